"""How far post-training moved the weights, tensor by tensor and by layer and module; streamed, like a merge."""

import csv
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import StringIO
from math import prod, sqrt
from pathlib import Path

from slrmerge.blend import CHUNK_ELEMENTS, MAX_ELEMENT_BYTES, as_tensor, one_core_per_chunk
from slrmerge.checkpoint import FLOATING, Checkpoint, CheckpointReader
from slrmerge.errors import PlanError, Problem, raise_all, require_extra
from slrmerge.files import write_file
from slrmerge.merge import default_threads
from slrmerge.plan import depth_problems
from slrmerge.progress import Progress, Silent, one_at_a_time
from slrmerge.writer import os_errors_at

OUTSIDE = -1
"""The layer of what is in no layer: embedding, last norm, head."""


@dataclass
class Distance:
    """Sums over pairs of elements, pre-trained p and post-trained q, in float64: p², q², (q − p)² and p·q."""

    parameters: int = 0
    pre: float = 0.0
    post: float = 0.0
    moved: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def relative_change(self) -> float:
        """|post − pre| / |pre|; infinite where only the pre-trained side is zero, 0 where both are."""
        if self.pre == 0:
            return 0.0 if self.moved == 0 else float("inf")
        return sqrt(self.moved / self.pre)

    @property
    def cosine(self) -> float:
        """The cosine between the two as vectors; 1 where they are equal, NaN where one is zero."""
        if self.moved == 0:
            return 1.0
        return self.product / (sqrt(self.pre) * sqrt(self.post)) if self.pre and self.post else float("nan")


@dataclass(frozen=True)
class Differences:
    """Distances by (layer, module), modules as `self_attn.q_proj`; `OUTSIDE` is the layer of everything else.

    `notes` name what could not be compared.
    """

    layers: int
    by_module: Mapping[tuple[int, str], Distance]
    notes: tuple[str, ...] = field(default=())

    def of_layer(self, layer: int, prefix: str = "") -> Distance:
        """A layer's distance, or that of its modules whose name starts with `prefix`."""
        own = (distance for (k, name), distance in self.by_module.items() if k == layer and name.startswith(prefix))
        return sum(own, Distance())

    def modules(self) -> list[str]:
        """The modules inside layers, in the order of the checkpoint."""
        return list(dict.fromkeys(name for layer, name in self.by_module if layer != OUTSIDE))

    def table(self) -> bytes:
        """CSV: layer (empty outside the layers), module, parameters, relative_change, cosine."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("layer", "module", "parameters", "relative_change", "cosine"))
        for (layer, name), found in self.by_module.items():
            place = "" if layer == OUTSIDE else layer
            writer.writerow((place, name, found.parameters, found.relative_change, found.cosine))
        return text.getvalue().encode()


def compare_checkpoints(
    pretrained: Checkpoint, posttrained: Checkpoint, *, threads: int | None = None, progress: Progress | None = None
) -> Differences:
    """Compare every floating tensor that both sides have in the same shape.

    Raises PlanError for models of different depth, SourceChangedError where a file changes meanwhile.
    """
    raise_all(depth_problems(pretrained, posttrained), PlanError)
    progress = progress or Silent()
    names, notes = _comparable(pretrained, posttrained)
    if not names:
        what = "the two checkpoints have no floating tensor in common"
        raise PlanError(Problem(str(posttrained), what, "name a model and what was trained from it"))
    progress.start("comparing", sum(side[name].nbytes for name in names for side in (pretrained, posttrained)))
    advance = one_at_a_time(progress.advance)
    with (
        CheckpointReader(pretrained) as pre,
        CheckpointReader(posttrained) as post,
        one_core_per_chunk(),
        ThreadPoolExecutor(threads or default_threads(pretrained, posttrained)) as pool,
    ):

        def measure(name: str) -> Distance:
            distance = Distance()
            for part in _chunks(pre, post, name):
                distance += part
            advance(pretrained[name].nbytes + posttrained[name].nbytes)
            return distance

        distances = dict(zip(names, pool.map(measure, names), strict=True))
        pre.check_unchanged()
        post.check_unchanged()
    by_module: dict[tuple[int, str], Distance] = {}
    stack = posttrained.stack
    for name, distance in distances.items():
        layer, inner = (stack.locate(name) if stack else None) or (OUTSIDE, name)
        module = inner.rpartition(".")[0] or inner
        by_module[layer, module] = by_module.get((layer, module), Distance()) + distance
    ordered = sorted(by_module.items(), key=lambda item: (item[0][0] == OUTSIDE, item[0][0]))
    return Differences(stack.count if stack else 0, dict(ordered), tuple(notes))


def save_differences(differences: Differences, folder: Path) -> None:
    """`diff.csv` and, where there are layers, the heat map `diff.png` and `diff.svg`, in `folder`.

    Raises OutputError, and MissingExtraError without matplotlib.
    """
    require_extra("search", "matplotlib")
    from slrmerge.plots import differences_figure, save

    with os_errors_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "diff.csv", differences.table(), fsync=False)
        if differences.layers:
            save(differences_figure(differences), folder / "diff")


def _comparable(pretrained: Checkpoint, posttrained: Checkpoint) -> tuple[list[str], list[str]]:
    """The tensors to compare, and notes on the others."""
    names: list[str] = []
    skipped: dict[str, list[str]] = {}
    for name, info in posttrained.items():
        if name not in pretrained:
            skipped.setdefault("only post-trained", []).append(name)
        elif pretrained[name].shape != info.shape:
            skipped.setdefault("of another shape", []).append(name)
        elif not {info.dtype, pretrained[name].dtype} <= FLOATING:
            skipped.setdefault("not floating", []).append(name)
        else:
            names.append(name)
    if gone := [name for name in pretrained.weight_map if name not in posttrained]:
        skipped["only pre-trained"] = gone
    return names, [f"not compared, {why}: {found[0]}{_more(found)}" for why, found in skipped.items()]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _chunks(pre: CheckpointReader, post: CheckpointReader, name: str) -> Iterator[Distance]:
    """A tensor's distance in parts, a chunk of elements at a time."""
    buffers = [memoryview(bytearray(CHUNK_ELEMENTS * MAX_ELEMENT_BYTES)) for _ in range(2)]
    steps = range(0, prod(post.checkpoint[name].shape), CHUNK_ELEMENTS)
    sides = [reader.read_elements(name, steps, buffer) for reader, buffer in zip((pre, post), buffers, strict=True)]
    for read in zip(*sides, strict=True):
        p, q = (as_tensor(buffer, dtype, count).double() for buffer, (dtype, count) in zip(buffers, read, strict=True))
        moved = q - p
        sums = (float(a.dot(b)) for a, b in ((p, p), (q, q), (moved, moved), (p, q)))
        yield Distance(len(moved), *sums)
