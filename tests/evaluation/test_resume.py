"""An interrupted evaluation continues when it is run again, and requests no sample twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import BusyError, NoSpaceError, OutputError, ServerError
from slrmerge.evaluation import charts
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.run import evaluate
from slrmerge.evaluation.samples import SampleKey, seed_of
from slrmerge.io.output_folder import OutputFolder
from slrmerge.io.progress import Progress
from tests.evaluation.openai_server import MODELS, PATIENCE_S, OpenAIServer, repeat
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


@pytest.fixture
def drawn() -> None:
    """Draws real charts."""


@pytest.fixture
def work(server: OpenAIServer, tmp_path: Path, request: pytest.FixtureRequest) -> Work:
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("sketched")
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(QUESTIONS))
    return Work(server, data, tmp_path / "out")


def seeds(*held: SampleKey) -> Counter[int]:
    """The seeds of these samples, by which the server knows them."""
    return Counter(seed_of(0, prompt, sample) for _, prompt, sample in held)


def sent(bodies: list[dict[str, Any]]) -> Counter[int]:
    return Counter(body["seed"] for body in bodies)


@pytest.mark.usefixtures("hurried")
def test_answers_are_kept_when_the_server_dies(work: Work) -> None:
    work.server.misbehave("close", times=None, skip=5)
    with refused(ServerError, "server-unreachable") as caught:
        work.evaluate()
    (note,) = caught.value.__notes__
    assert note.startswith(f"5 samples are kept in {work.out}")
    there = held(work.out)
    assert len(there) == 5
    assert sorted(path.name for path in work.out.iterdir()) == ["evaluation.json", "samples.jsonl"]
    work.server.behave()
    assert sent(work.asked()) == seeds(*keys("post") - there)
    retrying, reusing = work.progress.said
    assert "retrying" in retrying
    assert f"5 of {ALL} samples" in reusing
    assert held(work.out) == keys("post")
    assert all((work.out / name).stat().st_size for name in RESULTS)


def test_a_server_that_is_gone_is_noticed_at_once(work: Work, pauses: list[float]) -> None:
    work.stop_after(2)
    work.server.stop()
    with refused(ServerError, "server-unreachable") as caught:
        work.evaluate()
    assert caught.value.__notes__[0].startswith(f"2 samples are kept in {work.out}")
    assert pauses == []


def test_a_complete_evaluation_needs_no_server(work: Work) -> None:
    first = work.evaluate()
    made = {name: (work.out / name).read_bytes() for name in RESULTS}
    work.server.stop()
    assert work.evaluate() == first
    assert work.progress.said == []
    assert {name: (work.out / name).read_bytes() for name in RESULTS} == made


def test_an_evaluation_in_pieces_equals_one_in_one_piece(work: Work, drawn: None, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    work.evaluate(whole, concurrency=4)
    for count in (1, 4, 2):
        work.stop_after(count)
    work.evaluate()
    assert {name: (work.out / name).read_bytes() for name in RESULTS} == {
        name: (whole / name).read_bytes() for name in RESULTS
    }


@pytest.mark.parametrize("interrupt", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_requests_nothing_that_was_written(work: Work, interrupt: signal.Signals) -> None:
    work.server.misbehave("hang", times=None, skip=5)
    with work.child(samples=SAMPLES, concurrency=3) as child:
        try:
            work.server.wait_for(5 + 3)  # three hang, so five answers were received
            child.send_signal(interrupt)
            _, printed = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
    assert child.returncode == -interrupt
    assert (f"5 samples are kept in {work.out}" in printed) == (interrupt is signal.SIGINT)
    work.server.behave()
    there = held(work.out)
    assert len(there) == 5
    assert sent(work.asked(concurrency=3)) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")


@pytest.mark.parametrize("left", ["all but the end of the line", "a half", "a byte", "half a letter"])
def test_an_incomplete_line_is_dropped_and_its_sample_requested_again(work: Work, left: str) -> None:
    work.server.say = lambda prompt, seed, body: f"{seed} é"
    work.stop_after(6)
    file = work.out / "samples.jsonl"
    *before, last = file.read_bytes().splitlines(keepends=True)
    parts = {
        "all but the end of the line": -1,
        "a half": len(last) // 2,
        "a byte": 1,
        "half a letter": last.find(b"\xa9"),
    }
    file.write_bytes(b"".join(before) + last[: parts[left]])
    there = {SampleKey(line["model"], line["prompt"], line["sample"]) for line in map(json.loads, before)}
    assert len(there) == 5
    assert sent(work.asked()) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")
    assert {line["text"] for line in lines(file)} == {f"{line['seed']} é" for line in lines(file)}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.5}, "temperature 1.0, now 0.5"),
    "max_tokens": ({"max_tokens": 8}, "max_tokens 64, now 8"),
    "min_p": ({"min_p": 0.0}, "min_p 0.1, now 0.0"),
    "verbalized": ({"verbalized": SAMPLES}, f"max_tokens 64, now 1024, verbalized None, now {SAMPLES}"),
    "two": ({"temperature": 0.0, "min_p": 0.0}, "temperature 1.0, now 0.0, min_p 0.1, now 0.0"),
    "seed": ({"seed": 1}, "seed 0, now 1"),
}


def refuses_settings(work: Work, change: str, **options: Any) -> None:
    """The evaluation is refused because of this change, without a note that running again continues."""
    with refused(OutputError, "settings-changed") as caught:
        work.evaluate(**options)
    (problem,) = caught.value.problems
    assert problem.where == str(work.out / "samples.jsonl")
    assert f"({change})" in problem.what
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("changed", CHANGES)
def test_samples_with_other_settings_are_refused(work: Work, changed: str) -> None:
    options, change = CHANGES[changed]
    work.evaluate()
    requests, file = len(work.server.requests), (work.out / "samples.jsonl").read_bytes()
    refuses_settings(work, change, **options)
    assert len(work.server.requests) == requests
    assert (work.out / "samples.jsonl").read_bytes() == file
    assert work.asked() == []  # the earlier settings still work


@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_is_requested_with_other_settings_where_some_is_missing(work: Work, changed: str) -> None:
    options, change = CHANGES[changed]
    work.stop_after(ALL - 1)
    before = len(work.server.asked)
    refuses_settings(work, change, **options)
    assert len(work.server.asked) == before
    assert len(held(work.out)) == ALL - 1


def test_samples_of_another_model_with_the_same_label_are_refused(work: Work) -> None:
    work.evaluate()
    requests = len(work.server.requests)
    refuses_settings(work, "model_id m, now n", models={"post": work.at("n")})
    assert len(work.server.requests) == requests
    work.server.models = ["n"]  # another model, started at the same address
    refuses_settings(work, "model_id m, now n", models={"post": work.server.url})
    assert [request.path for request in work.server.requests[requests:]] == [MODELS]


def test_the_same_model_at_another_address_continues(work: Work) -> None:
    work.stop_after(4)
    there = held(work.out)
    with OpenAIServer("m") as moved:
        work.evaluate(models={"post": moved.url})
        assert sent(moved.asked) == seeds(*keys("post") - there)


def test_speed_is_not_a_setting_of_a_sample(work: Work) -> None:
    work.stop_after(4)
    assert len(work.asked(concurrency=7, timeout_s=50, batch=2)) == ALL - 4


def test_more_samples_request_only_the_rest(work: Work) -> None:
    work.evaluate()
    more = keys("post", samples=SAMPLES + 2)
    assert sent(work.asked(samples=SAMPLES + 2)) == seeds(*more - keys("post"))
    assert held(work.out) == more
    assert work.asked() == []  # fewer are among them


def test_more_questions_request_only_the_rest(work: Work) -> None:
    few = work.asked(questions=2)
    assert len(few) == 2 * SAMPLES
    more = work.asked(questions=3)
    assert len(more) == SAMPLES
    work.data.write_text(json.dumps({"Name a bird.": ["owl"], **QUESTIONS}))
    every = [*few, *more, *work.asked()]
    assert sent(every) == seeds(*held(work.out))
    assert len(held(work.out)) == (len(QUESTIONS) + 1) * SAMPLES


def test_another_model_is_requested_alone(work: Work) -> None:
    work.evaluate()
    bodies = work.asked(models={"post": work.at("m"), "pre": work.at("n")})
    assert Counter(body["model"] for body in bodies) == {"n": ALL}
    assert sent(bodies) == seeds(*keys("pre"))
    assert held(work.out) == keys("post", "pre")


def test_the_second_of_two_models_continues(work: Work) -> None:
    models = {"post": work.at("m"), "pre": work.at("n")}
    work.stop_after(ALL + 2, models=models)
    there = held(work.out)
    assert len(there) == ALL + 2
    bodies = work.asked(models=models)
    assert {body["model"] for body in bodies} == {"n"}
    assert sent(bodies) == seeds(*keys("pre") - there)
    assert held(work.out) == keys("post", "pre")


def test_an_unreachable_model_is_noticed_before_any_request(work: Work) -> None:
    with OpenAIServer("n") as gone:
        pass
    with refused(ServerError, "server-unreachable") as caught:
        work.evaluate(models={"post": work.at("m"), "pre": f"n@{gone.url}"})
    assert caught.value.problems[0].where == f"n@{gone.url}"
    assert work.server.asked == []


def test_a_judge_judges_each_text_once(work: Work) -> None:
    def say(prompt: str, seed: int, body: dict[str, Any]) -> str | None:
        return '{"answer": 1}' if body["model"] == "j" else repeat(prompt, seed, body)

    work.server.say = say
    judge = work.at("j")
    work.stop_after(ALL + 4, judge=judge)
    there = held(work.out, "judge.jsonl")
    assert (held(work.out), len(there)) == (keys("post"), 4)
    bodies = work.asked(judge=judge)
    assert [body["model"] for body in bodies] == ["j"] * (ALL - 4)
    about = [line["prompt"] for line in lines(work.out / "judge.jsonl")]
    assert len(set(about)) == len(about) == ALL
    assert {prompt_id(body["messages"][0]["content"]) for body in bodies} == set(about) - {key.prompt for key in there}
    assert work.asked(judge=judge) == []


def test_the_choice_of_questions_continues(work: Work) -> None:
    work.data.write_text(json.dumps([{"question": question, "answer": "7"} for question in QUESTIONS]))
    work.stop_after(3, task="reasoning")
    assert len(held(work.out, "greedy.jsonl")) == 3
    bodies = work.asked(task="reasoning")
    assert Counter(body["temperature"] for body in bodies) == {0.0: 1, 1.0: ALL}
    assert held(work.out, "greedy.jsonl") == keys("post", samples=1)
    assert held(work.out) == keys("post")


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


def test_a_deleted_line_is_requested_again(work: Work) -> None:
    work.evaluate()
    file = work.out / "samples.jsonl"
    written = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*written[:3], b"\x00 garbage\n", *written[4:]]))
    with refused(OutputError, "not-a-sample") as caught:
        work.evaluate()
    assert caught.value.problems[0].where == f"{file}:4"
    file.write_bytes(b"".join(written[:3] + written[4:]))
    assert len(work.asked()) == 1
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(written)


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


def test_nothing_is_requested_where_a_later_model_has_other_settings(work: Work) -> None:
    work.evaluate()
    before = len(work.server.asked)
    models = {"new": work.at("n"), "post": work.at("m")}
    refuses_settings(work, "temperature 1.0, now 0.5", models=models, temperature=0.5)
    assert len(work.server.asked) == before


def test_an_interrupt_while_results_are_written_notes_what_is_kept(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(result: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(charts, "draw", draw)
    with pytest.raises(KeyboardInterrupt) as caught:
        work.evaluate()
    assert caught.value.__notes__[0].startswith(f"{ALL} samples are kept in {work.out}")


def test_the_root_is_refused(work: Work) -> None:
    with refused(OutputError, "mount-point"):
        work.evaluate(Path("/"))


def test_an_answer_with_half_a_letter_can_be_judged(work: Work) -> None:
    work.server.say = lambda prompt, seed, body: '{"answer": 1}' if body["model"] == "j" else f"half \ud83d {seed}"
    work.evaluate(judge=work.at("j"))
    assert len(held(work.out, "judge.jsonl")) == ALL
