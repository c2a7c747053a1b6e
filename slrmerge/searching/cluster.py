"""A scorer on a Ray cluster: each worker scores all candidates on some of the contexts, by a LocalScorer of its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.side_files import fetch_side_files
from slrmerge.errors import ClusterError, Problem
from slrmerge.io.cluster import Cluster, Workers, require_shared
from slrmerge.io.progress import Progress
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.searching.scorer import LocalScorer, ScoreRequest, ScorerOptions, torch_threads
from slrmerge.searching.sweep.cost import Cost
from slrmerge.searching.sweep.trie import Context


@dataclass(frozen=True, slots=True)
class ScorerSetup:
    """What a worker needs to make its LocalScorer; a value that can be pickled."""

    pretrained: str
    posttrained: str
    fingerprints: tuple[dict[str, object], dict[str, object]]
    options: ScorerOptions
    threads: int


class RayScorer:
    """Scores hybrids on a Ray cluster. Splits a request by contexts, so that scores are the same as on one machine.

    Workers open the pair at its reference: a folder on shared storage, or a repository at a commit, which each machine
    downloads into its own cache. Finished layers are kept in the request's folder, which must be shared, too.
    """

    def __init__(
        self,
        pair: ModelPair,
        address: str,
        options: ScorerOptions | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        self._pair, self._address, self._threads = pair, address, threads
        self._options = options or ScorerOptions()
        self.local = LocalScorer(pair, replace(self._options, device="cpu"))
        self._closing = ExitStack()
        self._cluster: Cluster | None = None

    def __enter__(self) -> Self:
        self._connected()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        self._cluster = None

    @property
    def workers(self) -> Workers:
        """What the cluster can run at a time. Raises ClusterError."""
        return self._connected().workers(gpus=self._options.device.startswith("cuda"))

    def parts(self, request: ScoreRequest) -> list[ScoreRequest]:
        """The request of each worker: consecutive contexts, which have the most in common."""
        bounds = np.linspace(0, len(request.contexts), min(self.workers.count, len(request.contexts)) + 1).astype(int)
        return [replace(request, contexts=request.contexts[begin:end]) for begin, end in pairwise(bounds)]

    def cost(self, request: ScoreRequest) -> Cost:
        """The cost of all workers together."""
        costs = [self.local.cost(part) for part in self.parts(request)]
        return Cost(
            sum(cost.flop for cost in costs),
            sum(cost.states_bytes for cost in costs),
            sum(cost.states for cost in costs),
        )

    def check(self, post: TensorAlphas, contexts: Sequence[Context]) -> None:
        jobs = [_Check(self._setup(), post, tuple(contexts))]
        for _ in self._connected().run(_check, jobs, workers=self.workers, progress=Progress()):
            pass

    def score(self, request: ScoreRequest, folder: Path | None, progress: Progress) -> NDArray[np.float64]:
        parts = self.parts(request)
        setup = self._setup()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        jobs = [_Part(setup, part, folder, number) for number, part in enumerate(parts)]
        widest = max(len(context.targets) for context in request.contexts)
        whole = np.full((len(request.candidates), len(request.contexts), widest), np.nan)
        firsts = np.cumsum([0, *(len(part.contexts) for part in parts)])
        for number, scores in self._connected().run(_score, jobs, workers=self.workers, progress=progress):
            whole[:, firsts[number] : firsts[number + 1], : scores.shape[2]] = scores
        return whole

    def _connected(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._closing.enter_context(Cluster(self._address))
        return self._cluster

    def _setup(self) -> ScorerSetup:
        pre, post = self._pair.pretrained, self._pair.posttrained
        return ScorerSetup(
            pre.reference,
            post.reference,
            (pre.fingerprint(), post.fingerprint()),
            self._options,
            self._threads or self.workers.cpus,
        )


@dataclass(frozen=True)
class _Check:
    setup: ScorerSetup
    post: TensorAlphas
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class _Part:
    setup: ScorerSetup
    request: ScoreRequest
    folder: Path | None
    number: int


def _check(job: _Check, progress: Progress) -> None:
    with torch_threads(job.setup.threads), _local_scorer(job.setup, progress) as scorer:
        scorer.check(job.post, job.contexts)


def _score(job: _Part, progress: Progress) -> NDArray[np.float64]:
    if job.folder is not None:
        require_shared(job.folder)
    with torch_threads(job.setup.threads), _local_scorer(job.setup, progress) as scorer:
        return scorer.score(job.request, job.folder and job.folder / f"part-{job.number}", progress)


def _local_scorer(setup: ScorerSetup, progress: Progress) -> LocalScorer:
    """The scorer of a worker. Raises ClusterError where it sees other checkpoints than the driver."""
    pair = open_pair(setup.pretrained, setup.posttrained)
    for (_, checkpoint), fingerprint in zip(pair.items(), setup.fingerprints, strict=True):
        if checkpoint.fingerprint() != fingerprint:
            remedy = "use storage that all machines of the cluster share"
            raise ClusterError(Problem("not-shared", str(checkpoint), "is another checkpoint on a worker", remedy))
    fetch_side_files(pair.posttrained.side_files)
    return LocalScorer(pair.download(progress), setup.options)
