"""States in memory or in a mapped file, kept after every stage; damaged ones are never used."""

import json
from pathlib import Path

import pytest
import torch

import slrmerge.searching.sweep.states
from slrmerge.errors import OutputError
from slrmerge.searching.sweep.states import Resumed, StateStore
from tests.checkpoint import locked
from tests.problems import refused

SHAPE = (3, 5, 4)
BYTES = 3 * 5 * 4 * 4
IN_MEMORY, MAPPED = 1 << 20, 0


def store(folder: Path | None, *, max_bytes: int = IN_MEMORY, fingerprint: str = "a") -> StateStore:
    return StateStore(folder, max_bytes=max_bytes, fingerprint=fingerprint)


def filled(keeper: StateStore, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    states = keeper.allocate(SHAPE, dtype)
    states[:] = values(seed, dtype)
    return states


def resume(keeper: StateStore) -> Resumed | None:
    """What an earlier run left, without a message."""
    messages: list[str] = []
    resumed = keeper.resume(messages.append)
    assert messages == []
    return resumed


def assert_starts_over(keeper: StateStore, folder: Path) -> None:
    """What an earlier run left is not used, which is reported, and deleted."""
    messages: list[str] = []
    assert keeper.resume(messages.append) is None
    assert len(messages) == 1
    assert list(folder.iterdir()) == []


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
    assert (resumed.stages_done, resumed.hybrid_states) == (2, (0, 2, 1))
    assert resumed.states.dtype == dtype
    assert torch.equal(resumed.states, values(1, dtype))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
def test_released_states_are_in_no_memory_of_this_process_and_keep_their_values(tmp_path: Path) -> None:
    keeper = store(tmp_path, max_bytes=MAPPED)
    first = filled(keeper, 1)
    keeper.commit(1, (0, 1, 2), first)
    second = filled(keeper, 2)
    assert resident_bytes(tmp_path) > 0
    keeper.release()
    assert resident_bytes(tmp_path) == 0
    assert torch.equal(first, values(1))
    assert torch.equal(second, values(2))
    assert resident_bytes(tmp_path) > 0


def resident_bytes(folder: Path) -> int:
    """What this process holds in memory of the files in a folder that it has mapped."""
    sizes = 0
    is_in_folder = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():  # the head of a mapping, which begins with its addresses
            is_in_folder = f"{folder}/" in line
        elif is_in_folder and line.startswith("Rss:"):
            sizes += int(line.split()[1]) * 1024
    return sizes


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_only_the_last_stage_is_kept(tmp_path: Path, max_bytes: int) -> None:
    keeper = store(tmp_path, max_bytes=max_bytes)
    for stage in (1, 2, 3):
        keeper.commit(stage, (stage - 1,), filled(keeper, stage))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json", "states-3"]
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert (resumed.stages_done, resumed.hybrid_states) == (3, (2,))
    assert torch.equal(resumed.states, values(3))


def test_old_and_new_states_together_count_towards_the_limit(tmp_path: Path) -> None:
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
def test_an_unfinished_stage_does_not_change_the_one_before(tmp_path: Path, max_bytes: int) -> None:
    keeper = store(tmp_path, max_bytes=max_bytes)
    keeper.commit(2, (0,), filled(keeper, 1))
    filled(keeper, 2)
    resumed = resume(store(tmp_path, max_bytes=max_bytes))
    assert resumed is not None
    assert torch.equal(resumed.states, values(1))


@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_an_unfinished_stage_is_not_used(tmp_path: Path, later: int) -> None:
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
def test_an_unfinished_first_stage_is_not_used(tmp_path: Path, later: int) -> None:
    filled(store(tmp_path, max_bytes=MAPPED), 1)  # killed here, before anything was committed
    keeper = store(tmp_path, max_bytes=later)
    assert resume(keeper) is None
    keeper.commit(2, (0,), filled(keeper, 2))
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert torch.equal(resumed.states, values(2))


@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_a_larger_unfinished_file_leaves_nothing_in_a_smaller_one(tmp_path: Path, later: int) -> None:
    store(tmp_path, max_bytes=MAPPED, fingerprint="other").allocate((100, 5, 4), torch.float32).fill_(7)
    keeper = store(tmp_path, max_bytes=later)
    assert resume(keeper) is None
    keeper.commit(2, (0,), filled(keeper, 2))
    assert (tmp_path / "states-2").stat().st_size == BYTES
    resumed = resume(store(tmp_path))
    assert resumed is not None
    assert torch.equal(resumed.states, values(2))


def test_without_a_commit_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert resume(store(tmp_path)) is None
    assert resume(store(tmp_path / "none")) is None
    assert resume(store(None)) is None


def test_the_states_of_another_sweep_are_not_used(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    assert resume(store(tmp_path, fingerprint="a")) is not None
    assert_starts_over(store(tmp_path, fingerprint="b"), tmp_path)


@pytest.mark.parametrize("at", [0, BYTES // 2, BYTES - 1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, at: int) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    raw = bytearray((tmp_path / "states-2").read_bytes())
    raw[at] ^= 1
    (tmp_path / "states-2").write_bytes(raw)
    assert_starts_over(store(tmp_path), tmp_path)


@pytest.mark.parametrize("size", [0, BYTES - 4, BYTES + 4])
def test_a_file_of_another_size_is_noticed(tmp_path: Path, size: int) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    with open(tmp_path / "states-2", "r+b") as file:
        file.truncate(size)
    assert_starts_over(store(tmp_path), tmp_path)


def test_missing_states_mean_starting_over(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "states-2").unlink()
    assert_starts_over(store(tmp_path), tmp_path)


def test_states_without_progress_are_not_used(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "progress.json").unlink()
    assert resume(store(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"fingerprint": "a"}', "\xff"])
def test_malformed_progress_means_starting_over(tmp_path: Path, text: str) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    (tmp_path / "progress.json").write_bytes(text.encode("latin-1"))
    assert_starts_over(store(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages_done", 9),
        ("stages_done", 0),
        ("stages_done", None),
        ("dtype", "float99"),
        ("dtype", "int32"),
        ("dtype", "float64"),
        ("dtype", 7),
        ("digest", ""),
        ("digest", None),
        ("shape", [3, 5, 5]),
        ("shape", [3, 20]),
        ("shape", None),
        ("hybrid_states", [3]),
        ("hybrid_states", [-1]),
        ("hybrid_states", "0"),
        ("fingerprint", None),
        ("unknown", 1),
    ],
)
def test_progress_that_does_not_fit_its_states_means_starting_over(tmp_path: Path, key: str, value: object) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert_starts_over(store(tmp_path), tmp_path)


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, MAPPED])
def test_clear_deletes_the_states_and_nothing_else(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "log_probs.npz").write_text("kept")
    keeper = store(tmp_path, max_bytes=max_bytes)
    keeper.commit(2, (0,), filled(keeper, 1))
    filled(keeper, 2)
    keeper.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["log_probs.npz"]
    assert resume(store(tmp_path)) is None


def test_without_a_folder_states_are_in_memory_past_any_limit() -> None:
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
    with locked(folder), refused(OutputError, "io-error") as caught:
        keeper.commit(2, (0,), states)
    assert caught.value.problems[0].where == str(folder / "states.new")


def test_progress_that_the_system_does_not_let_us_read_is_an_error_and_stays(tmp_path: Path) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    with locked(tmp_path / "progress.json"), refused(OutputError, "io-error") as caught:
        resume(store(tmp_path))
    assert caught.value.problems[0].where == str(tmp_path / "progress.json")
    assert resume(store(tmp_path)) is not None


def test_a_bug_while_resuming_is_raised_and_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = store(tmp_path)
    keeper.commit(2, (0,), filled(keeper, 1))
    with monkeypatch.context() as patch:
        patch.setattr(slrmerge.searching.sweep.states, "as_bytes", None)
        with pytest.raises(TypeError):
            resume(store(tmp_path))
    assert resume(store(tmp_path)) is not None
