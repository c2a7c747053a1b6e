"""The hybrid's model card (README.md), as the Hub reads it, and the recipe as it was run."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slrmerge.checkpoint import open_regular
from slrmerge.errors import CheckpointError
from slrmerge.plan import PICTURE_NAME, Finding, MergePlan
from slrmerge.plan.summary import plan_sentences

_PAPER = "https://arxiv.org/abs/2602.06665"
_MOST_CARD_BYTES = 1_000_000
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter that the post-trained model's card hands on: terms of use travel with the weights."""


def recipe_as_run(plan: MergePlan, *, seen_from: Path) -> bytes:
    """The recipe with its overrides applied; relative sources count from the output folder, `seen_from`.

    Repositories are pinned to the commit that was read.
    """
    content = plan.recipe.to_dict()
    for side, checkpoint in zip(("pretrained", "posttrained"), plan.sides, strict=True):
        if checkpoint.snapshot:
            content[side] = str(checkpoint.snapshot.pinned)
        elif not Path(os.path.expanduser(content[side])).is_absolute():  # noqa: PTH111 (no such user is no error)
            content[side] = Path(os.path.relpath(os.path.realpath(checkpoint.folder), seen_from)).as_posix()
    return _yaml(content).encode()


def model_card(plan: MergePlan, recipe: bytes, *, name: str) -> bytes:
    """A model card: front matter that links both parents, what was done in words, and the recipe.

    `name` is where the model is to be loaded from: a folder, or a repository on the Hub.
    """
    names = [side.model_name for side in plan.sides]
    front = {
        **_base_models(names),
        "library_name": "transformers",
        "tags": [
            *(["mergekit"] if plan.recipe.mergekit_text else []),
            "merge",
            "slrmerge",
            "selective-layer-restoration",
        ],
        **_inherited_front_matter(plan.posttrained.folder),
    }
    lines = [
        "---",
        _yaml(front).rstrip(),
        "---",
        "",
        f"# {names[1].rpartition('/')[2]} merged with {names[0].rpartition('/')[2]}",
        "",
        f"A merge of `{names[0]}` (pre-trained) and `{names[1]}` (post-trained), made with slrmerge.",
        f"Putting layers back to their pre-trained weights is [Selective Layer Restoration]({_PAPER}).",
        "",
        "## What was done",
        "",
        *(f"- {sentence}" for sentence in plan_sentences(plan)),
        *(f"- note: {note}" for note in plan.notes),
        "",
        "Config, tokenizer and chat template are the post-trained model's.",
        "",
        *(_found(plan.finding) if plan.finding else ()),
        "## How to run it",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        *([] if "/" in name else ["# this folder, or the repository on the Hub that it is in"]),
        f'chat = pipeline("text-generation", model={json.dumps(name, ensure_ascii=False)})',
        'turns = [{"role": "user", "content": "Write a short poem."}]',
        'print(chat(turns, max_new_tokens=200, do_sample=True)[0]["generated_text"][-1]["content"])',
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.decode().rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def _base_models(names: list[str]) -> dict[str, Any]:
    """The parents that are on the Hub, as it links them; it refuses a card that names anything else."""
    on_the_hub = [name for name in names if "/" in name]
    return {"base_model": on_the_hub, "base_model_relation": "merge"} if on_the_hub else {}


def _found(finding: Finding) -> Iterator[str]:
    """What the search that chose the recipe found."""
    yield "## What the search found"
    yield ""
    yield f"`slrmerge search` scored {finding.candidates:,} candidates on the proxy task `{finding.task}`:"
    yield "quality Q is the probability on valid answers, diversity D the entropy among them."
    yield ""
    yield "| | Q | D (nats) |"
    yield "|---|---|---|"
    for number, (label, (quality, diversity)) in enumerate(finding.scores.items()):
        yield f"| {f'**{label}** (this model)' if number == 0 else label} | {quality:.4f} | {diversity:.4f} |"
    yield ""
    if finding.picture:
        yield f"![quality and diversity of all candidates]({PICTURE_NAME})"
        yield ""


def _inherited_front_matter(folder: Path) -> dict[str, Any]:
    try:
        with open_regular(folder / "README.md") as file:
            text = file.read(_MOST_CARD_BYTES).decode("utf-8-sig")
        before, front, _ = text.replace("\r\n", "\n").split("---\n", 2)
        content = None if before else yaml.load(front, Loader=yaml.BaseLoader)  # noqa: S506 (texts only)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, CheckpointError):
        return {}
    return {key: content[key] for key in _INHERITED if key in content} if isinstance(content, dict) else {}


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
