"""SmolLM2-135M-Instruct and a fine-tune of it: merged, verified, loaded, prompted."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slrmerge import Recipe, load_recipe
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.searching.prompts import contexts_of, tokenize
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter, score
from tests.checkpoints import read_back
from tests.cli import run
from tests.searching.sweep.models import transformers_log_probs
from tests.slow.conftest import WITH_SMOLLM2

pytestmark = WITH_SMOLLM2

QUESTIONS = ConstrainedRandomCharacter().questions()[::20]
"""One about digits and one about letters: a search of 465 intervals takes as long as it asks questions."""


def printed(*arguments: object) -> str:
    """What a command prints that has to succeed."""
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to merge in, with links to the shared pair and its recipe."""
    folder = tmp_path_factory.mktemp("merges")
    for entry in real_pair.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> Path:
    printed(folder / "recipe.yaml", "--out", folder / "hybrid")
    return folder / "hybrid"


def test_the_hybrid_is_verified_against_both_sides(hybrid: Path) -> None:
    report = json.loads(printed("verify", hybrid, "--json"))
    assert report["verified"]
    assert report["against_sources"]


def test_its_layers_are_those_of_the_recipe(hybrid: Path, folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    assert isinstance(recipe, Recipe)
    assert recipe.restore is not None
    ((first, last),) = recipe.restore
    merged = read_back(hybrid)
    pre, post = read_back(folder / "pretrained"), read_back(folder / "posttrained")
    inside = tuple(f"model.layers.{k}." for k in range(first, last + 1))
    assert merged.keys() == post.keys()
    assert all(merged[name] == (pre if name.startswith(inside) else post)[name] for name in merged)
    assert all(any(pre[name] != post[name] for name in merged if name.startswith(layer)) for layer in inside)


def answers(folder: Path, prompts: Sequence[str]) -> list[str]:
    """Greedy answers in fp32, through transformers and the checkpoint's own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_transformers_loads_the_hybrid_and_it_answers(hybrid: Path) -> None:
    digit = "Generate a random integer in the range [0, 5]. Do not include anything else in your reply."
    number, text = answers(hybrid, [digit, "Write a sentence about the sea."])
    assert number.strip()[0].isdigit()
    assert text.strip()


def test_the_selected_hybrid_has_the_scores_of_the_search_when_merged_and_loaded(folder: Path) -> None:
    task, searched = folder / "questions.yaml", folder / "search"
    task.write_text(write_yaml({"questions": [asdict(question) for question in QUESTIONS]}))
    options = ["--task", task, "--space", "intervals", "--threads", 1]
    printed("search", folder / "recipe.yaml", "--out", searched, *options)
    prompts = tokenize(QUESTIONS, folder / "posttrained")
    selected = json.loads((searched / "summary.json").read_text())["selected"]
    for name in ("slr", "early"):
        printed(searched / f"{name}.yaml", "--out", folder / f"searched-{name}")
        log_probs = transformers_log_probs(folder / f"searched-{name}", contexts_of(prompts))
        quality, diversity = score(log_probs[np.newaxis])
        assert quality.mean() == pytest.approx(selected[name]["quality"], abs=1e-4)
        assert diversity.mean() == pytest.approx(selected[name]["diversity"], abs=1e-4)
    assert selected["slr"]["quality"] >= 0.9 * selected["post"]["quality"]
    assert selected["slr"]["diversity"] > selected["post"]["diversity"]


def test_a_soup_in_three_shards_is_verified(folder: Path) -> None:
    (folder / "soup.yaml").write_text("pretrained: ./pretrained\nposttrained: ./posttrained\nalpha: 0.5\n")
    printed(folder / "soup.yaml", "--out", folder / "soup", "--max-shard-size", "100MB")
    assert json.loads(printed("verify", folder / "soup", "--json"))["against_sources"]
    assert len(list((folder / "soup").glob("model-*-of-*.safetensors"))) == 3
