"""A search and a merge on a real Ray cluster of two workers, one of which is killed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge.errors import ClusterError
from slrmerge.io.cluster import Cluster
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import merge
from slrmerge.merging.verify import verify
from slrmerge.searching.cluster import RayScorer
from slrmerge.searching.prompts import answer_log_probs
from slrmerge.searching.proxy_tasks import TASKS
from slrmerge.searching.scorer import LocalScorer
from tests.searching.pairs import SmallPair

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and processes to the system
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head without cores, and two machines with one core each, as processes here."""
    from ray.cluster_utils import Cluster as LocalCluster

    cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


class Killer(Progress):
    """Kills a worker when the first progress arrives."""

    killed = 0
    counted = 0

    def on_advance(self, count: int) -> None:
        self.counted += count
        if not self.killed:
            self.killed = next(_workers())
            os.kill(self.killed, signal.SIGKILL)


def _workers() -> Iterator[int]:
    """The processes of jobs, which Ray names after the function that they run."""
    for folder in Path("/proc").glob("[0-9]*"):
        if b"ray::_call" in (folder / "cmdline").read_bytes():
            yield int(folder.name)


def test_scores_on_a_cluster_are_those_of_one_machine_though_a_worker_is_killed(
    small: SmallPair, address: str, tmp_path: Path
) -> None:
    prepared = small.search(spaces=("intervals", "soups")).prepared
    request = prepared.first.request
    local = LocalScorer(prepared.pair, output_dtype=None, device=torch.device("cpu"), max_memory_bytes=1 << 30)
    with local:
        expected = local.score(request, None, Progress())
    remote = RayScorer(prepared.pair, address, output_dtype=None, device="cpu", max_memory_bytes=1 << 30, threads=None)
    progress = Killer()
    with remote:
        remote.check(request.candidates[0], request.contexts[:2])
        assert len(remote.parts(request)) == 2
        scores = remote.score(request, tmp_path / "first", progress)
        states = remote.cost(request).states
    assert progress.killed
    assert progress.counted == states
    task = TASKS["crc"]()
    here, there = (task.score(answer_log_probs(prepared.prompts, each)) for each in (expected, scores))
    assert max(np.abs(here.quality - there.quality).max(), np.abs(here.diversity - there.diversity).max()) < 1e-6


def test_a_merge_on_a_cluster_is_that_of_one_machine_though_a_worker_is_killed(
    small: SmallPair, address: str, tmp_path: Path
) -> None:
    recipe = small.recipe_file("soup.yaml", alpha=0.3, max_shard_size="20KB")
    here = merge(recipe, tmp_path / "here", fsync=False)
    progress = Killer()
    there = merge(recipe, tmp_path / "there", ray=address, progress=progress)
    assert len(there.files) > 5
    assert progress.killed
    assert {name: file.digest for name, file in there.files.items() if name.endswith(".safetensors")} == {
        name: file.digest for name, file in here.files.items() if name.endswith(".safetensors")
    }
    assert verify(tmp_path / "there").files == verify(tmp_path / "here").files


def test_an_address_without_a_cluster_is_one_clear_error() -> None:
    with pytest.raises(ClusterError) as raised, Cluster("127.0.0.1:1"):
        pass
    assert raised.value.problems[0].code == "no-cluster"
