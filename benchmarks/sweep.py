"""Time a sweep over all intervals against the naive loop, in one process: assemble each hybrid, ask it every prompt.

The pair is made here (random weights; time does not depend on them), its 40 prompts as long and about as alike as the
CRC prompts are with Llama-3.1's tokenizer and template: 2,240 tokens, 761 when packed (there 772). The naive loop keeps
both sides' weights in memory, copies them in, and asks one prompt at a time or all in one padded batch; a sample of the
intervals, half before the sweep and half after it, stands for all of them. Ratios count; times are for orientation.

    python benchmarks/sweep.py                        # 28 layers, Llama-like
    python benchmarks/sweep.py --layers 16 --family gemma2

Then the cost model's prediction for the paper's three models on this machine, as `slrmerge search --dry-run` gives it.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from slrmerge.chat import Prompt
from slrmerge.checkpoint import LayerStack, open_pair
from slrmerge.progress import Silent
from slrmerge.search.candidates import Candidate, ends, intervals
from slrmerge.search.scoring import PairSweeper, Pass
from slrmerge.sweep.cost import PAPER_MODELS, all_intervals_cost, measured_rate
from slrmerge.sweep.trie import pack

VOCABULARY = 4096
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 64, "query_pre_attn_scalar": 64}),
}
Weights = dict[str, torch.Tensor]


def made_prompts() -> list[Prompt]:
    """Two families of 20: 35 tokens that all share, 3 that a family shares, 18 of its own for each prompt but two."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    trunk = tokens(35)
    prompts = []
    for _ in range(2):
        shared = trunk + tokens(3)
        prompts += [Prompt(shared + tokens(18), tuple(rng.sample(range(3, VOCABULARY), 8))) for _ in range(20)]
    return prompts


def made_side(folder: Path, config: transformers.PreTrainedConfig, seed: int) -> Weights:
    """A model with random weights, saved to `folder`; its weights."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    weights: Weights = model.state_dict()
    return weights


def naive_seconds(
    model: torch.nn.Module,
    sides: tuple[Weights, Weights],
    stack: LayerStack,
    sample: Sequence[Candidate],
    ask: Callable[[], None],
) -> list[float]:
    """For each interval of the sample, the time to assemble its hybrid and to ask it."""
    pre, post = sides
    times = []
    for interval in sample:
        start = time.perf_counter()
        inside = range(interval.start or 0, (interval.end or 0) + 1)
        hybrid = {name: (pre if (place := stack.locate(name)) and place[0] in inside else post)[name] for name in post}
        model.load_state_dict(hybrid)
        ask()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--sample", type=int, default=8, help="intervals that the naive loop is timed on")
    parser.add_argument("--no-prediction", action="store_true", help="leave out the paper's models")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        compare(Path(folder), arguments)
    if not arguments.no_prediction:
        predict()


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Print what the sweep takes and how many times that the naive loop takes."""
    kind, more = FAMILIES[arguments.family]
    heads = arguments.hidden // 64
    config = kind(
        vocab_size=VOCABULARY, hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads // 2, **more,
    )  # fmt: skip
    sides = made_side(folder / "pre", config, 0), made_side(folder / "post", config, 1)
    pretrained, posttrained = open_pair(folder / "pre", folder / "post")
    assert posttrained.stack is not None
    prompts = made_prompts()
    candidates = [*ends(posttrained, arguments.layers), *intervals(posttrained, arguments.layers)]
    sample = candidates[2 :: max(1, len(candidates) // arguments.sample)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "post", dtype=torch.float32).eval()

    def one_at_a_time() -> None:
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt.ids]), logits_to_keep=1)

    def one_batch() -> None:
        model(input_ids=torch.tensor([prompt.ids for prompt in prompts]), logits_to_keep=1)

    rivals = {"one prompt at a time": one_at_a_time, "one padded batch of 40": one_batch}
    times: dict[str, list[float]] = {name: [] for name in rivals}

    def time_rivals(part: Sequence[Candidate]) -> None:
        for name, ask in rivals.items():
            times[name] += naive_seconds(model, sides, posttrained.stack, part, ask)

    time_rivals(sample[::2])
    start = time.perf_counter()
    with PairSweeper(pretrained, posttrained, output_dtype=None, device=torch.device("cpu")) as sweeper:
        sweeper.run(Pass("first", candidates, prompts, torch.float32), None, max_bytes=0, progress=Silent())
    sweep_s = time.perf_counter() - start
    time_rivals(sample[1::2])

    packed = len(pack([prompt.ids for prompt in prompts]))
    size = f"{arguments.layers} layers, hidden {arguments.hidden}, float32"
    print(f"{arguments.family}-like, {size}, {torch.get_num_threads()} threads")
    print(f"{len(candidates)} hybrids, {sum(len(p.ids) for p in prompts):,} prompt tokens, {packed} packed")
    print(f"sweep{sweep_s:31.1f} s")
    for name, found in times.items():
        each, low, high = (pick(found) * len(candidates) for pick in (statistics.median, min, max))
        spread = f"{each / sweep_s:.1f} × ({low / sweep_s:.1f}–{high / sweep_s:.1f})"
        print(f"naive, {name:24}{each:7.0f} s   {spread}, from {len(found)} of them")


def predict() -> None:
    """Print the cost model's prediction for the paper's models at the rate that is measured here."""
    for shape in PAPER_MODELS:
        cost = all_intervals_cost(shape)
        rate = measured_rate(shape.width, torch.bfloat16, torch.device("cpu"))
        print(
            f"predicted, {shape.name:14} {cost.flop / 1e15:.2f} PFLOP at {rate / 1e9:,.0f} GFLOP/s in bfloat16: "
            f"{cost.flop / rate / 60:.0f} min, states {cost.states_bytes / 1e9:.1f} GB at most"
        )


if __name__ == "__main__":
    main()
