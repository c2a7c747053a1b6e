"""Pairs whose embeddings or heads do not fit each other."""

import shutil
from pathlib import Path

import pytest

from slrmerge.errors import PlanError
from slrmerge.merging.executor import merge
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.plots import draw_result
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.select import select
from tests.problems import refused
from tests.searching.pairs import LAYERS, SmallPair, hurried, make_model
from tests.searching.sweep.models import edit_config


@pytest.fixture
def unlike(made_pair: Path, tmp_path: Path) -> SmallPair:
    """A pair whose post-trained side has more tokens."""
    shutil.copytree(made_pair / "pre", tmp_path / "pre")
    make_model(tmp_path / "post", seed=126, more_words=8)
    return SmallPair(tmp_path)


@hurried
def test_vocabularies_of_different_sizes_leave_out_what_cannot_be_asked(unlike: SmallPair) -> None:
    result = unlike.run()
    assert {row.space for row in result.rows} == {"post", "interval"}
    assert len(result.rows) == 1 + LAYERS * (LAYERS + 1) // 2
    (note,) = result.notes
    assert "lm_head.weight" in note
    assert "3 soups" in note
    assert result.choice.pre is None
    found = read_result(unlike.out)
    assert (found.rows, found.choice, found.summary()) == (result.rows, result.choice, result.summary())
    best = select(unlike.out, min_quality=0.0).choice
    assert best.slr is not None
    merge(best, unlike.folder / "merged", fsync=False)
    pictures = unlike.folder / "pictures"
    pictures.mkdir()
    draw_result(pictures, result.rows, result.choice, result.summary())
    assert (pictures / "tradeoff.png").is_file()


@hurried
def test_a_head_that_only_one_side_ties_leaves_out_what_cannot_be_asked(small: SmallPair) -> None:
    edit_config(small.folder / "post", tie_word_embeddings=True)
    prepared = small.search().prepared
    assert {each.info.space for each in prepared.candidates} == {"post", "interval"}
    assert "model.embed_tokens.weight" in prepared.notes[0]


@hurried
def test_a_shared_vocabulary_is_still_shared_after_another_selection(unlike: SmallPair) -> None:
    unlike.run(recipe=unlike.recipe(vocabulary="shared"))
    select(unlike.out, min_quality=0.0)
    written = load_recipe(unlike.out / "soup.yaml")
    assert written.vocabulary == "shared"
    assert plan_merge(written).kinds["linear"]


@hurried
def test_a_recipe_that_needs_another_vocabulary_is_refused_and_its_remedy_helps(unlike: SmallPair) -> None:
    with refused(PlanError, "different-shapes") as caught:
        unlike.search(also=unlike.recipe_file("soup.yaml", alpha=0.3)).estimate()
    assert caught.value.problems[0].where == "soup.yaml"
    kept = [{"match": name, "alpha": 0} for name in ("lm_head.weight", "model.embed_tokens.weight")]
    better = unlike.recipe_file("soup.yaml", alpha=0.3, tensors=kept)
    assert unlike.run(spaces=(), also=better).rows[-1].label == "soup.yaml"
