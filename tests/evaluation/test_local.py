"""Models in this process: the example pair, asked through its own chat template."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from slrmerge.errors import CheckpointError, UnsupportedModelError
from slrmerge.evaluation.local import LARGEST_CPU_BATCH, LocalModel, row_bytes
from slrmerge.evaluation.models import SampleRequest
from slrmerge.evaluation.samples import Answer, SampleKey, Settings
from slrmerge.io.progress import Progress
from slrmerge.searching.chat_template import render
from tests.conftest import TINY
from tests.evaluation.helpers import Kept
from tests.gguf_files import write_gguf
from tests.problems import refused

POST = TINY / "posttrained"
DIGIT = "Generate a random integer in the range [0, 5]. Do not include anything else in your reply."
LETTER = "Generate a random letter from A to G (inclusive). Do not include anything else in your reply."
SETTINGS = Settings("", temperature=1.0, min_p=0.0, max_tokens=4)
GREEDY = SETTINGS._replace(temperature=0.0)


def opened(folder: Path, batch: int | None = 64, dtype: str | None = None) -> LocalModel:
    return LocalModel(folder, device="cpu", batch=batch, dtype=dtype, progress=Progress())


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with closing(opened(POST)) as model:
        yield model


def asked(model: LocalModel, settings: Settings, *prompts: str, first: int = 0) -> list[Answer]:
    """The answers to prompts with seeds that count up from `first`."""
    requests = [
        SampleRequest(SampleKey("post", "p", number), prompt, number) for number, prompt in enumerate(prompts, first)
    ]
    kept = Kept(raises=True)
    model.answer(requests, settings, kept)
    return [kept.answers[request] for request in requests]


@pytest.fixture(scope="module")
def probabilities() -> np.ndarray:
    """Of the first token after the digit prompt, through transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(POST)
    loaded: Any = AutoModelForCausalLM.from_pretrained(POST, dtype=torch.float32)
    inputs = tokenizer(render(tokenizer, DIGIT), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        found: np.ndarray = loaded(**inputs).logits[0, -1].double().softmax(-1).numpy()
    return found


def drawn(model: LocalModel, settings: Settings, count: int) -> Counter[str]:
    return Counter(answer.text for answer in asked(model, settings._replace(max_tokens=1), *[DIGIT] * count))


def shares(probabilities: np.ndarray, settings: Settings) -> dict[str, float]:
    """What should be drawn: by temperature, then cut at min_p of the most probable, then of all that is left."""
    tokenizer: Any = AutoTokenizer.from_pretrained(POST)
    heated = probabilities ** (1 / settings.temperature)
    heated /= heated.sum()
    heated[heated < settings.min_p * heated.max()] = 0
    found: Counter[str] = Counter()
    for token in np.flatnonzero(heated):
        found[tokenizer.decode([token], skip_special_tokens=True)] += heated[token] / heated.sum()
    return dict(found)


@pytest.mark.parametrize(
    "settings", [SETTINGS, SETTINGS._replace(min_p=0.02), SETTINGS._replace(temperature=1.5, min_p=0.1)]
)
def test_samples_are_drawn_as_the_models_distribution_says(
    model: LocalModel, probabilities: np.ndarray, settings: Settings
) -> None:
    count = 1024
    found, expected = drawn(model, settings, count), shares(probabilities, settings)
    assert found.keys() <= expected.keys()
    common = [text for text, share in expected.items() if share * count >= 5]
    rest = 1 - sum(expected[text] for text in common)
    seen = [found[text] for text in common] + ([count - sum(found[t] for t in common)] if rest > 1e-9 else [])
    wanted = [expected[text] * count for text in common] + ([rest * count] if rest > 1e-9 else [])
    assert chisquare(seen, wanted).pvalue > 1e-3


def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model: LocalModel) -> None:
    together = asked(model, SETTINGS, DIGIT, LETTER, DIGIT, LETTER)
    with closing(opened(POST, batch=1)) as alone:
        assert [asked(alone, SETTINGS, prompt, first=n)[0] for n, prompt in enumerate((DIGIT, LETTER) * 2)] == together
    assert asked(model, SETTINGS, LETTER, first=1) == together[1:2]


def test_greedy_decoding_is_transformers_own(model: LocalModel) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(POST)
    loaded: Any = AutoModelForCausalLM.from_pretrained(POST, dtype=torch.float32)
    for answer, prompt in zip(asked(model, GREEDY, DIGIT, LETTER), (DIGIT, LETTER), strict=True):
        inputs = tokenizer(render(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")
        made = loaded.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(made, skip_special_tokens=True)


def test_a_truncated_answer_is_told_from_a_complete_one(model: LocalModel) -> None:
    (whole,), (cut,) = asked(model, GREEDY, DIGIT), asked(model, GREEDY._replace(max_tokens=1), DIGIT)
    assert whole.finish_reason == "stop"
    assert cut == Answer(whole.text, "length")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(POST, tmp_path / "copied")


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_models_own_generation_config_does_not_count(model: LocalModel, copied: Path) -> None:
    changed(copied / "generation_config.json", temperature=0.01, top_k=1, repetition_penalty=9.0, do_sample=True)
    with closing(opened(copied)) as other:
        assert asked(other, SETTINGS, *[DIGIT] * 16) == asked(model, SETTINGS, *[DIGIT] * 16)


def test_a_prompt_that_does_not_fit_is_refused_and_an_answer_ends_where_the_model_does(copied: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(POST)
    length = len(tokenizer(render(tokenizer, DIGIT), add_special_tokens=False)["input_ids"])
    changed(copied / "config.json", max_position_embeddings=length + 1)
    with closing(opened(copied)) as short:
        assert asked(short, GREEDY, DIGIT)[0].finish_reason == "length"
        with refused(UnsupportedModelError, "prompt-too-long"):
            asked(short, GREEDY, DIGIT + DIGIT)
        prompts = [DIGIT, DIGIT + DIGIT, DIGIT + DIGIT, DIGIT]
        requests = [SampleRequest(SampleKey("post", "p", number), text, 0) for number, text in enumerate(prompts)]
        kept = Kept()
        short.answer(requests, GREEDY, kept)
    assert list(kept.answers) == [requests[0], requests[3]]
    assert list(kept.refusals) == requests[1:3]
    assert kept.answers[requests[0]] == kept.answers[requests[3]]


def test_model_ids_depend_on_the_weights(copied: Path) -> None:
    assert opened(POST).model_id == opened(POST).model_id
    before = opened(copied).model_id
    assert before.startswith("copied ")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert opened(copied).model_id != before


def test_a_merge_is_known_by_its_manifest_wherever_it_lies(copied: Path) -> None:
    (copied / "slrmerge.json").write_text('{"files": 1}')
    before = opened(copied).model_id
    (copied / "model.safetensors").touch()
    assert opened(copied).model_id == before
    (copied / "slrmerge.json").write_text('{"files": 2}')
    assert opened(copied).model_id != before


def test_another_chat_template_is_another_model(copied: Path) -> None:
    before = opened(copied).model_id
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text() + "Think. ")
    assert opened(copied).model_id != before


@pytest.mark.parametrize("ends", [0, [3, 0], None])
def test_an_answer_ends_at_the_tokenizers_end_too(copied: Path, model: LocalModel, ends: object) -> None:
    (whole,) = asked(model, GREEDY, DIGIT)
    for name in ("generation_config.json", "config.json"):
        changed(copied / name, eos_token_id=ends)
    with closing(opened(copied)) as other:
        assert asked(other, GREEDY, DIGIT) == [whole]


def test_a_folder_without_a_model_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        opened(tmp_path)


def test_a_model_without_a_chat_template_is_an_error_before_anything_is_asked(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModelError) as caught:
        opened(copied).check()
    assert "chat template" in str(caught.value)


def test_a_model_unknown_to_transformers_is_refused(copied: Path) -> None:
    changed(copied / "config.json", model_type="unheard-of")
    with refused(UnsupportedModelError, "model-not-loadable"), closing(opened(copied)) as model:
        asked(model, GREEDY, DIGIT)


def test_a_gguf_file_is_left_to_a_server(tmp_path: Path) -> None:
    with refused(UnsupportedModelError, "gguf") as caught:
        opened(write_gguf(tmp_path / "m.gguf", 1))
    assert "llama-server" in caught.value.problems[0].remedy


# batches and dtypes


class Batches:
    """The sizes of the batches that models answer; a batch larger than `memory` rows is out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.memory = 1000
        answer = LocalModel._answer

        def answered(model: LocalModel, requests: Sequence[SampleRequest], settings: Settings) -> list[Answer]:
            self.sizes.append(len(requests))
            if len(requests) > self.memory:
                raise torch.cuda.OutOfMemoryError
            return answer(model, requests, settings)

        monkeypatch.setattr(LocalModel, "_answer", answered)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


def test_the_estimate_of_a_rows_memory_contains_its_keys_and_values() -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(POST, dtype=torch.float32)
    with torch.inference_mode():
        cache = loaded(torch.ones(1, 9, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert row_bytes(loaded.config, 9, 4) - row_bytes(loaded.config, 0, 4) == kept


def test_a_batch_has_as_many_rows_as_memory_holds(
    model: LocalModel, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [DIGIT, LETTER] * 20
    together = asked(model, SETTINGS, *prompts)
    batches.sizes.clear()
    with closing(opened(POST, batch=None)) as other:
        assert asked(other, SETTINGS, *prompts) == together
    assert batches.sizes == [LARGEST_CPU_BATCH, 40 - LARGEST_CPU_BATCH]

    config = AutoModelForCausalLM.from_pretrained(POST).config
    tokenizer: Any = AutoTokenizer.from_pretrained(POST)
    longest = max(len(tokenizer(render(tokenizer, prompt)).input_ids) for prompt in prompts)
    row = row_bytes(config, longest + SETTINGS.max_tokens, 4)
    for rows, expected in ((15.9, [15, 15, 10]), (0.5, [1] * 40)):
        monkeypatch.setattr("slrmerge.evaluation.local.available_memory_bytes", lambda rows=rows: int(2 * rows * row))
        batches.sizes.clear()
        with closing(opened(POST, batch=None)) as other:
            assert asked(other, SETTINGS, *prompts) == together
        assert batches.sizes == expected


@pytest.mark.parametrize("batch", [None, 32])
def test_a_batch_for_which_the_device_lacks_memory_is_halved(
    model: LocalModel, batches: Batches, batch: int | None
) -> None:
    together = asked(model, SETTINGS, *[DIGIT] * 20)
    batches.sizes.clear()
    batches.memory = 6
    with closing(opened(POST, batch=batch)) as other:
        assert asked(other, SETTINGS, *[DIGIT] * 20) == together
    assert batches.sizes == [20, 10, 5, 5, 5, 5]


def test_an_answer_for_which_the_device_lacks_memory_is_an_error(batches: Batches) -> None:
    batches.memory = 0
    with refused(UnsupportedModelError, "out-of-memory"), closing(opened(POST)) as model:
        asked(model, SETTINGS, DIGIT, DIGIT)
    assert batches.sizes == [2, 1]


def test_a_prompt_that_does_not_fit_is_refused_once_where_its_batch_is_halved(copied: Path, batches: Batches) -> None:
    changed(copied / "config.json", max_position_embeddings=40)
    batches.memory = 1
    prompts = [DIGIT, DIGIT * 9, DIGIT]
    requests = [SampleRequest(SampleKey("post", "p", number), text, 0) for number, text in enumerate(prompts)]
    kept = Kept()
    with closing(opened(copied)) as short:
        short.answer(requests, GREEDY, kept)
    assert list(kept.answers) == [requests[0], requests[2]]
    assert list(kept.refusals) == [requests[1]]
    assert batches.sizes == [2, 1, 1]


def test_a_model_too_large_for_the_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_memory(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr("transformers.PreTrainedModel.to", lacks_memory)
    with refused(UnsupportedModelError, "out-of-memory"), closing(opened(POST)) as model:
        asked(model, SETTINGS, DIGIT)


def test_a_model_runs_in_the_dtype_that_was_chosen(model: LocalModel) -> None:
    assert model.dtype == "float32"
    with closing(opened(POST, dtype="bfloat16")) as other:
        assert other.dtype == "bfloat16"
        (answer,) = asked(other, GREEDY, DIGIT)
        assert answer.finish_reason == "stop"
        assert other._ready().model.dtype == torch.bfloat16


@pytest.mark.parametrize(("stored", "rate", "expected"), [
    ("F16", 1e12, "float16"), ("BF16", 1e12, "bfloat16"), ("BF16", 1e10, "float32"), ("F32", 1e12, "float32"),
    ("U8", 1e12, "bfloat16"),
])  # fmt: skip
def test_a_large_model_runs_in_its_stored_dtype_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, stored: str, rate: float, expected: str
) -> None:
    monkeypatch.setattr("slrmerge.searching.device.BIG_PARAMETERS", 1)
    rates = {torch.float32: 1e11}
    monkeypatch.setattr("slrmerge.searching.device.measured_rate", lambda width, dtype, device: rates.get(dtype, rate))
    model = opened(POST)
    tensors = {name: info._replace(dtype=stored) for name, info in model._checkpoint.items()}
    monkeypatch.setattr(type(model._checkpoint), "values", lambda self: tensors.values())
    assert model.dtype == expected
