"""An evaluation of four questions by a server, to be interrupted and continued."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slrmerge.errors import ServerError
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.run import evaluate
from slrmerge.evaluation.samples import SampleKey, seed_of
from tests.evaluation.openai_server import OpenAIServer
from tests.merging.faults import Recorder
from tests.problems import refused

ROOT = Path(__file__).parents[2]
QUESTIONS = {
    "Name a colour.": ["red", "blue"],
    "Name a planet.": ["Mars", ["Earth", "Terra"]],
    "Name a river.": ["Nile"],
    "Name a tree.": ["oak"],
}
ASKED = {prompt_id(question): question for question in QUESTIONS}
RESULTS = ("results.csv", "results.md", "prompts.csv", "samples.html", "metrics.png", "metrics.svg", "evaluation.json")
SAMPLES = 3
ALL = len(QUESTIONS) * SAMPLES


def keys(*labels: str, samples: int = SAMPLES) -> set[SampleKey]:
    """The samples of a complete evaluation."""
    return {SampleKey(label, prompt, sample) for label in labels for prompt in ASKED for sample in range(samples)}


def lines(file: Path) -> list[dict[str, Any]]:
    """The samples in a file, every line of it complete."""
    data = file.read_bytes()
    assert data[-1:] in (b"", b"\n")
    return [json.loads(line) for line in data.splitlines()]


def held(out: Path, name: str = "samples.jsonl") -> set[SampleKey]:
    """The samples in a folder; none twice."""
    found = [SampleKey(line["model"], line["prompt"], line["sample"]) for line in lines(out / name)]
    assert len(set(found)) == len(found)
    return set(found)


@dataclass
class Work:
    """A server, a file of four questions, and the folder of an evaluation."""

    server: OpenAIServer
    data: Path
    out: Path
    progress: Recorder = field(default_factory=Recorder)

    def at(self, name: str) -> str:
        return f"{name}@{self.server.url}"

    def evaluate(
        self,
        out: Path | None = None,
        *,
        task: str = "open-qa",
        models: Mapping[str, str] | None = None,
        **options: Any,
    ) -> EvaluationResult:
        """Evaluate the model `m`, one request at a time, unless told otherwise."""
        options = {"samples": SAMPLES, "concurrency": 1, **options}
        models = models or {"post": self.at("m")}
        return evaluate(task, self.data, models, out or self.out, progress=self.progress, **options)

    def stop_after(self, count: int, **options: Any) -> None:
        """An evaluation that the server ends after so many answers; afterwards the server works again."""
        self.server.misbehave(404, times=None, skip=count)
        with refused(ServerError, "server-not-found"):
            self.evaluate(**options)
        self.server.behave()

    def asked(self, **options: Any) -> list[dict[str, Any]]:
        """The requests of an evaluation."""
        before = len(self.server.asked)
        self.evaluate(**options)
        return self.server.asked[before:]

    def child(self, **options: Any) -> "subprocess.Popen[str]":
        """An evaluation in a process of its own."""
        arguments = ["open-qa", str(self.data), {"post": self.at("m")}, str(self.out)]
        # SIGINT is ignored where the suite itself runs in the background.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from slrmerge.evaluation.run import evaluate\n"
            f"evaluate(*{arguments!r}, **{options!r})"
        )
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def seeds(*held: SampleKey) -> Counter[int]:
    """The seeds of these samples, by which the server knows them."""
    return Counter(seed_of(0, prompt, sample) for _, prompt, sample in held)


def sent(bodies: list[dict[str, Any]]) -> Counter[int]:
    return Counter(body["seed"] for body in bodies)
