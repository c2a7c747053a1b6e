"""Requesting the samples that are missing."""

from pathlib import Path

from slrmerge.evaluation.requesting import request_missing
from slrmerge.evaluation.samples import SampleFile, Settings, seed_of
from slrmerge.io.progress import Progress
from tests.evaluation.helpers import Answering

SETTINGS = Settings("a-model", 1.0, 0.1, 64, seed=3)


def request(model: Answering, file: SampleFile, prompts: dict[str, str], samples: int) -> None:
    request_missing(model, "post", prompts, file, SETTINGS, samples=samples, progress=Progress())


class Watching(Progress):
    """Records what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str | int] = []

    def on_start(self, description: str, total: int, unit: str) -> None:
        self.counted.append(description)

    def on_advance(self, count: int) -> None:
        self.counted.append(count)


class Downloading(Answering):
    """A model that has to be downloaded."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(str.upper)
        self.progress = progress

    def load(self) -> None:
        self.progress.start("downloading", 7)
        self.progress.advance(7)


def test_samples_are_counted_after_the_download_of_the_model(tmp_path: Path) -> None:
    progress = Watching()
    with SampleFile(tmp_path / "samples.jsonl") as file:
        texts = {"p1": "one"}
        request_missing(Downloading(progress), "post", texts, file, SETTINGS, samples=2, progress=progress)
    assert progress.counted == ["downloading", 7, "post", 1, 1]


def test_only_missing_samples_are_requested_each_with_its_own_seed(tmp_path: Path) -> None:
    model = Answering(str.upper)
    with SampleFile(tmp_path / "samples.jsonl") as file:
        request(model, file, {"p1": "one"}, 2)
        request(model, file, {"p1": "one", "p2": "two"}, 3)
        request(model, file, {"p2": "two"}, 1)
        assert [(*each.key[1:], each.prompt) for each in model.requests] == [
            ("p1", 0, "one"), ("p1", 1, "one"), ("p1", 2, "one"), ("p2", 0, "two"), ("p2", 1, "two"), ("p2", 2, "two"),
        ]  # fmt: skip
        expected = [seed_of(3, each.key.prompt, each.key.sample) for each in model.requests]
        assert [each.seed for each in model.requests] == expected
        assert {answer.text for each in model.requests if (answer := file.answer(each.key))} == {"ONE", "TWO"}
