"""An interrupted evaluation continues when it is run again, and requests no sample twice."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import OutputError, ServerError
from slrmerge.evaluation import charts
from slrmerge.evaluation.questions import prompt_id
from slrmerge.evaluation.samples import SampleKey
from tests.evaluation.openai_server import PATIENCE_S, OpenAIServer, repeat
from tests.evaluation.work import ALL, QUESTIONS, RESULTS, SAMPLES, Work, held, keys, lines, seeds, sent
from tests.problems import refused


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


def test_an_interrupt_while_results_are_written_notes_what_is_kept(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(result: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(charts, "draw", draw)
    with pytest.raises(KeyboardInterrupt) as caught:
        work.evaluate()
    assert caught.value.__notes__[0].startswith(f"{ALL} samples are kept in {work.out}")


def test_an_answer_with_half_a_letter_can_be_judged(work: Work) -> None:
    work.server.say = lambda prompt, seed, body: '{"answer": 1}' if body["model"] == "j" else f"half \ud83d {seed}"
    work.evaluate(judge=work.at("j"))
    assert len(held(work.out, "judge.jsonl")) == ALL
