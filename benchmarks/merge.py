"""Time a merge against `cp -r` and mergekit, on a pair made here, in one run: whole processes, in turn, repeated.

Absolute times mean little on a shared machine, so the figures are ratios of neighbouring runs (median, lowest–highest),
with each process's peak memory as the kernel counted it. slrmerge is byte-compiled first, as an installed package is,
and so is what it imports: with PYTHONDONTWRITEBYTECODE both might be compiled anew at every start, for up to 0.3 s.

    python benchmarks/merge.py --size 4GB --runs 5                    # a restoration and a soup against cp
    python benchmarks/merge.py --mergekit venv/bin/mergekit-yaml      # and against mergekit 0.1.5
    python benchmarks/merge.py --full-scale                           # one run on a sparse pair of 9B geometry
    python benchmarks/merge.py --many-tensors                         # memory with 100,000 tensors
    python benchmarks/merge.py --filesystem xfs                       # where files can be cloned (as root)
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

import slrmerge
from slrmerge.checkpoint.header import TensorInfo, header_bytes
from slrmerge.io.sizes import parse_bytes

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
SLRMERGE = str(Path(sys.executable).with_name("slrmerge"))


@dataclass(frozen=True)
class Run:
    wall_s: float
    peak_bytes: int


class Table:
    """Results, one row for each comparison; a row is also printed to stderr when it is there."""

    HEAD = ("what", "ratio, median (range)", "slrmerge", "rival", "slrmerge peak", "rival peak")

    def __init__(self) -> None:
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        self._rows.append(cells)
        print("  ".join(cells), file=sys.stderr)

    def print(self) -> None:
        """Print all rows as Markdown."""
        for row in (self.HEAD, ("---",) * len(self.HEAD), *self._rows):
            print(f"| {' | '.join(row)} |")


@dataclass(frozen=True)
class Geometry:
    """A Llama-like model: its layer count, sizes, and the most bytes in one of its files."""

    layers: int
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    vocabulary: int = VOCABULARY
    shard_bytes: int = 5_000_000_000

    @classmethod
    def of_size(cls, size_bytes: int) -> "Geometry":
        """Of about this many bytes in about three files: of at least four layers, narrower where that would be more."""
        for part in (1, 2, 4, 8, 16):
            hidden, intermediate = HIDDEN // part, INTERMEDIATE // part
            layer_bytes = 2 * (4 * hidden**2 + 3 * hidden * intermediate)
            layers = round((size_bytes - 4 * hidden * VOCABULARY) / layer_bytes)
            if layers >= 4:
                break
        return cls(max(4, layers), hidden, intermediate, shard_bytes=size_bytes // 3)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for k in range(self.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"model.layers.{k}.self_attn.{name}.weight", (self.hidden, self.hidden)
            for name in ("gate_proj", "up_proj"):
                yield f"model.layers.{k}.mlp.{name}.weight", (self.intermediate, self.hidden)
            yield f"model.layers.{k}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{k}.{name}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": self.vocabulary,
            "dtype": "bfloat16",
        }


def write_side(folder: Path, geometry: Geometry, data: bytes | None) -> None:
    """One side of a pair in bfloat16, `data` over and over; None leaves the data as a hole of zeros."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(geometry.config()))
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    offset = 0
    for name, shape in geometry.tensors():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if shards[-1] and offset + size > geometry.shard_bytes:
            shards.append([])
            offset = 0
        shards[-1].append((name, TensorInfo("BF16", shape, size, offset)))
        offset += size
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as output:
            output.write(header_bytes(entries))
            left = entries[-1][1].end
            if data is None:
                output.truncate(output.tell() + left)
                left = 0
            while data and left:
                left -= output.write(data[:left])
        weight_map |= {name: file for name, _ in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_pair(folder: Path, geometry: Geometry) -> None:
    """Two sides of random weights, `pre` and `post`."""
    for seed, side in enumerate(("pre", "post")):
        write_side(folder / side, geometry, random_weights(seed))


def random_weights(seed: int) -> bytes:
    """16 MB of random bfloat16 values of either sign, all between 2**-9 and 2**-5."""
    source = random.Random(seed)
    values = bytearray(source.randbytes(16_000_000))
    high = bytes((0x3B, 0x3C, 0xBB, 0xBC)[byte % 4] for byte in range(256))
    values[1::2] = values[1::2].translate(high)
    return bytes(values)


def timed(command: str, out: Path) -> Run:
    """Run a shell command that makes `out`, with `out` away before and after; its time and its peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(["sh", "-c", f"exec {command}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - started
    shutil.rmtree(out, ignore_errors=True)
    if status:
        raise SystemExit(f"failed: {command}")
    return Run(wall_s, usage.ru_maxrss * 1024)


def compare(title: str, ours: str, theirs: str, out: Path, runs: int, table: Table) -> None:
    """Two commands in turn; adds a row to the table. An uncounted run of each comes first, unless one is all."""
    if runs > 1:
        timed(ours, out), timed(theirs, out)
    pairs = [(timed(ours, out), timed(theirs, out)) for _ in range(runs)]
    ratios = [a.wall_s / b.wall_s for a, b in pairs]
    table.add(
        title,
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        f"{statistics.median(a.wall_s for a, _ in pairs):.2f} s",
        f"{statistics.median(b.wall_s for _, b in pairs):.2f} s",
        f"{max(a.peak_bytes for a, _ in pairs) / 1e6:.0f} MB",
        f"{max(b.peak_bytes for _, b in pairs) / 1e6:.0f} MB",
    )


@contextmanager
def mounted(filesystem: str, size_bytes: int, folder: Path) -> Iterator[Path]:
    """A new file system of this kind in a file in `folder`, mounted; ends the program where that is not permitted."""
    image, root = folder / "image", folder / "root"
    root.mkdir()
    image.touch()
    os.truncate(image, size_bytes)
    make = shutil.which(f"mkfs.{filesystem}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if make is None or os.geteuid() != 0:
        print(f"skipped: a file system needs root and mkfs.{filesystem}", file=sys.stderr)
        raise SystemExit(0)
    subprocess.run([make, "-q", image], check=True, stderr=subprocess.DEVNULL)
    if subprocess.run(["mount", "-o", "loop", image, root]).returncode:
        print("skipped: no file system may be mounted here", file=sys.stderr)
        raise SystemExit(0)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def used_bytes(folder: Path) -> int:
    """The bytes in use on a file system, once they no longer change: btrfs frees deleted files some time later."""
    used = [-2, -1]
    while used[-1] != used[-2]:
        time.sleep(2)
        os.sync()
        used.append(shutil.disk_usage(folder).used)
    return used[-1]


def cloned(work: Path, filesystem: str, size_bytes: int, runs: int, table: Table) -> None:
    """A restoration of about a sixth of the bytes, against a copy that does not clone; and the disk space of both."""
    geometry = Geometry.of_size(size_bytes)
    write_pair(work, geometry)
    first, count = geometry.layers // 3, max(1, geometry.layers // 6)
    write_recipe(work / "restoration.yaml", restore=[first, first + count - 1])
    out = work / "out"
    merge = f"{SLRMERGE} {work}/restoration.yaml --out {out} --quiet --no-fsync"
    title = f"restoration of {count} of {geometry.layers} layers, {filesystem}, --no-fsync / cp -r --reflink=never"
    compare(title, merge, f"cp -r --reflink=never {work}/post {out}", out, runs, table)
    changed = slrmerge.plan(work / "restoration.yaml").changed_bytes
    before = used_bytes(work)
    subprocess.run(["sh", "-c", merge], check=True)
    taken = used_bytes(work) - before
    title = f"disk space of it, {filesystem} / bytes overwritten"
    table.add(title, f"{taken / changed:.2f}", f"{taken / 1e6:.0f} MB", f"{changed / 1e6:.0f} MB", "", "")


def mergekit_config(work: Path, geometry: Geometry, interval: tuple[int, int]) -> tuple[Path, Path]:
    """The same restoration and the same soup in mergekit's words."""
    pre, post = str(work / "pre"), str(work / "post")
    first, last = interval
    slices = [(post, [0, first]), (pre, [first, last + 1]), (post, [last + 1, geometry.layers])]
    restoration = {
        "merge_method": "passthrough",
        "base_model": post,
        "slices": [{"sources": [{"model": model, "layer_range": span}]} for model, span in slices],
        "dtype": "bfloat16",
    }
    soup = {
        "merge_method": "linear",
        "base_model": post,
        "models": [
            {"model": pre, "parameters": {"weight": 0.85}},
            {"model": post, "parameters": {"weight": 0.15}},
        ],
        "dtype": "bfloat16",
    }
    files = (work / "mergekit-restoration.yaml", work / "mergekit-soup.yaml")
    for file, content in zip(files, (restoration, soup), strict=True):
        file.write_text(yaml.safe_dump(content))
    return files


def against_rivals(work: Path, size_bytes: int, runs: int, mergekit: str | None, table: Table) -> None:
    geometry = Geometry.of_size(size_bytes)
    write_pair(work, geometry)
    interval = (geometry.layers // 3, geometry.layers // 2)
    shard = geometry.shard_bytes
    write_recipe(work / "restoration.yaml", restore=list(interval), max_shard_size=shard)
    write_recipe(work / "soup.yaml", alpha=0.85, max_shard_size=shard)
    out = work / "out"
    copy = f"cp -r {work}/post {out}"
    for kind in ("restoration", "soup"):
        merge = f"{SLRMERGE} {work}/{kind}.yaml --out {out} --quiet"
        compare(f"{kind} --no-fsync / cp -r", f"{merge} --no-fsync", copy, out, runs, table)
        compare(f"{kind} / cp -r, sync", merge, f"sh -c '{copy} && sync'", out, runs, table)
    if mergekit:
        for kind, config in zip(("restoration", "soup"), mergekit_config(work, geometry, interval), strict=True):
            merge = f"{SLRMERGE} {work}/{kind}.yaml --out {out} --quiet --no-fsync"
            rival = f"{mergekit} {config} {out} --lazy-unpickle --quiet"
            compare(f"{kind} --no-fsync / mergekit", merge, rival, out, min(runs, max(2, runs // 2)), table)


def write_recipe(path: Path, **content: object) -> None:
    path.write_text(yaml.safe_dump({"pretrained": "./pre", "posttrained": "./post"} | content))


def small_things(work: Path, runs: int, table: Table) -> None:
    """The commands that should answer at once: planning 20,000 tensors, and --help."""
    many = work / "many"
    for side in ("pre", "post"):
        write_side(many / side, Geometry(layers=2222, hidden=8, intermediate=16, vocabulary=32), b"\0" * 1024)
    write_recipe(many / "recipe.yaml", restore=[700, 900])
    plan = f"{SLRMERGE} {many}/recipe.yaml --out {many}/out --dry-run"
    for title, command in (("plan 20,000 tensors", plan), ("--help", f"{SLRMERGE} --help")):
        taken = [timed(command, many / "out") for _ in range(runs)]
        median = statistics.median(run.wall_s for run in taken)
        table.add(title, "", f"{median:.2f} s", "", f"{max(run.peak_bytes for run in taken) / 1e6:.0f} MB", "")


def many_tensors(work: Path, count: int, table: Table) -> None:
    """Memory with `count` small tensors: what a plan holds for each, and the peak of a restoration and of a soup."""
    many = work / "memory"
    geometry = Geometry(layers=count // 9, hidden=8, intermediate=16, vocabulary=32)
    count = sum(1 for _ in geometry.tensors())
    write_pair(many, geometry)
    write_recipe(many / "restoration.yaml", restore=[count // 33, count // 17])
    write_recipe(many / "soup.yaml", alpha=0.85)
    for kind in ("restoration", "soup"):
        run = timed(f"{SLRMERGE} {many}/{kind}.yaml --out {many}/out --quiet --no-fsync", many / "out")
        table.add(f"{kind}, {count:,} tensors", "", f"{run.wall_s:.2f} s", "", f"{run.peak_bytes / 1e6:.0f} MB", "")
    # Planned here only now: the kernel counts this process's peak as that of the processes that it starts afterwards.
    slrmerge.plan(many / "restoration.yaml")  # imports are not counted
    tracemalloc.start()
    plan = slrmerge.plan(many / "restoration.yaml")
    held, peak = (size / count for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    title = f"plan of {len(plan.pair.posttrained):,} tensors, bytes per tensor"
    table.add(title, "", f"{held:.0f} held", "", f"{peak:.0f} peak", "")


def full_scale(work: Path, table: Table) -> None:
    """One restoration and one soup of 9B geometry; the sources are sparse, the output is written in full."""
    geometry = Geometry(layers=42, hidden=3584, intermediate=14336, vocabulary=256000)
    for side in ("pre", "post"):
        write_side(work / side, geometry, None)
    for kind, rule in (("restoration", {"restore": [17, 27]}), ("soup", {"alpha": 0.9})):
        write_recipe(work / f"{kind}.yaml", **rule)
        run = timed(f"{SLRMERGE} {work}/{kind}.yaml --out {work}/out --quiet", work / "out")
        size = sum(path.stat().st_size for path in (work / "post").iterdir())
        title = f"{kind}, {size / 1e9:.1f} GB a side"
        table.add(title, "", f"{run.wall_s:.1f} s", "", f"{run.peak_bytes / 1e6:.0f} MB", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("4GB"), help="bytes a side (default 4GB)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command (default 5)")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="path of mergekit-yaml")
    parser.add_argument("--full-scale", action="store_true", help="only one run on a sparse 9B pair")
    parser.add_argument("--filesystem", choices=["xfs", "btrfs"], help="only a restoration there, in its own loop file")
    parser.add_argument("--many-tensors", action="store_true", help="only memory with many tensors")
    parser.add_argument("--tensors", type=int, default=100_000, help="about how many of them (default 100,000)")
    parser.add_argument("--work", type=Path, default=None, help="where to work (default: a temporary folder)")
    chosen = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(Path(slrmerge.__file__).parent)], check=True)
    with tempfile.TemporaryDirectory(dir=chosen.work, prefix="slrmerge-benchmark-") as folder:
        work, table = Path(folder), Table()
        if chosen.full_scale:
            full_scale(work, table)
        elif chosen.filesystem:
            with mounted(chosen.filesystem, 4 * chosen.size + 2_000_000_000, work) as root:
                cloned(root / "work", chosen.filesystem, chosen.size, chosen.runs, table)
        elif chosen.many_tensors:
            many_tensors(work, chosen.tensors, table)
        else:
            against_rivals(work, chosen.size, chosen.runs, chosen.mergekit, table)
            small_things(work, chosen.runs, table)
            many_tensors(work, chosen.tensors, table)
    table.print()


if __name__ == "__main__":
    main()
