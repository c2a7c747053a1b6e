"""Ways for a merge to go wrong at a chosen moment, and a look at what it left behind.

As a program (`python -m tests.merge.faults`) it kills, interrupts or limits merges in processes of its own.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, TypedDict

from slrmerge import MergePlan, execute, load_recipe, plan_merge, writer
from slrmerge import files as durable
from slrmerge.hub import open_pair

ROOT = Path(__file__).parents[2]
OLD = {"config.json": b"{}", "model.safetensors": b"old weights", "chat_templates/more.jinja": b"old too"}
STATES = ("absent", "old", "new", "broken")


def nothing() -> None:
    pass


class Recorder:
    """A Progress that remembers what it was told, and does `act` at its call number `at` to `advance`."""

    def __init__(self, at: int = 0, act: Callable[[], object] = nothing) -> None:
        self.at, self.act = at, act
        self.started: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.calls = self.advanced = 0

    def start(self, what: str, total: int, unit: str = "B") -> None:
        self.started.append((what, total))

    def stage(self, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        self.calls += 1
        self.advanced += count
        if self.calls == self.at:
            self.act()

    def say(self, message: str) -> None:
        self.said.append(message)


class Stop(Exception):  # noqa: N818 (it stands for anything that ends a run)
    """What a test raises in the middle of a merge."""


def stop() -> None:
    raise Stop


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder, with its bytes; None where there is no such folder."""
    if not folder.exists():
        return None
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def leftovers(out: Path) -> list[str]:
    """What slrmerge keeps beside `out` while it works."""
    return sorted(path.name for path in out.parent.glob(".*"))


def age(folder: Path) -> None:
    """Date every file back, so that a later edit shows in its time however coarse the clock."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))


def tree(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Everything below a folder with what any write to it would change."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def harm(path: Path, fault: str) -> None:
    """Do to a file what its `fault` says."""
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
    """One kill: before which step, what it left, and what the next run made of it."""

    at: str
    left: str
    journaled: int
    resumed: int
    said: list[str]
    then: str
    leftovers: list[str]


def kill_everywhere(plan: MergePlan, out: Path, *, overwrite: bool, exchange: bool) -> Iterator[Row]:
    """Merge again and again, each time killed one step later, until a run gets through."""
    execute(plan, out)
    new = snapshot(out)

    def state() -> str:
        return STATES[[None, OLD, new, snapshot(out)].index(snapshot(out))]

    for number in count(1):
        for path in (out, *out.parent.glob(".*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if overwrite:
            write_files(out, OLD)
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            _die_at(number, tell, exchange=exchange)
            execute(plan, out, overwrite=overwrite, threads=1)
            os._exit(0)
        os.close(tell)
        with os.fdopen(told) as pipe:
            at = pipe.read()
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"step {number}: {status}")
        left = state()
        journal = durable.staging_folder(out) / ".slrmerge-journal"
        journaled = max(0, len(journal.read_text().splitlines()) - 1) if journal.exists() else 0
        recorder = Recorder()
        again = execute(plan, out, overwrite=overwrite or left != "absent", fsync=False, progress=recorder)
        yield Row(
            at=at, left=left, journaled=journaled, resumed=again.resumed_pieces, said=recorder.said, then=state(),
            leftovers=leftovers(out),
        )  # fmt: skip


def _die_at(number: int, tell: int, *, exchange: bool) -> None:
    """Have this process kill itself before its step `number` that changes anything on disk; writes are torn."""
    left = number
    write, really_exchange = os.write, durable._exchange

    def step(what: str, last_act: Callable[[], object] = nothing) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            last_act()
            write(tell, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            step(f"{event} {args[0]}")

    def torn_write(fd: int, data: memoryview) -> int:
        step("write", lambda: write(fd, data[: len(data) // 2]))
        return write(fd, data)

    def exchange_step(first: Path, second: Path) -> bool:
        step("exchange")
        return exchange and really_exchange(first, second)

    sys.addaudithook(audit)
    os.write = torn_write  # type: ignore[assignment]
    os.fsync = lambda fd: step("fsync")
    durable._exchange = exchange_step


def interrupt(at: int, arguments: list[str]) -> None:
    """Run the command line and press Ctrl-C at chunk number `at`, while a worker is in the middle of a shard."""
    from slrmerge.cli import main
    from slrmerge.cli.progress import TerminalProgress

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite itself runs in the background
    noticed, shutdown = Event(), ThreadPoolExecutor.shutdown

    def noticing_shutdown(self: ThreadPoolExecutor, **options: bool) -> None:
        noticed.set()
        shutdown(self, **options)

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        noticed.wait(60)

    recorder = Recorder(at, press)
    ThreadPoolExecutor.shutdown = noticing_shutdown  # type: ignore[method-assign,assignment]
    TerminalProgress.advance = lambda self, count: recorder.advance(count)  # type: ignore[method-assign]
    main(arguments)


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "interrupt":
        interrupt(int(words[0]), words[1:])
    elif command == "limit":
        import resource

        from slrmerge.cli import main

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(words[0]), int(words[0])))
        main(words[1:])
    else:
        recipe = load_recipe(Path(words[0]))
        made = plan_merge(recipe, open_pair(*recipe.sources()))
        if "pieces" in command:
            writer.PIECE_BYTES = 1024  # of shards of some 2,000 bytes
        rows = kill_everywhere(made, Path(words[1]), overwrite="overwrite" in command, exchange="swap" in command)
        json.dump(list(rows), sys.stdout)
