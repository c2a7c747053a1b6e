"""The tensors of a hybrid, read and worked out when they are wanted: the very bytes that a merge would write."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import prod
from queue import SimpleQueue
from typing import Self

import torch

from slrmerge.blend import Blender, as_bytes, one_core_per_chunk, torch_dtype
from slrmerge.checkpoint import DTYPE_BITS
from slrmerge.plan import PlannedTensor
from slrmerge.stream import Sources
from slrmerge.sweep.paths import Choice

_COMPARED_BYTES = 1 << 18


class HybridWeights:
    """Tensors at any alpha that was planned, in `dtype` on `device`; holds none itself. Use it in a `with`."""

    def __init__(
        self, planned: Mapping[Choice, PlannedTensor], sources: Sources, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._planned = planned
        self._sources = sources
        self._dtype, self._device = dtype, device
        self._blenders: SimpleQueue[Blender] = SimpleQueue()
        self._closing = ExitStack()
        threads = torch.get_num_threads()
        for _ in range(threads):
            self._blenders.put(Blender())
        self._pool = self._closing.enter_context(ThreadPoolExecutor(threads))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def load(self, choices: Iterable[Choice]) -> dict[str, torch.Tensor]:
        """The tensors by name. Raises what reading and blending raise (SourceChangedError, BlendError)."""
        wanted = [self._planned[choice] for choice in choices]
        return {tensor.name: made for tensor, made in zip(wanted, self._make(wanted, None), strict=True)}

    def load_rows(self, choice: Choice, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a tensor, in the order given."""
        tensor = self._planned[choice]
        runs: list[range] = []
        for row in rows:
            if runs and row == runs[-1].stop:
                runs[-1] = range(runs[-1].start, row + 1)
            else:
                runs.append(range(row, row + 1))
        return torch.cat(self._make([tensor] * len(runs), runs))

    def same_on_both_sides(self, name: str) -> bool:
        """Whether restoring a tensor changes no byte of it; read no further than the first difference."""
        pre, post = self._planned.get((name, 1.0)), self._planned.get((name, 0.0))
        if pre is None or post is None or not pre.kind == post.kind == "copy":
            return False
        ((pre_reader, pre_name),), ((post_reader, post_name),) = map(self._sources.read_for, (pre, post))
        sides = [torch.empty(min(_COMPARED_BYTES, post.info.nbytes), dtype=torch.uint8) for _ in range(2)]
        for start in range(0, post.info.nbytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, post.info.nbytes - start)
            pre_reader.read_into(pre_name, start, as_bytes(sides[0])[:count])
            post_reader.read_into(post_name, start, as_bytes(sides[1])[:count])
            if not torch.equal(sides[0][:count], sides[1][:count]):
                return False
        return True

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where a source is not what it was when the search began."""
        self._sources.check_unchanged()

    def _make(self, tensors: Sequence[PlannedTensor], rows: Sequence[range] | None) -> list[torch.Tensor]:
        """Each tensor, or the range of its rows that stands at its place in `rows`."""
        parts: Sequence[range | None] = rows or [None] * len(tensors)
        if all(tensor.kind == "copy" for tensor in tensors):
            return list(map(self._one, tensors, parts))
        with one_core_per_chunk():
            return list(self._pool.map(self._one, tensors, parts))

    def _one(self, tensor: PlannedTensor, rows: range | None) -> torch.Tensor:
        shape = tensor.info.shape
        if rows is not None:
            shape = (len(rows), *shape[1:])
        made = torch.empty(shape, dtype=torch_dtype(tensor.info.dtype))
        begin = rows.start * prod(shape[1:]) * DTYPE_BITS[tensor.info.dtype] // 8 if rows is not None else 0
        blender = self._blenders.get()
        try:
            self._sources.fill(as_bytes(made), tensor, begin, blender)
        finally:
            self._blenders.put(blender)
        return made.to(self._device, self._dtype)
