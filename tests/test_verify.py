"""A single flipped bit anywhere in a finished merge is found, and its tensor named where the sources are at hand."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from slrmerge import MergePlan, execute, verify_checkpoint
from slrmerge.errors import CheckpointError, VerificationError
from tests.checkpoints import llama_config, llama_tensors, safetensors_bytes, write_checkpoint
from tests.conftest import Pair
from tests.merge.faults import Recorder, age, snapshot, write_files

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def hybrid(pair: Pair) -> Pair:
    """The pair, merged into three shards."""
    execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, fsync=False)
    return pair


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    """The smallest pair there is, merged."""
    sides = [llama_tensors(side, layers=1, hidden=1, vocabulary=1, tied=True) for side in ("pre", "post")]
    for name, tensors in zip(("pre", "post"), sides, strict=True):
        write_checkpoint(tmp_path / name, tensors, llama_config(layers=1))
    pair = Pair(tmp_path, *sides)
    execute(pair.plan(restore=[0, 0]), pair.out, fsync=False)
    return pair


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit of a file; twice puts it back."""
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def problems(folder: Path) -> list[str]:
    """What verification finds, as lines with names inside the folder."""
    try:
        verify_checkpoint(folder, threads=1)
    except VerificationError as error:
        return [str(problem).replace(f"{folder}/", "") for problem in error.problems]
    return []


def altered(name: str, place: str = "") -> list[str]:
    return [f"{name}: was altered after it was written{place}; merge again"]


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
            if problems(tiny.out) != altered(name):
                unnoticed.append((name, position, bit))
            flip(tiny.out / name, position, bit)
    assert unnoticed == []
    assert problems(tiny.out) == []


def test_a_flipped_bit_in_the_weights_names_its_tensor(hybrid: Pair) -> None:
    plan = hybrid.plan(restore=[2, 3], max_shard_size="2KB")
    for shard in plan.shards:
        places = {0: "in its header", len(shard.header) - 1: "in its header"}
        for tensor in shard.tensors:
            first, last = (len(shard.header) + offset for offset in tensor.info.data_offsets)
            places |= dict.fromkeys((first, last - 1), f"in {tensor.name}")
        for position, place in places.items():
            flip(hybrid.out / shard.name, position, 6)
            assert problems(hybrid.out) == altered(shard.name, f" ({place})")
            flip(hybrid.out / shard.name, position, 6)


def test_a_flipped_bit_in_a_blend_names_its_tensor(pair: Pair) -> None:
    execute(plan := pair.plan(alpha=0.5), pair.out, fsync=False)
    flip(pair.out / "model.safetensors", plan.shards[0].file_bytes - 1, 0)
    assert problems(pair.out) == altered("model.safetensors", f" (in {plan.shards[0].tensors[-1].name})")


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


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard is missing": (lambda out: (out / SHARD).unlink(), [f"{SHARD}: is missing; merge again"]),
    "the tokenizer is missing": (
        lambda out: (out / "tokenizer.json").unlink(),
        ["tokenizer.json: is missing; merge again"],
    ),
    "a shard is a folder": (
        lambda out: make_folder_of(out / SHARD),
        [f"{SHARD}: is missing; merge again"],
    ),
    "a shard is cut short": (
        lambda out: cut(out / SHARD),
        altered(SHARD, " (in model.layers.4.mlp.down_proj.weight)"),
    ),
    "a shard is longer": (lambda out: grow(out / SHARD), altered(SHARD, " (bytes past its end)")),
    "a shard is empty": (lambda out: os.truncate(out / SHARD, 0), altered(SHARD, " (in its header)")),
    "a stale single file": (
        lambda out: (out / "model.safetensors").write_bytes(b""),
        ["model.safetensors: was added after the merge; move it away"],
    ),
    "a pickle": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b""),
        ["pytorch_model.bin: was added after the merge; move it away"],
    ),
    "three at once": (
        harm_three,
        [
            "config.json: is missing; merge again",
            "x.safetensors: was added after the merge; move it away",
            *altered("README.md"),
        ],
    ),
    "the recipe was edited": (lambda out: grow(out / "slrmerge.yaml"), altered("slrmerge.yaml")),
    "the manifest is gone": (
        lambda out: (out / "slrmerge.json").unlink(),
        ["slrmerge.json: is not there; only folders that slrmerge wrote can be verified"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_whatever_is_missing_altered_or_added_is_named(hybrid: Pair, case: str) -> None:
    harm, expected = DAMAGE[case]
    harm(hybrid.out)
    assert problems(hybrid.out) == expected


def test_what_no_loader_looks_for_may_be_added(hybrid: Pair) -> None:
    write_files(hybrid.out, {"notes.md": b"good model", "plots/quality.png": b"", ".cache/x.json": b"{}"})
    assert problems(hybrid.out) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "modeling.py", "original/x.pth"])
def test_what_a_loader_would_take_may_not(hybrid: Pair, name: str) -> None:
    write_files(hybrid.out, {name: b"{}"})
    assert problems(hybrid.out) == [f"{name}: was added after the merge; move it away"]


# the report


def test_a_sound_merge_is_compared_with_its_sources_bit_by_bit(hybrid: Pair) -> None:
    recorder = Recorder()
    report = verify_checkpoint(hybrid.out, progress=recorder)
    written = snapshot(hybrid.out) or {}
    assert (report.folder, report.files) == (hybrid.out, len(written))
    assert report.checked_bytes == sum(len(raw) for name, raw in written.items() if name != "slrmerge.json")
    assert (report.against_sources, report.sources) == (True, "the weights are equal bit by bit")
    weights = sum(len(raw) for name, raw in written.items() if name.endswith(".safetensors"))
    assert recorder.started == [
        ("checking digests", report.checked_bytes),
        ("comparing with the sources", weights),
    ]
    assert recorder.advanced == report.checked_bytes + weights


@pytest.mark.parametrize("threads", [None, 1, 3, 50])
def test_the_number_of_threads_does_not_matter(hybrid: Pair, threads: int | None) -> None:
    assert verify_checkpoint(hybrid.out, threads=threads).against_sources


def test_progress_is_told_by_one_thread_at_a_time(hybrid: Pair) -> None:
    from threading import Event, Lock

    class Watching(Recorder):
        overlaps, busy = 0, Lock()

        def advance(self, count: int) -> None:
            if not self.busy.acquire(blocking=False):
                self.overlaps += 1
                return
            Event().wait(0.002)  # long enough for another thread to come by
            self.busy.release()

    watching = Watching()
    verify_checkpoint(hybrid.out, threads=4, progress=watching)
    assert watching.overlaps == 0


def test_without_the_sources_digests_are_checked_and_that_is_said(hybrid: Pair) -> None:
    (hybrid.folder / "post").rename(hybrid.folder / "elsewhere")
    report = verify_checkpoint(hybrid.out)
    missing = hybrid.out / "../post"
    assert (report.against_sources, report.sources) == (False, f"not compared: {missing} is not at hand")


def test_sources_that_moved_are_compared_where_they_are_now(hybrid: Pair) -> None:
    for side in ("pre", "post"):
        shutil.move(hybrid.folder / side, hybrid.folder / "models" / side)
    pre, post = hybrid.folder / "models/pre", hybrid.folder / "models/post"
    assert verify_checkpoint(hybrid.out, pretrained=pre, posttrained=post).sources == "the weights are equal bit by bit"
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(hybrid.out, pretrained=pre)
    assert str(caught.value) == (
        f"{hybrid.out / '../post'}: no such folder; name a folder with config.json and safetensors files"
    )


def test_a_merge_and_its_sources_may_move_together(hybrid: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (hybrid.folder / "models").mkdir()
    for name in ("pre", "post", "hybrid"):
        (hybrid.folder / name).rename(hybrid.folder / "models" / name)
    monkeypatch.chdir(hybrid.folder / "models" / "hybrid")
    assert verify_checkpoint(Path()).sources == "the weights are equal bit by bit"


@pytest.mark.parametrize("side", ["pretrained", "posttrained"])
def test_a_source_that_is_named_and_not_there_is_an_error(hybrid: Pair, side: str) -> None:
    nowhere = hybrid.folder / "nowhere"
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(
            hybrid.out,
            pretrained=nowhere if side == "pretrained" else None,
            posttrained=nowhere if side == "posttrained" else None,
        )
    assert str(caught.value) == (
        f"{hybrid.folder / 'nowhere'}: no such folder; name a folder with config.json and safetensors files"
    )


def test_another_checkpoint_in_a_sources_place_is_not_compared_with(hybrid: Pair) -> None:
    shutil.rmtree(hybrid.folder / "pre")
    write_checkpoint(hybrid.folder / "pre", llama_tensors("pre", hidden=4))
    report = verify_checkpoint(hybrid.out)
    there = hybrid.out / "../pre"
    assert (report.against_sources, report.sources) == (
        False,
        f"not compared: {there} is not the checkpoint that was merged",
    )


@pytest.mark.parametrize("layers", [7, 3])
def test_a_source_whose_config_was_edited_since_is_not_compared_with(hybrid: Pair, layers: int) -> None:
    (hybrid.folder / "post" / "config.json").write_text(json.dumps(llama_config(layers=layers)))
    report = verify_checkpoint(hybrid.out)
    assert (report.against_sources, report.sources) == (
        False,
        f"not compared: {hybrid.out / '../post'} is not the checkpoint that was merged",
    )


def test_source_data_that_changed_since_is_told_from_damage(hybrid: Pair) -> None:
    age(hybrid.folder / "pre")
    path = hybrid.folder / "pre" / "model.safetensors"
    changed = {**hybrid.pre}
    name = "model.layers.3.self_attn.k_proj.weight"
    changed[name] = changed[name]._replace(data=bytes(len(changed[name].data)))
    path.write_bytes(safetensors_bytes(changed, {"format": "pt"}))
    (problem,) = problems(hybrid.out)
    assert problem == (
        f"{SHARD}: is as it was written, but not what its sources give now (in {name}); "
        "the sources have changed since, or were changing then: merge again"
    )


def test_source_data_that_no_restored_layer_takes_may_change(hybrid: Pair) -> None:
    path = hybrid.folder / "pre" / "model.safetensors"
    flip(path, path.stat().st_size - 1, 0)  # the pre-trained head is not used
    assert verify_checkpoint(hybrid.out).against_sources


def test_a_plan_that_is_not_the_one_carried_out_is_not_called_equal(
    hybrid: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MergePlan, "origins", lambda self: {})
    report = verify_checkpoint(hybrid.out)
    assert not report.against_sources
    assert report.sources.startswith("not compared: slrmerge ")


def test_a_source_out_of_sight_is_not_at_hand(hybrid: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: "pre" not in str(path) and exists(path))
    assert verify_checkpoint(hybrid.out).sources.endswith("pre is not at hand")


def test_the_loaders_own_reader_has_a_say(hybrid: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(nullcontext[None]):
        def keys(self) -> list[str]:
            return []

        def __enter__(self) -> "Blind":  # type: ignore[override]
            return self

    monkeypatch.setattr("safetensors.safe_open", lambda path, framework: Blind())
    said = "is not what safetensors expects to read; please report this"
    assert problems(hybrid.out) == [f"model-0000{k}-of-00003.safetensors: {said}" for k in (1, 2, 3)]
