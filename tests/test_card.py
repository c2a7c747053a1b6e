"""The model card and the recipe as run."""

import ast
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.card import model_card, recipe_as_run
from slrmerge.hub import open_pair
from slrmerge.plan import Finding, MergePlan, plan_merge
from slrmerge.recipe import load_recipe, parse_recipe
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.conftest import Pair

GOLDEN = Path(__file__).parent / "golden" / "card.md"
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
    return model_card(plan, recipe_as_run(plan, seen_from=out), name=out.name).decode()


def front_of(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    content = yaml.safe_load(front)
    assert isinstance(content, dict)
    return content


def test_the_card_is_this_one(tmp_path: Path) -> None:
    """A change of the card's words is a change of tests/golden/card.md, to be looked at."""
    pre, post = llama_tensors("pre", dtype="F32"), llama_tensors("post")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post, llama_config(eos_token_id=2), side_files={"README.md": POST_CARD})
    plan = Pair(tmp_path, pre, post).plan(
        restore=[2, 3],
        layers=[{"range": [4, 5], "alpha": 0.5, "modules": ["self_attn"]}],
        tensors=[{"match": "lm_head.*", "alpha": 0.25}],
        max_shard_size="2GiB",
    )
    card = card_of(plan, tmp_path / "hybrid")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8")


def in_the_hubs_cache(folder: Path) -> Path:
    """A folder of the Hub's cache with a checkpoint."""
    return write_checkpoint(folder / "snapshots" / "abc", llama_tensors(folder.name))


def test_parents_that_are_folders_are_not_linked(pair: Pair) -> None:
    """The Hub refuses a card whose base_model is no repo id."""
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
    recipe = parse_recipe({"pretrained": str(pre), "posttrained": str(post), "restore": [1, 2]})
    assert front_of(card_of(plan_merge(recipe, open_pair(pre, post)), tmp_path / "hybrid")) == {
        "base_model": linked,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "slrmerge", "selective-layer-restoration"],
    }


def test_a_snapshot_of_the_hubs_cache_is_called_by_its_repo_id(tmp_path: Path) -> None:
    folders = [tmp_path / f"hub/models--org--{side}/snapshots/abc" for side in ("pre", "post")]
    for folder in folders:
        write_checkpoint(folder, llama_tensors(folder.parts[-3]))
    recipe = parse_recipe({"pretrained": str(folders[0]), "posttrained": str(folders[1]), "restore": [1, 2]})
    card = card_of(plan_merge(recipe, open_pair(*folders)), tmp_path / "hybrid")
    assert front_of(card)["base_model"] == ["org/pre", "org/post"]
    assert "\n# post merged with pre\n" in card
    assert "A merge of `org/pre` (pre-trained) and `org/post` (post-trained), made with slrmerge." in card


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
def test_a_card_that_cannot_be_read_hands_nothing_on(pair: Pair, text: bytes) -> None:
    (pair.folder / "post/README.md").write_bytes(text)
    assert "license" not in front_of(card_of(pair.plan(restore=[1, 2]), pair.out))


def test_a_card_with_windows_line_ends_hands_its_licence_on(pair: Pair) -> None:
    (pair.folder / "post/README.md").write_bytes(POST_CARD.replace("\n", "\r\n").encode())
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out))["license"] == "llama3.1"


def test_the_card_says_what_was_done_in_words_and_holds_the_recipe(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], dtype="float16")
    recipe = recipe_as_run(plan, seen_from=pair.out)
    card = model_card(plan, recipe, name="hybrid").decode()
    assert "\n- layers 2–3, 2 of 6: pre-trained (10 tensors)\n" in card
    assert "\n- note: cast from BF16 to F16, rounded to nearest even: " in card
    assert f"\n```yaml\n{recipe.decode()}```\n" in card
    assert card.endswith("```\n")


@pytest.mark.parametrize(
    ("name", "literal"),
    [("hybrid", '"hybrid"'), ("me/hybrid", '"me/hybrid"'), ('Jörg\'s "best"\\', '"Jörg\'s \\"best\\"\\\\"')],
)
def test_the_card_says_how_to_run_it(pair: Pair, name: str, literal: str) -> None:
    plan = pair.plan(restore=[2, 3])
    card = model_card(plan, b"restore: [2, 3]\n", name=name).decode()
    code = card.split("\n## How to run it\n\n```python\n")[1].split("```\n\n## Recipe\n")[0]
    whose = "" if "/" in name else "# this folder, or the repository on the Hub that it is in\n"
    assert code == (
        f"from transformers import pipeline\n\n{whose}"
        f'chat = pipeline("text-generation", model={literal})\n'
        'turns = [{"role": "user", "content": "Write a short poem."}]\n'
        'print(chat(turns, max_new_tokens=200, do_sample=True)[0]["generated_text"][-1]["content"])\n'
    )
    statements = ast.parse(code).body
    assert [ast.literal_eval(node.value) for node in ast.walk(statements[1]) if isinstance(node, ast.keyword)] == [name]


FOUND = """
## What the search found

`slrmerge search` scored 1,176 candidates on the proxy task `crc`:
quality Q is the probability on valid answers, diversity D the entropy among them.

| | Q | D (nats) |
|---|---|---|
| **layers 2–3** (this model) | 0.9501 | 2.0000 |
| post-trained | 1.0000 | 0.5000 |
"""


@pytest.mark.parametrize("picture", [True, False])
def test_the_card_says_what_the_search_found(pair: Pair, picture: bool) -> None:
    plan = pair.plan(restore=[2, 3])
    scores = {"layers 2–3": (0.95014, 2.0), "post-trained": (1.0, 0.5)}
    finding = Finding("crc", 1176, scores, pair.folder / "tradeoff.png" if picture else None)
    card = card_of(replace(plan, finding=finding), pair.out)
    shown = "\n![quality and diversity of all candidates](tradeoff.png)\n" if picture else ""
    before, after = "Config, tokenizer and chat template are the post-trained model's.\n", "\n## How to run it\n"
    assert card.replace(FOUND + shown, "", 1) == card_of(plan, pair.out)
    assert f"{before}{FOUND}{shown}{after}" in card


def test_a_card_without_a_search_says_nothing_of_one(pair: Pair) -> None:
    assert [line for line in card_of(pair.plan(restore=[2, 3]), pair.out).splitlines() if line.startswith("##")] == [
        "## What was done",
        "## How to run it",
        "## Recipe",
    ]


def test_the_recipe_as_run_merges_the_same_from_the_output_folder(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], alpha=0.5, max_shard_size="1KB")
    pair.out.mkdir()
    written = pair.out / "slrmerge.yaml"
    written.write_bytes(recipe_as_run(plan, seen_from=pair.out))
    again = load_recipe(written)
    assert again.to_dict() == {
        "pretrained": "../pre",
        "posttrained": "../post",
        "restore": [[2, 3]],
        "alpha": 0.5,
        "max_shard_size": 1000,
    }
    assert plan_merge(again, open_pair(*again.sources())).fingerprint() == plan.fingerprint()


def test_the_recipe_as_run_keeps_absolute_folders_and_applies_overrides(pair: Pair) -> None:
    path = pair.recipe_file(pretrained=str(pair.folder / "pre"), alpha=1, dtype="float32")
    recipe = load_recipe(path, dtype="float16")
    plan = plan_merge(recipe, open_pair(*recipe.sources()))
    assert yaml.safe_load(recipe_as_run(plan, seen_from=pair.out)) == {
        "pretrained": str(pair.folder / "pre"),
        "posttrained": "../post",
        "alpha": 1.0,
        "dtype": "float16",
    }


def test_the_card_is_the_same_each_time(pair: Pair) -> None:
    assert card_of(pair.plan(alpha=0.3), pair.out) == card_of(pair.plan(alpha=0.3), pair.out)


def test_front_matter_is_handed_on_as_text_whatever_yaml_takes_it_for(pair: Pair) -> None:
    (pair.folder / "post/README.md").write_text("---\nlicense: mit\nlanguage: [no, !!int '', 2020-13-45]\n---\n")
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out))["language"] == ["no", "", "2020-13-45"]
