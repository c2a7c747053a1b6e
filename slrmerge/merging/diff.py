"""How far post-training moved the weights, by layer and module; streamed, like a merge."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from math import prod

from slrmerge.checkpoint.base import differing_chunks
from slrmerge.checkpoint.fused import is_regrouped
from slrmerge.checkpoint.gguf_header import QUANTIZED
from slrmerge.checkpoint.header import FLOATING
from slrmerge.checkpoint.layers import group_names
from slrmerge.checkpoint.pair import ModelPair, PairReader, require_same_depth
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.io.options import checks_types
from slrmerge.io.progress import Progress
from slrmerge.io.threads import cancellable_pool, thread_count
from slrmerge.merging.blend import CHUNK_ELEMENTS, MAX_ELEMENT_BYTES, as_tensor, one_core_per_chunk
from slrmerge.merging.diff_result import OUTSIDE, DiffResult, Distance
from slrmerge.merging.executor import default_threads
from slrmerge.recipe.load import RecipeLike, as_recipe


@checks_types
def diff(pair: RecipeLike | ModelPair, *, threads: int | None = None, progress: Progress | None = None) -> DiffResult:
    """Compare every floating tensor that both sides of a pair have in the same shape.

    `pair` is an open pair, or a recipe that names one. Quantized tensors of GGUF files are compared as bytes, and a
    note names those that differ.

    Raises PlanError for models of different depth, SourceChangedError where a file changes meanwhile; for a recipe also
    OptionError, RecipeError, CheckpointError and HubError.
    """
    pair = pair if isinstance(pair, ModelPair) else as_recipe(pair).open_pair()
    threads = thread_count(threads, default_threads(pair))
    raise_all(require_same_depth(pair), PlanError)
    names, blocks, notes = _comparable(pair)
    if not names and not blocks:
        what = "has no floating tensor in common with the pre-trained checkpoint"
        raise PlanError(
            Problem("nothing-in-common", str(pair.posttrained), what, "name a model and the one it was trained from")
        )
    distances, differing = _compare(pair, names, blocks, threads, progress or Progress())
    if blocks:
        which = f": {', '.join(group_names(differing))}" if differing else ""
        notes.append(f"quantized, compared as bytes: {len(differing):,} of {len(blocks):,} tensors differ{which}")
    return DiffResult(
        pair.stack.count if pair.stack else 0,
        _by_module(pair, distances),
        tuple(notes),
        pair.pretrained.model_name,
        pair.posttrained.model_name,
    )


def _compare(
    pair: ModelPair, names: Sequence[str], blocks: Sequence[str], threads: int, progress: Progress
) -> tuple[dict[str, Distance], list[str]]:
    """The distance of each of `names`, and those of `blocks` whose bytes differ."""
    twins = pair.correspondence.twins
    nbytes = {name: pair.pretrained[twins[name]].nbytes + pair.posttrained[name].nbytes for name in (*names, *blocks)}
    with pair.open() as reader, one_core_per_chunk(progress), cancellable_pool(threads) as (pool, cancelled):
        progress.start("comparing", sum(nbytes.values()))

        def measure(name: str) -> Distance:
            chunks = _chunks(reader, name, twins[name])
            distance = sum(takewhile(lambda _: not cancelled.is_set(), chunks), Distance())
            progress.advance(nbytes[name])
            return distance

        def differs(name: str) -> bool:
            chunks = differing_chunks(reader.posttrained, name, reader.pretrained, twins[name])
            found = any(takewhile(lambda _: not cancelled.is_set(), chunks))
            progress.advance(nbytes[name])
            return found

        try:
            distances = dict(zip(names, pool.map(measure, names), strict=True))
            differing = [name for name, found in zip(blocks, pool.map(differs, blocks), strict=True) if found]
        except BaseException:
            reader.cancel()
            raise
        reader.check_unchanged()
    return distances, differing


def _by_module(pair: ModelPair, distances: Mapping[str, Distance]) -> dict[tuple[int, str], Distance]:
    """The distance of each module in each layer; last what lies outside the layers."""
    by_module: dict[tuple[int, str], Distance] = {}
    for name, distance in distances.items():
        layer, inner = (pair.stack.locate(name) if pair.stack else None) or (OUTSIDE, name)
        module = inner.rpartition(".")[0] or inner
        by_module[layer, module] = by_module.get((layer, module), Distance()) + distance
    return dict(sorted(by_module.items(), key=lambda item: (item[0][0] == OUTSIDE, item[0][0])))


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
        elif info.dtype == pre.dtype and info.dtype in QUANTIZED:
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
