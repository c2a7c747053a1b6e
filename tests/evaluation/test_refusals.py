"""Prompts that a model refuses are recorded and counted; a model that refuses all of them ends the evaluation."""

import json
from collections.abc import Collection, Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest

from slrmerge.errors import Problem, ServerError, SlrmergeError
from slrmerge.evaluation.embedding_file import KeptEmbeddings
from slrmerge.evaluation.metrics import dissimilarity
from slrmerge.evaluation.models import MOST_REFUSED, AnswerSink, SampleRequest, ServerAddress
from slrmerge.evaluation.requesting import request_missing
from slrmerge.evaluation.run import evaluate
from slrmerge.evaluation.samples import Answer, SampleFile, SampleKey, Settings
from slrmerge.evaluation.server import ServerModel
from slrmerge.io.progress import Progress
from tests.evaluation.helpers import Answering
from tests.evaluation.openai_server import OpenAIServer, vector
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")

SETTINGS = Settings("a-model", 1.0, 0.1, 64)


class Refusing(Answering):
    """A model that refuses some prompts."""

    def __init__(self, refuses: Collection[str]) -> None:
        super().__init__(str.upper)
        self.refuses = refuses

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        for request in requests:
            self.requests.append(request)
            if request.prompt in self.refuses:
                sink.refuse(request, ServerError(Problem("request-rejected", "there", f"no {request.prompt}")))
            else:
                sink.keep(request, Answer(request.prompt.upper(), "stop"))


def ask(folder: Path, model: Answering, prompts: str, samples: int = 2) -> list[Answer]:
    with SampleFile(folder / "samples.jsonl") as file:
        texts = {prompt: prompt for prompt in prompts}
        request_missing(model, "post", texts, file, SETTINGS, samples=samples, progress=Progress())
        return [file.answer(SampleKey("post", prompt, number)) for prompt in prompts for number in range(samples)]


@pytest.mark.parametrize("refuses", ["a", "b", "c", "ab", "bc", "ac"])
def test_refusals_are_recorded_beside_answers(tmp_path: Path, refuses: str) -> None:
    model = Refusing(refuses)
    found = ask(tmp_path, model, "abc")
    assert [answer.is_refusal for answer in found] == [prompt in refuses for prompt in "aabbcc"]
    assert {answer.error for answer in found if answer.is_refusal} == {f"no {prompt}" for prompt in refuses}
    assert ask(tmp_path, model, "abc") == found
    assert len(model.requests) == 6  # a refusal is not requested again


def test_a_model_that_refuses_every_prompt_is_an_error_and_nothing_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(SlrmergeError) as caught:
        ask(tmp_path, Refusing("abc"), "abc")
    assert [problem.what for problem in caught.value.problems] == ["no a"]
    assert not (tmp_path / "samples.jsonl").exists()


def test_many_refusals_and_no_answer_end_the_requests(tmp_path: Path) -> None:
    prompts = "".join(chr(0x4E00 + number) for number in range(2 * MOST_REFUSED))
    model = Refusing(prompts[:-1])
    with pytest.raises(ServerError):
        ask(tmp_path, model, prompts, samples=3)
    assert len(model.requests) == 3 * (MOST_REFUSED - 1) + 1


def test_where_earlier_prompts_were_accepted_the_last_one_may_be_refused(tmp_path: Path) -> None:
    ask(tmp_path, Refusing(""), "ab")
    assert [answer.is_refusal for answer in ask(tmp_path, Refusing("c"), "abc")] == [False] * 4 + [True] * 2


# in an evaluation


def say(prompt: str, seed: int, body: object) -> str:
    return "red" if seed % 2 else "blue"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"Name a colour.": ["red", "blue"], "Name a paint.": ["red"], "Another?": ["blue"]}))
    return path


@pytest.mark.parametrize("skip", [0, 4, 8])
def test_a_refused_question_counts_as_unanswered(server: OpenAIServer, data: Path, skip: int) -> None:
    server.say = say
    server.misbehave(413, skip=skip, message="the prompt is too long")
    result = evaluate("open-qa", data, {"post": f"m@{server.url}"}, data.with_name("eval"), samples=4, concurrency=1)
    lines = [json.loads(line) for line in (data.with_name("eval") / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert [line["finish_reason"] for line in lines].count("refused") == 4
    assert len({line["prompt"] for line in lines if line["finish_reason"] == "refused"}) == 1
    (note,) = [note for note in result.notes if "refused" in note]
    assert note.startswith("post: 4 of 12 requests were refused")
    assert "the prompt is too long" in note
    assert not [note for note in result.notes if "verbalized" in note or "empty" in note]
    values = [score.metrics["precision"] for score in result.scores]
    assert values[skip // 4] == 0.0
    assert all(0 <= score.metrics["entropy"] <= log(2) for score in result.scores)
    assert result.cell("post", "precision").prompts == 3
    assert len(server.asked) == 9


def test_a_refused_verbalized_request_is_not_called_malformed(server: OpenAIServer, data: Path) -> None:
    server.say = lambda prompt, seed, body: json.dumps({"answers": [{"text": "red"}, {"text": "blue"}]})
    server.misbehave(413)
    result = evaluate(
        "open-qa", data, {"post": f"m@{server.url}"}, data.with_name("eval"), samples=4, concurrency=1, verbalized=2
    )
    notes = [note for note in result.notes if note.startswith("post: ")]
    assert [note.split()[1:4] for note in notes if "refused" in note] == [["2", "of", "6"]]
    assert result.responses[0].texts == [None] * 4


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_server_that_refuses_everything_ends_the_evaluation(server: OpenAIServer, data: Path, status: int) -> None:
    codes = {400: "request-rejected", 401: "key-rejected", 404: "server-not-found"}
    server.misbehave(status, times=None)
    with refused(ServerError, codes[status]):
        evaluate("open-qa", data, {"post": f"m@{server.url}"}, data.with_name("eval"), samples=4, concurrency=1)
    assert not (data.with_name("eval") / "samples.jsonl").exists()


def test_a_key_that_is_rejected_later_ends_the_evaluation(server: OpenAIServer, data: Path) -> None:
    server.misbehave(401, skip=5, times=None)
    with refused(ServerError, "key-rejected"):
        evaluate("open-qa", data, {"post": f"m@{server.url}"}, data.with_name("eval"), samples=4, concurrency=1)
    assert len((data.with_name("eval") / "samples.jsonl").read_bytes().splitlines()) == 5


# of embeddings


def embedder(server: OpenAIServer) -> ServerModel:
    return ServerModel(ServerAddress("m", server.url), concurrency=2, timeout_s=60)


@pytest.mark.parametrize("places", [{0}, {2, 3}, {99}, {0, 40, 63, 64, 70}, set(range(1, 100))], ids=str)
def test_texts_that_an_embeddings_server_rejects_have_no_embedding(server: OpenAIServer, places: set[int]) -> None:
    server.embeds_up_to = 10
    texts = [f"{'long ' * 10 if number in places else ''}{number}" for number in range(100)]
    found = embedder(server).embed(texts)
    assert found.shape == (100, 3)
    assert {number for number in range(100) if np.isnan(found[number]).all()} == places
    assert all(found[number].tolist() == vector(texts[number]) for number in range(100) if number not in places)


@pytest.mark.parametrize("count", [1, 300])
def test_an_embeddings_server_that_rejects_everything_is_an_error(server: OpenAIServer, count: int) -> None:
    server.embeds_up_to = 1
    with refused(ServerError, "request-rejected"):
        embedder(server).embed(["long"] * count)
    assert len(server.asked) < 200  # also where there are many texts


def test_a_rejected_text_is_recorded_and_not_embedded_again(server: OpenAIServer, tmp_path: Path) -> None:
    server.embeds_up_to = 10
    texts = ["a", "long " * 10, "b"]
    first = KeptEmbeddings(embedder(server), tmp_path).embed(texts)
    asked = len(server.asked)
    again = KeptEmbeddings(embedder(server), tmp_path)
    np.testing.assert_array_equal(again.embed(texts), first)
    assert len(server.asked) == asked
    assert np.isnan(again.embed(["longer " * 10])).all()  # where all that are missing are rejected
    assert again.embed(["c", "longer " * 10])[0].tolist() == vector("c")


def test_diversity_leaves_rejected_texts_out_and_counts_them(server: OpenAIServer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Tell me a joke.\n")
    server.say = lambda prompt, seed, body: ["a", "b", "long " * 10][seed % 3]
    server.embeds_up_to = 10
    at = f"m@{server.url}"
    result = evaluate("creative", tmp_path / "prompts.txt", {"post": at}, tmp_path / "eval", samples=8, embeddings=at)
    texts = [text for text in result.responses[0].texts if text in ("a", "b")]
    assert 2 <= len(texts) < 8
    vectors = np.array([vector(text) for text in texts], np.float32)
    assert result.cell("post", "diversity").mean == pytest.approx(dissimilarity(vectors))
    assert "m refuses 1 of 3 texts, which diversity leaves out" in result.notes
