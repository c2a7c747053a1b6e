"""A search on a real Ray cluster of two workers, one of which is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slrmerge.errors import ClusterError
from slrmerge.io.cluster import Cluster
from slrmerge.io.progress import Progress
from slrmerge.searching import cluster
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
    """A head without cores, and two machines with one core each, as processes here: only those that work needs."""
    from ray.cluster_utils import Cluster as LocalCluster

    head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives these 15 s to start, of which their first import, which compiles them, would take most.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        agents = "import ray.dashboard.agent, ray._private.runtime_env.agent.main"
        subprocess.run([sys.executable, "-c", agents], check=True)
        machines = LocalCluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                machines.add_node(num_cpus=1, include_log_monitor=False)
            yield machines.address
        finally:
            machines.shutdown()


class Counter(Progress):
    counted = 0

    def on_advance(self, count: int) -> None:
        self.counted += count


def test_scores_on_a_cluster_are_those_of_one_machine_though_a_worker_is_killed(
    small: SmallPair, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, score = tmp_path / "killed", cluster._score

    def killed_once(job: Any, progress: Progress) -> Any:
        """Runs on a worker, which dies in the middle of its first job."""
        if job.number == 0 and not killed.exists():
            killed.touch()
            progress.on_advance = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return score(job, progress)

    monkeypatch.setattr(cluster, "_score", killed_once)
    prepared = small.search(spaces=("intervals", "soups")).prepared
    request = prepared.first.request
    local = LocalScorer(prepared.pair, output_dtype=None, device=torch.device("cpu"), max_memory_bytes=1 << 30)
    with local:
        expected = local.score(request, None, Progress())
    remote = RayScorer(prepared.pair, address, output_dtype=None, device="cpu", max_memory_bytes=1 << 30, threads=None)
    progress = Counter()
    with remote:
        remote.check(request.candidates[0], request.contexts[:2])
        assert len(remote.parts(request)) == 2
        scores = remote.score(request, tmp_path / "first", progress)
        states = remote.cost(request).states
    assert killed.exists()
    assert progress.counted == states
    task = TASKS["crc"]()
    here, there = (task.score(answer_log_probs(prepared.prompts, each)) for each in (expected, scores))
    assert max(np.abs(here.quality - there.quality).max(), np.abs(here.diversity - there.diversity).max()) < 1e-6


def test_an_address_without_a_cluster_is_one_clear_error() -> None:
    with pytest.raises(ClusterError) as raised, Cluster("127.0.0.1:1"):
        pass
    assert raised.value.problems[0].code == "no-cluster"
