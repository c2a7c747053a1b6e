"""Many hybrids of one pair, asked the same prompts in one pass over the layers.

Two tries carry it. Over layers: hybrids with the same weights up to a layer have the same states there, so each state
is worked out once, and each layer's weights are read once per side. Over tokens: prompts share most of their text, so
they are packed as a trie. Nothing here knows what an interval is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import xxhash

import slrmerge
from slrmerge.progress import Progress
from slrmerge.sweep.model import Layout, StagedModel, rows_in_use
from slrmerge.sweep.paths import Step, SweepPlan, step
from slrmerge.sweep.states import StateStore
from slrmerge.sweep.trie import pack
from slrmerge.sweep.weights import HybridWeights

CHUNK_TOKENS = 2048
"""Tokens run through a layer at a time: enough for the matrix products, little enough for the caches."""

HEAD_BYTES = 1 << 26
"""Memory for a step of the head: rows of its weights, and the logits that they give in float64."""


class Prompt(Protocol):
    """What a hybrid is asked: token ids, and those of the answers that are valid."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def valid_ids(self) -> Sequence[int]: ...


class Sweep:
    """One pass of `plan`'s hybrids over `prompts`."""

    def __init__(
        self, model: StagedModel, weights: HybridWeights, *, plan: SweepPlan, prompts: Sequence[Prompt]
    ) -> None:
        self._model = model
        self._weights = weights
        self._plan = plan
        self._prompts = prompts
        self._layout: Layout = model.lay_out(pack([prompt.ids for prompt in prompts]))
        self._last = len(plan.stages) - 1

    @torch.inference_mode()
    def run(self, store: StateStore, progress: Progress) -> torch.Tensor:
        """Log-probabilities of the valid answers, float64, shape (hybrids, prompts, answers), NaN past a prompt's own.

        Goes on where an earlier run of the same sweep stopped, if `store` holds its states.
        """
        resumed = store.resume(progress.say)
        if resumed is None:
            done, (nodes, states) = 1, self._embed(store)
        else:
            done, nodes, states = resumed.stages_done, resumed.nodes, resumed.states
            where = f"layer {done - 1} of {self._last - 1}" if done > 1 else "the embedding"
            progress.say(f"going on after {where}, which an earlier run finished")
            progress.advance(sum(self._plan.state_counts[1:done]))
        for stage in range(done, self._last):
            now = self._step(stage, nodes)
            progress.stage(f"layer {stage} of {self._last - 1}, {len(nodes)} candidates")
            states = self._layer(stage, now, states, store, progress)
            nodes = now.nodes
            store.commit(stage + 1, nodes, states)
        progress.stage("head")
        return self._head(nodes, states)

    @torch.inference_mode()
    def ordinary(self) -> torch.Tensor:
        """What the first hybrid answers by the model's own forward, as `run` has it; one stage's weights at a time."""
        ids = [prompt.ids for prompt in self._prompts]
        rows = rows_in_use(token for prompt in ids for token in prompt)

        def weights(stage: int) -> Mapping[str, torch.Tensor]:
            variant = self._plan.choices[stage][0]
            return self._embedding(variant, rows) if stage == 0 else self._whole(stage, variant)

        return self._head((0,) * len(self._plan.choices[0]), self._model.ordinary(ids, weights))[:1]

    def _step(self, stage: int, nodes: Sequence[int]) -> Step:
        """The step of a stage; variants whose weights are the same bytes on both sides count as one."""
        same = [self._weights.same_on_both_sides(name) for name in self._plan.stages[stage]]
        number: dict[tuple[float, ...], int] = {}
        merged = []
        for place, alphas in enumerate(self._plan.variants[stage]):
            key = tuple(0.0 if equal and alpha == 1 else alpha for alpha, equal in zip(alphas, same, strict=True))
            merged.append(number.setdefault(key, place))
        return step(nodes, [merged[variant] for variant in self._plan.choices[stage]])

    def _embed(self, store: StateStore) -> tuple[tuple[int, ...], torch.Tensor]:
        now = self._step(0, (0,) * len(self._plan.choices[0]))
        rows = rows_in_use(self._layout.trie.ids)
        made: dict[int, torch.Tensor] = {}
        for variant, ((_, end),) in now.jobs.items():
            made[end] = self._model.embed(self._layout, self._embedding(variant, rows)).cpu()
        states = store.allocate((now.state_count, *made[0].shape[1:]), made[0].dtype)
        for end, state in made.items():
            states[end] = state[0]
        store.commit(1, now.nodes, states)
        return now.nodes, states

    def _embedding(self, variant: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The embedding's weights with these rows only."""
        embedding, *others = self._plan.tensors(0, variant)
        return {embedding[0]: self._weights.load_rows(embedding, rows), **self._weights.load(others)}

    def _whole(self, stage: int, variant: int) -> dict[str, torch.Tensor]:
        return self._weights.load(self._plan.tensors(stage, variant))

    def _layer(
        self, stage: int, now: Step, states: torch.Tensor, store: StateStore, progress: Progress
    ) -> torch.Tensor:
        tokens = states.shape[1] if stage < self._last - 1 else len(self._prompts)
        made = store.allocate((now.state_count, tokens, states.shape[2]), states.dtype)
        at_a_time = max(1, CHUNK_TOKENS // states.shape[1])
        for variant, jobs in now.jobs.items():
            weights = self._whole(stage, variant)
            for start in range(0, len(jobs), at_a_time):
                before, after = map(list, zip(*jobs[start : start + at_a_time], strict=True))
                chunk = states[before].to(self._model.device)
                made[after] = self._model.run_layer(stage - 1, self._layout, weights, chunk).to(made.device)
                progress.advance(len(before))
            del weights
        return made

    def _head(self, nodes: Sequence[int], states: torch.Tensor) -> torch.Tensor:
        now = self._step(self._last, nodes)
        answers = max(len(prompt.valid_ids) for prompt in self._prompts)
        shape = (now.state_count, len(self._prompts))
        total = torch.full(shape, -torch.inf, dtype=torch.float64)
        valid = torch.full((*shape, answers), torch.nan, dtype=torch.float64)
        for variant, jobs in now.jobs.items():
            tensors = self._plan.tensors(self._last, variant)
            whole = self._weights.load(choice for choice in tensors if choice[0] not in self._model.vocabulary_names)
            by_row = [choice for choice in tensors if choice[0] in self._model.vocabulary_names]
            for rows in self._row_chunks(states.shape[2]):
                part = whole | {choice[0]: self._weights.load_rows(choice, rows) for choice in by_row}
                asked = self._asked_in(rows)
                at_a_time = max(1, HEAD_BYTES // (len(self._prompts) * len(rows) * 8))
                for start in range(0, len(jobs), at_a_time):
                    before, after = map(list, zip(*jobs[start : start + at_a_time], strict=True))
                    logits = self._model.logits(states[before].to(self._model.device), part).double().cpu()
                    total[after] = torch.logaddexp(total[after], logits.logsumexp(dim=-1))
                    for prompt, answer, column in asked:
                        valid[after, prompt, answer] = logits[:, prompt, column]
        log_probs = valid - total[..., None]
        asked_for = torch.tensor([[a < len(prompt.valid_ids) for a in range(answers)] for prompt in self._prompts])
        log_probs[log_probs.isnan() & asked_for] = -torch.inf  # overflow somewhere: such a hybrid answers nothing valid
        return log_probs[list(now.nodes)]

    def _row_chunks(self, width: int) -> Iterator[range]:
        """The vocabulary in runs of rows that fit in `HEAD_BYTES`."""
        rows = max(1, HEAD_BYTES // (width * self._model.dtype.itemsize) // 2)
        for start in range(0, self._model.vocabulary, rows):
            yield range(start, min(start + rows, self._model.vocabulary))

    def _asked_in(self, rows: range) -> list[tuple[int, int, int]]:
        """The valid answers in a run of the vocabulary: (prompt, place among its answers, row in the run)."""
        return [
            (number, answer, token - rows.start)
            for number, prompt in enumerate(self._prompts)
            for answer, token in enumerate(prompt.valid_ids)
            if token in rows
        ]

    def fingerprint(self, *sources: object) -> str:
        """A digest of all that decides the result: the hybrids, the prompts, the model, the versions, and `sources`."""
        import transformers

        parts = [
            (slrmerge.__version__, torch.__version__, transformers.__version__),
            (self._model.name, self._model.dtype, self._model.device),
            self._plan,
            [(list(prompt.ids), list(prompt.valid_ids)) for prompt in self._prompts],
            sources,
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(map(repr, parts)).encode())
