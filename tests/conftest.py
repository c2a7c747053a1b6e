"""What most tests start from: a pair of small checkpoints and a recipe for them."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pytest
import yaml
from filelock import FileLock
from hypothesis import settings

from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.recipe.load import AnyRecipe, load_recipe
from tests.checkpoints import Tensor, llama_tensors, write_checkpoint

settings.register_profile("untimed", settings(), deadline=None)  # the current profile, which may be that of CI
settings.load_profile("untimed")

TINY = Path(__file__).parents[1] / "examples" / "tiny"


@dataclass(frozen=True)
class Pair:
    """Two six-layer checkpoints, `pre` in one file and `post` in two, side by side in `folder`."""

    sides: ClassVar = {"pretrained": "./pre", "posttrained": "./post"}

    folder: Path
    pre: dict[str, Tensor]
    post: dict[str, Tensor]

    @property
    def out(self) -> Path:
        return self.folder / "hybrid"

    def recipe_file(self, name: str = "recipe.yaml", **content: Any) -> Path:
        """A recipe file beside the two checkpoints, for them unless `content` names others."""
        path = self.folder / name
        path.write_text(yaml.safe_dump({**self.sides, **content}, sort_keys=False))
        return path

    def recipe(self, **content: Any) -> AnyRecipe:
        return load_recipe(self.recipe_file(**content))

    def plan(self, **content: Any) -> MergePlan:
        return plan_merge(self.recipe(**content))

    def open(self) -> ModelPair:
        return open_pair(self.folder / "pre", self.folder / "post")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post, shards=2)
    return Pair(tmp_path, pre, post)


@pytest.fixture(scope="session")
def tiny_search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example pair, searched once by the command line; not to be written to.

    The folder holds `pre`, `post`, `pair.yaml`, the results in `search`, and what was printed in `stdout` and `stderr`.
    """
    return made_once(tmp_path_factory, "tiny-search", _search_tiny)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` makes for the first who asks, and for all workers of the session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers share
    folder /= name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            new = folder.with_name(f"{name}.new")
            make(new)
            new.rename(folder)
    return folder


def _search_tiny(folder: Path) -> None:
    from tests.cli import run

    for side in ("pre", "post"):
        shutil.copytree(TINY / f"{side}trained", folder / side)
    (folder / "pair.yaml").write_text("pretrained: ./pre\nposttrained: ./post\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("slrmerge.cli.progress._SECONDS_PER_LINE", float("inf"))  # a slow machine prints stages
        result = run("search", "pair.yaml", "--out", "search", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)


class Sketch:
    """A figure that takes no time."""

    def savefig(self, file: BinaryIO, **options: object) -> None:
        file.write(b"a picture")


def sketch_charts(patch: pytest.MonkeyPatch) -> None:
    """The charts of an evaluation, which take most of the time of a small one, are not drawn."""
    patch.setattr("slrmerge.evaluation.charts.draw", lambda result: Sketch())


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch_charts(monkeypatch)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 128 kB."""
    with mounted("tmpfs", tmp_path / "disk", "128k") as folder:
        yield folder


@contextmanager
def mounted(kind: str, folder: Path, size: str) -> Iterator[Path]:
    """A new file system at `folder`: tmpfs, or another kind in a file beside it. Skips where that is not possible."""
    folder.mkdir(exist_ok=True)
    image = folder.with_name(f"{folder.name}.img")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if kind != "tmpfs":
        make = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if make is None:
            pytest.skip(f"mkfs.{kind} is not installed")
        subprocess.run(["truncate", "-s", size, image], check=True)
        subprocess.run([make, "-q", image], check=True, capture_output=True)
        command = ["mount", "-o", "loop", image, folder]
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        image.unlink(missing_ok=True)
        pytest.skip(f"no file system may be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:  # lazily: also while a process that a test left behind is in it
        subprocess.run(["umount", "--lazy", folder], check=True)
        image.unlink(missing_ok=True)
