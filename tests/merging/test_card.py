"""The model card and the recipe as run."""

import ast
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from slrmerge.checkpoint.files import LocalFile
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.merging.card import model_card
from slrmerge.merging.finding import Finding, HeldOut, HeldOutScores, ScoreChange, SelectedCandidate
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.recipe.load import load_recipe
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.conftest import Pair

GOLDEN = Path(__file__).parents[1] / "golden" / "card.md"
POST_CARD = """---
license: llama3.1
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
base_model: someone/else
tags: [facebook]
---

# Post
"""


def card_of(plan: MergePlan, out: Path) -> str:
    return model_card(plan, recipe_of(plan, out), name=out.name).decode()


def recipe_of(plan: MergePlan, out: Path) -> bytes:
    return write_yaml(plan.recipe.as_run(plan.pair, out)).encode()


def front_of(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    content = yaml.safe_load(front)
    assert isinstance(content, dict)
    return content


OWN = SelectedCandidate(label="layers 2–3", quality=0.95014, diversity=2.0, exact=True, restore=[2, 3])
HELD_OUT = HeldOut(prompts=40, scores={
    "post": HeldOutScores(label="post-trained", quality=0.98, diversity=0.625),
    "slr": HeldOutScores(
        label="layers 2–3", quality=0.92, diversity=1.875,
        quality_change=ScoreChange(mean=-0.06, low=-0.09, high=-0.03),
        diversity_change=ScoreChange(mean=1.25, low=1.0, high=1.5),
    ),
})  # fmt: skip
OTHER = SelectedCandidate(label="post-trained", quality=1.0, diversity=0.5, exact=True, alpha=0)


def test_a_long_card_is_inherited_from_wherever_its_text_is_cut(pair: Pair) -> None:
    for shift in ("", "x"):
        (pair.folder / "post/README.md").write_text(f"---\nlicense: mit\n---\n{shift}{'é' * 600_000}", "utf-8")
        assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out))["license"] == "mit"


def test_the_card_is_the_golden_one(tmp_path: Path) -> None:
    """A change of the card's wording is a change of tests/golden/card.md, to be reviewed."""
    pre, post = llama_tensors("pre", dtype="F32"), llama_tensors("post")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post, llama_config(eos_token_id=2), side_files={"README.md": POST_CARD})
    (tmp_path / "tradeoff.png").write_bytes(b"")
    plan = Pair(tmp_path, pre, post).plan(
        restore=[2, 3],
        layers=[{"range": [4, 5], "alpha": 0.5, "modules": ["self_attn"]}],
        tensors=[{"match": "lm_head.*", "alpha": 0.25}],
        max_shard_size="2GiB",
    )
    finding = Finding("crc", 1176, OWN, (OTHER,), LocalFile.at(tmp_path / "tradeoff.png"), HELD_OUT, 0.64)
    card = card_of(replace(plan, finding=finding), tmp_path / "hybrid")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8")


def in_the_hubs_cache(folder: Path) -> Path:
    """A folder of the Hub's cache with a checkpoint."""
    return write_checkpoint(folder / "snapshots" / "abc", llama_tensors(folder.name))


def test_parents_that_are_folders_are_not_linked(pair: Pair) -> None:
    """The Hub refuses a card whose base_model is not a repository."""
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out)) == {
        "library_name": "transformers",
        "tags": ["merge", "slrmerge", "selective-layer-restoration"],
    }


@pytest.mark.parametrize(
    ("sides", "linked"),
    [
        (("models--org--pre", "models--org--post"), ["org/pre", "org/post"]),
        (("models--org--pre", "post"), ["org/pre"]),
        (("pre", "models--org--post"), ["org/post"]),
    ],
)
def test_the_front_matter_links_the_parents_that_are_on_the_hub(
    tmp_path: Path, sides: tuple[str, str], linked: list[str]
) -> None:
    pre, post = (in_the_hubs_cache(tmp_path / "hub" / side) for side in sides)
    plan = plan_merge({"pretrained": str(pre), "posttrained": str(post), "restore": [1, 2]})
    assert front_of(card_of(plan, tmp_path / "hybrid")) == {
        "base_model": linked,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "slrmerge", "selective-layer-restoration"],
    }


def test_a_snapshot_of_the_hubs_cache_has_the_name_of_its_repository(tmp_path: Path) -> None:
    folders = [tmp_path / f"hub/models--org--{side}/snapshots/abc" for side in ("pre", "post")]
    for folder in folders:
        write_checkpoint(folder, llama_tensors(folder.parts[-3]))
    plan = plan_merge({"pretrained": str(folders[0]), "posttrained": str(folders[1]), "restore": [1, 2]})
    card = card_of(plan, tmp_path / "hybrid")
    assert front_of(card)["base_model"] == ["org/pre", "org/post"]
    assert "`org/pre`" in card
    assert "`org/post`" in card
    assert str(tmp_path) not in card.partition("## Recipe")[0]


def test_terms_of_use_and_language_are_inherited_and_nothing_else(pair: Pair) -> None:
    (pair.folder / "post/README.md").write_text(POST_CARD)
    (pair.folder / "pre/README.md").write_text("---\nlicense: mit\n---\n")
    front = front_of(card_of(pair.plan(restore=[1, 2]), pair.out))
    assert front["tags"] == ["merge", "slrmerge", "selective-layer-restoration"]
    assert {key: front[key] for key in front.keys() - {"library_name", "tags"}} == {
        "license": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize(
    "text",
    [
        b"# no front matter\n",
        b"---\n: [\n---\n",
        b"---\n- license\n---\n",
        b"---\nlicense: mit\n",
        b"---\nlicense: \xff\n---\n",
        b"A title\n---\nlicense: mit\n---\n",
        b"",
    ],
    ids=repr,
)
def test_a_card_that_cannot_be_read_has_nothing_to_inherit(pair: Pair, text: bytes) -> None:
    (pair.folder / "post/README.md").write_bytes(text)
    assert "license" not in front_of(card_of(pair.plan(restore=[1, 2]), pair.out))


@pytest.mark.parametrize(
    "value",
    [
        "[" * 300 + "]" * 300,
        "[[x, x]]",
        "{name: mit}",
        f"[{'x, ' * 2000}]",
        "x" * 2000,
        f"[{'x' * 2000}]",
    ],
)
def test_values_of_a_card_that_the_hub_would_not_take_are_not_inherited(pair: Pair, value: str) -> None:
    (pair.folder / "post" / "README.md").write_text(f"---\nlicense_name: x\ntags: {value}\nlanguage: {value}\n---\n")
    front = front_of(card_of(pair.plan(restore=[1, 2]), pair.out))
    assert (front["license_name"], "language" in front) == ("x", False)


def test_a_change_with_half_an_interval_is_shown_without_it() -> None:
    assert ScoreChange(mean=1, low=1).text(1) == "+1.0"


def test_the_licence_of_a_card_with_windows_line_ends_is_inherited(pair: Pair) -> None:
    (pair.folder / "post/README.md").write_bytes(POST_CARD.replace("\n", "\r\n").encode())
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out))["license"] == "llama3.1"


def test_the_card_contains_notes_and_recipe(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], dtype="float16")
    recipe = recipe_of(plan, pair.out)
    card = model_card(plan, recipe, name="hybrid").decode()
    assert plan.notes
    assert all(note in card for note in plan.notes)
    assert f"\n```yaml\n{recipe.decode()}```\n" in card
    assert card.endswith("```\n")


@pytest.mark.parametrize(("tokenizer", "same"), [("posttrained", True), ("pretrained", False)])
def test_the_card_names_the_side_of_the_tokenizer(pair: Pair, tokenizer: str, same: bool) -> None:
    default, card = (
        model_card(pair.plan(restore=[2, 3], **more), b"", name="hybrid") for more in ({}, {"tokenizer": tokenizer})
    )
    assert (card == default) is same


@pytest.mark.parametrize("name", ["hybrid", "me/hybrid", 'Jörg\'s "best"\\'])
def test_the_code_of_the_card_loads_the_model(pair: Pair, name: str) -> None:
    card = model_card(pair.plan(restore=[2, 3]), b"restore: [2, 3]\n", name=name).decode()
    code = card.split("\n```python\n")[1].split("```\n\n## Recipe\n")[0]
    assert ("#" in code) is ("/" not in name)  # a folder has no name on the Hub yet
    statements = ast.parse(code).body
    assert [ast.literal_eval(node.value) for node in ast.walk(statements[1]) if isinstance(node, ast.keyword)] == [name]


@pytest.mark.parametrize("with_figure", [True, False])
def test_the_card_shows_the_result_of_the_search(pair: Pair, with_figure: bool) -> None:
    plan = pair.plan(restore=[2, 3])
    (pair.folder / "tradeoff.png").write_bytes(b"")
    figure = LocalFile.at(pair.folder / "tradeoff.png") if with_figure else None
    card = card_of(replace(plan, finding=Finding("crc", 1176, OWN, (OTHER,), figure)), pair.out)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert [row.split("|")[2:4] for row in rows[2:]] == [[" 0.9501 ", " 2.0000 "], [" 1.0000 ", " 0.5000 "]]
    assert OWN.label in rows[2]
    assert OTHER.label in rows[3]
    assert "1,176" in card
    assert "`crc`" in card
    assert ("(tradeoff.png)" in card) is with_figure


def test_a_card_shows_held_out_scores_only_where_its_model_has_them(pair: Pair) -> None:
    for own in (OWN, OWN.model_copy(update={"label": "layers 1–3"})):
        plan = replace(pair.plan(restore=[2, 3]), finding=Finding("crc", 1176, own, (OTHER,), None, HELD_OUT))
        assert ("0.9200" in card_of(plan, pair.out)) == (own is OWN)


def test_a_card_without_a_search_has_no_section_about_one(pair: Pair) -> None:
    card = card_of(pair.plan(restore=[2, 3]), pair.out)
    assert [line for line in card.splitlines() if line.startswith("##")] == ["## Merge", "## Usage", "## Recipe"]


def test_the_recipe_as_run_merges_the_same_from_the_output_folder(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], alpha=0.5, max_shard_size="1KB")
    pair.out.mkdir()
    written = pair.out / "slrmerge.yaml"
    written.write_bytes(recipe_of(plan, pair.out))
    again = load_recipe(written)
    assert again.to_dict() == {
        "pretrained": "../pre",
        "posttrained": "../post",
        "restore": [2, 3],
        "alpha": 0.5,
        "max_shard_size": 1000,
    }
    assert plan_merge(again).fingerprint() == plan.fingerprint()


def test_the_recipe_as_run_keeps_absolute_folders_and_applies_overrides(pair: Pair) -> None:
    path = pair.recipe_file(pretrained=str(pair.folder / "pre"), alpha=1, dtype="float32")
    plan = plan_merge(load_recipe(path, dtype="float16"))
    assert yaml.safe_load(recipe_of(plan, pair.out)) == {
        "pretrained": str(pair.folder / "pre"),
        "posttrained": "../post",
        "alpha": 1.0,
        "dtype": "float16",
    }


def test_the_card_is_the_same_each_time(pair: Pair) -> None:
    assert card_of(pair.plan(alpha=0.3), pair.out) == card_of(pair.plan(alpha=0.3), pair.out)


def test_front_matter_is_inherited_as_text(pair: Pair) -> None:
    (pair.folder / "post/README.md").write_text("---\nlicense: mit\nlanguage: [no, !!int '', 2020-13-45]\n---\n")
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out))["language"] == ["no", "", "2020-13-45"]


def test_no_name_changes_the_structure_of_the_card(tmp_path: Path) -> None:
    name = "x\n# y\n```\n---\n](z) <b>|`\x1b[31m\u202e\udce9"
    more = {"](x)|<b>`": llama_tensors("more")["lm_head.weight"]}
    pre, post = llama_tensors("pre") | more, llama_tensors("post") | more
    cards = []
    for folder in (tmp_path / "plain", tmp_path / name):
        write_checkpoint(folder / "pre", pre)
        write_checkpoint(folder / f"post {folder.name}", post, llama_config(**{folder.name.replace("\udce9", ""): 1}))
        pair = Pair(folder, pre, post)
        plan = pair.plan(posttrained=f"./post {folder.name}", tensors=[{"match": "model.*", "alpha": 1}], layers=[])
        named = {"label": folder.name}
        held_out = HeldOut(prompts=1, scores={"post": HELD_OUT.scores["post"].model_copy(update=named)})
        finding = Finding("crc", 1, OWN.model_copy(update=named), (OTHER,), None, held_out)
        card = model_card(replace(plan, finding=finding), recipe_of(plan, tmp_path), name=folder.name).decode()
        assert card.replace("\n", "").isprintable()
        front_of(card)
        cards.append(MarkdownIt().enable("table").parse(card.split("---\n", 2)[2]))
    plain, hostile = ([(token.type, token.tag, token.info) for token in card] for card in cards)
    assert plain == hostile
    (_, recipe) = (token.content for token in cards[1] if token.type == "fence")
    assert yaml.safe_load(recipe)["posttrained"].endswith(f"post {name}")


def test_a_soup_is_not_called_a_restoration(pair: Pair) -> None:
    for rules in ({"alpha": 0.5}, {"alpha": 0.5, "blend": "slerp"}, {"tensors": [{"match": "lm_head.*", "alpha": 1}]}):
        card = model_card(pair.plan(**rules), b"", name="hybrid").decode()
        assert "selective-layer-restoration" not in card
        assert "Selective Layer Restoration" not in card
    card = model_card(pair.plan(restore=[2, 3]), b"", name="hybrid").decode()
    assert "selective-layer-restoration" in card


def test_the_card_of_a_mergekit_config_names_models_and_not_roles(pair: Pair) -> None:
    models = [{"model": str(pair.folder / side)} for side in ("pre", "post")]
    config = {
        "merge_method": "slerp", "base_model": models[0]["model"], "models": models, "parameters": {"t": 0.25},
        "dtype": "bfloat16",
    }  # fmt: skip
    plan = plan_merge(config)
    card = model_card(plan, b"", name="hybrid").decode()
    merged = [line for line in card.splitlines() if line.startswith("- ") and "note" not in line]
    assert merged
    assert all("pre-trained" not in line and "post-trained" not in line for line in merged)
    assert all("from pre to post" in line for line in merged)  # the base is where a slerp begins
    assert "Config, tokenizer and chat template are those of `pre`." in card
    assert "Selective Layer Restoration" not in card
