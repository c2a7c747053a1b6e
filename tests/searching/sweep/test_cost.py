"""The predicted cost of a sweep, compared with sums made by hand and with what the sweep then does."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

import slrmerge.searching.sweep.cost
from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.searching.sweep.cost import PAPER_MODELS, Cost, Shape, all_intervals_cost, cost_of, measured_rate
from slrmerge.searching.sweep.trie import pack
from tests.searching.sweep.families import write_family
from tests.searching.sweep.models import (
    INTERVALS,
    LAYERS,
    POST,
    PRE,
    VOCABULARY,
    WIDTH,
    Recorder,
    config_of,
    contexts,
    local_scorer,
    random_model,
    request,
    staged,
    swept,
)

SMALL = Shape("small", layers=3, layer_parameters=1000, width=10, vocabulary=50, tokens=7)


def test_a_cost_is_the_sum_of_its_matrix_products() -> None:
    #            embedding, three layers, head
    counts = [2, 3, 4, 5, 6]
    layers = 2 * 1000 * 7 * (3 + 4 + 0.2 * 5)
    head = 2 * 50 * 10 * 11 * 6
    assert cost_of(SMALL, counts, contexts=11, itemsize=4) == Cost(
        flop=layers + head, states_bytes=(3 + 4) * 7 * 10 * 4, states=3 + 4 + 5
    )


def test_the_cost_of_the_paper_s_largest_search() -> None:
    llama = all_intervals_cost(PAPER_MODELS[0])
    assert llama.flop == pytest.approx(1.9e15, rel=0.05)
    assert llama.states_bytes == (467 + 498) * 772 * 4096 * 2  # of layers 29 and 30, at once
    assert llama.states == 32 + 32 * 33 * 34 // 6 + 32  # the pre-trained model shares no state


def test_all_intervals_of_a_small_model_are_counted_one_by_one() -> None:
    #  embedding, layers, head: all intervals of three layers, the post-trained and, from another embedding, the other
    counts = [2, 2 + 1, 3 + 1 + 1, 7 + 1, 7 + 1]
    cost = all_intervals_cost(SMALL, contexts=4, itemsize=2)
    assert cost.states == sum(counts[1:-1])
    assert cost == cost_of(SMALL, counts, contexts=4, itemsize=2)


@pytest.mark.parametrize(
    ("shape", "architecture", "geometry"),
    [
        (PAPER_MODELS[0], "llama", {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}),
        (PAPER_MODELS[1], "qwen2", {"intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}),
        (
            PAPER_MODELS[2],
            "gemma2",
            {"intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_paper_s_models_have_the_parameters_of_transformers_models(
    shape: Shape, architecture: str, geometry: dict[str, int]
) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(architecture, hidden_size=shape.width, num_hidden_layers=1, **geometry)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [parameter for parameter in model.model.layers[0].parameters() if parameter.dim() == 2]
    assert sum(matrix.numel() for matrix in matrices) == shape.layer_parameters


def test_a_shape_is_read_from_the_headers_and_the_contexts(llamas: Path) -> None:
    layer = random_model(config_of("llama"), seed=0).model.layers[0]
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    expected = Shape("post", LAYERS, matrices, WIDTH, VOCABULARY, tokens=99)
    layers = staged(llamas / "post").layers
    assert Shape.of(open_checkpoint(llamas / "post"), layers, width=WIDTH, vocabulary=VOCABULARY, tokens=99) == expected
    with local_scorer(llamas) as scorer:
        shape = scorer.shape(request(scorer, [POST], contexts()))
    assert shape.tokens == len(pack([context.ids for context in contexts()]))
    assert (shape.layer_parameters, shape.width, shape.vocabulary) == (matrices, WIDTH, VOCABULARY)


def test_a_sweep_computes_as_many_states_as_its_cost_predicts(llamas: Path) -> None:
    hybrids, recorder = [POST, PRE, *INTERVALS], Recorder()
    with local_scorer(llamas) as scorer:
        cost = scorer.cost(request(scorer, hybrids, contexts()))
    swept(llamas, hybrids, contexts(), progress=recorder)
    assert sum(recorder.states) == cost.states == LAYERS + LAYERS * (LAYERS + 1) * (LAYERS + 2) // 6 + LAYERS


def test_states_of_half_the_width_take_half_the_bytes(llamas: Path) -> None:
    with local_scorer(llamas) as scorer:
        dtypes = (torch.float32, torch.bfloat16)
        fp32, bf16 = (scorer.cost(request(scorer, INTERVALS, contexts(), dtype)) for dtype in dtypes)
    assert bf16 == Cost(fp32.flop, fp32.states_bytes // 2, fp32.states)


def test_the_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([0.0, 0.25, 1.0, 1.25, 2.0, 2.125, 3.0, 3.25, 4.0, 4.25])
    monkeypatch.setattr(slrmerge.searching.sweep.cost, "perf_counter", lambda: next(ends))
    assert measured_rate(16, torch.float32, torch.device("cpu")) == 2 * 512 * 16 * 16 / 0.125


def test_a_slow_product_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([0.0, 8.0])
    monkeypatch.setattr(slrmerge.searching.sweep.cost, "perf_counter", lambda: next(ends))
    assert measured_rate(16, torch.float32, torch.device("cpu")) == 2 * 512 * 16 * 16 / 8


def test_of_experts_those_count_that_a_token_goes_through(tmp_path: Path) -> None:
    """Four experts, of which a token goes through two; layers that differ count as their mean."""
    post = write_family(tmp_path, "qwen3_moe") / "post"
    checkpoint = open_checkpoint(post)
    experts, others = (
        sum(prod(info.shape) for name, info in checkpoint.items()
            if ".layers." in name and len(info.shape) > 1 and (".experts." in name) == is_expert)
        for is_expert in (True, False)
    )  # fmt: skip
    shape = Shape.of(checkpoint, staged(post).layers, width=WIDTH, vocabulary=VOCABULARY, tokens=9)
    assert shape.layer_parameters == (experts / 2 + others) / LAYERS


def test_the_last_layer_of_rows_costs_as_much_as_another(tmp_path: Path) -> None:
    write_family(tmp_path, "lfm2")
    with local_scorer(tmp_path) as scorer:
        shape = scorer.shape(request(scorer, [POST], contexts()))
    assert shape.tokens == sum(len(context.ids) for context in contexts())
    assert shape.last_layer_share == 1
    one, other = (cost_of(replace(shape, last_layer_share=share), [1] * 6, contexts=1, itemsize=4) for share in (0, 1))
    assert other.flop - one.flop == 2 * shape.layer_parameters * shape.tokens
