"""The scores of a candidate are those of the checkpoint that a merge by its recipe writes, run by transformers."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import PlanError, SourceChangedError, UnsupportedModelError
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import merge
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.recipe.model import Recipe
from slrmerge.searching.candidates import make_candidates
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.prompts import Prompt, answer_log_probs, contexts_of, tokenize
from slrmerge.searching.proxy_tasks import TASKS, Question, score
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import Search
from slrmerge.searching.scorer import LocalScorer, ScoreRequest, ScorerOptions
from slrmerge.searching.selection import ScoredCandidate
from slrmerge.searching.sweep.cost import Cost
from slrmerge.searching.sweep.trie import Context
from tests.merging.faults import age, harm
from tests.problems import refused
from tests.searching.pairs import LAYERS, SmallPair, Watcher, hurry, scores_of_paths
from tests.searching.sweep.models import transformers_log_probs

HYBRIDS = [
    "post-trained", "pre-trained", "layers 1–2", "layer 3", "soup 0.50", "soup 0.75", "layers 0–1, self_attn only",
    "layers 1–3, mlp only", "mine.yaml",
]  # fmt: skip
MINE = {"restore": [[0, 0], [3, 3]], "layers": [{"range": [0, 3], "alpha": [0.25, 0.75], "modules": ["mlp"]}]}


@pytest.fixture(scope="module")
def searched(made_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallPair, list[Prompt], SearchResult]:
    """The small pair, its prompts, and the result of a search in every space, with a recipe besides."""
    pair = SmallPair(Path(shutil.copytree(made_pair, tmp_path_factory.mktemp("scorer") / "pair")))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        spaces = ("intervals", "soups", "attention", "mlp")
        search = pair.search(spaces=spaces, also=pair.recipe_file("mine.yaml", **MINE))
        return pair, search.prepared.prompts, search.run(pair.out)


def scores_by_transformers(folder: Path, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Mean Q and D of a checkpoint in float32, prompt by prompt, by transformers and the paper's equations."""
    contexts = contexts_of(prompts)
    qualities, entropies = [], []
    for context, log_probs in zip(contexts, transformers_log_probs(folder, contexts), strict=True):
        valid = [math.exp(log_prob) for log_prob in log_probs[: len(context.targets)]]
        qualities.append(sum(valid))
        entropies.append(-sum(p / sum(valid) * math.log(p / sum(valid)) for p in valid))
    return sum(qualities) / len(prompts), sum(entropies) / len(prompts)


def row_named(result: SearchResult, label: str) -> ScoredCandidate:
    return next(row for row in result.rows if row.label == label)


def merged(pair: SmallPair, recipe: Recipe) -> Path:
    return merge(recipe, pair.folder / "hybrid", overwrite=True, fsync=False).folder


@pytest.mark.parametrize("label", HYBRIDS)
def test_scores_are_those_of_the_merged_checkpoint(
    searched: tuple[SmallPair, list[Prompt], SearchResult], label: str
) -> None:
    pair, prompts, result = searched
    row = row_named(result, label)
    quality, diversity = scores_by_transformers(merged(pair, result.choice.recipe_for(row)), prompts)
    assert row.quality == pytest.approx(quality, abs=1e-5)
    assert row.diversity == pytest.approx(diversity, abs=1e-5)


words = st.sampled_from(["A", "B", "C", "1", "2", "letter", "random"])
answers = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=2, max_size=6, unique=True)


@given(st.lists(answers, min_size=1, max_size=2), st.sampled_from(["post-trained", "layers 1–2"]))
@settings(deadline=None, max_examples=10)
def test_scores_of_answers_of_any_length_are_those_of_whole_sequences(
    searched: tuple[SmallPair, list[Prompt], SearchResult], asked: list[list[str]], label: str
) -> None:
    """Also where an answer is the start of another: it ends with the end of the turn."""
    pair, _, result = searched
    folder = merged(pair, result.choice.recipe_for(row_named(result, label)))
    texts = ("Generate a random letter", "Generate a random integer")
    questions = [Question(text, tuple(valid)) for text, valid in zip(texts, asked, strict=False)]
    prompts = tokenize(questions, pair.folder / "post")
    opened = pair.open()
    candidates = {each.info.label: each.alphas for each in make_candidates(opened, ["intervals"])}
    scorer = LocalScorer(opened)
    with scorer:
        request = ScoreRequest("any", [candidates[label]], contexts_of(prompts), torch.float32)
        scores = score(answer_log_probs(prompts, scorer.score(request, None, Progress())))
    for number, prompt in enumerate(prompts):
        quality, diversity = scores_of_paths(folder, prompt)
        assert scores.quality[0, number] == pytest.approx(quality, abs=1e-5)
        assert scores.diversity[0, number] == pytest.approx(diversity, abs=1e-5)


def test_those_checkpoints_have_distinct_scores(searched: tuple[SmallPair, list[Prompt], SearchResult]) -> None:
    rows = [row_named(searched[2], label) for label in HYBRIDS]
    assert len({(round(row.quality, 4), round(row.diversity, 4)) for row in rows}) == len(HYBRIDS)


@pytest.mark.usefixtures("hurried")
def test_candidates_are_scored_in_the_recipes_dtype(small: SmallPair) -> None:
    search = small.search(small.recipe(dtype="float16"), spaces=("intervals",))
    result, prompts = search.run(small.out), search.prepared.prompts
    row = row_named(result, "layers 1–2")
    recipe = result.choice.recipe_for(row)
    quality, diversity = scores_by_transformers(merged(small, recipe), prompts)
    assert (result.choice.base.dtype, recipe.dtype, row.dtype) == ("float16", "float16", "float32")
    assert row.quality == pytest.approx(quality, abs=1e-6)
    assert row.diversity == pytest.approx(diversity, abs=1e-6)
    plain, _ = scores_by_transformers(merged(small, small.recipe(restore=[1, 2])), prompts)
    assert abs(plain - quality) > 1e-6  # so that the lines above can tell them apart


@pytest.mark.usefixtures("hurried")
def test_candidates_of_equal_sides_have_equal_scores(small: SmallPair) -> None:
    shutil.rmtree(small.folder / "pre")
    shutil.copytree(small.folder / "post", small.folder / "pre")
    result = small.run(spaces=("intervals",))
    assert len(result.rows) == 12
    assert len({(row.quality, row.diversity) for row in result.rows}) == 1


# LocalScorer


@pytest.fixture
def pair(small: SmallPair) -> ModelPair:
    return small.open()


@pytest.fixture
def scorer(pair: ModelPair) -> Iterator[LocalScorer]:
    with local_scorer(pair) as made:
        yield made


def local_scorer(pair: ModelPair, *, max_memory_bytes: int = 1 << 30) -> LocalScorer:
    return LocalScorer(pair, ScorerOptions(max_memory_bytes=max_memory_bytes))


def intervals_of(pair: ModelPair, count: int | None = None) -> ScoreRequest:
    prompts = tokenize(TASKS["crc"]().questions()[:3], pair.posttrained.folder)
    alphas = [candidate.alphas for candidate in make_candidates(pair, ["intervals"])[2:]]
    return ScoreRequest("first", alphas[:count], contexts_of(prompts), torch.float32)


def test_a_finished_request_is_resumed_only_by_the_same_request(
    scorer: LocalScorer, pair: ModelPair, tmp_path: Path
) -> None:
    folder = tmp_path / "pass"
    watchers = [Watcher() for _ in range(3)]
    requests = [intervals_of(pair), intervals_of(pair), intervals_of(pair, 4)]
    first, again, other = (
        scorer.score(request, folder, watcher) for request, watcher in zip(requests, watchers, strict=True)
    )
    assert [watcher.advanced > 0 for watcher in watchers] == [True, False, True]
    assert [len(watcher.messages) for watcher in watchers] == [0, 1, 0]
    assert first.tobytes() == again.tobytes()
    assert (first.shape[:2], other.shape[:2]) == ((10, 3), (4, 3))
    assert np.allclose(first[:4], other, rtol=0, atol=1e-6, equal_nan=True)


def test_scores_are_the_same_with_and_without_a_folder_or_memory(
    scorer: LocalScorer, pair: ModelPair, tmp_path: Path
) -> None:
    request = intervals_of(pair)
    in_memory = scorer.score(request, None, Progress())
    with local_scorer(pair, max_memory_bytes=0) as frugal:
        in_files = frugal.score(request, tmp_path / "pass", Progress())
    assert in_memory.tobytes() == in_files.tobytes()


def test_hidden_states_are_removed_when_a_request_is_finished(pair: ModelPair, tmp_path: Path) -> None:
    with local_scorer(pair, max_memory_bytes=0) as scorer:
        scorer.score(intervals_of(pair), tmp_path / "pass", Progress())
    assert [path.name for path in (tmp_path / "pass").iterdir()] == ["log_probs.npz"]


@pytest.mark.parametrize("garbage", [b"", b"not a zip", b"PK" + bytes(40)])
def test_a_damaged_result_is_computed_again(
    scorer: LocalScorer, pair: ModelPair, tmp_path: Path, garbage: bytes
) -> None:
    request, folder = intervals_of(pair), tmp_path / "pass"
    first = scorer.score(request, folder, Progress())
    (folder / "log_probs.npz").write_bytes(garbage)
    watcher = Watcher()
    assert scorer.score(request, folder, watcher).tobytes() == first.tobytes()
    assert watcher.advanced > 0


def test_the_cost_is_known_without_reading_weights(pair: ModelPair, small: SmallPair) -> None:
    for side in ("pre", "post"):
        (small.folder / side / "model.safetensors").unlink()
    scorer, watcher = local_scorer(pair), Watcher()
    assert scorer.cost(intervals_of(pair)).states == scorer.cost(intervals_of(pair)).states > LAYERS
    assert scorer.cost(intervals_of(pair, 1)).states == LAYERS
    assert watcher.totals == []


def test_what_cannot_be_merged_is_refused_with_the_cost(small: SmallPair) -> None:
    """That is before a download: the weights are not there."""
    pre = small.folder / "pre" / "model.safetensors"
    tensors = load_file(pre)
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][:3].clone()
    save_file(tensors, pre)
    pair = small.open()
    for side in ("pre", "post"):
        (small.folder / side / "model.safetensors").unlink()
    request = intervals_of(pair)
    assert local_scorer(pair).cost(replace(request, candidates=request.candidates[:1])).states == LAYERS
    with refused(PlanError, "different-shapes"):
        local_scorer(pair).cost(request)


def test_targets_past_a_contexts_own_are_nan(scorer: LocalScorer, pair: ModelPair) -> None:
    request = intervals_of(pair)
    contexts = [Context(context.ids, context.targets[: 1 + number]) for number, context in enumerate(request.contexts)]
    whole = scorer.score(request, None, Progress())
    some = scorer.score(replace(request, contexts=contexts), None, Progress())
    assert some.shape == (10, 3, 3)
    for number in range(3):
        assert np.isnan(some[:, number, number + 1 :]).all()
        np.testing.assert_allclose(some[:, number, : number + 1], whole[:, number, : number + 1], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("fault", ["edited", "truncated", "replaced", "missing"])
def test_a_source_that_changes_before_it_is_read_is_reported(small: SmallPair, fault: str) -> None:
    age(small.folder / "pre")
    search = small.search(spaces=("intervals",))
    assert search.prepared.candidates
    shard = small.folder / "pre" / "model.safetensors"
    harm(shard, fault)
    with pytest.raises(SourceChangedError) as caught:
        search.run(small.out)
    assert {problem.where for problem in caught.value.problems} == {str(shard)}
    assert not small.out.exists()


# another scorer


class FakeScorer:
    """Another Scorer: the more is restored, the higher the entropy; it uses neither weights nor a folder."""

    def __init__(self, pair: ModelPair) -> None:
        self.pair = pair
        self.calls: list[str] = []
        self.requests: list[ScoreRequest] = []

    def __enter__(self) -> Self:
        self.calls.append("enter")
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("exit")

    def check(self, post: TensorAlphas, contexts: Sequence[Context]) -> None:
        assert set(post.values()) == {0.0}
        assert len(contexts) == 2
        self.calls.append("check")

    def cost(self, request: ScoreRequest) -> Cost:
        return Cost(flop=1.0, states_bytes=1000, states=len(request.candidates))

    def score(self, request: ScoreRequest, folder: Path | None, progress: Progress) -> NDArray[np.float64]:
        self.calls.append("score")
        self.requests.append(request)
        progress.advance(len(request.candidates))
        log_probs = np.full((len(request.candidates), len(request.contexts), 26), np.nan)
        for number, alphas in enumerate(request.candidates):
            share = sum(alphas.values()) / len(alphas)
            for prompt, context in enumerate(request.contexts):
                weights = np.array([1.0, *[0.01 + share] * (len(context.targets) - 1)])
                log_probs[number, prompt, : len(weights)] = np.log(weights / weights.sum() * (1 - share / 10))
        return log_probs


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_scorer_is_one_class(small: SmallPair, dtype: str) -> None:
    made: list[FakeScorer] = []

    def make_scorer(pair: ModelPair) -> FakeScorer:
        made.append(FakeScorer(pair))
        return made[-1]

    watcher = Watcher()
    search = Search(small.open(), SearchOptions(threads=1, dtype=dtype), make_scorer=make_scorer)
    for side in ("pre", "post"):
        (small.folder / side / "model.safetensors").unlink()
    result = search.run(small.out, progress=watcher)
    (scorer,) = made
    assert scorer.calls[:2] == ["enter", "check"]
    assert scorer.calls[-1] == "exit"
    names = [request.name for request in scorer.requests]
    assert names == ["first", *(["finalists"] if dtype == "bfloat16" else []), "held-out"]
    assert watcher.advanced == sum(watcher.totals)
    assert result.choice.slr is not None
    assert result.choice.slr.label == "layers 0–3"
    assert read_result(small.out).rows == result.rows


@pytest.mark.usefixtures("hurried")
def test_a_scorer_that_refuses_the_model_ends_the_search(small: SmallPair) -> None:
    class Refusing(FakeScorer):
        def check(self, post: TensorAlphas, contexts: Sequence[Context]) -> None:
            raise UnsupportedModelError

    with pytest.raises(UnsupportedModelError):
        Search(small.open(), make_scorer=Refusing).run(small.out)
    assert not small.out.exists()
