"""The tensors of hybrids, bit by bit those of a merge; and which tensors are the same on both sides."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import slrmerge.checkpoint.base
from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import BlendError
from slrmerge.merging.executor import merge
from slrmerge.merging.plan.tensors import plan_tensor_alphas
from slrmerge.merging.stream import HybridReader
from slrmerge.searching.sweep.paths import TensorAlpha
from slrmerge.searching.sweep.weights import HybridWeights
from tests.checkpoints import Tensor, llama_tensors, random_tensor, write_checkpoint
from tests.problems import refused

ALPHAS = (0.0, 0.05, 0.3, 0.5, 1.0)
ODD = {"bias": ("F32", (7,)), "scale": ("BF16", (1, 1)), "long": ("BF16", (301, 5))}


@contextmanager
def weights(
    folder: Path,
    names: Mapping[str, Tensor],
    *,
    alphas: tuple[float, ...] = ALPHAS,
    output: str | None = None,
) -> Iterator[HybridWeights]:
    """The pair in `folder`, its tensors planned at each of the alphas."""
    pair = open_pair(folder / "pre", folder / "post")
    planned = plan_tensor_alphas([(name, alpha) for name in names for alpha in alphas], pair, dtype=output)
    with (
        pair.open() as reader,
        HybridWeights(planned, HybridReader(reader)) as loader,
    ):
        yield loader


def load(loader: HybridWeights, names: Iterable[str], alpha: float) -> dict[str, torch.Tensor]:
    return loader.load(TensorAlpha(name, alpha) for name in names)


def write(folder: Path, dtypes: tuple[str, str]) -> dict[str, Tensor]:
    """Two Llama-like sides, one dtype each, and a few tensors of odd shapes and dtypes of their own."""
    for side, dtype in zip(("pre", "post"), dtypes, strict=True):
        tensors = llama_tensors(side, dtype=dtype) | {
            name: random_tensor(kind, shape, side + name) for name, (kind, shape) in ODD.items()
        }
        write_checkpoint(folder / side, tensors)
    return tensors


def merged(folder: Path, alpha: float, *, output: str | None) -> dict[str, torch.Tensor]:
    content: dict[str, Any] = {"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), "alpha": alpha}
    out = folder / f"merged-{alpha}"
    merge(content | ({"dtype": output} if output else {}), out, fsync=False)
    return load_file(out / "model.safetensors")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("output", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "BF16"), ("F16", "F32")], ids="-".join)
def test_every_tensor_has_the_bits_of_a_merge(tmp_path: Path, dtypes: tuple[str, str], output: str | None) -> None:
    names = write(tmp_path, dtypes)
    for alpha in ALPHAS:
        expected = merged(tmp_path, alpha, output=output)
        with weights(tmp_path, names, output=output) as loader:
            loaded = load(loader, names, alpha)
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(bits(loaded[name]), bits(tensor)), (name, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [[0], [15], [3, 4, 5, 9, 1, 1], list(range(16)), [15, 0]], ids=str)
def test_rows_are_those_of_the_tensor_in_the_order_given(tmp_path: Path, alpha: float, rows: list[int]) -> None:
    names = write(tmp_path, ("F32", "BF16"))
    for name in ("model.embed_tokens.weight", "long"):
        with weights(tmp_path, names) as loader:
            whole, some = load(loader, [name], alpha)[name], loader.load_rows(TensorAlpha(name, alpha), rows)
        assert torch.equal(some, whole[rows])


def test_rows_of_a_bias_are_its_elements(tmp_path: Path) -> None:
    names = write(tmp_path, ("F32", "F32"))
    for alpha in (0.0, 0.3, 1.0):
        with weights(tmp_path, names) as loader:
            whole = load(loader, ["bias"], alpha)["bias"]
            assert torch.equal(loader.load_rows(TensorAlpha("bias", alpha), range(2, 5)), whole[2:5])


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    names = write(tmp_path, ("F32", "BF16"))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with weights(tmp_path, names) as loader:
            found.append(load(loader, names, 0.3))
            assert torch.get_num_threads() == threads
    assert all(torch.equal(bits(found[0][name]), bits(found[1][name])) for name in names)


def flipped(tensor: Tensor, at: int) -> Tensor:
    data = bytearray(tensor.data)
    data[at] ^= 1
    return tensor._replace(data=bytes(data))


@pytest.mark.parametrize("chunk_bytes", [1 << 18, 64, 7])
def test_one_different_byte_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(slrmerge.checkpoint.base, "CHUNK_BYTES", chunk_bytes)
    tensor = random_tensor("BF16", (9, 11), "x")
    size = len(tensor.data)
    empty = Tensor("BF16", (0, 3), b"")
    post = {"same": tensor, "empty": empty} | {str(at): flipped(tensor, at) for at in (0, 63, 64, size // 2, size - 1)}
    write_checkpoint(tmp_path / "pre", dict.fromkeys(post, tensor) | {"empty": empty}, {})
    write_checkpoint(tmp_path / "post", post, {})
    with weights(tmp_path, post) as loader:
        assert {name: loader.same_on_both_sides(name) for name in post} == {
            name: name in ("same", "empty") for name in post
        }


def test_only_tensors_copied_at_both_ends_count_as_the_same(tmp_path: Path) -> None:
    zeros = {"x": Tensor("F32", (4,), bytes(16))}
    write_checkpoint(tmp_path / "pre", {"x": Tensor("BF16", (4,), bytes(8))}, {})
    write_checkpoint(tmp_path / "post", zeros, {})
    with weights(tmp_path, zeros) as loader:
        assert not loader.same_on_both_sides("x")
    (tmp_path / "pre").rename(tmp_path / "narrow")
    write_checkpoint(tmp_path / "pre", zeros, {})
    with weights(tmp_path, zeros) as loader:
        assert loader.same_on_both_sides("x")
    with weights(tmp_path, zeros, output="bfloat16") as loader:
        assert not loader.same_on_both_sides("x")
    for alphas in ((0.0, 0.5), (0.5, 1.0)):
        with weights(tmp_path, zeros, alphas=alphas) as loader:
            assert not loader.same_on_both_sides("x")


def test_values_outside_the_output_dtype_are_refused_as_in_a_merge(tmp_path: Path) -> None:
    large = {"x": Tensor("F32", (1,), (0x7F000000).to_bytes(4, "little"))}
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, large, {})
    with weights(tmp_path, large, output="float16") as loader, refused(BlendError, "overflow") as caught:
        load(loader, ["x"], 0.5)
    assert caught.value.problems[0].where == "x"
