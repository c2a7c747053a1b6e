"""Scorers: candidates and contexts in, log-probabilities out. `LocalScorer` sweeps the pair in this process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from slrmerge.checkpoint.header import TORCH_DTYPES
from slrmerge.checkpoint.pair import ModelPair, require_layers
from slrmerge.errors import Problem, UnsupportedModelError
from slrmerge.io.files import replace_file
from slrmerge.io.progress import Progress
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.tensors import plan_tensor_alphas
from slrmerge.merging.stream import HybridReader
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.searching.device import dtype_name, require_device
from slrmerge.searching.sweep.cost import LAST_LAYER_SHARE, Cost, Shape, cost_of, sweep_memory_bytes
from slrmerge.searching.sweep.engine import Sweep
from slrmerge.searching.sweep.layouts import chunk_size, measured_state_s, staged_model, token_count
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.paths import SweepPlan
from slrmerge.searching.sweep.states import StateStore
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.sweep.weights import HybridWeights

_RESULT = "log_probs.npz"

TOLERANCE = 1e-4
"""The largest difference of a probability in float32; the error of a correct sweep is a hundredth of it."""


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Candidates to score on contexts, computed in `dtype`. `name` identifies the pass in its search."""

    name: str
    candidates: Sequence[TensorAlphas]
    contexts: Sequence[Context]
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)


class Scorer(Protocol):
    """Scores hybrids of one pair. Use it in a `with`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def check(self, post: TensorAlphas, contexts: Sequence[Context]) -> None:
        """Raise UnsupportedModelError if scores would differ from those of the loaded model."""
        ...

    def cost(self, request: ScoreRequest) -> Cost:
        """What `score` takes; reads no weights.

        Raises UnsupportedModelError and PlanError for all that can be refused without them.
        """
        ...

    def score(self, request: ScoreRequest, folder: Path | None, progress: Progress) -> NDArray[np.float64]:
        """Log-probabilities of the targets, shape (candidates, contexts, targets), NaN past a context's own targets.

        Finished work is kept in `folder`, and a killed request resumes from there.
        """
        ...


@dataclass(frozen=True, slots=True)
class ScorerOptions:
    """How hybrids are made, and where they are scored.

    `output_dtype` is the dtype that the recipe gives hybrids, None for their own. With `shares_vocabulary`, rows that
    only one vocabulary has stay post-trained. Hidden states take at most `max_memory_bytes` of memory; more are kept
    in the folder.
    """

    output_dtype: str | None = None
    shares_vocabulary: bool = False
    device: str = "cpu"
    max_memory_bytes: int = 1 << 30


class _Planned(NamedTuple):
    """The stages of a request's hybrids, and how their tensors are made."""

    sweep: SweepPlan
    tensors: Mapping[tuple[str, float], PlannedTensor]


class LocalScorer:
    """Scores hybrids in this process by a sweep over the layers. Raises OptionError where the device is missing."""

    def __init__(self, pair: ModelPair, options: ScorerOptions | None = None) -> None:
        self.pair = pair
        self.options = options or ScorerOptions()
        self.device = require_device(self.options.device)
        self._models: dict[torch.dtype, StagedModel] = {}
        self._plans: dict[object, _Planned] = {}
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._reader = HybridReader(self._closing.enter_context(self.pair.open()))
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def model(self, dtype: torch.dtype) -> StagedModel:
        """The post-trained side's model, without weights."""
        if dtype not in self._models:
            self._models[dtype] = staged_model(self.pair.posttrained, dtype=dtype, device=self.device)
        return self._models[dtype]

    def cost(self, request: ScoreRequest) -> Cost:
        return cost_of(
            self.shape(request),
            self._plan(request).sweep.state_counts,
            contexts=len(request.contexts),
            itemsize=request.dtype.itemsize,
        )

    def shape(self, request: ScoreRequest) -> Shape:
        """The model and the contexts, as far as the cost of a sweep depends on them."""
        model = self.model(request.dtype)
        tokens = token_count(model, request.contexts)
        return Shape.of(
            self.pair.posttrained,
            model.layers,
            width=model.width,
            vocabulary=model.vocabulary,
            tokens=tokens,
            last_layer_share=LAST_LAYER_SHARE if model.why_rows is None else 1.0,
        )

    def memory_bytes(self, request: ScoreRequest) -> int:
        """About the most memory that scoring takes, besides that of the program."""
        model = self.model(request.dtype)
        return sweep_memory_bytes(
            self.shape(request),
            self.cost(request),
            layer_bytes=max(self._layer_bytes(model, number) for number in range(len(model.layers))),
            chunk_tokens=chunk_size(model.width),
            max_states_bytes=self.options.max_memory_bytes,
            itemsize=request.dtype.itemsize,
        )

    def _layer_bytes(self, model: StagedModel, number: int) -> int:
        """A layer's weights, and those of its tensors that are not weights as they are stored."""
        stored = {name: self.pair.posttrained[name] for name in model.stages[number + 1]}
        dtypes = {name: self.options.output_dtype or TORCH_DTYPES.get(info.dtype) for name, info in stored.items()}
        others = [
            info.nbytes
            for name, info in stored.items()
            if dtypes[name] != dtype_name(model.dtype) or model.tensors.placements[name].is_converted
        ]
        return sum(each.nbytes for each in model.layers[number].parameters()) + sum(others)

    def state_s(self, request: ScoreRequest) -> float:
        """Seconds that a layer takes for one state, measured with random weights."""
        model, layer = self.model(request.dtype), require_layers(self.pair).count // 2
        with torch.inference_mode():
            return measured_state_s(model, request.contexts, layer=layer)

    def check(self, post: TensorAlphas, contexts: Sequence[Context]) -> None:
        """Score the post-trained model in float32 by a sweep and by its own forward, and compare."""
        with self._sweep(ScoreRequest("check", [post], contexts, torch.float32)) as sweep:
            swept = sweep.run(StateStore(None, max_bytes=0, fingerprint=""), Progress())
            model = self.model(torch.float32)
            require_agreement(sweep.reference(), swept, where=str(self.pair.posttrained), model=model.name)

    def score(self, request: ScoreRequest, folder: Path | None, progress: Progress) -> NDArray[np.float64]:
        with self._sweep(request) as sweep:
            sides = [checkpoint for _, checkpoint in self.pair.items()]
            fingerprint = sweep.fingerprint(
                [side.identity for side in sides],
                [sorted(side.config.items()) for side in sides],
                self.options.output_dtype,
                self.options.shares_vocabulary,
            )
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                if (earlier := _read_result(folder / _RESULT, fingerprint)) is not None:
                    progress.message("resuming: this pass is complete")
                    return earlier
            store = StateStore(folder, max_bytes=self.options.max_memory_bytes, fingerprint=fingerprint)
            log_probs: NDArray[np.float64] = sweep.run(store, progress).numpy()
            self._reader.pair.check_unchanged()
        if folder is not None:
            data = BytesIO()
            np.savez(data, fingerprint=fingerprint, log_probs=log_probs)
            replace_file(folder / _RESULT, data.getvalue())
            store.clear()
        return log_probs

    def _plan(self, request: ScoreRequest) -> _Planned:
        key = request.dtype, tuple(request.candidates)  # the parts of a request have the same
        if key not in self._plans:
            plan = SweepPlan.of(self.model(request.dtype).stages, request.candidates)
            planned = plan_tensor_alphas(
                plan.all_tensors(),
                self.pair,
                dtype=self.options.output_dtype,
                shares_vocabulary=self.options.shares_vocabulary,
            )
            self._plans[key] = _Planned(plan, planned)
        return self._plans[key]

    @contextmanager
    def _sweep(self, request: ScoreRequest) -> Iterator[Sweep]:
        plan, planned = self._plan(request)
        with HybridWeights(planned, self._reader) as weights:
            yield Sweep(self.model(request.dtype), weights, plan=plan, contexts=request.contexts)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use `count` threads in torch for the block, None for as many as now."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_result(path: Path, fingerprint: str) -> NDArray[np.float64] | None:
    """The result of a complete pass; None where there is none, or another one, or a damaged one."""
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            log_probs: NDArray[np.float64] = kept["log_probs"]
            is_same = str(kept["fingerprint"]) == fingerprint
    except Exception:  # noqa: BLE001 (zipfile and numpy raise anything for a damaged file)
        return None
    return log_probs if is_same else None


def require_agreement(reference: torch.Tensor, swept: torch.Tensor, *, where: str, model: str) -> None:
    """Raise UnsupportedModelError where a probability differs by more than the tolerance.

    Both are log-probabilities of one hybrid, float64, shape (1, contexts, targets), NaN past a context's own targets.
    """
    gap = (reference.exp().nan_to_num(nan=-1) - swept.exp().nan_to_num(nan=-1)).abs().max().item()
    if not gap <= TOLERANCE:  # a NaN does not pass either
        what = f"the sweep does not reproduce {model}: a probability differs by {gap:.2g}, {TOLERANCE:g} is allowed"
        raise UnsupportedModelError(
            Problem("sweep-disagrees", where, what, "please report this model; it cannot be searched yet")
        )
