"""Loads the tensors of hybrids when they are needed: the same bytes that a merge would write."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Self

import torch

from slrmerge.checkpoint.base import differing_chunks
from slrmerge.checkpoint.header import DTYPE_BITS
from slrmerge.io.threads import ThreadPool
from slrmerge.merging.blend import as_bytes, one_core_per_chunk
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.stream import HybridReader
from slrmerge.searching.sweep.loading import stored_dtype
from slrmerge.searching.sweep.paths import TensorAlpha


class HybridWeights:
    """Loads tensors at any planned alpha, in their own dtypes, and holds none of them. Use it in a `with`."""

    def __init__(self, planned: Mapping[tuple[str, float], PlannedTensor], reader: HybridReader) -> None:
        self._planned = planned
        self._reader = reader
        self._closing = ExitStack()
        self._pool = self._closing.enter_context(ThreadPool(torch.get_num_threads()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def load(self, tensors: Iterable[TensorAlpha]) -> dict[str, torch.Tensor]:
        """Whole tensors by name. Raises what reading and blending raise (SourceChangedError, BlendError, …)."""
        planned = [self._planned[tensor] for tensor in tensors]
        loaded = self._read_all(planned, [None] * len(planned))
        return {tensor.name: values for tensor, values in zip(planned, loaded, strict=True)}

    def load_rows(self, tensor: TensorAlpha, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a tensor, in the order given; adjacent ones are read together."""
        runs: list[range] = []
        for row in rows:
            if runs and row == runs[-1].stop:
                runs[-1] = range(runs[-1].start, row + 1)
            else:
                runs.append(range(row, row + 1))
        return torch.cat(self._read_all([self._planned[tensor]] * len(runs), runs))

    def same_on_both_sides(self, name: str) -> bool:
        """Whether a tensor has the same bytes restored and kept; reads up to the first difference.

        False where it is not planned at both alphas, or is not a plain copy at both.
        """
        pre, post = self._planned.get((name, 1.0)), self._planned.get((name, 0.0))
        if pre is None or post is None or not pre.kind == post.kind == "copy":
            return False
        ((side, source),), ((other, twin),) = pre.sources, post.sources
        return not any(differing_chunks(self._reader.pair[side], source, self._reader.pair[other], twin))

    def _read_all(self, tensors: Sequence[PlannedTensor], rows: Sequence[range | None]) -> list[torch.Tensor]:
        """Each tensor, or of each the range of rows at its place in `rows`; blends and casts in parallel."""
        if all(tensor.kind == "copy" for tensor in tensors):
            return list(map(self._read, tensors, rows))
        with one_core_per_chunk():
            return list(self._pool.map(self._read, tensors, rows))

    def _read(self, tensor: PlannedTensor, rows: range | None) -> torch.Tensor:
        first, shape = 0, tensor.info.shape
        if rows is not None:
            first, shape = rows.start, (len(rows), *shape[1:])
        values = torch.empty(shape, dtype=stored_dtype(tensor.name, tensor.info))
        begin = first * prod(shape[1:]) * DTYPE_BITS[tensor.info.dtype] // 8
        self._reader.read_into(tensor, begin, as_bytes(values))
        return values
