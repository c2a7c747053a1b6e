"""The alpha of every tensor by mergekit's rules, worked out by hand, and weights that are refused."""

from typing import Any

import pytest

from tests.recipe.mergekit import (
    BASE,
    alphas_of,
    arithmetic,
    both,
    everywhere,
    linear,
    part,
    passthrough,
    problems_of,
    slerp,
    source,
    unweighted,
    view,
)

# configs, and the share of the pre-trained side in embeddings, five layers, norm, head


PASSTHROUGHS = {
    "a restoration": (
        passthrough(("post", 0, 1), ("pre", 1, 3), ("post", 3, 5), **BASE),
        [0, 0, 1, 1, 0, 0, 0, 0],
    ),
    "the first slice gives the embeddings": (
        passthrough(("pre", 0, 2), ("post", 2, 5), **BASE),
        [1, 1, 1, 0, 0, 0, 0, 0],
    ),
    "the last slice gives norm and head": (
        passthrough(("post", 0, 2), ("pre", 2, 5), **BASE),
        [0, 0, 0, 1, 1, 1, 1, 1],
    ),
    "a slice of no layers keeps the embeddings": (
        passthrough(("post", 0, 0), ("pre", 0, 2), ("post", 2, 5), **BASE),
        [0, 1, 1, 0, 0, 0, 0, 0],
    ),
    "a slice of no layers keeps norm and head": (
        passthrough(("post", 0, 3), ("pre", 3, 5), ("post", 5, 5), **BASE),
        [0, 0, 0, 0, 1, 1, 0, 0],
    ),
    "only the ends": (
        passthrough(("pre", 0, 0), ("post", 0, 5), ("pre", 5, 5), **BASE),
        [1, 0, 0, 0, 0, 0, 1, 1],
    ),
    "slices of no layers in the middle": (
        passthrough(("post", 0, 2), ("pre", 2, 2), ("post", 2, 4), ("pre", 4, 5), **BASE),
        [0, 0, 0, 0, 0, 1, 1, 1],
    ),
    "all of the other side": (
        {"merge_method": "passthrough", **BASE, "models": [source("pre")]},
        everywhere(1),
    ),
}
LINEARS = {
    "a soup": (linear(0.25, 0.75), everywhere(0.75)),
    "a soup the other way round": (
        {"merge_method": "linear", **BASE, "models": [source("pre", weight=0.75), source("post", weight=0.25)]},
        everywhere(0.75),
    ),
    "weights are normalised": (linear(3, 1), everywhere(0.25)),
    "normalised because it is said": (linear(3, 1, parameters={"normalize": True}), everywhere(0.25)),
    "a mean that need not be normalised": (linear(0.75, 0.25, parameters={"normalize": False}), everywhere(0.25)),
    "negative weights are still a mean": (linear(-1, -3), everywhere(0.75)),
    "true and false are weights": (linear(False, True), everywhere(1)),
    "a gradient": (linear([1, 0], [0, 1]), [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]),
    "a gradient of three": (linear([1, 0, 1], [0, 1, 0]), [0, 0, 0.5, 1, 0.5, 0, 0, 0]),
    "a gradient of one": (linear([0.5], [0.5]), everywhere(0.5)),
    "one side's gradient, normalised": (linear(1, [0, 1]), [0, 0, 0.2, 1 / 3, 0.75 / 1.75, 0.5, 0, 0]),
    "the config's weight is for both": (unweighted(parameters={"weight": 7}), everywhere(0.5)),
    "a slice of one model is that model": (
        {
            "merge_method": "linear",
            **BASE,
            "slices": [
                part(source("post", 0, 2, weight=1)),
                part(source("post", 2, 4, weight=1), source("pre", 2, 4, weight=1)),
                part(source("pre", 4, 5, weight=0.5)),
            ],
        },
        [0, 0, 0, 0.5, 0.5, 1, 1, 1],
    ),
    "a gradient runs over each slice, and one layer is its end": (
        {
            "merge_method": "linear",
            "slices": [
                part(source("post", 0, 1, weight=1), source("pre", 0, 1, weight=[0, 1])),
                part(source("post", 1, 3, weight=[3, 0]), source("pre", 1, 3, weight=[1, 1])),
                part(source("post", 3, 5, weight=1), source("pre", 3, 5, weight=[1, 0])),
            ],
        },
        [0, 0.5, 0.25, 1, 0.5, 0, 0.5, 0.5],
    ),
    "normalize by filter": (
        linear(1, 1, parameters={"normalize": [{"filter": "mlp", "value": True}, {"value": 1}]}),
        everywhere(0.5),
    ),
}  # fmt: skip
SLERPS = {
    "one t": (slerp(0.25), everywhere(0.25)),
    "the base is where it starts, however the models stand": (
        slerp(0.25, models=[source("pre"), source("post")]),
        everywhere(0.25),
    ),
    "the base need not stand among the models": (slerp(0.25, models=[source("pre")]), everywhere(0.25)),
    "five values for five layers": (slerp([0, 0.5, 0.3, 0.7, 1]), [0, 0, 0.5, 0.3, 0.7, 1, 0, 0]),
    "three values": (slerp([1, 0, 0.5]), [1, 1, 0.5, 0, 0.25, 0.5, 1, 1]),
    "nine values": (slerp([0, 9, 0.5, 9, 1, 9, 0.25, 9, 0.75]), [0, 0, 0.5, 1, 0.25, 0.75, 0, 0]),
    "gradients over slices of one and two layers": (
        slerp([0.25, 0.5, 1], slices=[both(0, 1), both(1, 3), both(3, 5)]),
        [0.25, 1, 0.25, 1, 0.25, 1, 0.25, 0.25],
    ),
    "filters, with a gradient in one": (
        slerp([{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": [0, 1]}, {"value": 0.125}]),
        [0.125, (0, 0.5), (0.25, 0.5), 0.5, (0.75, 0.5), (1, 0.5), 0.125, 0.125],
    ),
    "the first filter that fits": (
        slerp([{"filter": "up", "value": 1}, {"filter": "mlp", "value": 0}, {"filter": "*", "value": 0.5}]),
        [0.5, *[(1, 0.5)] * 5, 0.5, 0.5],
    ),
    "a filter is a part of the name": (
        slerp([{"filter": "layers.1", "value": 1}, {"filter": "lm_", "value": 0.75}, {"filter": None, "value": 0}]),
        [0, 0, 1, 0, 0, 0, 0, 0.75],
    ),
    "one filter, not in a list": (slerp({"value": 0.5}), everywhere(0.5)),
    "a filter that does not fit falls through to the config": (
        slerp(
            0.25,
            slices=[both(0, 2, parameters={"t": [{"filter": "mlp", "value": 1}]}), both(2, 5)],
        ),
        [0.25, (1, 0.25), (1, 0.25), 0.25, 0.25, 0.25, 0.25, 0.25],
    ),
    "a slice's t is for what stands around the layers too": (
        slerp(0, slices=[both(0, 1, parameters={"t": 0.5}), both(1, 4), both(4, 5, parameters={"t": [0.75, 1]})]),
        [0.5, 0.5, 0, 0, 0, 1, 0.75, 0.75],
    ),
}
ARITHMETICS = {
    "a weight": (arithmetic(source("pre", weight=0.25)), everywhere(0.25)),
    "lambda": (arithmetic(source("pre", weight=0.5), **{"lambda": 0.25}), everywhere(0.125)),
    "normalised, a single weight is 1": (arithmetic(source("pre", weight=0.25), normalize=True), everywhere(1)),
    "normalised and times lambda": (
        arithmetic(source("pre", weight=0.25), normalize=True, **{"lambda": 0.75}),
        everywhere(0.75),
    ),
    "normalised, a weight of 0 is 0": (
        arithmetic(source("pre", weight=[0, 1]), normalize=True),
        [0, 0, 1, 1, 1, 1, 0, 0],
    ),
    "lambda by filter": (
        arithmetic(source("pre", weight=1), **{"lambda": [{"filter": "mlp", "value": 0.5}]}),
        [1, *[(0.5, 1)] * 5, 1, 1],
    ),
    "the base's own weight says nothing": (
        {
            "merge_method": "task_arithmetic",
            **BASE,
            "models": [source("post", weight=9), source("pre", weight=0.5)],
        },
        everywhere(0.5),
    ),
    "a slice without the task is the base": (
        {
            "merge_method": "task_arithmetic",
            **BASE,
            "parameters": {"weight": 0.5},
            "slices": [part(source("post", 0, 2)), part(source("pre", 2, 4)), part(source("post", 4, 5))],
        },
        [0, 0, 0, 0.5, 0.5, 0, 0, 0],
    ),
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(*case, id=f"{method}: {words}")
        for method, cases in (
            ("passthrough", PASSTHROUGHS), ("linear", LINEARS), ("slerp", SLERPS), ("arithmetic", ARITHMETICS)
        )
        for words, case in cases.items()
    ],
)  # fmt: skip
def test_a_config_gives_every_tensor_its_alpha(config: dict[str, Any], expected: list[Any]) -> None:
    assert view(alphas_of(config)) == expected


@pytest.mark.parametrize("levels", range(8))
def test_the_source_overrides_the_slice_and_the_slice_the_config(levels: int) -> None:
    """The bits of `levels` tell which of the three have a weight."""
    own, slices, whole = (
        dict[str, Any](weight=value) if levels >> bit & 1 else {} for bit, value in enumerate((3, 1, 0.5))
    )
    config: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        **BASE,
        "parameters": whole | {"lambda": 0.25},
        "slices": [{"sources": [source("pre", 0, 5, **own)], "parameters": slices}],
    }
    if not levels:
        assert problems_of(config) == [("missing-weight", "recipe")]
    else:
        expected = 0.75 if own else 0.25 if slices else 0.125
        assert view(alphas_of(config)) == everywhere(expected)


def test_a_filter_falls_through_source_and_slice_to_the_config() -> None:
    config = {
        "merge_method": "task_arithmetic",
        **BASE,
        "parameters": {"weight": 0.125},
        "slices": [
            {
                "sources": [source("pre", 0, 5, weight=[{"filter": "mlp", "value": [0, 1]}])],
                "parameters": {"weight": [{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": 9}]},
            }
        ],
    }
    layers = [(0, 0.5), (0.25, 0.5), 0.5, (0.75, 0.5), (1, 0.5)]
    assert view(alphas_of(config)) == [0.125, *layers, 0.125, 0.125]


def test_a_mean_a_rounding_away_from_0_or_1_is_that_end() -> None:
    assert view(alphas_of(linear(1, -1e-12))) == everywhere(0)
    assert view(alphas_of(linear(-1e-12, 1))) == everywhere(1)


UNFIT: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "a gap": (
        passthrough(("post", 0, 2), ("pre", 3, 5)),
        [("layers-reordered", "recipe: $.slices[1]")],
    ),
    "a gap at the start": (
        passthrough(("post", 1, 2), ("pre", 2, 5)),
        [("layers-reordered", "recipe: $.slices[0]")],
    ),
    "layers twice": (
        passthrough(("post", 0, 3), ("pre", 2, 5)),
        [("layers-reordered", "recipe: $.slices[1]")],
    ),
    "slices in another order": (
        passthrough(("post", 3, 5), ("pre", 0, 3)),
        [("layers-reordered", "recipe: $.slices[0]")],
    ),
    "too few layers": (
        passthrough(("post", 0, 2), ("pre", 2, 4)),
        [("layers-reordered", "recipe: $.slices")],
    ),
    "too many layers": (
        passthrough(("post", 0, 2), ("pre", 2, 6)),
        [("layers-reordered", "recipe: $.slices")],
    ),
    "different layers in one slice, and a gap": (
        slerp(0.5, slices=[part(source("post", 0, 2), source("pre", 1, 3)), both(3, 5)]),
        [("layers-misaligned", "recipe: $.slices[0]"), ("layers-reordered", "recipe: $.slices[1]")],
    ),
    "two sources to pass through": (
        passthrough(("post", 0, 2), ("pre", 2, 5)) | {"slices": [both(0, 5)]},
        [("unsupported-sources", "recipe")],
    ),
    "three sources of a slerp": (
        slerp(0.5, models=[source("post"), source("pre"), source("pre")]),
        [("unsupported-sources", "recipe")],
    ),
    "a slice of the base alone in a slerp": (
        slerp(0.5, slices=[part(source("post", 0, 2)), both(2, 5)]),
        [("unsupported-sources", "recipe")],
    ),
    "a base without weight": (
        {"merge_method": "linear", **BASE, "models": [source("pre", weight=1)]},
        [("missing-weight", "recipe")],
    ),
    "a gradient of nothing": (
        slerp([]),
        [("invalid-weight", "recipe")],
    ),
    "a weight that is a text": (
        slerp("half"),
        [("invalid-weight", "recipe")],
    ),
    "a weight that is nothing": (
        slerp(None),
        [("invalid-weight", "recipe")],
    ),
    "filters that are not filters": (
        slerp([{"filter": "mlp", "valu": 1}, 0.5]),
        [("invalid-weight", "recipe")],
    ),
    "a filter without a value": (
        slerp({"filter": "mlp"}),
        [("invalid-weight", "recipe")],
    ),
    "a number among filters": (
        slerp([{"filter": "head", "value": 1}, 0.5]),
        [("invalid-weight", "recipe")],
    ),
    "a filter's value that is not a number": (
        slerp([{"filter": "lm_head", "value": "x"}, {"value": 1}]),
        [("invalid-weight", "recipe")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_configs_that_do_not_fit_the_layers_or_the_method_are_refused(case: str) -> None:
    config, problems = UNFIT[case]
    assert problems_of(config) == problems


def norm(value: object) -> list[dict[str, Any]]:
    """A setting that says `value` of one tensor and 0.5 of the others, so that the messages are few."""
    return [{"filter": "model.norm", "value": value}, {"value": 0.5}]


ONE_TENSOR: dict[str, tuple[dict[str, Any], str]] = {
    "weights that sum to 0": (
        linear(norm(1), norm(-1)),
        "not-a-mean",
    ),
    "weights of 0": (
        linear(norm(0), norm(0)),
        "not-a-mean",
    ),
    "weights that are not a mean": (
        linear(norm(0.75), norm(0.5), parameters={"normalize": False}),
        "not-a-mean",
    ),
    "past the base": (
        linear(norm(3), norm(-1)),
        "alpha-out-of-range",
    ),
    "past the other": (
        linear(norm(-1), norm(3)),
        "alpha-out-of-range",
    ),
    "a slerp past the other": (
        slerp(norm(1.25)),
        "alpha-out-of-range",
    ),
    "an arithmetic past the other": (
        arithmetic(source("pre", weight=norm(0.75)), **{"lambda": 2}),
        "alpha-out-of-range",
    ),
    "not a number": (
        slerp(norm(float("nan"))),
        "alpha-out-of-range",
    ),
    "infinity": (
        linear(0.5, norm(float("inf"))),
        "alpha-out-of-range",
    ),
    "no weight of a source": (
        linear(0.5, [{"filter": word, "value": 0.5} for word in ("layers", "embed", "lm_head")]),
        "missing-weight",
    ),
    "no t": (
        slerp([{"filter": word, "value": 0.5} for word in ("layers", "embed", "lm_head")]),
        "missing-weight",
    ),
}


@pytest.mark.parametrize("case", ONE_TENSOR)
def test_a_share_that_is_not_between_the_two_models_is_refused(case: str) -> None:
    config, code = ONE_TENSOR[case]
    assert problems_of(config) == [(code, "recipe")]


def test_a_t_of_a_source_is_ignored_as_in_mergekit() -> None:
    config = slerp(0.25, models=[source("post", t=1), source("pre", t=1)])
    assert view(alphas_of(config)) == everywhere(0.25)


def test_a_problem_of_every_tensor_is_reported_once() -> None:
    assert problems_of(unweighted()) == [("missing-weight", "recipe")]
