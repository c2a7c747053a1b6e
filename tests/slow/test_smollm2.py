"""The main job on real weights: SmolLM2-135M-Instruct and a fine-tune of it, merged, verified, loaded, speaking."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from slrmerge import load_recipe
from tests.checkpoints import read_back
from tests.slow.conftest import SLRMERGE, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first makes the pair, on cores that others use too
]


@pytest.fixture(scope="module")
def folder(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file merges: the shared pair and its recipe, by links."""
    folder = tmp_path_factory.mktemp("smollm2")
    for entry in real_pair.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> Path:
    run(SLRMERGE, "recipe.yaml", "--out", "hybrid", cwd=folder)
    return folder / "hybrid"


def test_the_hybrid_is_verified_against_both_sides(hybrid: Path) -> None:
    report = json.loads(run(SLRMERGE, "verify", hybrid, "--json"))
    assert report["verified"]
    assert report["against_sources"]


def test_its_layers_are_those_of_the_recipe(hybrid: Path, folder: Path) -> None:
    ((first, last),) = load_recipe(folder / "recipe.yaml").restore or ()
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

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.filterwarnings("default")  # transformers' own
def test_transformers_loads_it_and_it_answers(hybrid: Path) -> None:
    digit = "Generate a random integer in the range [0, 5]. Do not include anything else in your reply."
    number, text = answers(hybrid, [digit, "Write a sentence about the sea."])
    assert number.strip()[0].isdigit()
    assert text.strip()


@pytest.mark.filterwarnings("default")  # transformers' own
def test_what_the_search_chose_scores_as_it_said_when_merged_and_loaded(searched: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from slrmerge.chat import tokenise
    from slrmerge.crc import ConstrainedRandomCharacter

    task = ConstrainedRandomCharacter()
    prompts = tokenise(task.questions(), folder / "posttrained")
    chosen = json.loads((searched / "summary.json").read_text())["chosen"]
    for name in ("slr", "early"):
        run(SLRMERGE, searched / f"{name}.yaml", "--out", folder / f"searched-{name}")
        model = AutoModelForCausalLM.from_pretrained(folder / f"searched-{name}", dtype=torch.float32)
        log_probs = torch.full((1, len(prompts), 26), torch.nan, dtype=torch.float64)
        with torch.inference_mode():
            for number, prompt in enumerate(prompts):
                logits = model(input_ids=torch.tensor([prompt.ids]), logits_to_keep=1).logits[0, -1].double()
                valid = logits.log_softmax(dim=-1)[list(prompt.valid_ids)]
                log_probs[0, number, : len(valid)] = valid
        quality, diversity = task.score(log_probs.numpy())
        assert quality.mean() == pytest.approx(chosen[name]["quality"], abs=1e-4)
        assert diversity.mean() == pytest.approx(chosen[name]["diversity"], abs=1e-4)
    assert chosen["slr"]["quality"] >= 0.9 * chosen["post"]["quality"]
    assert chosen["slr"]["diversity"] > chosen["post"]["diversity"]


def test_a_soup_of_it_is_verified_too(folder: Path) -> None:
    (folder / "soup.yaml").write_text("pretrained: ./pretrained\nposttrained: ./posttrained\nalpha: 0.5\n")
    run(SLRMERGE, "soup.yaml", "--out", "soup", "--max-shard-size", "100MB", cwd=folder)
    assert json.loads(run(SLRMERGE, "verify", "soup", "--json", cwd=folder))["against_sources"]
    assert len(list((folder / "soup").glob("model-*-of-*.safetensors"))) == 3
