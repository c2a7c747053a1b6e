"""A search and a merge on a real Ray cluster of two workers, one of which is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slrmerge.errors import ClusterError
from slrmerge.io.cluster import Cluster
from slrmerge.io.progress import Progress
from slrmerge.merging import cluster as merging
from slrmerge.merging.executor import merge
from slrmerge.merging.verify import verify
from slrmerge.searching import cluster as searching
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


def dying_once(function: Callable[[Any, Progress], Any], killed: Path) -> Callable[[Any, Progress], Any]:
    """`function`, whose first caller, a worker, dies when it reports progress."""

    def call(job: Any, progress: Progress) -> Any:
        with suppress(FileExistsError):
            killed.touch(exist_ok=False)
            progress.on_advance = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return function(job, progress)

    return call


def test_scores_on_a_cluster_are_those_of_one_machine_though_a_worker_is_killed(
    small: SmallPair, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    monkeypatch.setattr(searching, "_score", dying_once(searching._score, killed))
    prepared = small.search(spaces=("intervals", "soups")).prepared
    request = prepared.first.request
    local = LocalScorer(prepared.pair)
    with local:
        expected = local.score(request, None, Progress())
    remote = RayScorer(prepared.pair, address)
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


def test_a_merge_on_a_cluster_is_that_of_one_machine_though_a_worker_is_killed(
    small: SmallPair, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    monkeypatch.setattr(merging, "_write_shard", dying_once(merging._write_shard, killed))
    recipe = small.recipe_file("soup.yaml", alpha=0.3, max_shard_size="20KB")
    here = merge(recipe, tmp_path / "here", fsync=False)
    there = merge(recipe, tmp_path / "there", ray=address)
    assert len(there.files) > 5
    assert killed.exists()
    assert {name: file.digest for name, file in there.files.items() if name.endswith(".safetensors")} == {
        name: file.digest for name, file in here.files.items() if name.endswith(".safetensors")
    }
    assert verify(tmp_path / "there").files == verify(tmp_path / "here").files


def test_an_address_without_a_cluster_is_one_clear_error() -> None:
    with pytest.raises(ClusterError) as raised, Cluster("127.0.0.1:1"):
        pass
    assert raised.value.problems[0].code == "no-cluster"
