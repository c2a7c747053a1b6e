"""How far post-training moved the weights, compared with numpy, for all dtypes, shapes and zeros."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.checkpoint import files
from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import MissingExtraError, OptionError, OutputError, PlanError, RecipeError, SourceChangedError
from slrmerge.merging.diff import diff
from slrmerge.merging.diff_result import OUTSIDE, DiffResult, Distance
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.conftest import Pair
from tests.gguf_files import write_gguf
from tests.merging.faults import Recorder, age
from tests.problems import refused

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def values(tensor: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """A tensor's elements, read without slrmerge."""
    if tensor.dtype == "BF16":
        halves = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return halves.view("<f4").astype(np.float64)
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).astype(np.float64)


def expected(pre: Mapping[str, Tensor], post: Mapping[str, Tensor], names: list[str]) -> tuple[int, float, float]:
    """Parameters, |post − pre| / |pre| and cosine of some tensors, as one vector."""
    p, q = (np.concatenate([values(side[name]) for name in names]) for side in (pre, post))
    change = np.linalg.norm(q - p) / np.linalg.norm(p)
    return len(p), float(change), float(p @ q / np.linalg.norm(p) / np.linalg.norm(q))


def compare(folder: Path, pre: Mapping[str, Tensor], post: Mapping[str, Tensor], *, layers: int = 1) -> DiffResult:
    for side, tensors in (("pre", pre), ("post", post)):
        write_checkpoint(folder / side, tensors, llama_config(layers=layers))
    return diff(open_pair(folder / "pre", folder / "post"))


def differences(pair: Pair) -> DiffResult:
    return diff(pair.open())


def one(folder: Path, pre: Tensor, post: Tensor) -> Distance:
    """The distance of a layer with a single tensor."""
    name = "model.layers.0.mlp.w"
    return compare(folder, {name: pre}, {name: post}).by_module[0, "mlp"]


def floats(dtype: str, *numbers: float) -> Tensor:
    if dtype == "BF16":
        return Tensor(dtype, (len(numbers),), (np.array(numbers, "<f4").view("<u4") >> 16).astype("<u2").tobytes())
    return Tensor(dtype, (len(numbers),), np.array(numbers, NUMPY[dtype]).tobytes())


# the numbers


def test_a_module_is_no_part_of_another_whose_name_it_begins_with() -> None:
    attention, norm = Distance(100, 4.0, 5.0, 1.0, 4.0), Distance(5, 1.0, 1.0, 0.0, 1.0)
    found = DiffResult(1, {(0, "self_attn.q_proj"): attention, (0, "self_attn_layer_norm"): norm})
    assert found.of_layer(0, "self_attn") == attention
    assert found.of_layer(0, "self_attn_layer_norm") == norm
    assert found.of_layer(0).parameters == 105


def test_every_module_has_the_distance_that_numpy_computes(pair: Pair) -> None:
    found = differences(pair)
    assert found.layers == 6
    inside = {
        (int(name.split(".")[2]), ".".join(name.split(".")[3:-1])): name for name in pair.post if ".layers." in name
    }
    outside = {(OUTSIDE, name.removesuffix(".weight")): name for name in pair.post if ".layers." not in name}
    assert found.by_module.keys() == (inside | outside).keys()
    for key, name in (inside | outside).items():
        parameters, change, cosine = expected(pair.pre, pair.post, [name])
        distance = found.by_module[key]
        assert distance.parameters == parameters
        assert distance.relative_change == pytest.approx(change, rel=1e-12)
        assert distance.cosine == pytest.approx(cosine, rel=1e-12)


def test_the_distance_of_a_layer_is_that_of_all_its_tensors_as_one_vector(pair: Pair) -> None:
    found = differences(pair)
    for layer in range(6):
        for prefix in ("", "mlp", "self_attn", "self_attn.q_proj"):
            names = [name for name in pair.post if name.startswith(f"model.layers.{layer}.{prefix}")]
            parameters, change, cosine = expected(pair.pre, pair.post, names)
            distance = found.of_layer(layer, prefix)
            assert distance.parameters == parameters
            assert distance.relative_change == pytest.approx(change, rel=1e-12)
            assert distance.cosine == pytest.approx(cosine, rel=1e-12)


def test_biases_belong_to_their_module(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.{name}": floats("F32", 1, 2) for name in ("w.weight", "w.bias", "v.weight")}
    found = compare(tmp_path, tensors, tensors)
    assert {key: distance.parameters for key, distance in found.by_module.items()} == {(0, "mlp.w"): 4, (0, "mlp.v"): 2}


@pytest.mark.parametrize("pre_dtype", [*NUMPY, "BF16"])
@pytest.mark.parametrize("post_dtype", [*NUMPY, "BF16"])
def test_sides_of_different_dtypes_are_compared_as_they_are(tmp_path: Path, pre_dtype: str, post_dtype: str) -> None:
    pre, post = random_tensor(pre_dtype, (7, 5), "pre"), random_tensor(post_dtype, (7, 5), "post")
    distance = one(tmp_path, pre, post)
    parameters, change, cosine = expected({"w": pre}, {"w": post}, ["w"])
    assert distance.parameters == parameters == 35
    assert distance.relative_change == pytest.approx(change, rel=1e-12)
    assert distance.cosine == pytest.approx(cosine, rel=1e-12)


def test_what_rounding_alone_changed_is_seen(tmp_path: Path) -> None:
    exact = random_tensor("F32", (100,), "x")
    rounded = Tensor("BF16", (100,), torch.tensor(values(exact)).bfloat16().view(torch.uint8).numpy().tobytes())
    distance = one(tmp_path, exact, rounded)
    assert 1e-4 < distance.relative_change < 2**-8
    assert 1 - 1e-5 < distance.cosine < 1


@pytest.mark.parametrize(
    ("pre", "post", "change", "cosine"),
    [
        ((3.0, 4.0), (3.0, 4.0), 0.0, 1.0),
        ((0.0, 0.0), (0.0, 0.0), 0.0, 1.0),
        ((0.0, -0.0), (0.0, 0.0), 0.0, 1.0),
        ((0.0, 0.0), (3.0, 4.0), math.inf, math.nan),
        ((3.0, 4.0), (0.0, 0.0), 1.0, math.nan),
        ((3.0, 4.0), (-3.0, -4.0), 2.0, -1.0),
        ((1.0, 0.0), (0.0, 1.0), math.sqrt(2), 0.0),
        ((3.0, 4.0), (6.0, 8.0), 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [*NUMPY, "BF16"])
def test_zeros_and_simple_angles_come_out_as_they_should(
    tmp_path: Path, dtype: str, pre: tuple[float, ...], post: tuple[float, ...], change: float, cosine: float
) -> None:
    distance = one(tmp_path, floats(dtype, *pre), floats(dtype, *post))
    assert distance.relative_change == pytest.approx(change, rel=1e-12)
    assert distance.cosine == pytest.approx(cosine, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_very_small_and_very_large_numbers_have_an_angle_too(tmp_path: Path, scale: float) -> None:
    distance = one(tmp_path, floats("F64", 3 * scale, 4 * scale), floats("F64", 6 * scale, 8 * scale))
    assert distance.relative_change == pytest.approx(1)
    assert distance.cosine == pytest.approx(1)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_nan_and_infinity_are_reported(tmp_path: Path, odd: float) -> None:
    distance = one(tmp_path, floats("F32", 1, 2), floats("F32", 1, odd))
    assert not math.isfinite(distance.relative_change)
    assert math.isnan(distance.cosine)


finite = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6), st.integers(0, 6))
def test_the_distance_of_two_parts_together_is_that_of_the_whole(pairs: list[tuple[float, float]], cut: int) -> None:
    def distance(some: list[tuple[float, float]]) -> Distance:
        return Distance(
            len(some), math.fsum(p * p for p, _ in some), math.fsum(q * q for _, q in some),
            math.fsum((q - p) ** 2 for p, q in some), math.fsum(p * q for p, q in some),
        )  # fmt: skip

    parts, whole = distance(pairs[:cut]) + distance(pairs[cut:]), distance(pairs)
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-9, abs=1e-9)
    assert parts.parameters == whole.parameters


# how it is read


def test_tensors_are_read_in_chunks_with_the_same_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.merging.diff.CHUNK_ELEMENTS", 8)
    reads: list[int] = []
    read_at = files._read_at

    def watched(fd: int, position: int, buffer: memoryview) -> int:
        reads.append(len(buffer))
        return read_at(fd, position, buffer)

    name = "model.layers.0.mlp.w"
    pre, post = random_tensor("F32", (5, 9), "pre"), random_tensor("BF16", (5, 9), "post")
    for side, tensor in (("pre", pre), ("post", post)):
        write_checkpoint(tmp_path / side, {name: tensor}, llama_config(layers=1))
    opened = open_pair(tmp_path / "pre", tmp_path / "post")
    monkeypatch.setattr(files, "_read_at", watched)
    distance = diff(opened).by_module[0, "mlp"]
    parameters, change, _ = expected({"w": pre}, {"w": post}, ["w"])
    assert distance.parameters == parameters
    assert distance.relative_change == pytest.approx(change, rel=1e-12)
    assert reads == [8 * 4, 8 * 2] * 5 + [5 * 4, 5 * 2]  # 45 elements by eights, of each side in turn


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_result_does_not_depend_on_the_number_of_threads(pair: Pair, threads: int) -> None:
    assert diff(pair.open(), threads=threads).to_csv() == differences(pair).to_csv()


@pytest.mark.parametrize(
    ("threads", "code"),
    [(0, "out-of-range"), (-1, "out-of-range"), (2.5, "wrong-type"), ("2", "wrong-type"), (True, "wrong-type")],
)
def test_an_invalid_number_of_threads_is_refused(pair: Pair, threads: Any, code: str) -> None:
    with refused(OptionError, code):
        diff(pair.open(), threads=threads)


def test_a_value_that_is_neither_a_pair_nor_a_recipe_is_refused(pair: Pair) -> None:
    number: Any = 5
    with refused(OptionError, "wrong-type"):
        diff(number)
    with refused(RecipeError, "recipe-unreadable"):
        diff(pair.folder / "pre")


def test_progress_counts_the_bytes_of_both_sides(pair: Pair) -> None:
    recorder = Recorder()
    diff(pair.open(), progress=recorder)
    total = sum(len(tensor.data) for side in (pair.pre, pair.post) for tensor in side.values())
    assert recorder.started == [("comparing", total)]
    assert recorder.advanced == total


def test_a_source_that_changes_meanwhile_is_named(pair: Pair) -> None:
    age(pair.folder)
    path = pair.folder / "pre" / "model.safetensors"
    with refused(SourceChangedError, "source-changed") as caught:
        diff(pair.open(), threads=1, progress=Recorder(3, lambda: os.utime(path)))
    assert caught.value.problems[0].where == str(path)


# what cannot be compared


def test_tensors_of_one_side_of_other_shapes_and_of_whole_numbers_are_noted(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre", layers=1), llama_tensors("post", layers=1)
    del pre["lm_head.weight"], post["model.norm.weight"]
    pre["model.embed_tokens.weight"] = random_tensor("BF16", (12, 8), "short")
    for side in (pre, post):
        side["counts"] = random_tensor("I64", (3,), "counts")
    for name in ("a", "b", "c"):
        post[f"extra.{name}"] = random_tensor("BF16", (2,), name)
    found = compare(tmp_path, pre, post)
    assert found.notes == (
        "not compared, different shapes: model.embed_tokens.weight",
        "not compared, only post-trained: lm_head.weight and 3 more",
        "not compared, not floating: counts",
        "not compared, only pre-trained: model.norm.weight",
    )
    assert {layer for layer, _ in found.by_module} == {0}


def test_models_of_different_depth_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre", layers=5), llama_config(layers=5))
    write_checkpoint(tmp_path / "post", llama_tensors("post"))
    with refused(PlanError, "different-depth") as caught:
        diff(open_pair(tmp_path / "pre", tmp_path / "post"))
    assert caught.value.problems[0].where == str(tmp_path / "pre")


def test_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    config: dict[str, object] = {}
    write_checkpoint(tmp_path / "pre", {"a": random_tensor("F32", (2,), "a")}, config)
    write_checkpoint(tmp_path / "post", {"b": random_tensor("F32", (2,), "b")}, config)
    with refused(PlanError, "nothing-in-common") as caught:
        diff(open_pair(tmp_path / "pre", tmp_path / "post"))
    assert caught.value.problems[0].where == str(tmp_path / "post")


def test_models_without_layers_are_compared_too(tmp_path: Path) -> None:
    for side, number in (("pre", 1), ("post", 2)):
        write_checkpoint(tmp_path / side, {"adapter.weight": floats("F32", number, 0)}, {})
    found = diff(open_pair(tmp_path / "pre", tmp_path / "post"))
    assert (found.layers, found.modules()) == (0, [])
    assert found.by_module[OUTSIDE, "adapter"].relative_change == 1
    found.save(tmp_path / "moved")
    assert (tmp_path / "moved" / "diff.csv").read_text().splitlines()[1] == ",adapter,2,1.0,1.0"


# what comes out


def test_layers_come_in_order_and_what_is_outside_them_last(tmp_path: Path) -> None:
    tensors = llama_tensors("x", layers=12)
    backwards = dict(reversed(tensors.items()))
    found = compare(tmp_path, backwards, backwards, layers=12)
    layers = [layer for layer, _ in found.by_module]
    assert layers == sorted(layers[:-3]) + [OUTSIDE] * 3
    assert len(found.modules()) == 5


def test_the_csv_has_a_line_for_each_module(pair: Pair) -> None:
    found = differences(pair)
    lines = list(csv.DictReader(found.to_csv().splitlines()))
    assert list(lines[0]) == ["layer", "module", "parameters", "relative_change", "cosine"]
    assert [(line["layer"], line["module"]) for line in lines] == [
        ("" if layer == OUTSIDE else str(layer), module) for layer, module in found.by_module
    ]
    assert [float(line["relative_change"]) for line in lines] == [
        distance.relative_change for distance in found.by_module.values()
    ]
    assert found.to_csv().count("\r") == 0


def test_the_result_is_a_pandas_table(pair: Pair) -> None:
    pytest.importorskip("pandas")
    found = differences(pair)
    table = found.to_pandas()
    assert list(table) == ["layer", "module", "parameters", "relative_change", "cosine"]
    assert list(table["module"]) == [module for _, module in found.by_module]
    assert list(table["layer"].isna()) == [layer == OUTSIDE for layer, _ in found.by_module]
    assert list(table["cosine"]) == [distance.cosine for distance in found.by_module.values()]
    assert "<table" in found._repr_html_()
    assert "\n" not in repr(found)


def test_the_table_and_the_heat_map_are_saved_with_the_same_bytes_every_time(pair: Pair) -> None:
    found = differences(pair)
    for name in ("one", "two"):
        found.save(pair.folder / name / "deep")
    files = {path.name: path.read_bytes() for path in (pair.folder / "one" / "deep").iterdir()}
    assert sorted(files) == ["diff.csv", "diff.png", "diff.svg", "report.html"]
    assert files == {path.name: path.read_bytes() for path in (pair.folder / "two" / "deep").iterdir()}
    svg = files["diff.svg"].decode()
    assert all(f">{module}<" in svg for module in found.modules())


def test_an_infinite_change_leaves_a_heat_map(tmp_path: Path) -> None:
    found = compare(
        tmp_path,
        {f"model.layers.{k}.mlp.w": floats("F32", 0, k) for k in range(2)},
        {f"model.layers.{k}.mlp.w": floats("F32", 1, 1) for k in range(2)},
        layers=2,
    )
    found.save(tmp_path / "moved")
    assert (tmp_path / "moved" / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_is_an_output_error(pair: Pair) -> None:
    place = pair.recipe_file() / "below"
    with refused(OutputError, "io-error") as caught:
        differences(pair).save(place)
    assert caught.value.problems[0].where == str(place)


def test_the_heat_map_needs_matplotlib(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    found = differences(pair)
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    with refused(MissingExtraError, "missing-extra"):
        found.save(pair.folder / "moved")
    assert not (pair.folder / "moved").exists()


def test_quantized_tensors_of_gguf_files_are_compared_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.checkpoint.base.CHUNK_BYTES", 100)
    pre, same, post = (write_gguf(tmp_path / f"{n}.gguf", seed) for n, seed in (("a", 1), ("b", 1), ("c", 2)))
    content = bytearray(same.read_bytes())
    content[-1] ^= 1  # in the last tensor, output.weight
    same.write_bytes(content)
    one, all_of_them = (diff(open_pair(pre, other)) for other in (same, post))
    assert one.notes == ("quantized, compared as bytes: 1 of 14 tensors differ: output.weight",)
    assert all_of_them.notes[0].startswith("quantized, compared as bytes: 14 of 14 tensors differ: ")
    for found in (one, all_of_them):
        assert {(layer, name) for layer, name in found.by_module} == {
            *((layer, "attn_norm") for layer in range(4)),
            (OUTSIDE, "output_norm"),
        }
    assert {each.relative_change for each in one.by_module.values()} == {0}
    assert all(each.relative_change > 0.5 for each in all_of_them.by_module.values())
