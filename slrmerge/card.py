"""The hybrid's model card (README.md), as the Hub reads it, and the recipe as it was run."""

import os
from pathlib import Path
from typing import Any

import yaml

from slrmerge.checkpoint import open_regular
from slrmerge.errors import CheckpointError
from slrmerge.plan import MergePlan
from slrmerge.plan.summary import plan_sentences

_PAPER = "https://arxiv.org/abs/2602.06665"
_MOST_CARD_BYTES = 1_000_000
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter that the post-trained model's card hands on: terms of use travel with the weights."""


def recipe_as_run(plan: MergePlan, *, seen_from: Path) -> bytes:
    """The recipe with its overrides applied; relative sources count from the output folder, `seen_from`."""
    content = plan.recipe.to_dict()
    for side, checkpoint in (("pretrained", plan.pretrained), ("posttrained", plan.posttrained)):
        if not Path(os.path.expanduser(content[side])).is_absolute():  # noqa: PTH111 (no such user is no error)
            content[side] = Path(os.path.relpath(os.path.realpath(checkpoint.folder), seen_from)).as_posix()
    return _yaml(content).encode()


def model_card(plan: MergePlan, recipe: bytes) -> bytes:
    """A model card: front matter that links both parents, what was done in words, and the recipe."""
    names = [plan.pretrained.model_name, plan.posttrained.model_name]
    front = {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "slrmerge", "selective-layer-restoration"],
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
        "## Recipe",
        "",
        "```yaml",
        recipe.decode().rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines).encode()


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
