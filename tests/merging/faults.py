"""Ways for a merge to go wrong at a chosen moment, and a look at what it left behind.

As a program (`python -m tests.merging.faults`) it kills, interrupts or limits merges in processes of its own.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, TypedDict

from slrmerge.errors import SlrmergeError
from slrmerge.io import files, pieces
from slrmerge.io.output_folder import staging_folder
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.journal import JOURNAL_NAME
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge

ROOT = Path(__file__).parents[2]
OLD = {"config.json": b"{}", "model.safetensors": b"old weights", "chat_templates/more.jinja": b"old too"}
STATES = ("absent", "old", "new", "broken")


def nothing() -> None:
    pass


class Recorder(Progress):
    """A Progress that records everything it receives, and calls `act` at call number `at` to `advance`."""

    def __init__(self, at: int = 0, act: Callable[[], object] = nothing) -> None:
        super().__init__()
        self.at, self.act = at, act
        self.started: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.calls = self.advanced = 0

    def on_start(self, description: str, total: int, unit: str) -> None:
        self.started.append((description, total))

    def on_advance(self, count: int) -> None:
        self.calls += 1
        self.advanced += count
        if self.calls == self.at:
            self.act()

    def on_message(self, text: str) -> None:
        self.said.append(text)

    @property
    def counts(self) -> list[int]:
        """The first number of each message that has one."""
        found = [re.search(r"\d[\d,]*", text) for text in self.said]
        return [int(match[0].replace(",", "")) for match in found if match]


def kept_pieces(error: BaseException) -> tuple[int, int] | None:
    """The numbers of pieces, kept and in all, in the note of an error; None where it has no note of kept pieces."""
    for note in getattr(error, "__notes__", ()):
        if match := re.match(r"([\d,]+) of ([\d,]+) pieces", note):
            return int(match[1].replace(",", "")), int(match[2].replace(",", ""))
    return None


class Stop(Exception):  # noqa: N818 (stands for anything that ends a run)
    """What a test raises in the middle of a merge."""


def stop() -> None:
    raise Stop


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder, with its bytes; None where the folder does not exist."""
    if not folder.exists():
        return None
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def leftovers(out: Path) -> list[str]:
    """The hidden files and folders beside `out`, where slrmerge keeps its own."""
    return sorted(path.name for path in out.parent.glob(".*"))


def age(folder: Path) -> None:
    """Set old modification times, so that a later edit changes them even with a coarse clock."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))


def tree(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Everything below a folder, with the attributes that any write changes."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def harm(path: Path, fault: str) -> None:
    """Damage a file in the way that `fault` names."""
    if fault == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "emptied":
        os.truncate(path, 0)
    elif fault == "edited":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
    elif fault == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif fault == "replaced":
        (path.parent / "new").write_bytes(path.read_bytes())
        (path.parent / "new").replace(path)
    else:
        path.unlink()


class Row(TypedDict):
    """One kill: before which step, the state that it left, and the outcome of the next run."""

    at: str
    left: str
    journaled: int
    resumed: int
    said: list[str]
    then: str
    leftovers: list[str]


def kill_everywhere(plan: MergePlan, out: Path, *, overwrite: bool, exchange: bool) -> Iterator[Row]:
    """Merge again and again, each time killed one step later, until a run completes."""
    execute(plan, out)
    new = snapshot(out)

    def state() -> str:
        return STATES[[None, OLD, new, snapshot(out)].index(snapshot(out))]

    for number in count(1):
        for path in (out, *out.parent.glob(".*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if overwrite:
            write_files(out, OLD)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            _die_at(number, writing, exchange=exchange)
            execute(plan, out, options=MergeOptions(overwrite=overwrite, threads=1))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            at = pipe.read()
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"step {number}: {status}")
        left = state()
        journal = staging_folder(out) / JOURNAL_NAME
        journaled = max(0, len(journal.read_text().splitlines()) - 1) if journal.exists() else 0
        recorder = Recorder()
        options = MergeOptions(overwrite=overwrite or left != "absent", fsync=False)
        again = execute(plan, out, options=options, progress=recorder)
        yield Row(
            at=at, left=left, journaled=journaled, resumed=again.resumed_pieces, said=recorder.said, then=state(),
            leftovers=leftovers(out),
        )  # fmt: skip


def _die_at(number: int, report: int, *, exchange: bool) -> None:
    """Make this process kill itself before its step `number` that changes anything on the disk; writes are torn."""
    left = number
    write, real_exchange = os.write, files.exchange

    def step(what: str, last_act: Callable[[], object] = nothing) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            last_act()
            write(report, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            step(f"{event} {args[0]}")
        elif event == "fcntl.ioctl":
            step("clone")

    def torn_write(fd: int, data: memoryview) -> int:
        step("write", lambda: write(fd, data[: len(data) // 2]))
        return write(fd, data)

    def exchange_step(first: Path, second: Path) -> bool:
        step("exchange")
        return exchange and real_exchange(first, second)

    sys.addaudithook(audit)
    os.write = torn_write  # type: ignore[assignment]
    os.fsync = lambda fd: step("fsync")
    files.exchange = exchange_step


class Outcome(TypedDict):
    """How a merge in a process of its own ended: the codes and places of its problems, and its notes."""

    codes: list[str]
    where: list[str]
    notes: list[str]


def interrupt(at: int, recipe: str, out: str) -> None:
    """Merge and press Ctrl-C at chunk number `at`, while a worker is in the middle of a shard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite itself runs in the background
    noticed, shutdown = Event(), ThreadPoolExecutor.shutdown

    def noticing_shutdown(self: ThreadPoolExecutor, **options: bool) -> None:
        noticed.set()
        shutdown(self, **options)

    def press() -> None:
        noticed.clear()  # other pools, such as that of the plan, have shut down
        os.kill(os.getpid(), signal.SIGINT)
        noticed.wait(60)

    ThreadPoolExecutor.shutdown = noticing_shutdown  # type: ignore[method-assign,assignment]
    merge_and_report(recipe, out, progress=Recorder(at, press))


def merge_and_report(recipe: str, out: str, progress: Progress | None = None) -> None:
    """Merge with one thread; where that fails, print an Outcome as JSON and exit as the command line does."""
    try:
        merge(recipe, out, threads=1, progress=progress)
    except (SlrmergeError, KeyboardInterrupt) as error:
        problems = error.problems if isinstance(error, SlrmergeError) else ()
        outcome = Outcome(
            codes=[problem.code for problem in problems],
            where=[problem.where for problem in problems],
            notes=getattr(error, "__notes__", []),
        )
        json.dump(outcome, sys.stdout)
        sys.exit(error.exit_code if isinstance(error, SlrmergeError) else 130)


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "interrupt":
        interrupt(int(words[0]), words[1], words[2])
    elif command == "limit":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(words[0]), int(words[0])))
        merge_and_report(words[1], words[2])
    else:
        made = plan_merge(words[0])
        if "pieces" in command:
            pieces.PIECE_BYTES = 1024  # of shards of some 2,000 bytes
        if "cloned" in command:
            pieces.PIECE_BYTES = 1 << 14  # of shards of some 40,000 bytes, in whole blocks
        rows = kill_everywhere(made, Path(words[1]), overwrite="overwrite" in command, exchange="swap" in command)
        json.dump(list(rows), sys.stdout)
