"""The folder of an evaluation: others are refused, and a full disk keeps what is complete."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slrmerge.errors import BusyError, NoSpaceError, OutputError
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.progress import Progress
from tests.evaluation.work import ALL, RESULTS, Work, held, keys, lines, seeds, sent
from tests.problems import refused


def refuses_folder(work: Work, where: Path, code: str) -> None:
    """The folder is refused because of what is at `where`, and nothing is requested."""
    with refused(OutputError, code) as caught:
        work.evaluate()
    assert caught.value.problems[0].where == str(where)
    assert work.server.requests == []


def test_a_folder_of_another_task_is_refused(work: Work) -> None:
    work.out.mkdir()
    (work.out / "evaluation.json").write_text('{"slrmerge": "0.1.0", "task": "creative"}\n')
    refuses_folder(work, work.out, "other-task")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "5", '"task"', "[" * 10_000, '{"task": 1e400}', '{"task": NaN}']
)
def test_a_folder_with_an_invalid_summary_is_refused(work: Work, content: str) -> None:
    work.out.mkdir()
    (work.out / "evaluation.json").write_text(content)
    refuses_folder(work, work.out / "evaluation.json", "not-an-evaluation")
    assert (work.out / "evaluation.json").read_text() == content


def test_a_summary_that_is_a_fifo_is_refused(work: Work) -> None:
    work.out.mkdir()
    os.mkfifo(work.out / "evaluation.json")
    with refused(OutputError, "io-error"):
        work.evaluate()


def test_a_folder_with_other_files_is_refused(work: Work) -> None:
    work.out.mkdir()
    (work.out / "thesis.tex").write_text("years of work")
    refuses_folder(work, work.out, "not-an-evaluation")
    assert [path.name for path in work.out.iterdir()] == ["thesis.tex"]


def test_a_file_as_folder_is_refused(work: Work) -> None:
    work.out.write_text("years of work")
    refuses_folder(work, work.out, "output-is-a-file")
    assert work.out.read_text() == "years of work"


def test_an_empty_folder_is_used(work: Work) -> None:
    work.out.mkdir()
    work.evaluate()
    assert held(work.out) == keys("post")


def test_a_file_of_other_lines_is_refused(work: Work) -> None:
    work.stop_after(2)
    file = work.out / "samples.jsonl"
    file.write_bytes(b"years of work\n" + file.read_bytes())
    before = file.read_bytes()
    with refused(OutputError, "not-a-sample") as caught:
        work.evaluate()
    assert caught.value.problems[0].where == f"{file}:1"
    assert file.read_bytes() == before


def test_a_second_run_at_the_same_time_is_refused(work: Work) -> None:
    work.stop_after(2)
    requests, file = len(work.server.requests), (work.out / "samples.jsonl").read_bytes()
    with OutputFolder(work.out, overwrite=True).locked(Progress()), refused(BusyError, "output-busy"):
        work.evaluate()
    assert (len(work.server.requests), (work.out / "samples.jsonl").read_bytes()) == (requests, file)
    assert len(work.asked()) == ALL - 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_full_disk_keeps_complete_samples(work: Work, small_disk: Path, concurrency: int) -> None:
    work.out = small_disk / "out"
    work.server.say = lambda prompt, seed, body: str(seed % 10) * 20_001
    with refused(NoSpaceError, "no-space") as caught:
        work.evaluate(concurrency=concurrency)
    there = held(work.out)
    assert caught.value.problems[0].where == str(work.out / "samples.jsonl")
    assert caught.value.__notes__[0].startswith(f"{len(there)} samples are kept in {work.out}")
    assert 0 < len(there) < ALL
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert sent(work.asked(concurrency=concurrency)) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")
    assert {len(line["text"]) for line in lines(work.out / "samples.jsonl")} == {20_001}


def test_a_disk_that_is_full_for_results_keeps_all_samples(work: Work, drawn: None, small_disk: Path) -> None:
    work.out = small_disk / "out"
    work.stop_after(ALL - 1)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    with refused(NoSpaceError, "no-space"):
        work.evaluate()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert work.asked() == []
    assert held(work.out) == keys("post")
    assert all((work.out / name).stat().st_size for name in RESULTS)


def test_a_disk_that_is_full_at_the_start_does_not_spoil_the_folder(work: Work, small_disk: Path) -> None:
    work.out = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with refused(NoSpaceError, "no-space"):
        work.evaluate()
    ballast.unlink()
    work.evaluate()
    assert held(work.out) == keys("post")


def test_the_root_is_refused(work: Work) -> None:
    with refused(OutputError, "mount-point"):
        work.evaluate(Path("/"))
