"""transformers, llama.cpp and CTranslate2 load a merged model and continue a prompt in the same way."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slow.conftest import WITH_SMOLLM2
from tests.slow.llama_cpp import convert, serve

pytestmark = WITH_SMOLLM2

QUESTION = "What is 2+2?"
OPENINGS = ("The capital of France is", "Once upon a time there was a small")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def hybrid(real_hybrid: Path) -> Path:
    return real_hybrid / "hybrid"


@pytest.fixture(scope="module")
def tokenizer(hybrid: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hybrid)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[str]:
    """Two openings, and a question as chat; the answer ends by itself, the others at the limit."""
    chat = [{"role": "user", "content": QUESTION}]
    return [*OPENINGS, tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)]


def continued_by_transformers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    continued = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        mask = torch.ones_like(inputs)
        made = model.generate(inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        continued.append(made[0, len(ids) :].tolist())
    return continued


@pytest.fixture(scope="module")
def expected(hybrid: Path, real_pair: Path, tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """How transformers continues the prompts, which differs from both sides of the pair."""
    ids = tokenizer(prompts)["input_ids"]
    continued = continued_by_transformers(hybrid, ids)
    assert {made[-1] == tokenizer.eos_token_id for made in continued} == {True, False}
    for side in ("pretrained", "posttrained"):
        assert continued != continued_by_transformers(real_pair / side, ids)
    return continued


def test_llama_cpp_continues_prompts_alike(hybrid: Path, prompts: list[str], expected: list[list[int]]) -> None:
    server = serve(hybrid.with_suffix(".gguf"))
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    answers = [server.handle_completions({"prompt": prompt, **options})["choices"][0] for prompt in prompts]
    assert [[token["id"] for token in answer["logprobs"]["content"]] for answer in answers] == expected


def test_ctranslate2_continues_prompts_alike(
    hybrid: Path, tokenizer: Any, prompts: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    import ctranslate2

    command = Path(sys.executable).with_name("ct2-transformers-converter")
    folder = tmp_path / "ctranslate2"
    convert(command, "--model", hybrid, "--output_dir", folder, "--quantization", "float32")
    model = ctranslate2.Generator(str(folder), compute_type="float32", intra_threads=1)
    options = {"max_length": NEW_TOKENS, "include_prompt_in_result": False, "return_end_token": True}
    made = [model.generate_batch([tokenizer.tokenize(prompt)], **options)[0] for prompt in prompts]
    assert [result.sequences_ids[0] for result in made] == expected
