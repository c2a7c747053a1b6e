"""Time a merge of two repositories against fetching both, from a small Hub on loopback in a process of its own.

A real network is slower than loopback and a real Hub faster than ours in Python, so bytes served say more than seconds.

    python benchmarks/hub.py --size 1GB --runs 3
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from merge import SLRMERGE, Geometry, Table, compare, write_pair, write_recipe

import slrmerge
from slrmerge.io.sizes import parse_bytes

ROOT = Path(__file__).parents[1]
HF = str(Path(sys.executable).with_name("hf"))


def serve(work: Path, pipe: Connection) -> None:
    """A Hub with both sides; tells its address, then, each time it is asked, the bytes served since."""
    sys.path.insert(0, str(ROOT))
    from tests.checkpoint.hub.server import HubServer, environment

    with HubServer() as hub:
        for side in ("pre", "post"):
            hub.commit(f"org/{side}", {path.name: path.read_bytes() for path in (work / side).iterdir()})
        pipe.send(environment(hub, work / "cache"))
        while pipe.recv():
            pipe.send(hub.served())
            hub.requests.clear()


def served(pipe: Connection) -> int:
    pipe.send(True)
    count: int = pipe.recv()
    return count


def run(work: Path, size_bytes: int, runs: int) -> None:
    geometry = Geometry.of_size(size_bytes)
    write_pair(work, geometry)
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    server = spawn.Process(target=serve, args=(work, theirs), daemon=True)
    server.start()
    os.environ |= ours.recv()
    cache, out, fetch = work / "cache", work / "out", f"{HF} download --quiet org"
    rival = f"sh -c 'rm -rf {cache}; {fetch}/pre && {fetch}/post'"
    table = Table()
    sides = {"pretrained": "org/pre", "posttrained": "org/post"}
    bytes_served: dict[str, float] = {}
    for kind, rule in (
        ("restoration", {"restore": [geometry.layers // 3, geometry.layers // 2]}),
        ("soup", {"alpha": 0.85}),
    ):
        write_recipe(work / f"{kind}.yaml", **sides, **rule)
        merge = f"sh -c 'rm -rf {cache}; {SLRMERGE} {work}/{kind}.yaml --out {out} --quiet --no-fsync'"
        compare(f"{kind} / hf download of both", merge, rival, out, runs, table)
        served(ours)
        subprocess.run(["sh", "-c", f"{merge}; rm -rf {out}"], check=True)
        bytes_served[kind] = served(ours) / sum(path.stat().st_size for path in (work / "post").iterdir())
    table.print()
    print(json.dumps({f"{kind}: bytes served / one model": round(share, 3) for kind, share in bytes_served.items()}))
    ours.send(False)
    server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("1GB"), help="bytes a side (default 1GB)")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each command (default 3)")
    chosen = parser.parse_args()
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(Path(slrmerge.__file__).parent)], check=True)
    with tempfile.TemporaryDirectory(prefix="slrmerge-benchmark-") as folder:
        run(Path(folder), chosen.size, chosen.runs)


if __name__ == "__main__":
    main()
