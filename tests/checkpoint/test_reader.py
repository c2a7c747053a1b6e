"""What a reader returns is what the file held when its header was read, or an error that says so."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import CheckpointReader, open_checkpoint
from slrmerge.checkpoint.reader import read_exactly
from slrmerge.errors import SourceChangedError
from tests.checkpoint import locked
from tests.checkpoints import Tensor, llama_tensors, write_checkpoint

LONG_AGO_NS = 10**18
FIRST = "model-00001-of-00002.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"  # in the first of two files
TENSORS = llama_tensors(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return aged(write_checkpoint(tmp_path / "m", TENSORS, shards=2))


@pytest.fixture
def reader(folder: Path) -> Iterator[CheckpointReader]:
    with CheckpointReader(open_checkpoint(folder)) as reader:
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
    with CheckpointReader(open_checkpoint(write_checkpoint(tmp_path / "m", TENSORS, shards=shards))) as reader:
        assert {name: read(reader, name) for name in TENSORS} == {name: t.data for name, t in TENSORS.items()}
        reader.check_unchanged()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointReader]:
    folder = write_checkpoint(tmp_path_factory.mktemp("reader") / "m", TENSORS, shards=3)
    with CheckpointReader(open_checkpoint(folder)) as reader:
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


def test_only_the_given_buffer_is_filled(reader: CheckpointReader) -> None:
    buffer = bytearray(b"-" * 12)
    reader.read_into(NAME, 8, memoryview(buffer)[2:6])
    assert bytes(buffer) == b"--" + TENSORS[NAME].data[8:12] + b"-" * 6


def test_threads_may_share_a_reader(folder: Path) -> None:
    names = list(TENSORS) * 20
    with CheckpointReader(open_checkpoint(folder)) as reader, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: read(reader, name), names)) == [TENSORS[name].data for name in names]


def test_an_empty_tensor_reads_as_nothing(tmp_path: Path) -> None:
    tensors = {"none": Tensor("F32", (0, 3), b""), "some": Tensor("U8", (1,), b"x")}
    with CheckpointReader(open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {}))) as reader:
        reader.read_into("none", 0, memoryview(bytearray()))
        reader.check_unchanged()


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_files_are_opened_at_their_first_read_and_closed_with_the_reader(folder: Path) -> None:
    def open_files() -> list[str]:
        links = [os.path.realpath(link) for link in Path("/dev/fd").iterdir()]
        return sorted(Path(link).name for link in links if link.startswith(str(folder.resolve())))

    with CheckpointReader(open_checkpoint(folder)) as reader:
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
    with CheckpointReader(open_checkpoint(folder)) as reader:
        assert read(reader, NAME) == TENSORS[NAME].data
        edit_in_place(blob)
        assert what_is_said(folder / "model.safetensors", reader.check_unchanged) == (
            "FILE: was changed while it was read; run again when nothing else writes to it"
        )


def test_a_closed_reader_refuses_to_read(folder: Path) -> None:
    with CheckpointReader(open_checkpoint(folder)) as reader:
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
