"""How far post-training moved the weights, by layer and module; streamed, like a merge."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import takewhile
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.checkpoint.fused import is_regrouped
from slrmerge.checkpoint.gguf_header import QUANTISED
from slrmerge.checkpoint.header import FLOATING
from slrmerge.checkpoint.pair import ModelPair, PairReader, require_pair, require_same_depth
from slrmerge.errors import PlanError, Problem, raise_all, require_extra
from slrmerge.io.figures import figure_text, save_figure
from slrmerge.io.files import write_file
from slrmerge.io.pieces import CHUNK_BYTES, translate_os_errors
from slrmerge.io.progress import Progress
from slrmerge.io.text import to_csv
from slrmerge.io.threads import cancellable_pool, thread_count
from slrmerge.merging.blend import CHUNK_ELEMENTS, MAX_ELEMENT_BYTES, as_tensor, one_core_per_chunk
from slrmerge.merging.executor import default_threads
from slrmerge.merging.plan.tensors import group_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

OUTSIDE = -1
"""The layer of tensors outside the layers: embedding, last norm, head."""


@dataclass
class Distance:
    """Sums over pairs of elements, pre-trained p and post-trained q, in float64: p², q², (q − p)² and p·q."""

    parameters: int = 0
    pre: float = 0.0
    post: float = 0.0
    moved: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

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


@dataclass(frozen=True, repr=False)
class DiffResult:
    """Distances by (layer, module), modules as `self_attn.q_proj`; `OUTSIDE` is the layer of everything else.

    `notes` name the tensors that were not compared by value.
    """

    layers: int
    by_module: Mapping[tuple[int, str], Distance]
    notes: tuple[str, ...] = ()

    def of_layer(self, layer: int, prefix: str = "") -> Distance:
        """The distance of a layer, or of its modules at or below `prefix`, such as `mlp` or `self_attn.q_proj`."""
        start = prefix and f"{prefix}."
        inside = ((f"{name}.", distance) for (k, name), distance in self.by_module.items() if k == layer)
        return sum((distance for name, distance in inside if name.startswith(start)), Distance())

    def modules(self) -> list[str]:
        """The modules inside layers, in the order of the checkpoint."""
        return list(dict.fromkeys(name for layer, name in self.by_module if layer != OUTSIDE))

    def to_rows(self) -> list[dict[str, float | str | None]]:
        """A row per module: layer (None outside the layers), module, parameters, relative_change, cosine."""
        return [
            {
                "layer": None if layer == OUTSIDE else layer,
                "module": name,
                "parameters": found.parameters,
                "relative_change": found.relative_change,
                "cosine": found.cosine,
            }
            for (layer, name), found in self.by_module.items()
        ]

    def to_pandas(self) -> "DataFrame":
        """`to_rows` as a table. Raises MissingExtraError without pandas."""
        require_extra("search", "pandas")
        from pandas import DataFrame

        return DataFrame(self.to_rows()).astype({"layer": "Int64"})

    def to_csv(self) -> str:
        """`to_rows` as CSV."""
        header = ["layer", "module", "parameters", "relative_change", "cosine"]
        return to_csv(header, ([row[name] for name in header] for row in self.to_rows()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `diff.csv` and, where there are layers, the heat map `diff.png` and `diff.svg` to `folder`.

        Raises OutputError, and MissingExtraError without matplotlib.
        """
        require_extra("search", "matplotlib")
        folder = Path(folder)
        with translate_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / "diff.csv", self.to_csv().encode(), durable=False)
            if self.layers:
                save_figure(diff_figure(self), folder / "diff")

    def __repr__(self) -> str:
        total = sum(self.by_module.values(), Distance())
        return f"<DiffResult: {self.layers} layers, relative change {total.relative_change:.2e}>"

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(index=False))


def diff(pair: ModelPair, *, threads: int | None = None, progress: Progress | None = None) -> DiffResult:
    """Compare every floating tensor that both sides of a pair have in the same shape.

    Quantised tensors of GGUF files are compared as bytes, and a note names those that differ.

    Raises PlanError for models of different depth, SourceChangedError where a file changes meanwhile.
    """
    require_pair(pair)
    threads = thread_count(threads, default_threads(pair))
    raise_all(require_same_depth(pair), PlanError)
    progress = progress or Progress()
    names, blocks, notes = _comparable(pair)
    if not names and not blocks:
        what = "has no floating tensor in common with the pre-trained checkpoint"
        raise PlanError(
            Problem("nothing-in-common", str(pair.posttrained), what, "name a model and the one it was trained from")
        )
    twins = pair.correspondence.twins
    compared = (*names, *blocks)
    total = sum(pair.pretrained[twins[name]].nbytes + pair.posttrained[name].nbytes for name in compared)
    progress.start("comparing", total)
    with (
        pair.open() as reader,
        one_core_per_chunk(),
        cancellable_pool(threads) as (pool, cancelled),
    ):

        def measure(name: str) -> Distance:
            twin = twins[name]
            distance = sum(takewhile(lambda _: not cancelled.is_set(), _chunks(reader, name, twin)), Distance())
            progress.advance(pair.pretrained[twin].nbytes + pair.posttrained[name].nbytes)
            return distance

        def differ(name: str) -> bool:
            twin = twins[name]
            found = any(takewhile(lambda _: not cancelled.is_set(), _differing_chunks(reader, name, twin)))
            progress.advance(pair.pretrained[twin].nbytes + pair.posttrained[name].nbytes)
            return found

        try:
            distances = dict(zip(names, pool.map(measure, names), strict=True))
            differing = [name for name, found in zip(blocks, pool.map(differ, blocks), strict=True) if found]
        except BaseException:
            reader.cancel()
            raise
        reader.check_unchanged()
    if blocks:
        which = f": {', '.join(group_names(differing))}" if differing else ""
        notes.append(f"quantised, compared as bytes: {len(differing):,} of {len(blocks):,} tensors differ{which}")
    by_module: dict[tuple[int, str], Distance] = {}
    for name, distance in distances.items():
        layer, inner = (pair.stack.locate(name) if pair.stack else None) or (OUTSIDE, name)
        module = inner.rpartition(".")[0] or inner
        by_module[layer, module] = by_module.get((layer, module), Distance()) + distance
    ordered = sorted(by_module.items(), key=lambda item: (item[0][0] == OUTSIDE, item[0][0]))
    return DiffResult(pair.stack.count if pair.stack else 0, dict(ordered), tuple(notes))


def diff_figure(result: DiffResult) -> "Figure":
    """The relative change and the cosine of each module in each layer."""
    import numpy as np
    from matplotlib.figure import Figure

    modules = result.modules()
    size = (2.5 + 0.28 * result.layers, 1.6 + 0.6 * len(modules))
    figure = Figure(figsize=size, layout="constrained")
    panels = (("relative_change", "|post − pre| / |pre|", "viridis"), ("cosine", "cosine", "viridis_r"))
    for number, (name, label, colours) in enumerate(panels, 1):
        grid = np.full((len(modules), result.layers), np.nan)
        for (layer, module), distance in result.by_module.items():
            if module in modules and 0 <= layer < result.layers:
                grid[modules.index(module), layer] = getattr(distance, name)
        axes = figure.add_subplot(2, 1, number)
        image = axes.imshow(grid, cmap=colours, aspect="auto")
        figure.colorbar(image, ax=axes, label=label)
        axes.set_yticks(range(len(modules)), list(map(figure_text, modules)))
        axes.set_xlabel("layer")
    figure.suptitle("how far post-training moved the weights")
    return figure


def _comparable(pair: ModelPair) -> tuple[list[str], list[str], list[str]]:
    """The names of tensors to compare by value, of those to compare as bytes, and notes on the others."""
    names: list[str] = []
    blocks: list[str] = []
    skipped: dict[str, list[str]] = {}
    twins = pair.correspondence.twins
    for name, info in pair.posttrained.items():
        pre = pair.pretrained[twins[name]] if name in twins else None
        if pre is None:
            skipped.setdefault("only post-trained", []).append(name)
        elif not is_regrouped(pre.shape, info.shape):
            skipped.setdefault("different shapes", []).append(name)
        elif info.dtype == pre.dtype and info.dtype in QUANTISED:
            blocks.append(name)
        elif not {info.dtype, pre.dtype} <= FLOATING:
            skipped.setdefault("not floating", []).append(name)
        else:
            names.append(name)
    compared = set(twins.values())
    if missing := [name for name in pair.pretrained if name not in compared]:
        skipped["only pre-trained"] = missing
    more = {why: f" and {len(found) - 1} more" if len(found) > 1 else "" for why, found in skipped.items()}
    renamed = [pair.correspondence.note] if pair.correspondence.note else []
    return names, blocks, renamed + [f"not compared, {why}: {found[0]}{more[why]}" for why, found in skipped.items()]


def _differing_chunks(reader: PairReader, name: str, twin: str) -> Iterator[bool]:
    """Whether a tensor differs from its pre-trained twin, a chunk of bytes at a time."""
    pre, post = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    nbytes = reader.posttrained.checkpoint[name].nbytes
    for start in range(0, nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, nbytes - start)
        reader.pretrained.read_into(twin, start, memoryview(pre)[:size])
        reader.posttrained.read_into(name, start, memoryview(post)[:size])
        yield pre[:size] != post[:size]


def _chunks(reader: PairReader, name: str, twin: str) -> Iterator[Distance]:
    """The distance of a tensor from its pre-trained twin in parts, a chunk of elements at a time."""
    size = CHUNK_ELEMENTS * MAX_ELEMENT_BYTES
    buffers = memoryview(bytearray(size)), memoryview(bytearray(size))
    steps = range(0, prod(reader.posttrained.checkpoint[name].shape), CHUNK_ELEMENTS)
    for count, dtypes in reader.read_elements(twin, name, steps, buffers):
        p, q = (as_tensor(buffer, dtype, count).double() for buffer, dtype in zip(buffers, dtypes, strict=True))
        moved = q - p
        sums = (float(a.dot(b)) for a, b in ((p, p), (q, q), (moved, moved), (p, q)))
        yield Distance(len(moved), *sums)
