"""What a reader returns is what the file held when its header was read, or an error that says so."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import Checkpoint, CheckpointReader, Extent, open_folder
from slrmerge.checkpoint.reader import read_exactly
from slrmerge.errors import CheckpointError, SourceChangedError
from tests.checkpoint import locked
from tests.checkpoints import Tensor, llama_tensors, random_tensor, write_checkpoint

LONG_AGO_NS = 10**18
FIRST = "model-00001-of-00002.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"  # in the first of two files
TENSORS = llama_tensors(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return aged(write_checkpoint(tmp_path / "m", TENSORS, shards=2))


@pytest.fixture
def reader(folder: Path) -> Iterator[CheckpointReader]:
    with CheckpointReader(open_folder(folder)) as reader:
        yield reader


def aged(folder: Path) -> Path:
    """Set the files' times back, so that a write right after is a change whatever the clock's grain."""
    for file in folder.iterdir():
        os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return folder


def read(reader: CheckpointReader, name: str, offset: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(len(TENSORS[name].data) - offset if length is None else length)
    reader.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


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


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 4)


def grow(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))


def what_is_said(file: Path, action: Callable[[], object]) -> str:
    with pytest.raises(SourceChangedError) as error:
        action()
    assert error.value.exit_code == 9
    return str(error.value).replace(str(file), "FILE")


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_tensor_reads_as_it_was_written(tmp_path: Path, shards: int) -> None:
    with CheckpointReader(open_folder(write_checkpoint(tmp_path / "m", TENSORS, shards=shards))) as reader:
        assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
        reader.check_unchanged()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointReader]:
    folder = write_checkpoint(tmp_path_factory.mktemp("reader") / "m", TENSORS, shards=3)
    with CheckpointReader(open_folder(folder)) as reader:
        yield reader


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TENSORS)), st.data())
def test_any_stretch_of_a_file_reads_as_it_lies_there(shared: CheckpointReader, name: str, data: st.DataObject) -> None:
    shard = shared.checkpoint.shards[shared.checkpoint.weight_map[name]]
    content = shard.path.read_bytes()[shard.data_start :]
    begin, end = shard.tensors[name].data_offsets
    offset = data.draw(st.integers(0, end - begin), label="offset")
    length = data.draw(st.integers(0, len(content) - begin - offset), label="length")  # may run into the neighbours
    assert read(shared, name, offset, length) == content[begin + offset :][:length]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TENSORS)), st.data())
def test_elements_come_in_steps_at_the_start_of_the_buffer(
    shared: CheckpointReader, name: str, data: st.DataObject
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
    with CheckpointReader(open_folder(write_checkpoint(tmp_path / "m", {"x": tensor}, {}))) as reader:
        steps = reader.read_elements("x", range(1, 7, 3), memoryview(buffer))
        assert [(next(steps), bytes(buffer)) for _ in range(2)] == [
            ((dtype, 3), tensor.data[width : 4 * width]),
            ((dtype, 3), tensor.data[4 * width :]),
        ]
        assert list(steps) == []


def test_a_stretch_of_a_file_here_is_where_it_lies(reader: CheckpointReader) -> None:
    (extent,) = reader.stretch(NAME, 3, 8)
    assert isinstance(extent, Extent)
    assert (extent.nbytes, extent.path) == (8, reader.checkpoint.folder / FIRST)
    assert os.pread(extent.fd, extent.nbytes, extent.offset) == TENSORS[NAME].data[3:11]


def test_reading_from_an_extent_gives_its_rest(reader: CheckpointReader) -> None:
    (whole,) = reader.stretch(NAME, 0, 8)
    assert isinstance(whole, Extent)
    buffer = bytearray(5)
    rest = whole.read_into(memoryview(buffer))
    assert (bytes(buffer), rest) == (TENSORS[NAME].data[:5], whole._replace(offset=whole.offset + 5, nbytes=3))
    end = rest.read_into(memoryview(buffer)[:3])
    assert (bytes(buffer[:3]), end.nbytes) == (TENSORS[NAME].data[5:8], 0)


def test_the_chunks_of_an_extent_are_its_bytes(reader: CheckpointReader) -> None:
    (extent,) = reader.stretch(NAME, 3, 8)
    assert isinstance(extent, Extent)
    chunks = [bytes(chunk) for chunk in extent.chunks(memoryview(bytearray(3)))]
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    assert b"".join(chunks) == TENSORS[NAME].data[3:11]


def test_an_extent_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcde")
    with (tmp_path / "x").open("rb") as file:
        assert what_is_said(
            tmp_path / "x", lambda: Extent(file.fileno(), 2, 4, tmp_path / "x").read_into(memoryview(bytearray(4)))
        ) == ("FILE: was cut short while it was read; run again when nothing else writes to it")


@pytest.mark.skipif("os.name == 'nt'")
def test_an_extent_that_cannot_be_read_is_told_in_the_systems_words(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(CheckpointError) as caught:
            Extent(fd, 0, 4, tmp_path / "x").read_into(memoryview(bytearray(4)))
    finally:
        os.close(fd)
    assert str(caught.value) == f"{tmp_path / 'x'}: cannot be read (Is a directory)"


class Elsewhere:
    """A file that is not on this disk, given in chunks of `chunk_bytes` from one buffer, as far as it is asked for."""

    def __init__(self, content: bytes, chunk_bytes: int) -> None:
        self.content, self.chunk_bytes = content, chunk_bytes
        self.asked: list[tuple[int, int]] = []
        self.told_to_give_up: Event | None = None

    @property
    def file_bytes(self) -> int:
        return len(self.content)

    @property
    def digest(self) -> str:
        return "sha256:0"

    def stream(self, start: int, stop: int, *, given_up: Event | None = None) -> Iterator[memoryview]:
        self.asked.append((start, stop))
        self.told_to_give_up = given_up
        buffer = bytearray(self.chunk_bytes)
        for begin in range(start, stop, self.chunk_bytes):
            chunk = self.content[begin : min(begin + self.chunk_bytes, stop)]
            buffer[: len(chunk)] = chunk
            yield memoryview(buffer)[: len(chunk)]
            buffer[:] = b"?" * len(buffer)  # what was given is valid until the next is asked for, and no longer

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
        raise AssertionError("only ranges were asked for")

    def check(self, path: Path) -> None:
        raise AssertionError("nothing is here to be checked")


def moved_away(checkpoint: Checkpoint, chunk_bytes: int) -> tuple[Checkpoint, Elsewhere]:
    """The same checkpoint of one file with that file elsewhere."""
    ((name, shard),) = checkpoint.shards.items()
    remote = Elsewhere(shard.path.read_bytes(), chunk_bytes)
    shard.path.unlink()
    return replace(checkpoint, shards={name: replace(shard, remote=remote)}), remote


@pytest.mark.parametrize("chunk_bytes", [1, 3, 16, 1000])
def test_a_file_elsewhere_reads_as_if_it_were_here(tmp_path: Path, chunk_bytes: int) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)), chunk_bytes)
    with CheckpointReader(checkpoint) as reader:
        assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
        assert len(remote.asked) == len(TENSORS)
        remote.asked.clear()
        assert read(reader, NAME, 6, 5) == TENSORS[NAME].data[6:11]
        begin = checkpoint.shards["model.safetensors"].data_start + checkpoint[NAME].data_offsets[0]
        assert remote.asked == [(begin + 6, begin + 11)]
        assert b"".join(map(bytes, reader.stretch(NAME, 6, 5))) == TENSORS[NAME].data[6:11]  # type: ignore[arg-type]
        reader.check_unchanged()


@pytest.mark.parametrize("chunk_bytes", [1, 3, 16, 1000])
@pytest.mark.parametrize("step", [1, 5, 100])
def test_the_elements_of_a_file_elsewhere_are_asked_for_once(tmp_path: Path, chunk_bytes: int, step: int) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)), chunk_bytes)
    begin = checkpoint.shards["model.safetensors"].data_start + checkpoint[NAME].data_offsets[0]
    buffer = bytearray(2 * step)
    with CheckpointReader(checkpoint) as reader:
        steps = reader.read_elements(NAME, range(2, 40, step), memoryview(buffer))
        found = [bytes(buffer[: 2 * count]) for _, count in steps]
    wanted = TENSORS[NAME].data[4:80]
    assert found == [wanted[k : k + 2 * step] for k in range(0, len(wanted), 2 * step)]
    assert remote.asked == [(begin + 4, begin + 80)]


@pytest.mark.parametrize("leave", [CheckpointReader.give_up, lambda reader: reader.__exit__(None, None, None)])
def test_a_reader_that_is_given_up_or_closed_waits_for_nothing_elsewhere(
    tmp_path: Path, leave: Callable[[CheckpointReader], None]
) -> None:
    checkpoint, remote = moved_away(open_folder(write_checkpoint(tmp_path / "m", TENSORS)), 16)
    reader = CheckpointReader(checkpoint)
    read(reader, NAME)
    assert remote.told_to_give_up is not None
    assert not remote.told_to_give_up.is_set()
    leave(reader)
    assert remote.told_to_give_up.is_set()


def test_only_the_given_buffer_is_filled(reader: CheckpointReader) -> None:
    buffer = bytearray(b"-" * 12)
    reader.read_into(NAME, 8, memoryview(buffer)[2:6])
    assert bytes(buffer) == b"--" + TENSORS[NAME].data[8:12] + b"-" * 6


def test_threads_may_share_a_reader(folder: Path) -> None:
    names = list(TENSORS) * 20
    with CheckpointReader(open_folder(folder)) as reader, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: read(reader, name), names)) == [TENSORS[name].data for name in names]


def test_an_empty_tensor_reads_as_nothing(tmp_path: Path) -> None:
    tensors = {"none": Tensor("F32", (0, 3), b""), "some": Tensor("U8", (1,), b"x")}
    with CheckpointReader(open_folder(write_checkpoint(tmp_path / "m", tensors, {}))) as reader:
        reader.read_into("none", 0, memoryview(bytearray()))
        reader.check_unchanged()


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_files_are_opened_at_their_first_read_and_closed_with_the_reader(folder: Path) -> None:
    def open_files() -> list[str]:
        links = [os.path.realpath(link) for link in Path("/dev/fd").iterdir()]
        return sorted(Path(link).name for link in links if link.startswith(str(folder.resolve())))

    with CheckpointReader(open_folder(folder)) as reader:
        assert open_files() == []
        read(reader, NAME)
        read(reader, NAME)
        assert open_files() == [FIRST]
        read(reader, "lm_head.weight")
        assert open_files() == [FIRST, FIRST.replace("1-", "2-")]
    assert open_files() == []


@pytest.mark.parametrize("change", [edit_in_place, replace_by_rename, cut_short, grow])
def test_a_file_changed_before_its_first_read_is_told(
    folder: Path, reader: CheckpointReader, change: Callable[[Path], None]
) -> None:
    change(folder / FIRST)
    assert what_is_said(folder / FIRST, lambda: read(reader, NAME)) == (
        "FILE: was changed after its header was read; run again when nothing else writes to it"
    )


def test_a_file_removed_before_its_first_read_is_told(folder: Path, reader: CheckpointReader) -> None:
    (folder / FIRST).unlink()
    assert what_is_said(folder / FIRST, lambda: read(reader, NAME)) == (
        "FILE: cannot be opened any more (No such file or directory); run again when nothing else writes to it"
    )


@pytest.mark.skipif("os.name == 'nt'")
def test_a_file_that_may_not_be_read_any_more_is_told(folder: Path, reader: CheckpointReader) -> None:
    with locked(folder / FIRST):
        assert what_is_said(folder / FIRST, lambda: read(reader, NAME)) == (
            "FILE: cannot be opened any more (Permission denied); run again when nothing else writes to it"
        )


@pytest.mark.parametrize("change", [edit_in_place, cut_short, grow])
def test_a_file_changed_after_its_first_read_is_told_by_the_check(
    folder: Path, reader: CheckpointReader, change: Callable[[Path], None]
) -> None:
    assert read(reader, NAME) == TENSORS[NAME].data
    reader.check_unchanged()
    change(folder / FIRST)
    assert what_is_said(folder / FIRST, reader.check_unchanged) == (
        "FILE: was changed while it was read; run again when nothing else writes to it"
    )


def test_a_file_cut_short_after_its_first_read_is_told_at_the_next(folder: Path, reader: CheckpointReader) -> None:
    first, last = "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"
    assert reader.checkpoint.weight_map[first] == reader.checkpoint.weight_map[last] == FIRST
    assert read(reader, first) == TENSORS[first].data
    shard = reader.checkpoint.shards[FIRST]
    for size in (shard.data_start + shard.tensors[last].data_offsets[1] - 1, shard.data_start, 0):
        os.truncate(folder / FIRST, size)
        assert what_is_said(folder / FIRST, lambda: read(reader, last)) == (
            "FILE: was cut short while it was read; run again when nothing else writes to it"
        )


@pytest.mark.parametrize("change", [replace_by_rename, Path.unlink])
def test_a_file_replaced_or_removed_after_its_first_read_keeps_its_old_bytes(
    folder: Path, reader: CheckpointReader, change: Callable[[Path], None]
) -> None:
    assert read(reader, NAME, 0, 1) == TENSORS[NAME].data[:1]
    change(folder / FIRST)
    assert read(reader, NAME) == TENSORS[NAME].data
    reader.check_unchanged()


def test_a_change_in_a_file_that_was_never_read_does_not_matter(folder: Path, reader: CheckpointReader) -> None:
    assert read(reader, NAME) == TENSORS[NAME].data
    edit_in_place(folder / FIRST.replace("1-", "2-"))
    reader.check_unchanged()


def test_a_download_through_a_symlink_is_watched_at_its_target(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    blob = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    os.utime(blob, ns=(LONG_AGO_NS, LONG_AGO_NS))
    with CheckpointReader(open_folder(folder)) as reader:
        assert read(reader, NAME) == TENSORS[NAME].data
        edit_in_place(blob)
        assert what_is_said(folder / "model.safetensors", reader.check_unchanged) == (
            "FILE: was changed while it was read; run again when nothing else writes to it"
        )


def test_a_closed_reader_refuses_to_read(folder: Path) -> None:
    with CheckpointReader(open_folder(folder)) as reader:
        assert read(reader, NAME) == TENSORS[NAME].data
    with pytest.raises(ValueError, match="closed"):  # its descriptors may belong to other files by now
        read(reader, NAME)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_reading_past_the_end_of_a_file_is_an_end_of_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(b"abcde")
    with (tmp_path / "x").open("rb") as file:
        buffer = bytearray(length)
        read_exactly(file.fileno(), 5 - length, memoryview(buffer))
        assert bytes(buffer) == b"abcde"[5 - length :]
        with pytest.raises(EOFError):
            read_exactly(file.fileno(), 5 - length, memoryview(bytearray(length + 1)))


def test_reads_that_return_less_than_asked_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: whole(fd, [buffers[0][:2]], position))
    (tmp_path / "x").write_bytes(b"abcdefg")
    buffer = bytearray(7)
    with (tmp_path / "x").open("rb") as file:
        read_exactly(file.fileno(), 0, memoryview(buffer))
    assert bytes(buffer) == b"abcdefg"
