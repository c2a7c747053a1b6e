"""The hybrid that was scored is the hybrid that a merge by its recipe writes, asked by transformers itself."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge import merge_checkpoints
from slrmerge.chat import Prompt, tokenise
from slrmerge.crc import TASKS
from slrmerge.errors import SourceChangedError
from slrmerge.hub import open_pair
from slrmerge.progress import Silent
from slrmerge.recipe import parse_recipe
from slrmerge.search.candidates import SPACES, Candidate, recipe_of
from slrmerge.search.choose import Row
from slrmerge.search.results import Report
from slrmerge.search.run import Search, SearchOptions
from slrmerge.search.scoring import PairSweeper, Pass
from tests.merge.faults import age, harm
from tests.search.pairs import SmallPair, Watcher, hurry

HYBRIDS = [
    "post-trained", "pre-trained", "layers 1–2", "layer 3", "soup 0.50", "soup 0.75", "layers 0–1, self_attn only",
    "layers 1–3, mlp only", "mine",
]  # fmt: skip
MINE = {"restore": [[0, 0], [3, 3]], "layers": [{"range": [0, 3], "alpha": [0.25, 0.75], "modules": ["mlp"]}]}


@pytest.fixture(scope="module")
def searched(made_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallPair, Search, Report]]:
    """The small pair, searched in every space and with a recipe of one's own."""
    folder = tmp_path_factory.mktemp("scoring") / "pair"
    pair = SmallPair(Path(shutil.copytree(made_pair, folder)))
    options = SearchOptions(spaces=("intervals", "soups", "attention", "mlp"), threads=1,
                            also=(("mine", pair.recipe(**MINE)),))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        with Search(pair.recipe(), options) as search:
            yield pair, search, search.run(pair.out)


def asked(folder: Path, prompts: list[Prompt]) -> tuple[float, float]:
    """Mean Q and D of a checkpoint in fp32, prompt by prompt, by transformers and the paper's equations."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    qualities, entropies = [], []
    for prompt in prompts:
        with torch.inference_mode():
            probabilities = model(torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1)
        valid = [probabilities[token].item() for token in prompt.valid_ids]
        qualities.append(sum(valid))
        entropies.append(-sum(p / sum(valid) * math.log(p / sum(valid)) for p in valid))
    return sum(qualities) / len(prompts), sum(entropies) / len(prompts)


def row_called(report: Report, label: str) -> Row:
    return next(row for row in report.rows if row.candidate.label == label)


def merged(pair: SmallPair, candidate: Candidate, dtype: str | None = None) -> Path:
    sides = {side: str(pair.folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    out = pair.folder / "hybrid"
    merge_checkpoints(parse_recipe(recipe_of(candidate, **sides, dtype=dtype)), out, overwrite=True, fsync=False)
    return out


@pytest.mark.parametrize("label", HYBRIDS)
def test_the_hybrid_that_was_scored_is_the_one_that_its_recipe_merges(
    searched: tuple[SmallPair, Search, Report], label: str
) -> None:
    pair, search, report = searched
    row = row_called(report, label)
    quality, diversity = asked(merged(pair, row.candidate), search.prompts)
    assert row.quality == pytest.approx(quality, abs=1e-5)
    assert row.diversity == pytest.approx(diversity, abs=1e-5)


def test_no_two_of_those_hybrids_have_the_same_scores(searched: tuple[SmallPair, Search, Report]) -> None:
    rows = [row_called(searched[2], label) for label in HYBRIDS]
    assert len({(round(row.quality, 4), round(row.diversity, 4)) for row in rows}) == len(HYBRIDS)


@pytest.mark.usefixtures("hurried")
def test_a_recipes_dtype_is_the_dtype_of_the_hybrids_that_are_scored(small: SmallPair) -> None:
    with small.search(small.recipe(dtype="float16"), spaces=("intervals",)) as search:
        report = search.run(small.out)
        row = row_called(report, "layers 1–2")
        quality, diversity = asked(merged(small, row.candidate, "float16"), search.prompts)
    assert (report.dtype, row.dtype) == ("float16", "float32")
    assert row.quality == pytest.approx(quality, abs=1e-6)
    assert row.diversity == pytest.approx(diversity, abs=1e-6)
    plain, _ = asked(merged(small, row.candidate), search.prompts)
    assert abs(plain - quality) > 1e-6  # so that the line above can tell them apart


@pytest.mark.usefixtures("hurried")
def test_layers_that_are_the_same_on_both_sides_are_worked_out_once(small: SmallPair) -> None:
    shutil.rmtree(small.folder / "pre")
    shutil.copytree(small.folder / "post", small.folder / "pre")
    report = small.report(spaces=("intervals",))
    assert len(report.rows) == 12
    assert len({(row.quality, row.diversity) for row in report.rows}) == 1


@pytest.fixture
def sweeper(small: SmallPair) -> Iterator[PairSweeper]:
    pair = open_pair(small.folder / "pre", small.folder / "post")
    with PairSweeper(*pair, output_dtype=None, device=torch.device("cpu")) as made:
        yield made


def intervals_of(sweeper: PairSweeper) -> Pass:
    questions = TASKS["crc"]().questions()[:3]
    candidates = [*SPACES["intervals"](sweeper.posttrained, 4)]
    return Pass("first", candidates, tokenise(questions, sweeper.posttrained.folder), torch.float32)


def test_a_finished_pass_is_taken_up_only_by_the_same_pass(sweeper: PairSweeper, tmp_path: Path) -> None:
    whole = intervals_of(sweeper)
    fewer = replace(whole, candidates=whole.candidates[:4])
    watchers = [Watcher() for _ in range(3)]
    first, again, other = (
        sweeper.run(wanted, tmp_path / "pass", max_bytes=1 << 30, progress=watcher)
        for wanted, watcher in zip((whole, whole, fewer), watchers, strict=True)
    )
    assert [watcher.states > 0 for watcher in watchers] == [True, False, True]
    assert first.tobytes() == again.tobytes()
    assert (first.shape[:2], other.shape[:2]) == ((10, 3), (4, 3))
    assert np.allclose(first[:4], other, rtol=0, atol=1e-6, equal_nan=True)


def test_the_states_are_gone_when_a_pass_is_done(sweeper: PairSweeper, tmp_path: Path) -> None:
    sweeper.run(intervals_of(sweeper), tmp_path / "pass", max_bytes=0, progress=Silent())
    assert [path.name for path in (tmp_path / "pass").iterdir()] == ["log_probs.npz"]


@pytest.mark.parametrize("garbage", [b"", b"not a zip", b"PK" + bytes(40)])
def test_the_result_of_a_pass_that_was_torn_is_worked_out_again(
    sweeper: PairSweeper, tmp_path: Path, garbage: bytes
) -> None:
    whole, folder = intervals_of(sweeper), tmp_path / "pass"
    first = sweeper.run(whole, folder, max_bytes=1 << 30, progress=Silent())
    (folder / "log_probs.npz").write_bytes(garbage)
    assert sweeper.run(whole, folder, max_bytes=1 << 30, progress=Silent()).tobytes() == first.tobytes()


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("fault", ["edited", "truncated", "replaced", "missing"])
def test_a_source_that_changes_before_its_weights_are_read_is_named(small: SmallPair, fault: str) -> None:
    age(small.folder / "pre")
    with small.search(spaces=("intervals",)) as search:
        shard = small.folder / "pre" / "model.safetensors"
        harm(shard, fault)
        with pytest.raises(SourceChangedError) as caught:
            search.run(small.out)
    assert {problem.where for problem in caught.value.problems} == {str(shard)}
    assert not small.out.exists()
