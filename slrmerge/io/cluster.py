"""Work on a Ray cluster: Ray's own scheduling and retries, with the progress of every worker here.

Ray is imported only where a cluster is asked for.
"""

import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self, TypeVar

from slrmerge._version import __version__
from slrmerge.errors import ClusterError, Problem, SlrmergeError, first_line, require_extra
from slrmerge.io.progress import Progress

J = TypeVar("J")
R = TypeVar("R")

RETRIES = 3
"""How often Ray restarts a job whose worker died."""

_POLL_S = 0.5
_REPORT_S = 0.2
_CONNECT_S = 10


@dataclass(frozen=True, slots=True)
class Workers:
    """What a cluster can run at the same time: `count` jobs, each with `cpus` cores and `gpus` GPUs."""

    count: int
    cpus: int
    gpus: int


class Cluster:
    """A Ray cluster at `address`: `auto` for the one of this machine, `local` for a new one, or HOST:PORT.

    Use it in a `with`. Raises MissingExtraError, and ClusterError where it cannot be reached.
    """

    def __init__(self, address: str) -> None:
        require_extra("ray", "ray")
        self.address = address

    def __enter__(self) -> Self:
        import ray

        self._was_connected = ray.is_initialized()
        if not self._was_connected:
            try:
                _knock(self.address)
                ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                remedy = "start one with `ray start --head`, or use local"
                problem = Problem("no-cluster", self.address, f"no Ray cluster answers ({first_line(error)})", remedy)
                raise ClusterError(problem) from error
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if not self._was_connected:
            ray.shutdown()

    def workers(self, *, gpus: bool) -> Workers:
        """One worker per GPU, or per machine with all its cores. Raises ClusterError where the cluster has none."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [each for each in machines if each.get("GPU" if gpus else "CPU", 0) >= 1]
        if not machines:
            what = f"the cluster has no {'GPU' if gpus else 'CPU'}"
            raise ClusterError(Problem("no-workers", self.address, what))
        if not gpus:
            return Workers(len(machines), min(int(each["CPU"]) for each in machines), 0)
        count = sum(int(each["GPU"]) for each in machines)
        return Workers(count, max(1, min(int(each.get("CPU", 1) // each["GPU"]) for each in machines)), 1)

    def run(
        self, function: Callable[[J, Progress], R], jobs: Sequence[J], *, workers: Workers, progress: Progress
    ) -> Iterator[tuple[int, R]]:
        """Call `function` for every job on some worker; yields each job's number with its result as it finishes.

        What the workers report to their progress arrives at `progress`. A job whose worker died is started again.
        Raises what `function` raises first, and ClusterError where a worker died too often.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        reports = _actor(_Reports)
        remote = ray.remote(_call)
        options = {
            "num_cpus": workers.cpus,
            "num_gpus": workers.gpus,
            "max_retries": RETRIES,
            "scheduling_strategy": "SPREAD",
        }
        pending = {
            remote.options(**options).remote(function, job, number, reports, __version__): number
            for number, job in enumerate(jobs)
        }
        counted = 0
        try:
            while pending:
                with redirect_stdout(sys.stderr):  # where Ray prints what happens to workers
                    done, _ = ray.wait(list(pending), timeout=_POLL_S)
                    total, messages = ray.get(reports.take.remote())
                for text in messages:
                    progress.message(text)
                if total > counted:  # a job that starts again counts from its beginning
                    progress.advance(total - counted)
                    counted = total
                for reference in done:
                    yield pending.pop(reference), ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, SlrmergeError):
                raise error.cause from error
            raise
        except RayError as error:
            problem = Problem("worker-died", self.address, f"a worker of the cluster died ({first_line(error)})")
            raise ClusterError(problem) from error
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


class _Reports:
    """Collects what jobs report: an actor, which the workers call."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._messages: list[str] = []

    def begin(self, job: int) -> None:
        self._counts[job] = 0

    def advance(self, job: int, count: int) -> None:
        self._counts[job] += count

    def message(self, text: str) -> None:
        self._messages.append(text)

    def take(self) -> tuple[int, list[str]]:
        """The sum of all counts, and the messages since the last call."""
        messages, self._messages = self._messages, []
        return sum(self._counts.values()), messages


class _RemoteProgress(Progress):
    """The progress of one job, sent to its `_Reports` a few times a second."""

    def __init__(self, job: int, reports: Any) -> None:
        super().__init__()
        self._job, self._reports = job, reports
        self._unsent, self._last = 0, monotonic()
        reports.begin.remote(job)

    def on_advance(self, count: int) -> None:
        self._unsent += count
        if monotonic() - self._last > _REPORT_S:
            self.flush()

    def on_message(self, text: str) -> None:
        self._reports.message.remote(f"worker {self._job + 1}: {text}")

    def flush(self) -> None:
        self._reports.advance.remote(self._job, self._unsent)
        self._unsent, self._last = 0, monotonic()


def _actor(kind: type[Any]) -> Any:
    """A new actor, which needs no core."""
    import ray

    remote: Any = ray.remote(num_cpus=0)(kind)
    return remote.remote()


def _knock(address: str) -> None:
    """Raise OSError at once where nothing listens at HOST:PORT, for which Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def _call(function: Callable[[Any, Progress], Any], job: Any, number: int, reports: Any, version: str) -> Any:
    """Run on a worker: one job. Raises ClusterError where the worker has another version of slrmerge."""
    if version != __version__:
        what = f"has slrmerge {__version__}, this machine has {version}"
        raise ClusterError(Problem("other-version", "a worker", what, "install the same version on every machine"))
    progress = _RemoteProgress(number, reports)
    result = function(job, progress)
    progress.flush()
    return result


def require_shared(folder: Path) -> None:
    """Raise ClusterError where a worker does not see `folder`, which the driver has just created."""
    if not folder.is_dir():
        remedy = "use storage that all machines of the cluster share"
        raise ClusterError(Problem("not-shared", str(folder), "does not exist on a worker", remedy))
