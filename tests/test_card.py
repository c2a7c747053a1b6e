"""The model card and the recipe as run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.card import model_card, recipe_as_run
from slrmerge.checkpoint import open_pair
from slrmerge.plan import MergePlan, plan_merge
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
    return model_card(plan, recipe_as_run(plan, seen_from=out)).decode()


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
    assert card_of(plan, tmp_path / "hybrid") == GOLDEN.read_text(encoding="utf-8")


def test_the_front_matter_links_both_parents(pair: Pair) -> None:
    assert front_of(card_of(pair.plan(restore=[1, 2]), pair.out)) == {
        "base_model": ["pre", "post"],
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
    assert front["base_model"] == ["pre", "post"]
    assert front["tags"] == ["merge", "slrmerge", "selective-layer-restoration"]
    assert {
        key: front[key] for key in front.keys() - {"base_model", "base_model_relation", "library_name", "tags"}
    } == {
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
    card = model_card(plan, recipe).decode()
    assert "\n- layers 2–3, 2 of 6: pre-trained (10 tensors)\n" in card
    assert "\n- note: cast from BF16 to F16, rounded to nearest even: " in card
    assert f"\n```yaml\n{recipe.decode()}```\n" in card
    assert card.endswith("```\n")


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
    assert plan_merge(again, open_pair(*again.source_folders())).fingerprint() == plan.fingerprint()


def test_the_recipe_as_run_keeps_absolute_folders_and_applies_overrides(pair: Pair) -> None:
    path = pair.recipe_file(pretrained=str(pair.folder / "pre"), alpha=1, dtype="float32")
    recipe = load_recipe(path, dtype="float16")
    plan = plan_merge(recipe, open_pair(*recipe.source_folders()))
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
