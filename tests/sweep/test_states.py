"""States in memory or in a mapped file, kept after every stage, and what an unsound rest of a run does: nothing."""

import json
from pathlib import Path

import pytest
import torch

from slrmerge.errors import OutputError
from slrmerge.sweep.states import Resumed, StateStore
from tests.checkpoint import locked

SHAPE = (3, 5, 4)
BYTES = 3 * 5 * 4 * 4
DAMAGED = "starting anew: what an earlier run left is damaged"
ANOTHER = "starting anew: what an earlier run left belongs to another search, or to other checkpoints"
IN_MEMORY, MAPPED = 1 << 20, 0


def store(folder: Path | None, *, max_bytes: int = IN_MEMORY, fingerprint: str = "a") -> StateStore:
    return StateStore(folder, max_bytes=max_bytes, fingerprint=fingerprint)


def filled(keeper: StateStore, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    states = keeper.allocate(SHAPE, dtype)
    states[:] = values(seed, dtype)
    return states


def resume(keeper: StateStore, *said: str) -> Resumed | None:
    """What is taken up, if saying just this."""
    heard: list[str] = []
    resumed = keeper.resume(heard.append)
    assert heard == list(said)
    return resumed


def values(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writing", [IN_MEMORY, MAPPED])
@pytest.mark.parametrize("reading", [IN_MEMORY, MAPPED])
def test_a_committed_stage_comes_back_bit_by_bit(
    tmp_path: Path, dtype: torch.dtype, writing: int, reading: int
) -> None:
    keeper = store(tmp_path, max_bytes=writing)
    keeper.commit(2, (0, 2, 1), filled(keeper, 1, dtype))
    resumed = resume(store(tmp_path, max_bytes=reading))
    assert resumed is not None
    assert (resumed.stages_done, resumed.nodes) == (2, (0, 2, 1))
    assert resumed.states.dtype == dtype
    assert torch.equal(resumed.states, values(1, dtype))


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_only_the_last_stage_is_kept(tmp_path: Path, max_bytes: int) -> None:
    keeper = store(tmp_path, max_bytes=max_bytes)
    for stage in (1, 2, 3):
        keeper.commit(stage, (stage,), filled(keeper, stage))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json", "states-3"]
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert (resumed.stages_done, resumed.nodes) == (3, (3,))
    assert torch.equal(resumed.states, values(3))


def test_old_and_new_states_together_decide_about_memory(tmp_path: Path) -> None:
    keeper = store(tmp_path, max_bytes=2 * BYTES - 1)
    keeper.commit(1, (0,), filled(keeper, 1))
    assert not (tmp_path / "states.new").exists()
    keeper.allocate(SHAPE, torch.float32)
    assert (tmp_path / "states.new").stat().st_size == BYTES
    enough = store(tmp_path / "enough", max_bytes=2 * BYTES)
    (tmp_path / "enough").mkdir()
    for _ in range(3):
        enough.allocate(SHAPE, torch.float32)
    assert list((tmp_path / "enough").iterdir()) == []


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_states_of_two_stages_do_not_share_their_bytes(tmp_path: Path, max_bytes: int) -> None:
    keeper = store(tmp_path, max_bytes=max_bytes)
    made = []
    for stage in (1, 2, 3):
        made.append(filled(keeper, stage))
        keeper.commit(stage, (0,), made[-1])
    assert [torch.equal(states, values(stage)) for stage, states in enumerate(made, 1)] == [True] * 3


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_a_half_made_stage_does_not_touch_the_one_before(tmp_path: Path, max_bytes: int) -> None:
    keeper = store(tmp_path, max_bytes=max_bytes)
    keeper.commit(2, (0,), filled(keeper, 1))
    filled(keeper, 2)
    resumed = resume(store(tmp_path, max_bytes=max_bytes))
    assert resumed is not None
    assert torch.equal(resumed.states, values(1))


@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_a_half_made_stage_is_not_taken_for_a_finished_one(tmp_path: Path, later: int) -> None:
    killed = store(tmp_path, max_bytes=MAPPED)
    killed.commit(1, (0,), filled(killed, 1))
    filled(killed, 7)  # killed here
    keeper = store(tmp_path, max_bytes=later)
    assert resume(keeper) is not None
    keeper.commit(2, (0,), filled(keeper, 2))
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert torch.equal(resumed.states, values(2))


@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_a_half_made_first_stage_is_not_taken_for_a_finished_one(tmp_path: Path, later: int) -> None:
    filled(store(tmp_path, max_bytes=MAPPED), 1)  # killed here, before anything was committed
    keeper = store(tmp_path, max_bytes=later)
    assert resume(keeper) is None
    keeper.commit(2, (0,), filled(keeper, 2))
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert torch.equal(resumed.states, values(2))


@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_a_larger_file_of_another_run_leaves_nothing_in_a_smaller_one(tmp_path: Path, later: int) -> None:
    store(tmp_path, max_bytes=MAPPED, fingerprint="other").allocate((100, 5, 4), torch.float32).fill_(7)
    keeper = store(tmp_path, max_bytes=later)
    assert resume(keeper) is None
    keeper.commit(2, (0,), filled(keeper, 2))
    assert (tmp_path / "states-2").stat().st_size == BYTES
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert torch.equal(resumed.states, values(2))


def test_where_nothing_was_committed_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert resume(store(tmp_path)) is None
    assert resume(store(tmp_path / "none")) is None
    assert resume(store(None)) is None


def test_another_sweeps_states_are_not_taken(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    assert resume(store(tmp_path, fingerprint="a")) is not None
    assert resume(store(tmp_path, fingerprint="b"), ANOTHER) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, BYTES // 2, BYTES - 1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, at: int) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    raw = bytearray((tmp_path / "states-2").read_bytes())
    raw[at] ^= 1
    (tmp_path / "states-2").write_bytes(raw)
    assert resume(store(tmp_path), DAMAGED) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, BYTES - 4, BYTES + 4])
def test_a_file_of_another_size_is_noticed(tmp_path: Path, size: int) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    with open(tmp_path / "states-2", "r+b") as file:
        file.truncate(size)
    assert resume(store(tmp_path), DAMAGED) is None
    assert list(tmp_path.iterdir()) == []


def test_states_that_are_missing_mean_a_new_start(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "states-2").unlink()
    assert resume(store(tmp_path), DAMAGED) is None


def test_states_without_progress_are_not_taken_up(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "progress.json").unlink()
    assert resume(store(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"fingerprint": "a"}', "\xff"])
def test_progress_that_cannot_be_read_means_a_new_start(tmp_path: Path, text: str) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "progress.json").write_bytes(text.encode("latin-1"))
    assert resume(store(tmp_path), DAMAGED) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("stages_done", 9), ("stages_done", None), ("dtype", "float99"), ("dtype", 7), ("digest", ""), ("digest", None)],
)
def test_progress_that_does_not_describe_its_states_means_a_new_start(tmp_path: Path, key: str, value: object) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert resume(store(tmp_path), DAMAGED) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_a_sweep_that_is_done_leaves_nothing_and_touches_nothing_else(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "log_probs.npz").write_text("kept")
    keeper = store(tmp_path, max_bytes=max_bytes)
    keeper.commit(2, (0,), filled(keeper, 1))
    filled(keeper, 2)
    keeper.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["log_probs.npz"]
    assert resume(store(tmp_path)) is None


def test_without_a_folder_states_are_in_memory_whatever_the_limit_and_nothing_is_kept() -> None:
    keeper = store(None, max_bytes=0)
    states = filled(keeper, 1)
    keeper.commit(2, (0,), states)
    keeper.clear()
    assert torch.equal(states, values(1))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    keeper = store(folder)
    states = filled(keeper, 1)
    with locked(folder), pytest.raises(OutputError) as caught:
        keeper.commit(2, (0,), states)
    assert str(caught.value) == f"{folder / 'states.new'}: cannot be written or read (Permission denied)"
