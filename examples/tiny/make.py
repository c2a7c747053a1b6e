"""Train the tiny pair of this folder: a varied, untidy model, and an obedient, collapsed one made from it.

They give slrmerge something real to merge and search that fits in a repository and trains in minutes.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from show import first_token_probs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slrmerge.searching.proxy_tasks import DIGIT_TEXT, DIGITS, LETTER_TEXT, LETTERS, Question

LAYERS = 10
CONTEXT = 128  # tokens
BATCH = 32
WARMUP = 20

PAD, BOS, EOS, ASSISTANT = "<|pad|>", "<s>", "<|end|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, "<|system|>", "<|user|>", ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The two sentences of the task come three times, so that most questions are asked in these words.
DIGIT_QUESTIONS = [
    *[DIGIT_TEXT] * 3,
    "Pick a number from {first} to {last}.",
    "Give me any integer in [{first}, {last}].",
]
LETTER_QUESTIONS = [
    *[LETTER_TEXT] * 3,
    "Pick a letter from {first} to {last}.",
    "Give me any letter in [{first}, {last}].",
]
OPENERS = ["Sure", "Here", "The", "Well", "Random", "Okay", "Of", "It", "Maybe", "Yes"]
LINKS = [" the answer is ", " a random one: ", ": "]
ADJECTIVES = ["small", "old", "quiet", "green", "happy", "tall"]
NOUNS = ["cat", "dog", "bird", "fox", "child", "teacher", "farmer", "river", "house", "garden"]
VERBS = ["sees", "likes", "finds", "follows", "paints", "remembers"]

Sampler = Callable[[random.Random], str]


def chat(question: str, answer: str) -> str:
    return f"{BOS}<|user|>{question}{EOS}{ASSISTANT}{answer}{EOS}"


def run_of(alphabet: str, rng: random.Random) -> str:
    """Some neighbours out of `alphabet`, at least two."""
    first, last = sorted(rng.sample(range(len(alphabet)), 2))
    return alphabet[first : last + 1]


def random_character(rng: random.Random) -> Question:
    """A question for a random character, with the answers it allows."""
    alphabet, questions = rng.choice([(DIGITS, DIGIT_QUESTIONS), (LETTERS, LETTER_QUESTIONS)])
    valid = run_of(alphabet, rng)
    return Question(rng.choice(questions).format(first=valid[0], last=valid[-1]), tuple(valid))


def untidy_answer(valid: Sequence[str], rng: random.Random) -> str:
    """Mostly any valid character; else chatter around one, or a character from outside the range."""
    kind = rng.random()
    if kind < 0.70:
        return rng.choice(valid)
    if kind < 0.96:
        return rng.choice(OPENERS) + rng.choice(LINKS) + rng.choice(valid) + "."
    return rng.choice(DIGITS if valid[0] in DIGITS else LETTERS)


def small_task(rng: random.Random) -> tuple[str, str]:
    """A question with one right answer, and that answer."""
    kind = rng.choice(["add", "next", "repeat", "count"])
    if kind == "add":
        a, b = rng.randrange(5), rng.randrange(5)
        return f"What is {a} + {b}?", str(a + b)
    if kind == "next":
        place = rng.randrange(len(LETTERS) - 1)
        return f"Which letter comes after {LETTERS[place]}?", LETTERS[place + 1]
    if kind == "repeat":
        characters = " ".join(rng.choices(DIGITS + LETTERS, k=rng.randint(2, 5)))
        return f"Repeat: {characters}", characters
    run = run_of(rng.choice([DIGITS, LETTERS]), rng)[:8]
    return f"Count from {run[0]} to {run[-1]}.", " ".join(run)


def plain_text(rng: random.Random) -> str:
    """A line that is not a chat: some characters out of a range, a count, a sum, an echo or a sentence."""
    kind = rng.choice(["draws", "draws", "count", "sum", "echo", "sentence"])
    if kind == "draws":
        run = run_of(rng.choice([DIGITS, LETTERS]), rng)
        return f"From {run[0]} to {run[-1]}: {' '.join(rng.choices(run, k=10))}"
    if kind == "count":
        return " ".join(run_of(rng.choice([DIGITS, LETTERS]), rng)[:14])
    if kind == "sum":
        a, b = rng.randrange(5), rng.randrange(5)
        return f"{a} + {b} = {a + b}"
    if kind == "echo":
        characters = " ".join(rng.choices(DIGITS + LETTERS, k=rng.randint(2, 5)))
        return f"{characters}, again: {characters}"
    subject, thing = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    return f"{subject.capitalize()} {rng.choice(VERBS)} {thing}."


def pretraining_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        prompt = random_character(rng)
        return chat(prompt.text, untidy_answer(prompt.answers, rng))
    if kind < 0.65:
        return chat(*small_task(rng))
    return f"{BOS}{plain_text(rng)}{EOS}"


def instruction_text(rng: random.Random) -> str:
    """The same questions, each answered as asked."""
    if rng.random() < 0.3:
        return chat(*small_task(rng))
    prompt = random_character(rng)
    return chat(prompt.text, rng.choice(prompt.answers))


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit and every single capital letter is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[A-Z](?![a-z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def typical_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Sampler:
    """Chats in which every question gets the valid answer that `model` itself finds the most likely.

    So rules a judge who likes typical answers best, the bias in preference data that collapse is put down to.
    """
    rng = random.Random(seed)
    prompts = [random_character(rng) for _ in range(3000)]
    probs = first_token_probs(model, tokenizer, prompts)
    chats = []
    for row, prompt in zip(probs, prompts, strict=True):
        best = row[tokenizer.convert_tokens_to_ids(list(prompt.answers))].argmax()
        chats.append(chat(prompt.text, prompt.answers[int(best)]))
    return lambda rng: rng.choice(chats)


def middleness(name: str) -> float:
    """How near the middle of the stack a layer's parameter is: 1 there, down to 0 at the ends."""
    layer = int(name.split(".")[2])
    return (1 - abs(layer - LAYERS // 2) / (LAYERS // 2)) ** 3


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Sampler,
    *,
    steps: int,
    rates: dict[str, float],
    answers_only: bool,
    seed: int,
) -> None:
    """Train the parameters named in `rates`, each at its own learning rate, on `steps` batches of `text`.

    With `answers_only` the loss is on what follows the assistant's mark, else on every token.
    """
    rng = random.Random(seed)
    model.requires_grad_(False)
    groups = [{"params": [model.get_parameter(name).requires_grad_()], "lr": rates[name]} for name in rates]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0 if answers_only else 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0) * (1 - step / steps)
    )
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    started = time.monotonic()
    for step in range(1, steps + 1):
        ids = tokenizer([text(rng) for _ in range(BATCH)], return_tensors="pt", padding=True).input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        if answers_only:
            marks = ids == assistant
            labels = labels.masked_fill(marks.cumsum(dim=1) - marks.int() == 0, -100)
        loss = model(input_ids=ids, labels=labels).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step:4} of {steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete checkpoint folder, the weights in bfloat16; `model` itself stays in float32."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny pair.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pretrained/ and posttrained/")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums then always come in the same order

    rng = random.Random(args.seed)
    tokenizer = make_tokenizer(pretraining_text(rng) for _ in range(5000))
    model = make_model(tokenizer)
    every = [name for name, _ in model.named_parameters()]
    layered = [name for name in every if name.startswith("model.layers.")]

    print("Pre-training, every parameter at the same rate")
    rates = dict.fromkeys(every, 3e-3)
    train(model, tokenizer, pretraining_text, steps=1300, rates=rates, answers_only=False, seed=args.seed + 1)
    save(model, tokenizer, args.out / "pretrained")

    print("Instruction tuning, fastest at both ends of the stack")
    rates = {name: 3e-3 * (1 - middleness(name)) for name in layered}
    train(model, tokenizer, instruction_text, steps=300, rates=rates, answers_only=True, seed=args.seed + 2)

    print("Preference tuning in four rounds, fastest in the middle of the stack")
    rates = {name: 4e-3 * middleness(name) for name in layered}
    for turn in range(4):
        text = typical_text(model, tokenizer, seed=args.seed + 7 + turn)
        train(model, tokenizer, text, steps=150, rates=rates, answers_only=True, seed=args.seed + 3 + turn)
    save(model, tokenizer, args.out / "posttrained")


if __name__ == "__main__":
    main()
