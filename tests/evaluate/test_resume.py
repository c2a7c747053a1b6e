"""However an evaluation ends, the same command goes on where it was, and asks nothing again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from click.testing import Result

from slrmerge import files
from slrmerge.evaluate import charts
from slrmerge.evaluate.questions import prompt_id
from slrmerge.evaluate.samples import seed_of
from tests.cli import run
from tests.evaluate.openai_server import MODELS, PATIENCE_S, OpenAIServer, repeat

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

Key = tuple[str, str, int]


def keys(*labels: str, samples: int = SAMPLES) -> set[Key]:
    """The samples that a whole evaluation consists of."""
    return {(label, prompt, sample) for label in labels for prompt in ASKED for sample in range(samples)}


def lines(file: Path) -> list[dict[str, Any]]:
    """The samples in a file, every line of it whole."""
    data = file.read_bytes()
    assert data[-1:] in (b"", b"\n")
    return [json.loads(line) for line in data.splitlines()]


def held(out: Path, name: str = "samples.jsonl") -> set[Key]:
    """Which samples a folder holds; none twice."""
    found = [(line["model"], line["prompt"], line["sample"]) for line in lines(out / name)]
    assert len(set(found)) == len(found)
    return set(found)


@dataclass
class Work:
    """A server, four questions in a file, and a folder to be."""

    server: OpenAIServer
    data: Path
    out: Path

    @property
    def model(self) -> str:
        return f"post=m@{self.server.url}"

    def command(self, *options: object) -> list[str]:
        """The arguments, one question at a time unless `options` say otherwise; later ones win."""
        usual = ["--data", self.data, "--out", self.out, "--samples", SAMPLES, "--concurrency", 1]
        model = [] if "--model" in options else ["--model", self.model]
        return [str(word) for word in ("eval", "open-qa", *usual, *model, *options)]

    def evaluate(self, *options: object) -> Result:
        return run(*self.command(*options))

    def stop_after(self, count: int, *options: object) -> None:
        """An evaluation that the server ends after so many answers; the server is well again then."""
        self.server.misbehave(404, times=None, skip=count)
        assert self.evaluate(*options).exit_code == 16
        self.server.behave()

    def asked(self, *options: object, exit_code: int = 0) -> list[dict[str, Any]]:
        """What the server is asked by an evaluation."""
        before = len(self.server.asked)
        result = self.evaluate(*options)
        assert result.exit_code == exit_code, result.stderr
        return self.server.asked[before:]


class Sketch:
    """A picture that takes no time."""

    def savefig(self, file: BinaryIO, **options: object) -> None:
        file.write(b"a picture")


@pytest.fixture
def drawn() -> None:
    """Pictures are really drawn, where a test asks for that."""


@pytest.fixture
def work(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Work:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(charts, "draw", lambda report: Sketch())
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(QUESTIONS))
    return Work(server, data, tmp_path / "out")


def seeds(*held: Key) -> Counter[int]:
    """The seeds by which a server knows these samples."""
    return Counter(seed_of(0, prompt, sample) for _, prompt, sample in held)


def sent(bodies: list[dict[str, Any]]) -> Counter[int]:
    return Counter(body["seed"] for body in bodies)


@pytest.mark.usefixtures("three_tries")
def test_a_server_that_dies_is_told_of_and_what_it_said_is_kept(work: Work) -> None:
    work.server.misbehave("close", times=None, skip=5)
    result = work.evaluate()
    assert result.exit_code == 16
    assert result.stdout == ""
    assert result.stderr == (
        "error: a model server did not give what was asked\n"
        f"  m@{work.server.url}: cannot be reached (Server disconnected without sending a response.); "
        "start it, then run the same command again\n"
        f"  5 answers are kept in {work.out}; the same command goes on from there\n"
    )
    there = held(work.out)
    assert len(there) == 5
    assert sorted(path.name for path in work.out.iterdir()) == [
        "evaluation.json", "greedy.jsonl", "judge.jsonl", "samples.jsonl",
    ]  # fmt: skip
    work.server.behave()
    before = len(work.server.asked)
    again = work.evaluate()
    assert (again.exit_code, again.stderr) == (0, f"post: 5 of {ALL} samples are there already\n")
    assert sent(work.server.asked[before:]) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")
    assert all((work.out / name).stat().st_size for name in RESULTS)


def test_a_server_that_has_gone_is_told_of_at_once(work: Work) -> None:
    work.stop_after(2)
    work.server.stop()
    result = work.evaluate()
    assert result.exit_code == 16
    assert result.stderr == (
        "error: a model server did not give what was asked\n"
        f"  m@{work.server.url}: cannot be reached (All connection attempts failed); "
        "start it, then run the same command again\n"
        f"  2 answers are kept in {work.out}; the same command goes on from there\n"
    )


def test_what_is_complete_needs_no_server(work: Work) -> None:
    first = work.evaluate()
    assert first.exit_code == 0
    made = {name: (work.out / name).read_bytes() for name in RESULTS}
    work.server.stop()
    result = work.evaluate()
    assert (result.exit_code, result.stderr, result.stdout) == (0, "", first.stdout)
    assert {name: (work.out / name).read_bytes() for name in RESULTS} == made


def test_an_evaluation_in_pieces_gives_what_one_in_one_piece_gives(work: Work, drawn: None, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert work.evaluate("--out", whole, "--concurrency", 4).exit_code == 0
    for count in (1, 4, 2):
        work.stop_after(count)
    assert work.evaluate().exit_code == 0
    assert {name: (work.out / name).read_bytes() for name in RESULTS} == {
        name: (whole / name).read_bytes() for name in RESULTS
    }


def test_an_evaluation_that_was_killed_asks_for_nothing_that_was_written(work: Work) -> None:
    work.server.misbehave("hang", times=None, skip=5)
    command = [sys.executable, "-m", "slrmerge", *work.command("--concurrency", 3)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE) as child:
        try:
            work.server.wait_for(5 + 3)  # three hang, so five answers have been taken
        finally:
            child.kill()
        assert (child.wait(PATIENCE_S), child.stderr and child.stderr.read()) == (-signal.SIGKILL, b"")
    work.server.behave()
    there = held(work.out)
    assert len(there) == 5
    assert sent(work.asked("--concurrency", 3)) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")


@pytest.mark.parametrize("left", ["all but the end of the line", "a half", "a byte", "half a letter"])
def test_a_torn_line_is_dropped_and_its_sample_asked_for_again(work: Work, left: str) -> None:
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
    there = {(line["model"], line["prompt"], line["sample"]) for line in map(json.loads, before)}
    assert len(there) == 5
    assert sent(work.asked()) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")
    assert {line["text"] for line in lines(file)} == {f"{line['seed']} é" for line in lines(file)}


A_PROMPT = next(iter(ASKED))
CHANGES: dict[str, tuple[list[object], str]] = {
    "temperature": (["--temperature", 0.5], "temperature 1.0, now 0.5"),
    "max-tokens": (["--max-tokens", 8], "max_tokens 64, now 8"),
    "min-p": (["--min-p", 0], "min_p 0.1, now 0.0"),
    "verbalized": (["--verbalized", SAMPLES], f"max_tokens 64, now 1024, verbalized None, now {SAMPLES}"),
    "two": (["--temperature", 0, "--min-p", 0], "temperature 1.0, now 0.0, min_p 0.1, now 0.0"),
}


def refusal(work: Work, changed: str) -> list[str]:
    what = f"has samples of post made by other settings ({changed})"
    remedy = "choose another --out, or the settings of then"
    return ["error: the output cannot be written", f"  {work.out / 'samples.jsonl'}: {what}; {remedy}"]


@pytest.mark.parametrize("changed", CHANGES)
def test_samples_made_by_other_settings_are_not_taken(work: Work, changed: str) -> None:
    options, said = CHANGES[changed]
    assert work.evaluate().exit_code == 0
    requests, file = len(work.server.requests), (work.out / "samples.jsonl").read_bytes()
    result = work.evaluate(*options)
    assert (result.exit_code, result.stderr.splitlines()[:2]) == (6, refusal(work, said))
    assert len(work.server.requests) == requests
    assert (work.out / "samples.jsonl").read_bytes() == file
    assert work.asked() == []  # the settings of then are as good as ever


@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_is_asked_by_other_settings_where_some_is_missing(work: Work, changed: str) -> None:
    options, said = CHANGES[changed]
    work.stop_after(ALL - 1)
    before = len(work.server.asked)
    result = work.evaluate(*options)
    assert (result.exit_code, result.stderr.splitlines()[:2]) == (6, refusal(work, said))
    assert len(work.server.asked) == before
    assert len(held(work.out)) == ALL - 1


def test_samples_made_by_another_seed_are_not_taken(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    requests = len(work.server.requests)
    result = work.evaluate("--seed", 1)
    assert result.exit_code == 6
    head, problem = result.stderr.splitlines()[:2]
    assert head == "error: the output cannot be written"
    assert problem.startswith(f"  {work.out / 'samples.jsonl'}: has samples of post made by other settings (seed ")
    assert len(work.server.requests) == requests


def test_samples_of_another_model_are_not_taken_for_those_of_its_label(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    requests = len(work.server.requests)
    result = work.evaluate("--model", f"post=n@{work.server.url}")
    assert (result.exit_code, result.stderr.splitlines()[:2]) == (6, refusal(work, "asked_of m, now n"))
    assert len(work.server.requests) == requests
    work.server.models = ["n"]  # another model, started at the same address
    unnamed = work.evaluate("--model", f"post={work.server.url}")
    assert (unnamed.exit_code, unnamed.stderr.splitlines()[:2]) == (6, refusal(work, "asked_of m, now n"))
    assert [request.path for request in work.server.requests[requests:]] == [MODELS]


def test_the_same_model_at_another_address_goes_on(work: Work) -> None:
    work.stop_after(4)
    there = held(work.out)
    with OpenAIServer("m") as moved:
        assert work.evaluate("--model", f"post={moved.url}").exit_code == 0
        assert sent(moved.asked) == seeds(*keys("post") - there)


def test_how_fast_it_is_asked_is_no_setting_of_a_sample(work: Work) -> None:
    work.stop_after(4)
    assert len(work.asked("--concurrency", 7, "--timeout", 50, "--batch", 2)) == ALL - 4


def test_more_samples_ask_for_the_rest(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    more = keys("post", samples=SAMPLES + 2)
    assert sent(work.asked("--samples", SAMPLES + 2)) == seeds(*more - keys("post"))
    assert held(work.out) == more
    assert work.asked() == []  # fewer are a part of them


def test_more_questions_ask_for_the_rest(work: Work) -> None:
    few = work.asked("--questions", 2)
    assert len(few) == 2 * SAMPLES
    more = work.asked("--questions", 3)
    assert len(more) == SAMPLES
    work.data.write_text(json.dumps({"Name a bird.": ["owl"], **QUESTIONS}))
    every = [*few, *more, *work.asked()]
    assert sent(every) == seeds(*held(work.out))
    assert len(held(work.out)) == (len(QUESTIONS) + 1) * SAMPLES


def test_another_model_is_asked_alone(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    bodies = work.asked("--model", work.model, "--model", f"pre=n@{work.server.url}")
    assert Counter(body["model"] for body in bodies) == {"n": ALL}
    assert sent(bodies) == seeds(*keys("pre"))
    assert held(work.out) == keys("post", "pre")


def test_the_second_of_two_models_goes_on_where_it_was(work: Work) -> None:
    two = ["--model", work.model, "--model", f"pre=n@{work.server.url}"]
    work.stop_after(ALL + 2, *two)
    there = held(work.out)
    assert len(there) == ALL + 2
    bodies = work.asked(*two)
    assert {body["model"] for body in bodies} == {"n"}
    assert sent(bodies) == seeds(*keys("pre") - there)
    assert held(work.out) == keys("post", "pre")


def test_a_model_that_is_not_there_is_noticed_before_the_others_are_asked(work: Work) -> None:
    with OpenAIServer("n") as gone:
        pass
    result = work.evaluate("--model", work.model, "--model", f"pre=n@{gone.url}")
    assert result.exit_code == 16
    assert result.stderr.splitlines()[1:] == [
        f"  n@{gone.url}: cannot be reached (All connection attempts failed); start it, then run the same command again"
    ]
    assert work.server.asked == []


def test_a_judge_is_asked_once_about_the_same_thing(work: Work) -> None:
    def say(prompt: str, seed: int, body: dict[str, Any]) -> str | None:
        return '{"answer": 1}' if body["model"] == "j" else repeat(prompt, seed, body)

    work.server.say = say
    judged = ["--judge", f"j@{work.server.url}"]
    work.stop_after(ALL + 4, *judged)
    there = held(work.out, "judge.jsonl")
    assert (held(work.out), len(there)) == (keys("post"), 4)
    bodies = work.asked(*judged)
    assert [body["model"] for body in bodies] == ["j"] * (ALL - 4)
    about = [line["prompt"] for line in lines(work.out / "judge.jsonl")]
    assert len(set(about)) == len(about) == ALL
    assert {prompt_id(body["messages"][0]["content"]) for body in bodies} == set(about) - {key[1] for key in there}
    assert work.asked(*judged) == []


def test_the_choice_of_questions_goes_on_where_it_was(work: Work) -> None:
    work.data.write_text(json.dumps([{"question": question, "answer": "7"} for question in QUESTIONS]))
    command = ["eval", "reasoning", *work.command()[2:]]
    work.server.misbehave(404, times=None, skip=3)
    assert run(*command).exit_code == 16
    assert len(held(work.out, "greedy.jsonl")) == 3
    work.server.behave()
    before = len(work.server.asked)
    assert run(*command).exit_code == 0
    assert Counter(body["temperature"] for body in work.server.asked[before:]) == {0.0: 1, 1.0: ALL}
    assert held(work.out, "greedy.jsonl") == keys("post", samples=1)
    assert held(work.out) == keys("post")


def refused_folder(work: Work, where: Path, said: str) -> None:
    """`where` is refused in words, nothing is asked, and it is left as it was."""
    result = work.evaluate("--out", where)
    assert result.exit_code == 6
    assert result.stderr == f"error: the output cannot be written\n  {said}\n"
    assert work.server.requests == []


def test_a_folder_of_another_task_is_refused(work: Work) -> None:
    work.out.mkdir()
    (work.out / "evaluation.json").write_text('{"slrmerge": "0.1.0", "task": "creative"}\n')
    refused_folder(work, work.out, f"{work.out}: holds an evaluation of creative; choose another --out")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "5", '"task"'])
def test_a_folder_that_only_looks_like_an_evaluations_is_refused(work: Work, content: str) -> None:
    work.out.mkdir()
    (work.out / "evaluation.json").write_text(content)
    refused_folder(work, work.out, f"{work.out / 'evaluation.json'}: is not an evaluation's; choose another --out")
    assert (work.out / "evaluation.json").read_text() == content


def test_a_folder_of_something_else_is_refused(work: Work) -> None:
    work.out.mkdir()
    (work.out / "thesis.tex").write_text("years of work")
    refused_folder(work, work.out, f"{work.out}: holds something else than an evaluation; choose another --out")
    assert [path.name for path in work.out.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(work: Work) -> None:
    work.out.write_text("years of work")
    refused_folder(work, work.out, f"{work.out}: cannot be written or read (File exists)")
    assert work.out.read_text() == "years of work"


def test_an_empty_folder_is_taken(work: Work) -> None:
    work.out.mkdir()
    assert work.evaluate().exit_code == 0


def test_samples_that_are_none_are_refused(work: Work) -> None:
    work.stop_after(2)
    file = work.out / "samples.jsonl"
    file.write_bytes(b"years of work\n" + file.read_bytes())
    before = file.read_bytes()
    result = work.evaluate()
    assert result.exit_code == 6
    assert result.stderr == (
        f"error: the output cannot be written\n  {file}:1: is not a sample; choose another --out\n"
    )
    assert file.read_bytes() == before


def test_a_second_run_at_the_same_time_is_refused(work: Work) -> None:
    work.stop_after(2)
    requests, file = len(work.server.requests), (work.out / "samples.jsonl").read_bytes()
    with files.exclusive(work.out):
        result = work.evaluate()
    assert result.exit_code == 8
    assert result.stderr == (
        "error: the target is in use\n"
        f"  {work.out}: another slrmerge is writing it; wait for that run, or choose another --out\n"
    )
    assert (len(work.server.requests), (work.out / "samples.jsonl").read_bytes()) == (requests, file)
    assert len(work.asked()) == ALL - 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_disk_that_is_full_keeps_whole_samples_and_goes_on(work: Work, small_disk: Path, concurrency: int) -> None:
    work.out = small_disk / "out"
    work.server.say = lambda prompt, seed, body: str(seed % 10) * 20_001
    result = work.evaluate("--concurrency", concurrency)
    there = held(work.out)
    assert result.exit_code == 7
    assert result.stderr == (
        "error: not enough disk space\n"
        f"  {work.out / 'samples.jsonl'}: the disk is full; free some space and run again\n"
        f"  {len(there)} answers are kept in {work.out}; the same command goes on from there\n"
    )
    assert 0 < len(there) < ALL
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert sent(work.asked("--concurrency", concurrency)) == seeds(*keys("post") - there)
    assert held(work.out) == keys("post")
    assert {len(line["text"]) for line in lines(work.out / "samples.jsonl")} == {20_001}


def test_a_disk_that_is_full_when_results_are_written_keeps_all_samples(
    work: Work, drawn: None, small_disk: Path
) -> None:
    work.out = small_disk / "out"
    work.stop_after(ALL - 1)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    result = work.evaluate()
    assert result.exit_code == 7
    assert result.stderr.splitlines()[:3] == [
        f"post: {ALL - 1} of {ALL} samples are there already",
        "error: not enough disk space",
        f"  {work.out}: the disk is full; free some space and run again",
    ]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert work.asked() == []
    assert held(work.out) == keys("post")
    assert all((work.out / name).stat().st_size for name in RESULTS)


def test_a_disk_that_is_full_at_the_very_start_does_not_spoil_the_folder(work: Work, small_disk: Path) -> None:
    work.out = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert work.evaluate().exit_code == 7
    ballast.unlink()
    assert work.evaluate().exit_code == 0


def test_nothing_is_asked_where_a_later_model_was_made_by_other_settings(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    models = ["--model", f"new=n@{work.server.url}", "--model", work.model]
    assert work.asked(*models, "--temperature", 0.5, exit_code=6) == []


def test_where_the_same_command_cannot_go_on_it_is_not_promised(work: Work) -> None:
    assert work.evaluate().exit_code == 0
    assert "goes on" not in work.evaluate("--temperature", 0.5).stderr


def test_ctrl_c_while_results_are_made_says_what_is_kept(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(report: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(charts, "draw", draw)
    result = work.evaluate()
    assert result.exit_code == 130
    said = f"stopped: {ALL} answers are kept in {work.out}; the same command goes on from there"
    assert result.stderr.strip() == said


def test_the_root_is_no_folder_for_an_evaluation(work: Work) -> None:
    result = work.evaluate("--out", "/")
    assert result.exit_code == 6
    assert "/: is no folder for an evaluation; name one inside it" in result.stderr


def test_an_answer_with_half_a_letter_can_be_judged(work: Work) -> None:
    work.server.say = lambda prompt, seed, body: '{"answer": 1}' if body["model"] == "j" else f"half \ud83d {seed}"
    result = work.evaluate("--judge", f"j@{work.server.url}")
    assert result.exit_code == 0, result.stderr
