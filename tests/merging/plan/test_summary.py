"""A plan in words."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.merging.plan.summary import describe_layers, describe_plan, summarise_parts
from tests.checkpoints import llama_tensors, random_tensor, write_checkpoint
from tests.merging.plan import plan_of, write_pair

OUTSIDE = "lm_head.weight, model.embed_tokens.weight, model.norm.weight"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([3], "layer 3"),
        ([3, 4], "layers 3–4"),
        ([5, 3, 4, 9], "layers 3–5, 9"),
        ([0, 2], "layers 0, 2"),
        (range(12, 18), "layers 12–17"),
        ([1, 2, 4, 5], "layers 1–2, 4–5"),
    ],
)
def test_layer_numbers_are_written_as_people_write_them(layers: list[int], words: str) -> None:
    assert describe_layers(layers) == words


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (
            {"restore": [2, 3]},
            [
                "layers 0–1, 2 of 6: post-trained (10 tensors)",
                "layers 2–3, 2 of 6: pre-trained (10 tensors)",
                "layers 4–5, 2 of 6: post-trained (10 tensors)",
                f"{OUTSIDE}: post-trained (3 tensors)",
            ],
        ),
        (
            {"restore": [[0, 0], [5, 5]]},
            [
                "layer 0, 1 of 6: pre-trained (5 tensors)",
                "layers 1–4, 4 of 6: post-trained (20 tensors)",
                "layer 5, 1 of 6: pre-trained (5 tensors)",
                f"{OUTSIDE}: post-trained (3 tensors)",
            ],
        ),
        (
            {"alpha": 0.85},
            [
                "layers 0–5, 6 of 6: 0.85 × pre + 0.15 × post (30 tensors)",
                f"{OUTSIDE}: 0.85 × pre + 0.15 × post (3 tensors)",
            ],
        ),
        (
            {"layers": [{"range": [0, 5], "alpha": 0.5, "modules": ["self_attn"]}]},
            [
                "layers 0–5, 6 of 6: input_layernorm, mlp: post-trained (18 tensors)",
                "layers 0–5, 6 of 6: self_attn: 0.5 × pre + 0.5 × post (12 tensors)",
                f"{OUTSIDE}: post-trained (3 tensors)",
            ],
        ),
        (
            {"layers": [{"range": [1, 4], "alpha": 1, "modules": ["q_proj"]}]},
            [
                "layer 0, 1 of 6: post-trained (5 tensors)",
                "layers 1–4, 4 of 6: input_layernorm, mlp, self_attn.k_proj: post-trained (16 tensors)",
                "layers 1–4, 4 of 6: self_attn.q_proj: pre-trained (4 tensors)",
                "layer 5, 1 of 6: post-trained (5 tensors)",
                f"{OUTSIDE}: post-trained (3 tensors)",
            ],
        ),
        (
            {"layers": [{"range": [2, 4], "alpha": [1, 0]}]},
            [
                "layers 0–1, 2 of 6: post-trained (10 tensors)",
                "layer 2, 1 of 6: pre-trained (5 tensors)",
                "layer 3, 1 of 6: 0.5 × pre + 0.5 × post (5 tensors)",
                "layers 4–5, 2 of 6: post-trained (10 tensors)",
                f"{OUTSIDE}: post-trained (3 tensors)",
            ],
        ),
        (
            {"tensors": [{"match": "model.embed_tokens.*", "alpha": 0.25}, {"match": "lm_head.*", "alpha": 1}]},
            [
                "layers 0–5, 6 of 6: post-trained (30 tensors)",
                "model.norm.weight: post-trained (1 tensor)",
                "model.embed_tokens.weight: 0.25 × pre + 0.75 × post (1 tensor)",
                "lm_head.weight: pre-trained (1 tensor)",
            ],
        ),
    ],
)
def test_a_summary_lists_parts_with_their_sources(
    tmp_path: Path, content: dict[str, Any], sentences: list[str]
) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    assert list(describe_plan(plan_of(tmp_path, **content))) == sentences


def test_the_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    plan = plan_of(tmp_path, alpha=0.1, restore=[1, 2], layers=[{"range": [2, 4], "alpha": 0.7, "modules": ["k_proj"]}])
    parts = summarise_parts(plan)
    assert sum(part.tensors for part in parts) == len(list(plan.tensors()))
    assert sum(part.output_bytes for part in parts) == sum(shard.data_bytes for shard in plan.shards)


def test_many_tensors_outside_the_layers_are_counted_not_listed(tmp_path: Path) -> None:
    towers = {f"vision.blocks.{k}.weight": random_tensor("BF16", (2,), k) for k in range(9)}
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, llama_tensors(side) | towers)
    *_, last = describe_plan(plan_of(tmp_path, restore=[0, 5]))
    assert last == "lm_head.weight, model.embed_tokens.weight and 10 more: post-trained (12 tensors)"


def test_without_a_known_stack_everything_is_outside(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        tensors = {name: random_tensor("BF16", (2,), side + name) for name in ("a", "b")}
        write_checkpoint(tmp_path / side, tensors, {})
    assert list(describe_plan(plan_of(tmp_path, alpha=0.5))) == ["a, b: 0.5 × pre + 0.5 × post (2 tensors)"]
