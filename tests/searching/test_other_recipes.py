"""The recipe's own rules and other recipes, scored beside the candidates."""

import pytest

from slrmerge.errors import PlanError
from slrmerge.searching.results_folder import read_result
from tests.merging.faults import leftovers
from tests.problems import refused
from tests.searching.pairs import SmallPair, hurried


@hurried
def test_a_recipe_that_is_not_linear_is_refused(small: SmallPair) -> None:
    with refused(PlanError, "unsupported-blend") as caught:
        small.run(also=small.recipe_file("other.yaml", alpha=0.5, blend="slerp"))
    assert caught.value.problems[0].where == "other.yaml"


@hurried
@pytest.mark.parametrize("side", ["pretrained", "posttrained"])
def test_a_recipe_for_other_checkpoints_is_refused(small: SmallPair, side: str) -> None:
    other = small.recipe_file("other.yaml", **{side: "./elsewhere", "alpha": 0.5})
    with refused(PlanError, "other-checkpoint") as caught:
        small.run(also=other)
    assert caught.value.problems[0].where == f"other.yaml: $.{side}"
    assert leftovers(small.out) == []


@hurried
def test_a_recipe_may_name_the_same_folders_otherwise(small: SmallPair) -> None:
    (small.folder / "link").symlink_to(small.folder / "pre")
    sides = {"pretrained": "../link", "posttrained": str(small.folder / "post")}
    other = small.recipe_file("deep/other.yaml", **sides, alpha=0.3)
    assert small.run(also=other).rows[-1].label == "other.yaml"


@hurried
def test_the_recipes_own_rules_and_other_recipes_are_scored(small: SmallPair) -> None:
    own = small.recipe(restore=[[0, 0], [2, 2]])
    soup, other = small.recipe_file("soup.yaml", alpha=0.3), {"alpha": 0.35}
    sides = {side: str(small.folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    result = small.search(own, also=[soup, {**sides, **other}]).run(small.out)
    assert [each.label for each in result.rows[-3:]] == ["the recipe's own", "soup.yaml", "recipe 2"]
    assert [each.space for each in result.rows[-3:]] == ["recipe"] * 3
    assert result.choice.slr is not None
    assert result.choice.slr.space == "interval"


@hurried
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recipes_with_equal_alphas_are_one_candidate_and_a_finalist(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr("slrmerge.searching.run.RESCORED_AT_LEAST", 0)
    monkeypatch.setattr("slrmerge.searching.run.ROUNDING_MARGIN", 0.0)
    plain = {row.label: row for row in small.run(small.folder / "plain", dtype=dtype).rows}
    rough = next(row for row in plain.values() if not row.exact) if dtype == "bfloat16" else plain["layer 1"]
    same = small.recipe(**rough.rules.rules())
    also = small.recipe_file("a = b.yaml", **rough.rules.rules())
    result = small.search(same, also=also, dtype=dtype).run(small.out)
    rows = {row.label: row for row in result.rows}
    assert rows.keys() == plain.keys()
    assert rows[rough.label].also_named == ("the recipe's own", "a = b.yaml")
    assert rows[rough.label].exact
    assert read_result(small.out).rows == result.rows


@hurried
def test_recipes_with_the_same_file_name_keep_their_own_scores(small: SmallPair) -> None:
    alphas = [0.1, 0.3, 0.35]
    files = [small.recipe_file(f"{number}/r.yaml", pretrained="../pre", posttrained="../post", alpha=alpha)
             for number, alpha in enumerate(alphas)]  # fmt: skip
    result = small.run(also=files, dtype="bfloat16")
    assert [each.label for each in result.rows[-3:]] == ["r.yaml", "r.yaml (2)", "r.yaml (3)"]
    for alpha, both in zip(alphas, result.rows[-3:], strict=True):
        out = small.folder / f"alone-{alpha}"
        alone = small.search(small.recipe(alpha=alpha), spaces=()).run(out).rows[-1]
        assert (both.exact, both.alpha) == (True, alpha)
        assert both.quality == pytest.approx(alone.quality, abs=1e-6)
        assert both.diversity == pytest.approx(alone.diversity, abs=1e-6)


@hurried
def test_a_mergekit_config_is_scored(small: SmallPair) -> None:
    config = small.folder / "mergekit.yml"
    models = [f"- model: {small.folder / side}\n  parameters: {{weight: {w}}}" for side, w in (("post", 7), ("pre", 3))]
    config.write_text("merge_method: linear\nmodels:\n" + "\n".join(models) + "\n")
    result = small.run(also=[config, small.recipe_file("soup.yaml", alpha=0.3)])
    assert result.rows[-1].label == "mergekit.yml"
    assert result.rows[-1].also_named == ("soup.yaml",)
    assert read_result(small.out).rows == result.rows
