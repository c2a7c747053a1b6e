"""Progress from several threads reaches its methods one call at a time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

from slrmerge.io.progress import Progress

THREADS = 8


class Recorder(Progress):
    """Records calls, and whether two of them ever ran at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.overlapped = Lock(), False
        self.calls: list[tuple[object, ...]] = []
        self.count = 0

    def _enter(self, *call: object) -> None:
        free = self.running.acquire(blocking=False)
        self.overlapped = self.overlapped or not free
        self.calls.append(call)
        if free:
            self.running.release()

    def on_start(self, description: str, total: int, unit: str) -> None:
        self._enter("start", description, total, unit)

    def on_stage(self, description: str) -> None:
        self._enter("stage", description)

    def on_advance(self, count: int) -> None:
        before = self.count
        self._enter("advance", count)
        self.count = before + count  # loses counts unless the calls come one at a time

    def on_message(self, text: str) -> None:
        self._enter("message", text)


def test_calls_reach_the_methods_in_order() -> None:
    progress = Recorder()
    progress.start("reading", 10)
    progress.stage("a file")
    progress.advance(4)
    progress.message("note")
    progress.start("scoring", 3, "prompts")
    assert progress.calls == [
        ("start", "reading", 10, "B"),
        ("stage", "a file"),
        ("advance", 4),
        ("message", "note"),
        ("start", "scoring", 3, "prompts"),
    ]


def test_threads_do_not_lose_counts_or_overlap() -> None:
    progress, together = Recorder(), Barrier(THREADS)

    def work(number: int) -> None:
        together.wait()
        for _ in range(500):
            progress.advance(1)
            progress.message(str(number))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert progress.count == 500 * THREADS
    assert len(progress.calls) == 1000 * THREADS
    assert not progress.overlapped


def test_the_base_class_shows_nothing() -> None:
    progress = Progress()
    progress.start("x", 1)
    progress.stage("x")
    progress.advance(1)
    progress.message("x")
