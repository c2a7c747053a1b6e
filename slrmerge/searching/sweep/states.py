"""The hidden states of a sweep, in memory or in a mapped file, and what is kept on disk so that a sweep can resume."""

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from slrmerge.io.files import replace_file
from slrmerge.io.pieces import digest_file, translate_os_errors, write_file
from slrmerge.merging.blend import as_bytes
from slrmerge.recipe.model import Dtype

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Resumed:
    """Where an earlier run stopped: the stages that it finished, the state of every hybrid, and the states.

    `states` has shape (states, tokens, width).
    """

    stages_done: int
    hybrid_states: tuple[int, ...]
    states: torch.Tensor


class _SavedProgress(BaseModel):
    """The content of progress.json: the last finished stage, and what its file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fingerprint: str
    stages_done: Annotated[int, Field(ge=1)]
    hybrid_states: tuple[NonNegativeInt, ...]
    shape: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
    dtype: Dtype
    digest: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def describes(self, file: Path) -> bool:
        """Whether a file is the one that was saved, and has a state for every hybrid."""
        if not file.is_file() or max(self.hybrid_states, default=0) >= self.shape[0]:
            return False
        return digest_file(file) == (prod(self.shape) * self.torch_dtype.itemsize, self.digest)


class StateStore:
    """Allocates states and, with a `folder`, keeps those of the last finished stage there.

    The states of a stage and of the one before together take at most `max_bytes` of memory, or are mapped files in the
    folder. `fingerprint` tells sweeps apart. All methods raise OutputError and NoSpaceError.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int, fingerprint: str) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._fingerprint = fingerprint
        self._held_bytes = 0
        self._maps: list[mmap.mmap] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized states for a stage, while those of the stage before are still held."""
        state_bytes = prod(shape) * dtype.itemsize
        in_memory = self._folder is None or self._held_bytes + state_bytes <= self._max_bytes
        self._held_bytes = state_bytes
        self._maps = self._maps[-1:]  # those of the stage before
        if self._folder is not None:
            with translate_os_errors(self._new_file):
                self._new_file.unlink(missing_ok=True)  # unfinished, from a killed run
        if in_memory:
            return torch.empty(*shape, dtype=dtype)
        with translate_os_errors(self._new_file), open(self._new_file, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # writing to a map on a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, max(state_bytes, 1))
        return self._map(self._new_file, shape, dtype)

    def release(self) -> None:
        """Let go of the memory of mapped states, whose values the files keep: it would count as the process's own."""
        for mapped in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)

    def commit(self, stages_done: int, hybrid_states: Sequence[int], states: torch.Tensor) -> None:
        """Keep the states of a finished stage; a run that is killed later resumes from here."""
        if self._folder is None:
            return
        file = self._stage_file(stages_done)
        with translate_os_errors(self._new_file):
            if self._new_file.exists():
                written = digest_file(self._new_file)
            else:
                written = write_file(self._new_file, [as_bytes(states)], durable=False)
            os.replace(self._new_file, file)
            saved = _SavedProgress(
                fingerprint=self._fingerprint,
                stages_done=stages_done,
                hybrid_states=tuple(hybrid_states),
                shape=(states.shape[0], states.shape[1], states.shape[2]),
                dtype=str(states.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # pydantic checks it
                digest=written.digest,
            )
            replace_file(self._folder / _PROGRESS, saved.model_dump_json().encode())
        with suppress(OSError):
            self._stage_file(stages_done - 1).unlink()

    def resume(self, message: Callable[[str], None]) -> Resumed | None:
        """The states of an earlier run of the same sweep. Without usable ones, clears the folder and returns None."""
        if self._folder is None:
            return None
        progress = self._folder / _PROGRESS
        with translate_os_errors(progress):
            content = progress.read_bytes() if progress.exists() else None
        if content is None:
            return None
        try:
            saved = _SavedProgress.model_validate_json(content)
        except ValidationError:
            message("starting over: the saved progress is damaged")
        else:
            file = self._stage_file(saved.stages_done)
            if saved.fingerprint != self._fingerprint:
                message("starting over: the saved progress belongs to another search, or to other checkpoints")
            elif not saved.describes(file):
                message("starting over: the saved progress is damaged")
            else:
                return Resumed(saved.stages_done, saved.hybrid_states, self._load(file, saved))
        self.clear()
        return None

    def _load(self, file: Path, saved: _SavedProgress) -> torch.Tensor:
        self._held_bytes = prod(saved.shape) * saved.torch_dtype.itemsize
        if 2 * self._held_bytes > self._max_bytes:
            return self._map(file, saved.shape, saved.torch_dtype)
        states = torch.empty(saved.shape, dtype=saved.torch_dtype)
        with translate_os_errors(file), open(file, "rb") as opened:
            opened.readinto(as_bytes(states))
        return states

    def clear(self) -> None:
        """Delete the kept states: the sweep is complete."""
        if self._folder is not None:
            with translate_os_errors(self._folder):
                for path in (self._folder / _PROGRESS, self._new_file, *self._folder.glob("states-*")):
                    path.unlink(missing_ok=True)

    def _map(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A file of raw elements as a tensor; what is written to the tensor is written to the file."""
        with open(path, "r+b") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0))
        return torch.frombuffer(self._maps[-1], dtype=dtype, count=prod(shape)).view(*shape)

    @property
    def _new_file(self) -> Path:
        """The states of the stage that is being computed."""
        assert self._folder is not None
        return self._folder / "states.new"

    def _stage_file(self, stages_done: int) -> Path:
        assert self._folder is not None
        return self._folder / f"states-{stages_done}"
