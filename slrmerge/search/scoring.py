"""A pair of checkpoints held open and asked by sweeps: candidates in, log-probabilities of the valid answers out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from slrmerge.chat import Prompt
from slrmerge.checkpoint import Checkpoint, CheckpointReader
from slrmerge.files import replace_file
from slrmerge.plan import plan_choices
from slrmerge.progress import Progress, Silent
from slrmerge.search.candidates import Candidate, alphas_of
from slrmerge.stream import Sources
from slrmerge.sweep.check import require_agreement
from slrmerge.sweep.cost import Cost, Shape, cost_of
from slrmerge.sweep.engine import Sweep
from slrmerge.sweep.model import StagedModel
from slrmerge.sweep.paths import SweepPlan
from slrmerge.sweep.states import StateStore
from slrmerge.sweep.trie import pack
from slrmerge.sweep.weights import HybridWeights

_RESULT = "log_probs.npz"


@dataclass(frozen=True, eq=False)
class Pass:
    """A sweep to be made: who is asked what, in which dtype. Each is itself only."""

    name: str
    candidates: Sequence[Candidate]
    prompts: Sequence[Prompt]
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class PairSweeper:
    """Runs passes over one pair. `output_dtype` is the dtype that the recipe gives hybrids, None for their own."""

    def __init__(
        self, pretrained: Checkpoint, posttrained: Checkpoint, *, output_dtype: str | None, device: torch.device
    ) -> None:
        self.pretrained, self.posttrained = pretrained, posttrained
        self._output_dtype = output_dtype
        self._device = device
        self._models: dict[torch.dtype, StagedModel] = {}
        self._plans: dict[Pass, SweepPlan] = {}
        self._closing = ExitStack()
        readers = (self._closing.enter_context(CheckpointReader(side)) for side in (pretrained, posttrained))
        self._sources = Sources(*readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def model(self, dtype: torch.dtype) -> StagedModel:
        if dtype not in self._models:
            self._models[dtype] = StagedModel(self.posttrained, dtype=dtype, device=self._device)
        return self._models[dtype]

    def cost(self, wanted: Pass) -> Cost:
        plan = self._plan(wanted)
        return cost_of(
            self.shape(wanted), plan.state_counts, prompts=len(wanted.prompts), itemsize=wanted.dtype.itemsize
        )

    def shape(self, wanted: Pass) -> Shape:
        model = self.model(wanted.dtype)
        trie = pack([prompt.ids for prompt in wanted.prompts])
        return Shape.of(self.posttrained, width=model.width, vocabulary=model.vocabulary, tokens=len(trie))

    def check(self, prompts: Sequence[Prompt], post: Candidate) -> None:
        """Ask the post-trained model in fp32 the ordinary way and by a sweep; raise where the answers differ."""
        wanted = Pass("check", [post], prompts, torch.float32)
        with self._sweep(wanted) as sweep:
            swept = sweep.run(StateStore(None, max_bytes=0, fingerprint=""), Silent())
            model = self.model(torch.float32)
            require_agreement(sweep.ordinary(), swept, where=str(self.posttrained), model=model.name)

    def run(self, wanted: Pass, folder: Path | None, *, max_bytes: int, progress: Progress) -> NDArray[np.float64]:
        """Log-probabilities of the valid answers, shape (candidates, prompts, answers), NaN past a prompt's own.

        With a `folder`, what is finished is kept there, and an earlier run of the same pass is taken up.
        """
        with self._sweep(wanted) as sweep:
            fingerprint = sweep.fingerprint(
                [shard.identity for side in (self.pretrained, self.posttrained) for shard in side.shards.values()],
                [sorted(side.config.items()) for side in (self.pretrained, self.posttrained)],
                self._output_dtype,
            )
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                if (earlier := _read_result(folder / _RESULT, fingerprint)) is not None:
                    progress.say("an earlier run finished this pass")
                    return earlier
            store = StateStore(folder, max_bytes=max_bytes, fingerprint=fingerprint)
            log_probs: NDArray[np.float64] = sweep.run(store, progress).numpy()
            self._sources.check_unchanged()
        if folder is not None:
            kept = BytesIO()
            np.savez(kept, fingerprint=fingerprint, log_probs=log_probs)
            replace_file(folder / _RESULT, kept.getvalue())
            store.clear()
        return log_probs

    def _plan(self, wanted: Pass) -> SweepPlan:
        if wanted not in self._plans:
            alphas = alphas_of(wanted.candidates, self.posttrained)
            self._plans[wanted] = SweepPlan.of(self.model(wanted.dtype).stages, alphas)
        return self._plans[wanted]

    @contextmanager
    def _sweep(self, wanted: Pass) -> Iterator[Sweep]:
        plan = self._plan(wanted)
        planned = plan_choices(plan.wanted, self.pretrained, self.posttrained, dtype=self._output_dtype)
        with HybridWeights(planned, self._sources, dtype=wanted.dtype, device=self._device) as weights:
            yield Sweep(self.model(wanted.dtype), weights, plan=plan, prompts=wanted.prompts)


def _read_result(path: Path, fingerprint: str) -> NDArray[np.float64] | None:
    """What a finished pass left, if it was this one."""
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            if str(kept["fingerprint"]) == fingerprint:
                log_probs: NDArray[np.float64] = kept["log_probs"]
                return log_probs
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        pass
    return None
