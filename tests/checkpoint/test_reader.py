"""A reader returns the bytes that the files had when their headers were read, or raises an error."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.safetensors import _MAX_OPEN, SafetensorsFolder, SafetensorsReader, open_folder
from slrmerge.errors import SourceChangedError
from tests.checkpoint import locked, read
from tests.checkpoints import Tensor, llama_tensors, random_tensor, write_checkpoint
from tests.problems import refused

LONG_AGO_NS = 10**18
FIRST = "model-00001-of-00002.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"  # in the first of two files
TENSORS = llama_tensors(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return aged(write_checkpoint(tmp_path / "m", TENSORS, shards=2))


@pytest.fixture
def reader(folder: Path) -> Iterator[SafetensorsReader]:
    with open_folder(folder).open() as reader:
        yield reader


def aged(folder: Path) -> Path:
    """Set the files' times back, so that a write right after is a change whatever the clock's grain."""
    for file in folder.iterdir():
        os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return folder


def edit_in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


def replace_by_rename(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(bytes(file.stat().st_size))
    os.utime(other, ns=(LONG_AGO_NS, LONG_AGO_NS))
    other.replace(file)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 4)


def grow(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))


def changed(file: Path, action: Callable[[], object]) -> None:
    """The action raises SourceChangedError about this file."""
    with refused(SourceChangedError, "source-changed") as caught:
        action()
    assert caught.value.problems[0].where == str(file)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_tensor_reads_as_it_was_written(tmp_path: Path, shards: int) -> None:
    with open_folder(write_checkpoint(tmp_path / "m", TENSORS, shards=shards)).open() as reader:
        assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
        reader.check_unchanged()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SafetensorsReader]:
    folder = write_checkpoint(tmp_path_factory.mktemp("reader") / "m", TENSORS, shards=3)
    with open_folder(folder).open() as reader:
        yield reader


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TENSORS)), st.data())
def test_any_range_of_a_file_is_read(shared: SafetensorsReader, name: str, data: st.DataObject) -> None:
    shard = shared.checkpoint.shards[shared.checkpoint.weight_map[name]]
    content = Path(str(shard.file)).read_bytes()[shard.data_start :]
    begin, end = shard.tensors[name].begin, shard.tensors[name].end
    offset = data.draw(st.integers(0, end - begin), label="offset")
    length = data.draw(st.integers(0, len(content) - begin - offset), label="length")  # may run into the neighbours
    assert read(shared, name, offset, length) == content[begin + offset :][:length]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TENSORS)), st.data())
def test_elements_come_in_steps_at_the_start_of_the_buffer(
    shared: SafetensorsReader, name: str, data: st.DataObject
) -> None:
    elements = prod(TENSORS[name].shape)
    start = data.draw(st.integers(0, elements), label="start")
    stop = data.draw(st.integers(start, elements), label="stop")
    step = data.draw(st.integers(1, elements), label="step")
    buffer = bytearray(b"-" * (2 * step + 3))
    found: list[bytes] = []
    for dtype, count in shared.read_elements(name, range(start, stop, step), memoryview(buffer)):
        assert (dtype, bytes(buffer[2 * step :])) == ("BF16", b"---")
        found.append(bytes(buffer[: 2 * count]))
    wanted = TENSORS[name].data[2 * start : 2 * stop]
    assert found == [wanted[k : k + 2 * step] for k in range(0, len(wanted), 2 * step)]


@pytest.mark.parametrize(("dtype", "width"), [("U8", 1), ("F16", 2), ("F32", 4), ("F64", 8), ("C64", 8)])
def test_elements_are_as_wide_as_their_dtype(tmp_path: Path, dtype: str, width: int) -> None:
    tensor = random_tensor(dtype, (7,), "x")
    buffer = bytearray(3 * width)
    with open_folder(write_checkpoint(tmp_path / "m", {"x": tensor}, {})).open() as reader:
        steps = reader.read_elements("x", range(1, 7, 3), memoryview(buffer))
        assert [(next(steps), bytes(buffer)) for _ in range(2)] == [
            ((dtype, 3), tensor.data[width : 4 * width]),
            ((dtype, 3), tensor.data[4 * width :]),
        ]
        assert list(steps) == []


@pytest.mark.parametrize("start", [0, 5])
def test_a_stream_continues_into_the_tensors_that_follow(reader: SafetensorsReader, start: int) -> None:
    names = [name for name, file in reader.checkpoint.weight_map.items() if file == FIRST]
    content = b"".join(TENSORS[name].data for name in names)
    stream, found = reader.stream(names[0], start, len(content)), b""
    while len(found) < len(content) - start:
        buffer = bytearray(min(100, len(content) - start - len(found)))
        stream.readinto(memoryview(buffer))
        found += buffer
    assert found == content[start:]


class RemoteFile:
    """A SourceFile that is not on this disk, and an OpenFile; its streams return what was requested, and no more."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requested: list[tuple[int, int]] = []
        self.cancelled: Event | None = None
        self.closed = 0

    file_bytes = property(lambda self: len(self.content))
    download_bytes = file_bytes
    identity = ("remote",)

    def __str__(self) -> str:
        return "remote"

    def open(self, cancelled: Event | None = None) -> "RemoteFile":
        self.cancelled = cancelled
        return self

    def fetch(self, on_bytes: Any = None, cancelled: Any = None) -> Path:
        raise AssertionError("only ranges are requested")

    def stream(self, start: int, stop: int) -> "RemoteStream":
        self.requested.append((start, stop))
        return RemoteStream(self.content[start:stop])

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class RemoteStream:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def readinto(self, buffer: memoryview) -> None:
        assert len(buffer) <= len(self.content), "more was read than requested"
        buffer[:], self.content = self.content[: len(buffer)], self.content[len(buffer) :]


def moved_away(checkpoint: SafetensorsFolder) -> tuple[SafetensorsFolder, RemoteFile]:
    """The same checkpoint of one file with that file elsewhere."""
    ((name, shard),) = checkpoint.shards.items()
    assert isinstance(shard.file, LocalFile)
    remote = RemoteFile(shard.file.path.read_bytes())
    shard.file.path.unlink()
    return replace(checkpoint, shards={name: replace(shard, file=remote)}), remote


def test_a_remote_file_reads_like_a_local_one(tmp_path: Path) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)))
    assert checkpoint.is_remote
    with checkpoint.open() as reader:
        assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
        assert len(remote.requested) == len(TENSORS)
        remote.requested.clear()
        assert read(reader, NAME, 6, 5) == TENSORS[NAME].data[6:11]
        begin = checkpoint.shards["model.safetensors"].data_start + checkpoint[NAME].begin
        assert remote.requested == [(begin + 6, begin + 11)]
        reader.check_unchanged()
    assert remote.closed == 1


@pytest.mark.parametrize("step", [1, 5, 100])
def test_elements_of_a_remote_file_are_requested_once(tmp_path: Path, step: int) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)))
    begin = checkpoint.shards["model.safetensors"].data_start + checkpoint[NAME].begin
    buffer = bytearray(2 * step)
    with checkpoint.open() as reader:
        steps = reader.read_elements(NAME, range(2, 40, step), memoryview(buffer))
        found = [bytes(buffer[: 2 * count]) for _, count in steps]
    wanted = TENSORS[NAME].data[4:80]
    assert found == [wanted[k : k + 2 * step] for k in range(0, len(wanted), 2 * step)]
    assert remote.requested == [(begin + 4, begin + 80)]


@pytest.mark.parametrize("leave", [SafetensorsReader.cancel, SafetensorsReader.close])
def test_a_cancelled_or_closed_reader_does_not_wait_for_remote_files(
    tmp_path: Path, leave: Callable[[SafetensorsReader], None]
) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)))
    reader = checkpoint.open()
    read(reader, NAME)
    assert remote.cancelled is not None
    assert not remote.cancelled.is_set()
    leave(reader)
    assert remote.cancelled.is_set()


def test_a_file_that_is_being_opened_while_the_reader_closes_is_closed_too(tmp_path: Path) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)))
    reader, opening = checkpoint.open(), Barrier(2)
    closing = Thread(target=reader.close)

    def open_slowly(cancelled: Event | None = None) -> RemoteFile:
        opening.wait()
        assert cancelled is not None
        assert cancelled.wait(60)  # the reader is closing
        return remote

    remote.open = open_slowly  # type: ignore[method-assign]  # a file that waits for the race
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.stream, NAME, 0, 1)
        opening.wait()
        closing.start()
        reading.result()
        closing.join()
    assert remote.closed == 1


def test_only_the_given_buffer_is_filled(reader: SafetensorsReader) -> None:
    buffer = bytearray(b"-" * 12)
    reader.read_into(NAME, 8, memoryview(buffer)[2:6])
    assert bytes(buffer) == b"--" + TENSORS[NAME].data[8:12] + b"-" * 6


def test_threads_may_share_a_reader(folder: Path) -> None:
    names = list(TENSORS) * 20
    with open_folder(folder).open() as reader, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: read(reader, name), names)) == [TENSORS[name].data for name in names]


def test_an_empty_tensor_reads_as_nothing(tmp_path: Path) -> None:
    tensors = {"none": Tensor("F32", (0, 3), b""), "some": Tensor("U8", (1,), b"x")}
    with open_folder(write_checkpoint(tmp_path / "m", tensors, {})).open() as reader:
        reader.read_into("none", 0, memoryview(bytearray()))
        reader.check_unchanged()


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_files_are_opened_at_their_first_read_and_closed_with_the_reader(folder: Path) -> None:
    def open_files() -> list[str]:
        links = [os.path.realpath(link) for link in Path("/dev/fd").iterdir()]
        return sorted(Path(link).name for link in links if link.startswith(str(folder.resolve())))

    with open_folder(folder).open() as reader:
        assert open_files() == []
        read(reader, NAME)
        read(reader, NAME)
        assert open_files() == [FIRST]
        read(reader, "lm_head.weight")
        assert open_files() == [FIRST, FIRST.replace("1-", "2-")]
    assert open_files() == []


@pytest.mark.parametrize("change", [edit_in_place, replace_by_rename, truncate, grow])
def test_a_file_changed_before_its_first_read_is_reported(
    folder: Path, reader: SafetensorsReader, change: Callable[[Path], None]
) -> None:
    change(folder / FIRST)
    changed(folder / FIRST, lambda: read(reader, NAME))


def test_a_file_removed_before_its_first_read_is_reported(folder: Path, reader: SafetensorsReader) -> None:
    (folder / FIRST).unlink()
    changed(folder / FIRST, lambda: read(reader, NAME))


@pytest.mark.skipif("os.name == 'nt'")
def test_a_file_that_lost_its_permission_is_reported(folder: Path, reader: SafetensorsReader) -> None:
    with locked(folder / FIRST):
        changed(folder / FIRST, lambda: read(reader, NAME))


@pytest.mark.parametrize("change", [edit_in_place, truncate, grow])
def test_a_file_changed_after_its_first_read_is_reported_by_the_check(
    folder: Path, reader: SafetensorsReader, change: Callable[[Path], None]
) -> None:
    assert read(reader, NAME) == TENSORS[NAME].data
    reader.check_unchanged()
    change(folder / FIRST)
    changed(folder / FIRST, reader.check_unchanged)


def test_a_file_truncate_after_its_first_read_is_reported_at_the_next_read(
    folder: Path, reader: SafetensorsReader
) -> None:
    first, last = "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"
    assert reader.checkpoint.weight_map[first] == reader.checkpoint.weight_map[last] == FIRST
    assert read(reader, first) == TENSORS[first].data
    shard = reader.checkpoint.shards[FIRST]
    for size in (shard.data_start + shard.tensors[last].end - 1, shard.data_start, 0):
        os.truncate(folder / FIRST, size)
        changed(folder / FIRST, lambda: read(reader, last))


@pytest.mark.parametrize("change", [replace_by_rename, Path.unlink])
def test_a_file_replaced_or_removed_after_its_first_read_keeps_its_old_bytes(
    folder: Path, reader: SafetensorsReader, change: Callable[[Path], None]
) -> None:
    assert read(reader, NAME, 0, 1) == TENSORS[NAME].data[:1]
    change(folder / FIRST)
    assert read(reader, NAME) == TENSORS[NAME].data
    reader.check_unchanged()


def test_a_change_in_a_file_that_was_never_read_is_ignored(folder: Path, reader: SafetensorsReader) -> None:
    assert read(reader, NAME) == TENSORS[NAME].data
    edit_in_place(folder / FIRST.replace("1-", "2-"))
    reader.check_unchanged()


def test_a_download_through_a_symlink_is_watched_at_its_target(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    blob = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    os.utime(blob, ns=(LONG_AGO_NS, LONG_AGO_NS))
    with open_folder(folder).open() as reader:
        assert read(reader, NAME) == TENSORS[NAME].data
        edit_in_place(blob)
        changed(folder / "model.safetensors", reader.check_unchanged)


def test_a_closed_reader_refuses_to_read(folder: Path) -> None:
    with open_folder(folder).open() as reader:
        assert read(reader, NAME) == TENSORS[NAME].data
    with pytest.raises(ValueError):  # its descriptors may belong to other files by now
        read(reader, NAME)


# few descriptors


def many_shards(folder: Path, count: int) -> Path:
    return aged(write_checkpoint(folder, TENSORS, shards=count))


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_a_reader_holds_few_of_many_files_open(tmp_path: Path) -> None:
    checkpoint = open_folder(many_shards(tmp_path / "m", len(TENSORS)))
    before = len(list(Path("/dev/fd").iterdir()))
    with checkpoint.open() as reader:
        for _ in range(2):
            assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
            assert len(list(Path("/dev/fd").iterdir())) - before <= _MAX_OPEN
        reader.check_unchanged()
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_stream_outlives_that_its_file_is_no_longer_held(tmp_path: Path) -> None:
    first, *others = TENSORS
    with open_folder(many_shards(tmp_path / "m", len(TENSORS))).open() as reader:
        stream = reader.stream(first, 0, len(TENSORS[first].data))
        for name in others:
            read(reader, name)
        buffer = bytearray(len(TENSORS[first].data))
        stream.readinto(memoryview(buffer))
    assert bytes(buffer) == TENSORS[first].data


@pytest.mark.parametrize("change", [edit_in_place, replace_by_rename, truncate])
def test_a_change_of_a_file_that_is_no_longer_held_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoint = open_folder(many_shards(tmp_path / "m", len(TENSORS)))
    file = tmp_path / "m" / checkpoint.weight_map[next(iter(TENSORS))]
    with checkpoint.open() as reader:
        for name in TENSORS:
            read(reader, name)
        change(file)
        changed(file, reader.check_unchanged)
