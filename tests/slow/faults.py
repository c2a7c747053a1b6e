"""Runs commands with a fault at a chosen file operation, and says what they do.

As a program, with `injector.c` preloaded, it imports everything once and runs each command in a child of its own:
`Runner` talks to it.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

from slrmerge.io.output_folder import set_aside_folder, staging_folder
from tests.merging.faults import ROOT, leftovers, snapshot

NEED_SPACE = {"write", "create", "mkdir", "allocate", "clone", "truncate"}
CHECKED = {"open", "create", "list", "mkdir", "rmdir", "unlink", "rename", "chmod", "truncate"}
READS = {"open", "read", "list", "lock"}


class Fault(NamedTuple):
    """What happens at an operation, to which operations it can happen, and the exit codes that it may lead to."""

    what: int
    happens_to: Callable[[str], bool]
    exit_codes: set[int]
    again: bool = False


FAULTS = {
    "kill": Fault(-1, lambda op: op not in READS, {-signal.SIGKILL}),  # at a read it would be a kill at the last write
    "SIGINT": Fault(-2, lambda op: True, {0, 130}),
    "ENOSPC": Fault(errno.ENOSPC, lambda op: op in NEED_SPACE, {0, 7}, again=True),
    "EIO": Fault(errno.EIO, lambda op: True, {0, 3, 4, 6, 9, 12, 15}),
    "EACCES": Fault(errno.EACCES, lambda op: op in CHECKED, {0, 3, 4, 6, 9, 12, 15}),
}


class Outcome(NamedTuple):
    """How a command ended, and the operations that it did: `op path`, the path seen from the folder."""

    exit_code: int
    operations: list[str]
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Job:
    """A command that writes the folder `work/out` of a job's own folder, where `before` was.

    With `hurried`, figures and searches are quick. `normalised` removes what differs between runs, such as the time
    that they took. With `in_place`, files appear one by one, each of them as before or complete; those in `grows` grow
    line by line.
    """

    command: list[str]
    out: Path
    before: dict[str, bytes] = field(default_factory=dict)
    normalised: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda files: files
    hurried: bool = False
    in_place: bool = False
    grows: tuple[str, ...] = ()

    def reset(self) -> None:
        """Remove everything that runs wrote, and write what was there before."""
        for path in (self.out, staging_folder(self.out), set_aside_folder(self.out)):
            shutil.rmtree(path, ignore_errors=True)
        for name in leftovers(self.out):
            (self.out.parent / name).unlink()
        for name, data in self.before.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(data)

    def written(self) -> dict[str, bytes] | None:
        found = snapshot(self.out)
        return found and self.normalised(found)


class Runner:
    """Runs jobs in children of one process, which imports what the children imported. Use it in a `with`."""

    def __init__(self, folder: Path, *, hurried: bool) -> None:
        self._folder, self._hurried = folder, hurried
        self._library = folder / "injector.so"
        source = Path(__file__).with_name("injector.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self._library, source, "-ldl"], check=True)

    def __enter__(self) -> Self:
        environment = os.environ | {"LD_PRELOAD": str(self._library), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "tests.slow.faults", self._library, self._folder, str(int(self._hurried))]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, job: Job, *more: str, fault: str = "", at: int = 0) -> Outcome:
        """Run a job with `more` options, and a fault at operation number `at` in its folder, sources included."""
        what, _, _, again = FAULTS[fault] if fault else Fault(0, bool, set())
        command, folder = [*job.command, *more], str(job.out.parents[1])
        request = {"command": command, "folder": folder, "at": at, "what": what, "again": again}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        exit_code = json.loads(self._process.stdout.readline())
        operations, stdout, stderr = ((self._folder / name).read_text() for name in ("operations", "stdout", "stderr"))
        return Outcome(exit_code, operations.splitlines(), stdout, stderr)


def _serve(library: str, folder: Path, *, hurried: bool) -> None:
    """Answer each line of stdin, a request of `Runner`, with the exit code of its command."""
    import ctypes

    from slrmerge.cli import main

    if hurried:
        _hurry()
    arm: Any = ctypes.CDLL(library).arm
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")]
            log = os.open(folder / "operations", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for fd, file in zip((1, 2), files, strict=True):
                os.dup2(file, fd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.umask(0o002)  # as many systems set it: what others can write to, the next run does not trust
            arm(request["folder"].encode(), request["at"], request["what"], request["again"], log)
            exit_code = _exit_code(main, request["command"])
            if not request["at"]:
                (folder / "modules").write_text("\n".join(sys.modules))
            os._exit(exit_code)
        status = os.waitpid(child, 0)[1]
        for name in (folder / "modules").read_text().splitlines():
            with suppress(ImportError):
                import_module(name)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


def _exit_code(main: Callable[..., object], command: list[str]) -> int:
    """Run a command as the console script does, which prints a traceback and exits with 1 where one escapes."""
    try:
        main(command, prog_name="slrmerge")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:  # noqa: BLE001 (whatever it is, the console script prints it)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _hurry() -> None:
    """Make pictures and searches quick: files are what matters here."""
    import pytest

    from tests.conftest import sketch_charts
    from tests.searching.pairs import hurry

    patch = pytest.MonkeyPatch()
    hurry(patch)
    sketch_charts(patch)


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), hurried=sys.argv[3] == "1")
