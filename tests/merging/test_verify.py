"""A single flipped bit anywhere in a finished merge is found, and its tensor named where the sources are available."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from slrmerge.errors import CheckpointError, OptionError, OutputError, Problem, VerificationError
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.verify import verify
from slrmerge.recipe.load import load_recipe
from tests.checkpoints import llama_config, llama_tensors, safetensors_bytes, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import Recorder, age, snapshot, write_files
from tests.problems import refused

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def hybrid(pair: Pair) -> Pair:
    """The pair, merged into three shards."""
    execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, options=MergeOptions(fsync=False))
    return pair


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    """The smallest pair there is, merged."""
    sides = [llama_tensors(side, layers=1, hidden=1, vocabulary=1, tied=True) for side in ("pre", "post")]
    for name, tensors in zip(("pre", "post"), sides, strict=True):
        write_checkpoint(tmp_path / name, tensors, llama_config(layers=1))
    pair = Pair(tmp_path, *sides)
    execute(pair.plan(restore=[0, 0]), pair.out, options=MergeOptions(fsync=False))
    return pair


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit of a file; twice puts it back."""
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


class Found(NamedTuple):
    """A problem: its code, the file's name in the folder, and the place inside the file where one is given."""

    code: str
    file: str
    place: str = ""


def problems(folder: Path) -> list[Found]:
    """Everything that verification finds."""
    try:
        verify(folder, threads=1)
    except VerificationError as error:
        return [_found(folder, problem) for problem in error.problems]
    return []


def _found(folder: Path, problem: Problem) -> Found:
    place = re.search(r"\((.*)\)$", problem.what)
    return Found(problem.code, problem.where.removeprefix(f"{folder}/"), place[1] if place else "")


def altered(name: str, place: str = "") -> list[Found]:
    return [Found("file-altered", name, place)]


def missing(name: str) -> list[Found]:
    return [Found("file-missing", name)]


def added(name: str) -> list[Found]:
    return [Found("file-added", name)]


def test_a_flipped_bit_anywhere_in_any_file_is_found(tiny: Pair) -> None:
    (tiny.folder / "post").rename(tiny.folder / "elsewhere")  # digests alone must tell
    rng = random.Random(0)
    sizes = {name: len(raw) for name, raw in (snapshot(tiny.out) or {}).items()}
    assert sizes.keys() == {
        "README.md", "config.json", "model.safetensors", "slrmerge.json", "slrmerge.yaml", "tokenizer.json"
    }  # fmt: skip
    unnoticed = []
    for name, size in sizes.items():
        for position in range(0, size, 1 if name == "model.safetensors" else 5):
            bit = rng.randrange(8)
            flip(tiny.out / name, position, bit)
            code = "manifest-altered" if name == "slrmerge.json" else "file-altered"
            if problems(tiny.out) != [Found(code, name)]:
                unnoticed.append((name, position, bit))
            flip(tiny.out / name, position, bit)
    assert unnoticed == []
    assert problems(tiny.out) == []


def test_a_flipped_bit_in_the_weights_names_its_tensor(hybrid: Pair) -> None:
    plan = hybrid.plan(restore=[2, 3], max_shard_size="2KB")
    for shard in plan.shards:
        places = {0: "in its header", len(shard.header) - 1: "in its header"}
        for tensor, *offsets in shard.spans():
            first, last = (len(shard.header) + offset for offset in offsets)
            places |= dict.fromkeys((first, last - 1), f"in {tensor.name}")
        for position, place in places.items():
            flip(hybrid.out / shard.name, position, 6)
            assert problems(hybrid.out) == altered(shard.name, place)
            flip(hybrid.out / shard.name, position, 6)


def test_a_flipped_bit_in_a_blend_names_its_tensor(pair: Pair) -> None:
    execute(plan := pair.plan(alpha=0.5), pair.out, options=MergeOptions(fsync=False))
    (shard, _) = plan.shards
    flip(pair.out / shard.name, shard.file_bytes - 1, 0)
    assert problems(pair.out) == altered(shard.name, f"in {shard.tensors[-1].name}")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def harm_three(out: Path) -> None:
    write_files(out, {"x.safetensors": b""})
    (out / "config.json").unlink()
    cut(out / "README.md")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[Found]]] = {
    "a shard is missing": (lambda out: (out / SHARD).unlink(), missing(SHARD)),
    "the tokenizer is missing": (
        lambda out: (out / "tokenizer.json").unlink(),
        missing("tokenizer.json"),
    ),
    "a shard is a folder": (
        lambda out: make_folder_of(out / SHARD),
        missing(SHARD),
    ),
    "a shard is cut short": (
        lambda out: cut(out / SHARD),
        altered(SHARD, "in model.layers.4.mlp.down_proj.weight"),
    ),
    "a shard is longer": (lambda out: grow(out / SHARD), altered(SHARD, "bytes past its end")),
    "a shard is empty": (lambda out: os.truncate(out / SHARD, 0), altered(SHARD, "in its header")),
    "a stale single file": (
        lambda out: (out / "model.safetensors").write_bytes(b""),
        added("model.safetensors"),
    ),
    "a pickle": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b""),
        added("pytorch_model.bin"),
    ),
    "three at once": (
        harm_three,
        [
            *missing("config.json"),
            *added("x.safetensors"),
            *altered("README.md"),
        ],
    ),
    "the recipe was edited": (lambda out: grow(out / "slrmerge.yaml"), altered("slrmerge.yaml")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_missing_altered_and_added_files_are_named(hybrid: Pair, case: str) -> None:
    harm, expected = DAMAGE[case]
    harm(hybrid.out)
    assert problems(hybrid.out) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "kind", ["nothing", pytest.param("FIFO", marks=pytest.mark.skipif(os.name == "nt", reason="POSIX"))]
)
@pytest.mark.parametrize("step", ["digests", "sources"])
def test_a_file_that_is_removed_or_replaced_by_a_fifo_meanwhile_is_an_error(hybrid: Pair, step: str, kind: str) -> None:
    def replace() -> None:
        (hybrid.out / SHARD).unlink()
        if kind == "FIFO":
            os.mkfifo(hybrid.out / SHARD)

    digests = len(list(hybrid.out.iterdir())) - 1  # all but the manifest's
    recorder = Recorder(1 if step == "digests" else digests + 1, replace)
    with refused(OutputError, "io-error"):
        verify(hybrid.out, threads=1, progress=recorder)


def test_files_that_no_loader_reads_may_be_added(hybrid: Pair) -> None:
    write_files(hybrid.out, {"notes.md": b"good model", "plots/quality.png": b"", ".cache/x.json": b"{}"})
    assert problems(hybrid.out) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "modeling.py", "original/x.pth"])
def test_files_that_a_loader_reads_may_not_be_added(hybrid: Pair, name: str) -> None:
    write_files(hybrid.out, {name: b"{}"})
    assert problems(hybrid.out) == added(name)


# the report


def test_a_valid_merge_is_compared_with_its_sources_bit_by_bit(hybrid: Pair) -> None:
    recorder = Recorder()
    report = verify(hybrid.out, progress=recorder)
    written = snapshot(hybrid.out) or {}
    assert (report.folder, report.files) == (hybrid.out, len(written))
    assert report.checked_bytes == sum(len(raw) for name, raw in written.items() if name != "slrmerge.json")
    assert report.against_sources
    assert "\n" not in repr(report)
    weights = sum(len(raw) for name, raw in written.items() if name.endswith(".safetensors"))
    assert recorder.started == [
        ("checking digests", report.checked_bytes),
        ("comparing with the sources", weights),
    ]
    assert recorder.advanced == report.checked_bytes + weights


@pytest.mark.parametrize("threads", [None, 1, 3, 50])
def test_the_number_of_threads_does_not_matter(hybrid: Pair, threads: int | None) -> None:
    assert verify(hybrid.out, threads=threads).against_sources


@pytest.mark.parametrize("threads", [0, -1])
def test_an_invalid_number_of_threads_is_refused(hybrid: Pair, threads: int) -> None:
    with refused(OptionError, "out-of-range"):
        verify(hybrid.out, threads=threads)


def not_compared(folder: Path) -> str:
    """The reason why the sources of a merge were not compared."""
    result = verify(folder)
    assert not result.against_sources
    return result.sources


def test_without_the_sources_only_digests_are_checked(hybrid: Pair) -> None:
    (hybrid.folder / "post").rename(hybrid.folder / "elsewhere")
    assert str(hybrid.out / "../post") in not_compared(hybrid.out)
    with refused(VerificationError, "sources-unavailable"):
        verify(hybrid.out, full=True)


def test_sources_that_moved_are_compared_where_they_are_now(hybrid: Pair) -> None:
    for side in ("pre", "post"):
        shutil.move(hybrid.folder / side, hybrid.folder / "models" / side)
    pre, post = hybrid.folder / "models/pre", hybrid.folder / "models/post"
    assert verify(hybrid.out, pretrained=pre, posttrained=str(post)).against_sources
    with refused(CheckpointError, "no-checkpoint") as caught:
        verify(hybrid.out, pretrained=pre)
    assert caught.value.problems[0].where == str(hybrid.out / "../post")


def test_a_merge_and_its_sources_may_move_together(hybrid: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (hybrid.folder / "models").mkdir()
    for name in ("pre", "post", "hybrid"):
        (hybrid.folder / name).rename(hybrid.folder / "models" / name)
    monkeypatch.chdir(hybrid.folder / "models" / "hybrid")
    assert verify(Path()).against_sources


@pytest.mark.parametrize("side", ["pretrained", "posttrained"])
def test_a_named_source_that_does_not_exist_is_an_error(hybrid: Pair, side: str) -> None:
    nowhere = hybrid.folder / "nowhere"
    with refused(CheckpointError, "no-checkpoint") as caught:
        verify(
            hybrid.out,
            pretrained=nowhere if side == "pretrained" else None,
            posttrained=nowhere if side == "posttrained" else None,
        )
    assert caught.value.problems[0].where == str(nowhere)


def test_another_checkpoint_in_a_sources_place_is_not_compared_with(hybrid: Pair) -> None:
    shutil.rmtree(hybrid.folder / "pre")
    write_checkpoint(hybrid.folder / "pre", llama_tensors("pre", hidden=4))
    assert str(hybrid.folder / "pre") in not_compared(hybrid.out)


@pytest.mark.parametrize("layers", [7, 3])
def test_a_source_whose_config_was_edited_since_is_not_compared_with(hybrid: Pair, layers: int) -> None:
    (hybrid.folder / "post" / "config.json").write_text(json.dumps(llama_config(layers=layers)))
    assert str(hybrid.folder / "post") in not_compared(hybrid.out)


def test_changed_source_data_is_distinguished_from_damage(hybrid: Pair) -> None:
    age(hybrid.folder / "pre")
    path = hybrid.folder / "pre" / "model.safetensors"
    changed = {**hybrid.pre}
    name = "model.layers.3.self_attn.k_proj.weight"
    changed[name] = changed[name]._replace(data=bytes(len(changed[name].data)))
    path.write_bytes(safetensors_bytes(changed, {"format": "pt"}))
    assert problems(hybrid.out) == [Found("sources-differ", SHARD, f"in {name}")]


def test_source_data_that_the_merge_does_not_use_may_change(hybrid: Pair) -> None:
    path = hybrid.folder / "pre" / "model.safetensors"
    flip(path, path.stat().st_size - 1, 0)  # the pre-trained head is not used
    assert verify(hybrid.out).against_sources


def test_a_plan_that_differs_from_the_executed_one_is_not_compared(
    hybrid: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MergePlan, "origins", lambda self: {})
    assert "slrmerge" in not_compared(hybrid.out)


def test_a_source_in_a_folder_that_may_not_be_read_is_not_compared(
    hybrid: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: "pre" not in str(path) and exists(path))
    assert "pre" in not_compared(hybrid.out)


def test_shards_must_be_readable_by_the_safetensors_library(hybrid: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(nullcontext[None]):
        def keys(self) -> list[str]:
            return []

        def __enter__(self) -> "Blind":  # type: ignore[override]
            return self

    monkeypatch.setattr("safetensors.safe_open", lambda path, framework: Blind())
    assert problems(hybrid.out) == [Found("unreadable-shard", f"model-0000{k}-of-00003.safetensors") for k in (1, 2, 3)]


# merges by mergekit configs

CONFIGS: dict[str, dict[str, Any]] = {
    "slerp": {"merge_method": "slerp", "base_model": "post", "models": [{"model": "pre"}], "parameters": {"t": 0.25}},
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "post", "parameters": {"weight": 1}},
            {"model": "pre", "parameters": {"weight": 3}},
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "post", "layer_range": [0, 2]}]},
            {"sources": [{"model": "pre", "layer_range": [2, 6]}]},
        ],
    },
}


@pytest.mark.parametrize("max_shard_size", [None, "2KB"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_merge_by_a_mergekit_config_stores_it_with_absolute_sources_and_is_verified(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, method: str, max_shard_size: str | None
) -> None:
    config = pair.folder / "mergekit.yml"
    config.write_text(yaml.safe_dump(CONFIGS[method], sort_keys=False))
    monkeypatch.chdir(pair.folder)
    merge(load_recipe(config, max_shard_size=max_shard_size), pair.out, fsync=False)
    text = yaml.safe_dump(CONFIGS[method], sort_keys=False)
    for side in ("pre", "post"):
        text = re.sub(rf"\b{side}\b$", str(pair.folder / side), text, flags=re.MULTILINE)
    for name in ("slrmerge.yaml", "mergekit_config.yml"):
        assert yaml.safe_load((pair.out / name).read_text()) == yaml.safe_load(text)
    monkeypatch.chdir(pair.out)
    assert verify(pair.out, full=True).against_sources
    assert len(list(pair.out.glob("*.safetensors"))) == (3 if max_shard_size else 2)
