"""What was finished before a merge ended is not done again; what is not sure is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge import execute, files
from slrmerge.errors import BusyError
from slrmerge.merge.journal import JOURNAL_NAME, Journal
from slrmerge.writer import Written
from tests.checkpoints import llama_tensors, read_back, safetensors_bytes
from tests.cli import run
from tests.conftest import Pair
from tests.merge.faults import Recorder, Stop, harm, leftovers, stop, tree


def stopped(pair: Pair, at: int = 8) -> Path:
    """A merge into three shards that ended after two; returns where it left them."""
    with pytest.raises(Stop):
        execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, threads=1, progress=Recorder(at, stop))
    return files.staging_folder(pair.out)


def test_a_resumed_merge_writes_only_what_is_missing_and_gives_the_same_files(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    undisturbed = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    staging, recorder = stopped(pair), Recorder()
    result = execute(plan, pair.out, progress=recorder)
    assert recorder.said == [
        f"resuming: checking 2 finished shards in {staging}",
        "resuming: 2 shards are as they should be",
    ]
    assert recorder.started == [("merging", plan.shards[2].file_bytes)]
    assert (result.resumed_shards, result.files) == (2, undisturbed)


@pytest.mark.parametrize("fault", ["edited", "truncated", "grown", "deleted"])
def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(pair: Pair, fault: str) -> None:
    staging, recorder = stopped(pair), Recorder()
    harm(staging / "model-00001-of-00003.safetensors", fault)
    result = execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, progress=recorder)
    assert result.resumed_shards == 1
    assert recorder.said[1:] == ["resuming: 1 shards are as they should be"]
    layers = {f".{k}." for k in (2, 3)}
    expected = {n: (pair.pre if any(k in n for k in layers) else pair.post)[n] for n in pair.post}
    assert read_back(pair.out) == expected


@pytest.mark.parametrize("change", ["recipe", "source", "size"])
def test_a_merge_of_something_else_starts_anew(pair: Pair, change: str) -> None:
    stopped(pair)
    if change == "source":
        path = pair.folder / "pre" / "model.safetensors"
        path.write_bytes(safetensors_bytes(llama_tensors("another"), {"format": "pt"}))
    plan = pair.plan(
        restore=[2, 4] if change == "recipe" else [2, 3], max_shard_size="1KB" if change == "size" else "2KB"
    )
    recorder = Recorder()
    assert execute(plan, pair.out, progress=recorder).resumed_shards == 0
    assert recorder.said == []
    assert len(list(pair.out.glob("*.safetensors"))) == len(plan.shards)


def test_a_resumed_merge_needs_room_for_the_rest_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(pair)
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    free = plan.output_bytes - plan.shards[0].file_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    result = run(pair.recipe_file(restore=[2, 3], max_shard_size="2KB"), "--out", pair.out)
    assert (result.exit_code, result.stderr.splitlines()[-1:]) == (0, ["resuming: 2 shards are as they should be"])


def test_a_dry_run_touches_nothing_an_earlier_run_left(pair: Pair) -> None:
    stopped(pair)
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    before = tree(pair.folder)
    assert run(recipe, "--out", pair.out, "--dry-run").exit_code == 0
    assert tree(pair.folder) == before


@pytest.mark.parametrize(
    ("tail", "finished"),
    [
        (b'["model-00002', {"model-00001"}),
        (b"\x00" * 8, {"model-00001"}),
        (b'["model-00002", 5, "xxh3_128:0"]', {"model-00001", "model-00002"}),
    ],
)
def test_a_journal_whose_last_line_was_cut_short_keeps_the_others(
    tmp_path: Path, tail: bytes, finished: set[str]
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b'the plan\n["model-00001", 4, "xxh3_128:0"]\n' + tail)
    assert Journal.open(tmp_path, "the plan", fsync=False).finished.keys() == finished


def test_what_is_recorded_after_a_line_cut_short_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b'the plan\n["model-0000')
    Journal.open(tmp_path, "the plan", fsync=False).record("model-00002", Written(5, "xxh3_128:0"))
    assert Journal.open(tmp_path, "the plan", fsync=False).finished == {"model-00002": Written(5, "xxh3_128:0")}


@pytest.mark.parametrize("line", [b"\xff\xfe", b"1", b"[]", b'[["x"], 1, "y"]', b'["x", 1]', b"{}", b'["x", "y", "z"]'])
def test_a_journal_that_makes_no_sense_costs_work_and_no_more(pair: Pair, line: bytes) -> None:
    staging = stopped(pair)
    with (staging / JOURNAL_NAME).open("ab") as file:
        file.write(line + b"\n")
    execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out)
    assert len(read_back(pair.out)) == len(pair.post)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_shard_that_could_not_be_recorded_does_not_count_as_finished(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).symlink_to("/dev/full")
    journal = Journal(tmp_path, {}, "plan", fsync=False)
    with pytest.raises(OSError, match="No space left"):
        journal.record("model-00001", Written(5, "xxh3_128:0"))
    assert journal.finished == {}


def test_a_journal_names_each_shard_with_its_size_and_digest(pair: Pair) -> None:
    plan, staging = pair.plan(restore=[2, 3], max_shard_size="2KB"), stopped(pair)
    fingerprint, *lines = (staging / JOURNAL_NAME).read_text().splitlines()
    assert fingerprint == plan.fingerprint()
    assert [json.loads(line)[:2] for line in lines] == [[shard.name, shard.file_bytes] for shard in plan.shards[:2]]


def test_a_second_run_at_the_same_time_says_so_and_leaves_the_first_alone(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3])
    told: list[str] = []

    def second_run() -> None:
        with pytest.raises(BusyError) as caught:
            execute(plan, pair.out)
        told.append(str(caught.value))

    execute(plan, pair.out, progress=Recorder(2, second_run))
    assert told == [f"{pair.out}: another slrmerge is writing it; wait for that run, or choose another --out"]
    assert len(read_back(pair.out)) == len(pair.post)
    assert leftovers(pair.out) == []


def test_a_second_run_on_the_command_line_exits_with_8(pair: Pair) -> None:
    with files.exclusive(pair.out):
        result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert result.stderr.splitlines() == [
        "error: the target is in use",
        f"  {pair.out}: another slrmerge is writing it; wait for that run, or choose another --out",
    ]
    assert (result.exit_code, result.stdout, leftovers(pair.out)) == (8, "", [])


def test_two_runs_on_different_targets_do_not_mind_each_other(pair: Pair) -> None:
    with files.exclusive(pair.folder / "another"):
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert len(read_back(pair.out)) == len(pair.post)
