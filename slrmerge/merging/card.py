"""The hybrid's model card (README.md), as the Hub reads it."""

import re
import shlex
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slrmerge.checkpoint.files import open_within
from slrmerge.checkpoint.side_files import CARD_NAME
from slrmerge.errors import CheckpointError
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.io.text import markdown, markdown_block, markdown_code, printable, to_json
from slrmerge.merging.finding import TRADEOFF_NAME, Finding, HeldOut
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.summary import describe_plan

_PAPER = "https://arxiv.org/abs/2602.06665"
_MAX_CARD_BYTES = 1_000_000
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter taken from the post-trained model's card: terms of use belong to the weights."""

_MAX_INHERITED = 1000
"""Characters of a value, or values of a list: more than any licence's address, or the languages of any model."""


def model_card(plan: MergePlan, recipe: bytes, *, name: str) -> bytes:
    """A model card: front matter that links both parents, the merge in words, and the recipe as it was run.

    `name` is how to load the model: a folder, or a repository on the Hub.
    """
    pre, post = plan.pair.pretrained.model_name, plan.pair.posttrained.model_name
    lines = [
        "---",
        write_yaml(_front_matter(plan, pre, post)).rstrip(),
        "---",
        "",
        f"# {markdown(post.rpartition('/')[2])} merged with {markdown(pre.rpartition('/')[2])}",
        "",
        *_introduction(plan, pre, post),
        "",
        "## Merge",
        "",
        *(f"- {markdown(_in_names(sentence, plan, pre, post))}" for sentence in describe_plan(plan)),
        *(f"- note: {markdown(note)}" for note in plan.notes),
        "",
        _side_files_sentence(plan),
        "",
        *(_search_section(plan.finding) if plan.finding else ()),
        "## Usage",
        "",
        *(_llama_cpp_usage(plan.shards[0].name, name) if _is_gguf(plan) else _transformers_usage(name)),
        "",
        "## Recipe",
        "",
        markdown_block("yaml", recipe.decode().rstrip()),
        "",
    ]
    return "\n".join(lines).encode()


def _front_matter(plan: MergePlan, pre: str, post: str) -> dict[str, Any]:
    """What the Hub reads of the card: parents, library, tags, and the terms of use."""
    tags = {
        "mergekit": plan.recipe.is_mergekit,
        "merge": True,
        "slrmerge": True,
        "selective-layer-restoration": _is_restoration(plan),
        "gguf": _is_gguf(plan),
    }
    return {
        **(_base_models(pre, relation="adapter") if plan.whole else _base_models(pre, post)),
        **({} if _is_gguf(plan) else {"library_name": "peft" if plan.whole else "transformers"}),
        "tags": [tag for tag, applies in tags.items() if applies],
        **_inherited_front_matter(plan.pair.posttrained.folder),
    }


def _is_gguf(plan: MergePlan) -> bool:
    return plan.pair.posttrained.format == "gguf"


def _is_restoration(plan: MergePlan) -> bool:
    """Whether whole layers are reset, and nothing is blended: what the paper calls Selective Layer Restoration."""
    plan = plan.whole or plan  # of an adapter, the model that it gives
    stack = plan.pair.stack
    is_reset = any(tensor.alpha == 1 and stack and stack.locate(tensor.name) for tensor in plan.tensors())
    return is_reset and not plan.recipe.is_mergekit and all(tensor.alpha in (0, 1) for tensor in plan.tensors())


def _introduction(plan: MergePlan, pre: str, post: str) -> Iterator[str]:
    if plan.recipe.is_mergekit:
        how = "by a mergekit config"
        yield f"A merge of {markdown_code(post)} and {markdown_code(pre)} {how}, made with slrmerge."
        return
    yield f"A merge of {markdown_code(pre)} (pre-trained) and {markdown_code(post)} (post-trained), made with slrmerge."
    if _is_restoration(plan):
        yield f"Resetting layers to their pre-trained weights is [Selective Layer Restoration]({_PAPER})."


def _in_names(sentence: str, plan: MergePlan, pre: str, post: str) -> str:
    """A sentence of the plan; in a mergekit merge with the models' names in place of their roles."""
    if not plan.recipe.is_mergekit:
        return sentence
    where, separator, source = sentence.rpartition(": ")
    names = {"pre": pre, "pre-trained": pre, "post": post, "post-trained": post}
    return where + separator + re.sub(r"\b(pre|post)(-trained)?\b", lambda found: names[found[0]], source)


def _transformers_usage(name: str) -> Iterator[str]:
    yield "```python"
    yield "from transformers import pipeline"
    yield ""
    if "/" not in name:
        yield "# this folder, or its repository on the Hub"
    yield f'chat = pipeline("text-generation", model={to_json(name)})'
    yield 'messages = [{"role": "user", "content": "Write a short poem."}]'
    yield 'sampling = {"do_sample": True, "temperature": 1.0, "min_p": 0.1, "top_p": 1.0, "top_k": 0}'
    yield 'print(chat(messages, max_new_tokens=200, **sampling)[0]["generated_text"][-1]["content"])'
    yield "```"


def _llama_cpp_usage(file: str, name: str) -> Iterator[str]:
    options = ["--hf-repo", name, "--hf-file", file] if "/" in name else ["--model", f"{name}/{file}"]
    yield markdown_block("sh", printable(shlex.join(["llama-server", *options])))


def _side_files_sentence(plan: MergePlan) -> str:
    names = {"pretrained": plan.pair.pretrained.model_name, "posttrained": plan.pair.posttrained.model_name}
    config, tokenizer = (markdown_code(names[side]) for side in ("posttrained", plan.recipe.tokenizer))
    if plan.recipe.tokenizer == "posttrained":
        return f"Config, tokenizer and chat template are those of {config}."
    return f"The config is that of {config}.\nTokenizer and chat template are those of {tokenizer}."


def _base_models(*names: str, relation: str = "merge") -> dict[str, Any]:
    """The parents on the Hub, as it links them; it refuses a card that names anything else."""
    on_the_hub = [name for name in names if "/" in name]
    return {"base_model": on_the_hub, "base_model_relation": relation} if on_the_hub else {}


def _search_section(finding: Finding) -> Iterator[str]:
    yield "## Search"
    yield ""
    yield f"`slrmerge search` scored {finding.candidates:,} candidates on the proxy task {markdown_code(finding.task)}:"
    yield "quality Q is the probability of a valid answer, diversity D the entropy of the valid answers."
    yield ""
    yield "| | Q | D (nats) |"
    yield "|---|---|---|"
    for found in (finding.own, *finding.others):
        label = markdown(found.label)
        label = f"**{label}** (this model)" if found is finding.own else label
        yield f"| {label} | {found.quality:.4f} | {found.diversity:.4f} |"
    yield ""
    if finding.reselected is not None:
        share = f"{finding.reselected:.0%} of draws"
        yield f"With prompts drawn again with replacement, the search selects this candidate in {share}."
        yield ""
    if finding.held_out and finding.own.label in {found.label for found in finding.held_out.scores.values()}:
        yield from _held_out_section(finding.held_out, finding.own.label)
    if finding.figure:
        yield f"![quality and diversity of all candidates]({TRADEOFF_NAME})"
        yield ""


def _held_out_section(held_out: HeldOut, own: str) -> Iterator[str]:
    yield f"On {held_out.prompts} prompts that were not used to select, with the mean change from the post-trained"
    yield "model and its 95% bootstrap interval:"
    yield ""
    yield "| | Q | D (nats) | ΔQ | ΔD |"
    yield "|---|---|---|---|---|"
    for found in {found.label: found for found in held_out.scores.values()}.values():
        label = f"**{markdown(found.label)}** (this model)" if found.label == own else markdown(found.label)
        changes = [change.text(4) if change else "" for change in (found.quality_change, found.diversity_change)]
        yield f"| {label} | {found.quality:.4f} | {found.diversity:.4f} | {changes[0]} | {changes[1]} |"
    yield ""


def _inherited_front_matter(folder: Path) -> dict[str, Any]:
    try:
        with open_within(folder, CARD_NAME) as file:
            text = getincrementaldecoder("utf-8-sig")().decode(file.read(_MAX_CARD_BYTES))  # it may end in a character
        before, front, _ = text.replace("\r\n", "\n").split("---\n", 2)
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # strings only
        content = None if before else yaml.load(front, Loader=loader)  # noqa: S506
    except (OSError, ValueError, RecursionError, yaml.YAMLError, CheckpointError):
        return {}
    found = content if isinstance(content, dict) else {}
    return {key: found[key] for key in _INHERITED if _is_text(found.get(key)) or _is_list_of_texts(found.get(key))}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_INHERITED


def _is_list_of_texts(value: object) -> bool:
    """Whether this is a list as the Hub takes one: what others nest, or repeat, is not published again."""
    return isinstance(value, list) and len(value) <= _MAX_INHERITED and all(map(_is_text, value))
