"""Finished pieces of an interrupted merge are kept; everything that is not certainly finished is written again."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from slrmerge.errors import BusyError
from slrmerge.io import files
from slrmerge.io.output_folder import OutputFolder, staging_folder
from slrmerge.io.pieces import write_piece
from slrmerge.io.progress import Progress
from slrmerge.merging import journal as journals
from slrmerge.merging import shard_writer
from slrmerge.merging.executor import execute, output_folder
from slrmerge.merging.journal import JOURNAL_NAME, Journal
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.verify import verify
from tests.checkpoints import llama_tensors, read_back, safetensors_bytes, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import Recorder, Stop, harm, kept_pieces, leftovers, snapshot, stop, tree
from tests.problems import refused

ONE_THREAD = MergeOptions(threads=1)


def stopped(pair: Pair, at: int = 8) -> Path:
    """Stop a merge into three shards after two; returns the staging folder."""
    with pytest.raises(Stop):
        execute(
            pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, options=ONE_THREAD, progress=Recorder(at, stop)
        )
    return staging_folder(pair.out)


def test_a_resumed_merge_writes_only_what_is_missing_and_gives_the_same_files(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    undisturbed = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    staging, recorder = stopped(pair), Recorder()
    result = execute(plan, pair.out, progress=recorder)
    assert recorder.counts == [2, 2]  # checked, intact
    assert str(staging) in recorder.said[0]
    assert recorder.started == [("merging", plan.shards[2].file_bytes)]
    assert (result.resumed_pieces, result.files) == (2, undisturbed)


@pytest.mark.parametrize("fault", ["edited", "truncated", "grown", "deleted"])
def test_a_finished_shard_that_was_damaged_is_written_again(pair: Pair, fault: str) -> None:
    staging, recorder = stopped(pair), Recorder()
    harm(staging / "model-00001-of-00003.safetensors", fault)
    result = execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, progress=recorder)
    assert result.resumed_pieces == 1
    assert recorder.counts == [2, 1]
    layers = {f".{k}." for k in (2, 3)}
    expected = {n: (pair.pre if any(k in n for k in layers) else pair.post)[n] for n in pair.post}
    assert read_back(pair.out) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["FIFO", "folder", "link", "hard link"])
@pytest.mark.parametrize(("name", "resumed"), [(JOURNAL_NAME, 0), ("model-00001-of-00003.safetensors", 1)])
def test_what_is_not_a_file_of_its_own_is_written_again(pair: Pair, name: str, resumed: int, kind: str) -> None:
    staging, mine = stopped(pair), pair.folder / "mine"
    mine.write_bytes((staging / name).read_bytes())
    before = mine.read_bytes()
    (staging / name).unlink()
    if kind == "FIFO":
        os.mkfifo(staging / name)
    elif kind == "folder":
        (staging / name).mkdir()
    elif kind == "link":
        (staging / name).symlink_to(mine)
    else:
        (staging / name).hardlink_to(mine)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    assert execute(plan, pair.out).resumed_pieces == resumed
    assert verify(pair.out).against_sources
    assert mine.read_bytes() == before


@pytest.mark.parametrize("change", ["recipe", "source", "size"])
def test_another_merge_starts_from_nothing(pair: Pair, change: str) -> None:
    stopped(pair)
    if change == "source":
        path = pair.folder / "pre" / "model.safetensors"
        path.write_bytes(safetensors_bytes(llama_tensors("another"), {"format": "pt"}))
    plan = pair.plan(
        restore=[2, 4] if change == "recipe" else [2, 3], max_shard_size="1KB" if change == "size" else "2KB"
    )
    recorder = Recorder()
    assert execute(plan, pair.out, progress=recorder).resumed_pieces == 0
    assert recorder.said == []
    assert len(list(pair.out.glob("*.safetensors"))) == len(plan.shards)


def test_a_resumed_merge_needs_space_for_the_rest_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(pair)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    free = plan.output_bytes - plan.shards[0].file_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert execute(plan, pair.out).resumed_pieces == 2


def test_checking_a_plan_changes_nothing_that_an_earlier_run_left(pair: Pair) -> None:
    stopped(pair)
    recipe = pair.recipe(restore=[2, 3], max_shard_size="2KB")
    before = tree(pair.folder)
    output_folder(plan_merge(recipe), pair.out, MergeOptions()).check()
    assert tree(pair.folder) == before


@pytest.mark.parametrize(
    ("tail", "finished"),
    [
        (b'["model-00002', {("model-00001", 0)}),
        (b'["model-00002", 1, "00f', {("model-00001", 0)}),
        (b"\x00" * 8, {("model-00001", 0)}),
        (b'["model-00002", 1, "00ff"]', {("model-00001", 0), ("model-00002", 1)}),
    ],
)
def test_a_journal_whose_last_line_was_cut_short_keeps_the_others(
    tmp_path: Path, tail: bytes, finished: set[tuple[str, int]]
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b'the plan\n["model-00001", 0, "00ff"]\n' + tail)
    assert Journal.open(tmp_path, "the plan", durable=False).finished == dict.fromkeys(finished, b"\x00\xff")


def test_tensors_with_nan_are_kept_with_the_pieces_and_forgotten_without_them(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "the plan", durable=False)
    journal.note_nans({"b", "a"})
    journal.note_nans({"a", "c"})
    assert Journal.open(tmp_path, "the plan", durable=False).nan_names == set()  # no piece is finished
    journal.record(("model-00002", 5), b"\x00\xff")
    journal.note_nans({"d"})
    (tmp_path / JOURNAL_NAME).write_bytes(b'the plan\n{"nan": "a"}\n["model-00002", 5, "00ff"]\n{"nan": 1}\n{"nan')
    again = Journal.open(tmp_path, "the plan", durable=False)
    assert (again.nan_names, again.finished) == ({"a"}, {("model-00002", 5): b"\x00\xff"})
    assert Journal.open(tmp_path, "the plan", durable=False).nan_names == {"a"}
    assert Journal.open(tmp_path, "another plan", durable=False).nan_names == set()


def test_a_resumed_merge_still_notes_what_was_not_a_number_in_the_pieces_of_the_first_run(pair: Pair) -> None:
    plan = pair.plan(alpha=0.5, max_shard_size="2KB")
    first = plan.shards[0].tensors[0].name
    post = pair.post | {first: pair.post[first]._replace(data=b"\xc0\x7f" + pair.post[first].data[2:])}
    shutil.rmtree(pair.folder / "post")
    write_checkpoint(pair.folder / "post", post, shards=2)
    plan = pair.plan(alpha=0.5, max_shard_size="2KB")
    with pytest.raises(Stop):
        execute(plan, pair.out, options=ONE_THREAD, progress=Recorder(18, stop))  # in the second piece of three
    result = execute(plan, pair.out)
    assert result.resumed_pieces > 0
    assert [first in note for note in result.notes if "NaN" in note] == [True]


def test_an_entry_after_a_line_that_was_cut_short_is_kept(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b'the plan\n["model-0000')
    Journal.open(tmp_path, "the plan", durable=False).record(("model-00002", 5), b"\x00\xff")
    assert Journal.open(tmp_path, "the plan", durable=False).finished == {("model-00002", 5): b"\x00\xff"}


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"1",
        b"[]",
        b"{}",
        b'["x", 1]',
        b'["x", "y", "z"]',
        b'["x", 1, 5]',
        b'["x", 1, ""]',
        b'[["x"], 1, "00"]',
        b'["x", [1], "00"]',
        b'["model-00001-of-00003.safetensors", 0, "00"]',
        b'["model-00001-of-00003.safetensors", "0", "00"]',
        b'["model-00001-of-00003.safetensors", 7, "00"]',
    ],
    ids=repr,
)
def test_an_invalid_journal_line_is_ignored(pair: Pair, line: bytes) -> None:
    staging = stopped(pair)
    with (staging / JOURNAL_NAME).open("ab") as file:
        file.write(line + b"\n")
    execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out)
    assert len(read_back(pair.out)) == len(pair.post)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_piece_that_could_not_be_recorded_does_not_count_as_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "JOURNAL_NAME", "full")
    journal = Journal(Path("/dev"), {}, "plan", durable=False)
    with pytest.raises(OSError) as caught:
        journal.record(("model-00001", 0), b"\x00\xff")
    assert caught.value.errno == errno.ENOSPC
    assert journal.finished == {}


def test_a_journal_names_each_finished_piece_with_its_digest(pair: Pair) -> None:
    plan, staging = pair.plan(restore=[2, 3], max_shard_size="2KB"), stopped(pair)
    fingerprint, *lines = (staging / JOURNAL_NAME).read_text().splitlines()
    assert fingerprint == plan.fingerprint()
    assert [json.loads(line) for line in lines] == [
        [shard.name, 0, xxhash.xxh3_128_hexdigest((staging / shard.name).read_bytes())] for shard in plan.shards[:2]
    ]


# several pieces to a shard

SMALL_PIECE = 512  # of the 2,000 bytes or so of a shard here
RULES: list[dict[str, Any]] = [{"restore": [2, 3]}, {"alpha": 0.5, "dtype": "float32", "restore": [[2, 3]]}]


def pieces_of(plan: MergePlan) -> dict[tuple[str, int], int]:
    """The pieces of every shard in order, each with its size."""
    return {
        (shard.name, start // SMALL_PIECE): min(SMALL_PIECE, shard.file_bytes - start)
        for shard in plan.shards
        for start in range(0, shard.file_bytes, SMALL_PIECE)
    }


def journaled(staging: Path) -> list[tuple[str, int]]:
    lines = (staging / JOURNAL_NAME).read_text().splitlines()[1:]
    return [(name, number) for name, number, _ in map(json.loads, lines)]


def written_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The pieces that are written from now on."""
    written: list[tuple[str, int]] = []

    def watched(path: Path, start: int, chunks: Iterable[memoryview], **options: Any) -> bytes:
        written.append((path.name, start // SMALL_PIECE))
        return write_piece(path, start, chunks, **options)

    monkeypatch.setattr(shard_writer, "write_piece", watched)
    return written


class StopHalfDone(Progress):
    """Stops a merge once `finished` pieces are in the journal."""

    def __init__(self, staging: Path, finished: int) -> None:
        super().__init__()
        self.staging, self.finished = staging, finished

    def on_advance(self, count: int) -> None:
        if self.finished <= len(journaled(self.staging)):
            raise Stop


def stop_inside_a_shard(pair: Pair, plan: MergePlan) -> tuple[Path, list[tuple[str, int]]]:
    """Stop a merge where the second shard is half done; returns the staging folder and the finished pieces."""
    pieces, staging = list(pieces_of(plan)), staging_folder(pair.out)
    half_done = [number for number, (name, k) in enumerate(pieces) if name == plan.shards[1].name and k == 2]
    with pytest.raises(Stop):
        execute(plan, pair.out, options=ONE_THREAD, progress=StopHalfDone(staging, half_done[0]))
    return staging, pieces[: half_done[0]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rules", RULES, ids=["copied", "blended"])
def test_a_merge_stopped_inside_a_shard_keeps_its_finished_pieces_and_writes_only_the_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any], threads: int
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", SMALL_PIECE)
    plan = pair.plan(**rules, max_shard_size="2KB")
    undisturbed = execute(plan, pair.out)
    wanted = snapshot(pair.out)
    shutil.rmtree(pair.out)
    pieces = pieces_of(plan)
    staging, kept = stop_inside_a_shard(pair, plan)
    second = [piece for piece in pieces if piece[0] == plan.shards[1].name]
    assert [piece for piece in kept if piece in second] == second[:2] != second
    assert journaled(staging) == kept
    assert sorted(path.name for path in staging.iterdir()) == sorted({JOURNAL_NAME, *(name for name, _ in kept)})
    written, recorder = written_by(monkeypatch), Recorder()
    result = execute(plan, pair.out, options=MergeOptions(threads=threads), progress=recorder)
    missing = [piece for piece in pieces if piece not in kept]
    assert sorted(written) == missing
    assert recorder.counts == [len(kept)] * 2
    rest = sum(pieces[piece] for piece in missing)
    assert (recorder.started, recorder.advanced) == ([("merging", rest)], rest)
    assert (result.resumed_pieces, result.files) == (len(kept), undisturbed.files)
    assert snapshot(pair.out) == wanted
    assert verify(pair.out).against_sources
    assert leftovers(pair.out) == []


def test_the_error_of_a_stopped_merge_reports_the_pieces_that_are_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", SMALL_PIECE)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    total = len(pieces_of(plan))
    with pytest.raises(Stop) as caught:
        execute(plan, pair.out, options=ONE_THREAD, progress=Recorder(8, stop))
    staging = staging_folder(pair.out)
    kept = len(journaled(staging))
    assert 0 < kept < total
    assert kept_pieces(caught.value) == (kept, total)
    assert str(staging) in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("fault", "spoilt"),
    [
        ("edited", lambda count: [count - 1]),  # in its last byte
        ("truncated", lambda count: range((count - 1) // 2, count)),  # to half its size
        ("grown", range),
        ("emptied", range),
        ("deleted", range),
    ],
)
def test_the_intact_pieces_of_a_damaged_shard_are_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: str, spoilt: Callable[[int], Iterable[int]]
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", SMALL_PIECE)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    undisturbed = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    staging, kept = stop_inside_a_shard(pair, plan)
    first = plan.shards[0].name
    harm(staging / first, fault)
    lost = [(first, number) for number in spoilt(len([piece for piece in kept if piece[0] == first]))]
    written = written_by(monkeypatch)
    result = execute(plan, pair.out, options=ONE_THREAD)
    assert sorted(written) == [piece for piece in pieces_of(plan) if piece in lost or piece not in kept]
    assert (result.resumed_pieces, result.files) == (len(kept) - len(lost), undisturbed)


def test_missing_pieces_are_written_in_their_places(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", SMALL_PIECE)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    undisturbed = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    staging, kept = stop_inside_a_shard(pair, plan)
    lost = kept[1:6:2]
    journal = staging / JOURNAL_NAME
    plan_line, *lines = journal.read_bytes().splitlines(keepends=True)
    still = [line for line, piece in zip(lines, kept, strict=True) if piece not in lost]
    journal.write_bytes(b"".join([plan_line, *still]))
    for name, number in lost:
        with (staging / name).open("r+b") as file:
            file.seek(number * SMALL_PIECE)
            file.write(bytes(pieces_of(plan)[name, number]))
    written = written_by(monkeypatch)
    result = execute(plan, pair.out)
    assert len(lost) == 3
    assert sorted(written) == [piece for piece in pieces_of(plan) if piece in lost or piece not in kept]
    assert (result.resumed_pieces, result.files) == (len(kept) - 3, undisturbed)


def test_a_resumed_merge_needs_no_space_for_the_space_its_shards_occupy(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", SMALL_PIECE)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    staging, kept = stop_inside_a_shard(pair, plan)
    begun = [shard for shard in plan.shards if (staging / shard.name).exists()]
    allocated = sum(min(files.allocated_bytes(staging / shard.name), shard.file_bytes) for shard in begun)
    assert sum(pieces_of(plan)[piece] for piece in kept) <= allocated < plan.output_bytes
    required: list[int] = []
    require_space = OutputFolder.require_space

    def watched(self: OutputFolder, needed_bytes: int) -> None:
        required.append(needed_bytes)
        require_space(self, needed_bytes)

    monkeypatch.setattr(OutputFolder, "require_space", watched)
    assert execute(plan, pair.out).resumed_pieces == len(kept)
    assert required == [plan.output_bytes - allocated]


# two at a time


def test_a_second_run_at_the_same_time_is_refused_and_leaves_the_first_alone(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3])
    refusals: list[str] = []

    def second_run() -> None:
        with refused(BusyError, "output-busy") as caught:
            execute(plan, pair.out)
        refusals.append(caught.value.problems[0].where)

    execute(plan, pair.out, progress=Recorder(2, second_run))
    assert refusals == [str(pair.out)]
    assert len(read_back(pair.out)) == len(pair.post)
    assert leftovers(pair.out) == []


def test_runs_with_different_targets_do_not_wait_for_each_other(pair: Pair) -> None:
    with OutputFolder(pair.folder / "another").locked(Progress()):
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert len(read_back(pair.out)) == len(pair.post)
