"""A hybrid's tensors, bit by bit those of a merge; and which layers post-training did not touch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import slrmerge.sweep.weights
from slrmerge.checkpoint import CheckpointReader
from slrmerge.errors import BlendError, SourceChangedError
from slrmerge.hub import open_pair
from slrmerge.merge import merge_checkpoints
from slrmerge.plan import plan_choices
from slrmerge.recipe import parse_recipe
from slrmerge.stream import Sources
from slrmerge.sweep.weights import HybridWeights
from tests.checkpoints import Tensor, llama_tensors, random_tensor, write_checkpoint

ALPHAS = (0.0, 0.05, 0.3, 0.5, 1.0)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ODD = {"bias": ("F32", (7,)), "scale": ("BF16", (1, 1)), "long": ("BF16", (301, 5))}


@contextmanager
def weights(
    folder: Path,
    names: Mapping[str, Tensor],
    *,
    alphas: tuple[float, ...] = ALPHAS,
    wanted: torch.dtype = torch.float32,
    output: str | None = None,
) -> Iterator[HybridWeights]:
    """The pair in `folder`, its tensors planned at each of the alphas."""
    pre, post = open_pair(folder / "pre", folder / "post")
    planned = plan_choices([(name, alpha) for name in names for alpha in alphas], pre, post, dtype=output)
    with (
        CheckpointReader(pre) as one,
        CheckpointReader(post) as other,
        HybridWeights(planned, Sources(one, other), dtype=wanted, device=torch.device("cpu")) as ready,
    ):
        yield ready


def write(folder: Path, dtypes: tuple[str, str]) -> dict[str, Tensor]:
    """Two Llama-like sides, one dtype each, and a few tensors of odd shapes and dtypes of their own."""
    for side, dtype in zip(("pre", "post"), dtypes, strict=True):
        tensors = llama_tensors(side, dtype=dtype) | {
            name: random_tensor(kind, shape, side + name) for name, (kind, shape) in ODD.items()
        }
        write_checkpoint(folder / side, tensors)
    return tensors


def merge(folder: Path, alpha: float, *, output: str | None) -> dict[str, torch.Tensor]:
    content: dict[str, Any] = {"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), "alpha": alpha}
    out = folder / f"merged-{alpha}"
    merge_checkpoints(parse_recipe(content | ({"dtype": output} if output else {})), out, fsync=False)
    return load_file(out / "model.safetensors")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("output", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "BF16"), ("F16", "F32")], ids="-".join)
def test_every_tensor_is_bit_by_bit_what_a_merge_writes(
    tmp_path: Path, dtypes: tuple[str, str], output: str | None
) -> None:
    names = write(tmp_path, dtypes)
    for alpha in ALPHAS:
        merged = merge(tmp_path, alpha, output=output)
        for wanted in {tensor.dtype for tensor in merged.values()}:
            with weights(tmp_path, names, wanted=wanted, output=output) as ready:
                loaded = ready.load((name, alpha) for name in names)
            assert loaded.keys() == merged.keys()
            for name, tensor in merged.items():
                if tensor.dtype == wanted:
                    assert torch.equal(bits(loaded[name]), bits(tensor)), (name, alpha)


def test_what_a_merge_writes_is_then_given_in_the_dtype_of_the_sweep(tmp_path: Path) -> None:
    names = write(tmp_path, ("F32", "BF16"))
    merged = merge(tmp_path, 0.3, output=None)
    with weights(tmp_path, names, wanted=torch.float32) as ready:
        loaded = ready.load((name, 0.3) for name in names)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in merged.items():
        assert torch.equal(loaded[name], tensor.float())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [[0], [15], [3, 4, 5, 9, 1, 1], list(range(16)), [15, 0]], ids=str)
def test_rows_are_those_of_the_whole_tensor_in_the_order_given(tmp_path: Path, alpha: float, rows: list[int]) -> None:
    names = write(tmp_path, ("F32", "BF16"))
    for name in ("model.embed_tokens.weight", "long"):
        with weights(tmp_path, names) as ready:
            whole, some = ready.load([(name, alpha)])[name], ready.load_rows((name, alpha), rows)
        assert torch.equal(some, whole[rows])


def test_rows_of_a_bias_are_its_elements(tmp_path: Path) -> None:
    names = write(tmp_path, ("F32", "F32"))
    for alpha in (0.0, 0.3, 1.0):
        with weights(tmp_path, names) as ready:
            whole = ready.load([("bias", alpha)])["bias"]
            assert torch.equal(ready.load_rows(("bias", alpha), range(2, 5)), whole[2:5])


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    names = write(tmp_path, ("F32", "BF16"))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with weights(tmp_path, names, wanted=torch.bfloat16) as ready:
            found.append(ready.load((name, 0.3) for name in names))
            assert torch.get_num_threads() == threads
    assert all(torch.equal(bits(found[0][name]), bits(found[1][name])) for name in names)


def flipped(tensor: Tensor, at: int) -> Tensor:
    data = bytearray(tensor.data)
    data[at] ^= 1
    return tensor._replace(data=bytes(data))


@pytest.mark.parametrize("compared_bytes", [1 << 18, 64, 7])
def test_one_byte_makes_a_tensor_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared_bytes: int) -> None:
    monkeypatch.setattr(slrmerge.sweep.weights, "_COMPARED_BYTES", compared_bytes)
    tensor = random_tensor("BF16", (9, 11), "x")
    size = len(tensor.data)
    empty = Tensor("BF16", (0, 3), b"")
    post = {"same": tensor, "empty": empty} | {str(at): flipped(tensor, at) for at in (0, 63, 64, size // 2, size - 1)}
    write_checkpoint(tmp_path / "pre", dict.fromkeys(post, tensor) | {"empty": empty}, {})
    write_checkpoint(tmp_path / "post", post, {})
    with weights(tmp_path, post) as ready:
        assert {name: ready.same_on_both_sides(name) for name in post} == {
            name: name in ("same", "empty") for name in post
        }


def test_tensors_that_are_not_copied_from_both_sides_do_not_count_as_the_same(tmp_path: Path) -> None:
    zeros = {"x": Tensor("F32", (4,), bytes(16))}
    write_checkpoint(tmp_path / "pre", {"x": Tensor("BF16", (4,), bytes(8))}, {})
    write_checkpoint(tmp_path / "post", zeros, {})
    with weights(tmp_path, zeros) as ready:
        assert not ready.same_on_both_sides("x")
    (tmp_path / "pre").rename(tmp_path / "narrow")
    write_checkpoint(tmp_path / "pre", zeros, {})
    with weights(tmp_path, zeros) as ready:
        assert ready.same_on_both_sides("x")
    with weights(tmp_path, zeros, output="bfloat16") as ready:
        assert not ready.same_on_both_sides("x")
    for alphas in ((0.0, 0.5), (0.5, 1.0)):
        with weights(tmp_path, zeros, alphas=alphas) as ready:
            assert not ready.same_on_both_sides("x")


def test_values_past_the_output_dtype_are_an_error_as_in_a_merge(tmp_path: Path) -> None:
    large = {"x": Tensor("F32", (1,), (0x7F000000).to_bytes(4, "little"))}
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, large, {})
    with weights(tmp_path, large, output="float16") as ready, pytest.raises(BlendError) as caught:
        ready.load([("x", 0.5)])
    assert str(caught.value) == ("x: has values past float16's 65504; use dtype: bfloat16 or float32 in the recipe")


def test_a_source_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    names = write(tmp_path, ("BF16", "BF16"))
    path = tmp_path / "post" / "model.safetensors"
    with weights(tmp_path, names) as ready:
        ready.load([("bias", 0.0)])
        ready.check_unchanged()
        with open(path, "ab") as file:
            file.write(b"x")
        with pytest.raises(SourceChangedError) as caught:
            ready.check_unchanged()
    assert str(path) in str(caught.value)
