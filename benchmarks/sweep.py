"""Time a sweep over all intervals, compared with the naive loop: assemble each hybrid and run it on every prompt.

The pair is made here (random weights; time does not depend on them), with 40 prompts as long and about as alike as the
CRC prompts with Llama-3.1's tokenizer and template: 2,240 tokens, 761 when packed (there 772). The naive loop keeps
both sides' weights in memory, copies them into one model, and runs one prompt at a time or all in one padded batch. It
is timed on a sample of the intervals, half before the sweep and half after it. Ratios count; times are for orientation.

    python benchmarks/sweep.py                        # 28 layers, Llama-like
    python benchmarks/sweep.py --layers 16 --family gemma2
    python benchmarks/sweep.py --smoke                # a few seconds, to see that it runs

Then it prints the cost that the model of `slrmerge search --dry-run` predicts for the paper's three models here.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import slrmerge
from slrmerge.searching.candidates import Candidate, make_candidates
from slrmerge.searching.scorer import LocalScorer, ScoreRequest, ScorerOptions
from slrmerge.searching.sweep.cost import PAPER_MODELS, all_intervals_cost, measured_rate
from slrmerge.searching.sweep.trie import Context, pack

VOCABULARY = 4096
FAMILIES = {"llama": {}, "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64}}
"""By transformers' `model_type`, with what their configs need."""

hf: Any = transformers  # partly typed; calls of its untyped functions are no errors this way
Weights = dict[str, torch.Tensor]


def make_contexts() -> list[Context]:
    """Two families of 20: 35 tokens that all share, 3 that a family shares, and 18 of each prompt's own."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    trunk = tokens(35)
    contexts = []
    for _ in range(2):
        shared = trunk + tokens(3)
        contexts += [Context(shared + tokens(18), tuple(rng.sample(range(3, VOCABULARY), 8))) for _ in range(20)]
    return contexts


def make_side(folder: Path, config: Any, seed: int) -> Weights:
    """A model with random weights, saved to `folder`; returns its weights."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    weights: Weights = model.state_dict()
    return weights


def naive_seconds(
    model: torch.nn.Module, pre: Weights, post: Weights, sample: Sequence[Candidate], forward: Callable[[], None]
) -> list[float]:
    """For each interval of the sample, the time to assemble its hybrid and to run it on all prompts."""
    times = []
    for candidate in sample:
        start = time.perf_counter()
        alphas = candidate.alphas
        model.load_state_dict({name: (pre if alphas.get(name) == 1 else post)[name] for name in post})
        forward()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width, a multiple of 64")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--sample", type=int, default=8, help="number of intervals that the naive loop is timed on")
    parser.add_argument("--no-prediction", action="store_true", help="leave out the paper's models")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, without the paper's models")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.layers, arguments.hidden, arguments.sample, arguments.no_prediction = 3, 64, 2, True
        torch.set_num_threads(1)  # products this small are slower on several
    hf.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        compare(Path(folder), arguments)
    if not arguments.no_prediction:
        predict()


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the time of the sweep and of the naive loop, and their ratio."""
    config = make_config(arguments)
    pre, post = make_side(folder / "pre", config, 0), make_side(folder / "post", config, 1)
    pair = slrmerge.open_pair(folder / "pre", folder / "post")
    contexts = make_contexts()
    candidates = make_candidates(pair, ["intervals"])
    sample = candidates[2 :: max(1, len(candidates) // arguments.sample)]
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "post", dtype=torch.float32).eval()

    def one_at_a_time() -> None:
        for context in contexts:
            model(input_ids=torch.tensor([context.ids]), logits_to_keep=1)

    def one_batch() -> None:
        model(input_ids=torch.tensor([context.ids for context in contexts]), logits_to_keep=1)

    forwards = {"one prompt at a time": one_at_a_time, "one padded batch of 40": one_batch}
    times: dict[str, list[float]] = {name: [] for name in forwards}

    def time_naive(part: Sequence[Candidate]) -> None:
        for name, forward in forwards.items():
            times[name] += naive_seconds(model, pre, post, part, forward)

    time_naive(sample[::2])
    sweep_s = sweep_seconds(pair, candidates, contexts)
    time_naive(sample[1::2])

    packed = len(pack([context.ids for context in contexts]))
    size = f"{arguments.layers} layers, hidden {arguments.hidden}, float32"
    print(f"{arguments.family}-like, {size}, {torch.get_num_threads()} threads")
    print(f"{len(candidates)} hybrids, {sum(len(each.ids) for each in contexts):,} prompt tokens, {packed} packed")
    print_ratios(sweep_s, times, len(candidates))


def make_config(arguments: argparse.Namespace) -> Any:
    """A config of the chosen family, depth and width."""
    heads = arguments.hidden // 64
    return hf.AutoConfig.for_model(
        arguments.family,
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        **FAMILIES[arguments.family],
    )


def sweep_seconds(pair: slrmerge.ModelPair, candidates: Sequence[Candidate], contexts: Sequence[Context]) -> float:
    """The time of a sweep that scores all candidates."""
    start = time.perf_counter()
    request = ScoreRequest("first", [candidate.alphas for candidate in candidates], contexts, torch.float32)
    with LocalScorer(pair, ScorerOptions(max_memory_bytes=0)) as scorer:
        scorer.score(request, None, slrmerge.Progress())
    return time.perf_counter() - start


def print_ratios(sweep_s: float, times: dict[str, list[float]], hybrids: int) -> None:
    """Print the time of the sweep, and that of each naive loop, scaled up from the timed intervals to all hybrids."""
    print(f"sweep{sweep_s:31.1f} s")
    for name, found in times.items():
        middle, low, high = (pick(found) * hybrids for pick in (statistics.median, min, max))
        spread = f"{middle / sweep_s:.1f} × ({low / sweep_s:.1f}–{high / sweep_s:.1f})"
        print(f"naive, {name:24}{middle:7.1f} s   {spread}, from {len(found)} intervals")


def predict() -> None:
    """Print the predicted cost of the paper's models, at the rate of a matrix product measured here."""
    for shape in PAPER_MODELS:
        cost = all_intervals_cost(shape)
        rate = measured_rate(shape.width, torch.bfloat16, torch.device("cpu"))
        print(
            f"predicted, {shape.name:14} {cost.flop / 1e15:.2f} PFLOP at {rate / 1e9:,.0f} GFLOP/s in bfloat16: "
            f"{cost.flop / rate / 60:.0f} min, states {cost.states_bytes / 1e9:.1f} GB at most"
        )


if __name__ == "__main__":
    main()
