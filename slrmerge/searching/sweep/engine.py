"""Many hybrids of one pair, scored on the same contexts in one pass over the layers.

Hybrids with the same weights up to a layer share their hidden states, so each is computed once, and each layer's
weights are read once per variant. Contexts share most of their text, so they are packed as a trie where
the model allows it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import xxhash

from slrmerge._version import __version__
from slrmerge.io.progress import Progress
from slrmerge.searching.sweep.cost import HEAD_BYTES
from slrmerge.searching.sweep.embedding_rows import rows_in_use
from slrmerge.searching.sweep.layouts import chunk_size, lay_out
from slrmerge.searching.sweep.log_softmax import StreamingLogSoftmax
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.paths import Step, SweepPlan, Transition, plan_step
from slrmerge.searching.sweep.states import StateStore
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.sweep.weights import HybridWeights


class _Chunk(NamedTuple):
    """Transitions that are computed together."""

    before: list[int]
    after: list[int]


class Sweep:
    """One pass of a plan's hybrids over contexts.

    At most `chunk_tokens` tokens go through a layer at a time, and a step of the head takes about `head_bytes`.
    """

    def __init__(
        self,
        model: StagedModel,
        weights: HybridWeights,
        *,
        plan: SweepPlan,
        contexts: Sequence[Context],
        chunk_tokens: int | None = None,
        head_bytes: int = HEAD_BYTES,
    ) -> None:
        self._model = model
        self._weights = weights
        self._plan = plan
        self._contexts = contexts
        self._chunk_tokens = chunk_tokens or chunk_size(model.width)
        self._head_bytes = head_bytes
        self._layout = lay_out(model, contexts, chunk_tokens=self._chunk_tokens)
        self._head_stage = len(plan.stages) - 1

    @torch.inference_mode()
    def run(self, store: StateStore, progress: Progress) -> torch.Tensor:
        """Log-probabilities, float64, shape (hybrids, contexts, targets), NaN past a context's own targets.

        Resumes an earlier run of the same sweep where `store` has its states.
        """
        resumed = store.resume(progress.message)
        step = self._step(0, (0,) * self._plan.hybrid_count)
        origins, embedded = step.hybrid_states, self._embed(step)
        if resumed is None:
            done, hybrid_states, states = 1, origins, store.allocate(embedded.shape, embedded.dtype).copy_(embedded)
            store.commit(1, hybrid_states, states)
        else:
            done, hybrid_states, states = resumed.stages_done, resumed.hybrid_states, resumed.states
            finished = f"layer {done - 1} of {self._head_stage - 1}" if done > 1 else "the embedding"
            progress.message(f"resuming after {finished}")
            progress.advance(sum(self._plan.state_counts[1:done]))
        for stage in range(done, self._head_stage):
            progress.stage(f"layer {stage} of {self._head_stage - 1}")
            step = self._step(stage, hybrid_states)
            origin_of = dict(zip(hybrid_states, origins, strict=True))
            states = self._run_layer(stage, step, states, origin_of, store, progress)
            hybrid_states = step.hybrid_states
            store.commit(stage + 1, hybrid_states, states)
        progress.stage("answers")
        return self._run_head(hybrid_states, states)

    @torch.inference_mode()
    def reference(self) -> torch.Tensor:
        """The first hybrid's log-probabilities by the model's own forward, shape (1, contexts, targets).

        Holds the weights of one stage at a time.
        """
        ids = [context.ids for context in self._contexts]
        rows = rows_in_use(token for context in ids for token in context)

        def stage_weights(stage: int) -> Mapping[str, torch.Tensor]:
            variant = self._plan.hybrid_variants[stage][0]
            return self._embedding_weights(variant, rows) if stage == 0 else self._stage_weights(stage, variant)

        states = self._model.reference_states(ids, stage_weights)
        return self._run_head((0,) * self._plan.hybrid_count, states)[:1]

    def _step(self, stage: int, hybrid_states: Sequence[int]) -> Step:
        """The step of a stage; variants that differ only in tensors with the same bytes on both sides are one."""
        same = [self._weights.same_on_both_sides(name) for name in self._plan.stages[stage]]
        first: dict[tuple[float, ...], int] = {}
        merged = []
        for variant, alphas in enumerate(self._plan.variants[stage]):
            key = tuple(0.0 if equal and alpha == 1 else alpha for alpha, equal in zip(alphas, same, strict=True))
            merged.append(first.setdefault(key, variant))
        return plan_step(hybrid_states, [merged[variant] for variant in self._plan.hybrid_variants[stage]])

    def _embed(self, step: Step) -> torch.Tensor:
        """The states after the embedding, shape (states, tokens, width)."""
        rows = rows_in_use(self._layout.token_ids)
        made: dict[int, torch.Tensor] = {}
        for variant, ((_, after),) in step.transitions.items():  # all hybrids start from one state
            made[after] = self._layout.embed(after, self._embedding_weights(variant, rows)).cpu()
        return torch.stack([made[number] for number in range(step.state_count)])

    def _embedding_weights(self, variant: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The weights of the first stage, of the embedding only these rows."""
        tensors, by_row = self._plan.tensors(0, variant), self._model.by_row[0]
        some = {tensor.name: self._weights.load_rows(tensor, rows) for tensor in tensors if tensor.name in by_row}
        whole = self._weights.load(tensor for tensor in tensors if tensor.name not in by_row)
        return self._model.embedding_weights(whole, some, rows)

    def _stage_weights(self, stage: int, variant: int) -> dict[str, torch.Tensor]:
        return self._model.weights(self._weights.load(self._plan.tensors(stage, variant)))

    def _run_layer(
        self,
        stage: int,
        step: Step,
        states: torch.Tensor,
        origin_of: Mapping[int, int],
        store: StateStore,
        progress: Progress,
    ) -> torch.Tensor:
        """(states before, tokens, width) → (states after, tokens, width), of the last layer the leaves only.

        `origin_of` is, for every state before, the number of the state after the embedding that it began with.
        """
        tokens = states.shape[1] if stage < self._head_stage - 1 else len(self._contexts)
        made = store.allocate((step.state_count, tokens, states.shape[2]), states.dtype)
        for variant, transitions in step.transitions.items():
            weights = self._stage_weights(stage, variant)
            for origin, alike in _by_origin(transitions, origin_of):
                for before, after in _chunks(alike, self._chunk_tokens // states.shape[1]):
                    chunk = states[before].to(self._model.device)
                    made[after] = self._layout.run_layer(stage - 1, weights, chunk, origin).to(made.device)
                    store.release()
                    progress.advance(len(before))
            del weights  # before the next are loaded
        return made

    def _run_head(self, hybrid_states: Sequence[int], states: torch.Tensor) -> torch.Tensor:
        """The last layer's states, shape (states, contexts, width) → (hybrids, contexts, targets), float64."""
        step = self._step(self._head_stage, hybrid_states)
        softmax = StreamingLogSoftmax(step.state_count, self._contexts)
        for variant, transitions in step.transitions.items():
            tensors = self._plan.tensors(self._head_stage, variant)
            by_row = [tensor for tensor in tensors if tensor.name in self._model.by_row[1]]
            others = self._model.weights(self._weights.load(tensor for tensor in tensors if tensor not in by_row))
            for rows in self._vocabulary_runs(states.shape[2]):
                some = {tensor.name: self._weights.load_rows(tensor, rows) for tensor in by_row}
                weights = others | self._model.row_weights(some)
                for before, after in _chunks(transitions, self._head_bytes // (len(self._contexts) * len(rows) * 8)):
                    logits = self._model.logits(states[before].to(self._model.device), weights)
                    softmax.add(after, rows, logits.double().cpu())
        return softmax.log_probs()[list(step.hybrid_states)]

    def _vocabulary_runs(self, width: int) -> Iterator[range]:
        """The vocabulary in runs of rows that fit in half of `head_bytes`; in one run where rows cannot be loaded."""
        rows = max(1, self._head_bytes // (width * self._model.dtype.itemsize) // 2)
        if not self._model.by_row[1]:
            rows = self._model.vocabulary
        for start in range(0, self._model.vocabulary, rows):
            yield range(start, min(start + rows, self._model.vocabulary))

    def fingerprint(self, *sources: object) -> str:
        """A digest of everything that the result depends on: hybrids, contexts, model, versions, and `sources`."""
        import transformers

        parts = [
            (__version__, torch.__version__, transformers.__version__),
            (self._model.name, self._model.dtype, self._model.device),
            self._plan,
            [(list(context.ids), list(context.targets)) for context in self._contexts],
            sources,
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(map(repr, parts)).encode())


def _by_origin(
    transitions: Sequence[Transition], origin_of: Mapping[int, int]
) -> Iterator[tuple[int, list[Transition]]]:
    """Transitions by the origin of the states that they start from."""
    groups: dict[int, list[Transition]] = defaultdict(list)
    for transition in transitions:
        groups[origin_of[transition.before]].append(transition)
    yield from groups.items()


def _chunks(transitions: Sequence[Transition], size: int) -> Iterator[_Chunk]:
    """Transitions in chunks of `size`, at least one each."""
    size = max(1, size)
    for start in range(0, len(transitions), size):
        chunk = transitions[start : start + size]
        yield _Chunk([each.before for each in chunk], [each.after for each in chunk])
