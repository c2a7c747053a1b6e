"""A sweep's hidden states, in memory or past a limit in a mapped file, and what it takes to go on after a kill."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from slrmerge.blend import as_bytes
from slrmerge.errors import OutputError
from slrmerge.files import replace_file
from slrmerge.writer import digest_file, output_error

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Resumed:
    """Where an earlier run got to: the stages that are done, the hybrids' places, and their states."""

    stages_done: int
    nodes: tuple[int, ...]
    states: torch.Tensor


class StateStore:
    """Gives room for states and, with a `folder`, keeps those of the last finished stage there.

    Old and new states of a stage together stay under `max_bytes` of memory, or are mapped files in the folder.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int, fingerprint: str) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._fingerprint = fingerprint
        self._held_bytes = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room for the states that a stage makes, while those of the stage before are still held."""
        count = prod(shape) * dtype.itemsize
        in_memory = self._folder is None or self._held_bytes + count <= self._max_bytes
        self._held_bytes = count
        try:
            if self._folder is not None:
                self._new.unlink(missing_ok=True)  # what a killed run left half made
            if in_memory:
                return torch.empty(*shape, dtype=dtype)
            with open(self._new, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # or a full disk would end the process when the map is written to
                    os.posix_fallocate(file.fileno(), 0, max(count, 1))
        except OSError as error:
            raise output_error(self._new, error) from error
        return _mapped(self._new, shape, dtype)

    def commit(self, stages_done: int, nodes: Sequence[int], states: torch.Tensor) -> None:
        """Keep a finished stage; from here a killed run goes on."""
        if self._folder is None:
            return
        kept = self._kept(stages_done)
        try:
            if not self._new.exists():
                with open(self._new, "wb") as file:
                    file.write(as_bytes(states))
            os.replace(self._new, kept)
            value = {
                "fingerprint": self._fingerprint,
                "stages_done": stages_done,
                "nodes": list(nodes),
                "shape": list(states.shape),
                "dtype": str(states.dtype).removeprefix("torch."),
                "digest": digest_file(kept).digest,
            }
            replace_file(self._folder / _PROGRESS, json.dumps(value).encode())
        except OSError as error:
            raise output_error(self._new, error) from error
        with suppress(OSError):
            self._kept(stages_done - 1).unlink()

    def resume(self, say: Callable[[str], None]) -> Resumed | None:
        """What an earlier run of the same sweep left; None, and the reason said, where that cannot be taken up."""
        if self._folder is None or not (self._folder / _PROGRESS).exists():
            return None
        try:
            value = json.loads((self._folder / _PROGRESS).read_bytes())
            kept = self._kept(value["stages_done"])
            if value["fingerprint"] != self._fingerprint:
                say("starting anew: what an earlier run left belongs to another search, or to other checkpoints")
            elif value["digest"] != digest_file(kept).digest:
                say("starting anew: what an earlier run left is damaged")
            else:
                return self._taken_up(kept, value)
        except (OSError, OutputError, ValueError, KeyError, TypeError, AttributeError):
            say("starting anew: what an earlier run left is damaged")
        self.clear()
        return None

    def _taken_up(self, kept: Path, value: dict[str, Any]) -> Resumed:
        dtype = getattr(torch, value["dtype"])
        self._held_bytes = kept.stat().st_size
        if 2 * self._held_bytes > self._max_bytes:
            states = _mapped(kept, value["shape"], dtype)
        else:
            states = torch.empty(value["shape"], dtype=dtype)
            with open(kept, "rb") as file:
                file.readinto(as_bytes(states))
        return Resumed(value["stages_done"], tuple(value["nodes"]), states)

    def clear(self) -> None:
        """Forget the states: the sweep is done."""
        if self._folder is not None:
            for path in (self._folder / _PROGRESS, self._new, *self._folder.glob("states-*")):
                path.unlink(missing_ok=True)

    @property
    def _new(self) -> Path:
        assert self._folder is not None
        return self._folder / "states.new"

    def _kept(self, stages_done: int) -> Path:
        assert self._folder is not None
        return self._folder / f"states-{stages_done}"


def _mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(*shape)
