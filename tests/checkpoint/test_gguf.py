"""GGUF models are opened from a file, a part, or a folder, or refused with what they are."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.gguf import GgufCheckpoint, differing_values
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.errors import CheckpointError
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.gguf_files import raw_gguf, raw_value, read_gguf_back, shapes, text, write_gguf
from tests.problems import refused


def opened(path: Path | str) -> GgufCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint


def test_a_file_is_a_checkpoint_with_its_layers(tmp_path: Path) -> None:
    checkpoint = opened(write_gguf(tmp_path / "m-Q8_0.gguf", 1))
    assert set(checkpoint) == set(shapes())
    assert checkpoint.stack == LayerStack("blk", 4)
    assert checkpoint.config == {"architectures": ["llama"], "num_hidden_layers": 4}
    assert (checkpoint.architecture, checkpoint.model_name) == ("llama", "m-Q8_0")
    assert checkpoint.format == "gguf"
    assert checkpoint.reference == str(checkpoint) == str(tmp_path / "m-Q8_0.gguf")
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_bytes_are_those_that_the_gguf_package_reads(tmp_path: Path, kind: str) -> None:
    checkpoint = opened(write_gguf(tmp_path / "m.gguf", 1, kind))
    expected = read_gguf_back(tmp_path / "m.gguf")
    with checkpoint.open() as reader:
        for name, info in checkpoint.items():
            data = bytearray(info.nbytes)
            reader.read_into(name, 0, memoryview(data))
            assert (info.dtype, bytes(data)) == expected[name]


def test_a_split_model_is_opened_from_any_part_and_from_its_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 1, parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
    checkpoints = [opened(path) for path in (*parts, tmp_path)]
    assert [list(checkpoint.weight_files) for checkpoint in checkpoints] == [[part.name for part in parts]] * 4
    assert {checkpoint.model_name for checkpoint in checkpoints} == {"m"}
    assert set(checkpoints[0]) == set(shapes())
    assert opened(parts[2]).reference == str(parts[2])
    assert opened(tmp_path).reference == str(tmp_path)


def test_a_folder_with_one_model_is_that_model_with_its_side_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 1)
    (tmp_path / "LICENSE").write_text("terms")
    (tmp_path / "._m.gguf").write_text("a system's own file")
    checkpoint = opened(tmp_path)
    assert list(checkpoint.weight_files) == ["m.gguf"]
    assert list(checkpoint.side_files) == ["LICENSE"]
    assert checkpoint.locations == (tmp_path,)
    named = opened(tmp_path / "m.gguf")
    assert (dict(named.side_files), named.locations) == ({}, (tmp_path / "m.gguf",))


def test_a_safetensors_model_takes_precedence_in_its_folder(tmp_path: Path) -> None:
    write_gguf(write_checkpoint(tmp_path / "m", llama_tensors(1)) / "m.gguf", 1)
    assert open_checkpoint(tmp_path / "m").format == "safetensors"
    assert open_checkpoint(tmp_path / "m" / "m.gguf").format == "gguf"


def test_extra_prediction_layers_are_outside_the_stack(tmp_path: Path) -> None:
    values = {"llama.nextn_predict_layers": 1}
    assert opened(write_gguf(tmp_path / "m.gguf", 1, values=values)).stack == LayerStack("blk", 3)


def test_the_name_in_the_hubs_cache_is_the_repositorys(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "models--org--m-GGUF" / "snapshots" / "c0" / "m.gguf", 1)
    assert opened(path).model_name == "org/m-GGUF"


def test_several_models_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", 1)
    write_gguf(tmp_path / "b.gguf", 1, parts=2)
    with refused(CheckpointError, "several-models") as caught:
        open_checkpoint(tmp_path)
    assert "a.gguf, b-00001-of-00002.gguf" in caught.value.problems[0].what


def test_missing_parts_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 1, parts=4)
    for part in (2, 4):
        (tmp_path / f"m-0000{part}-of-00004.gguf").unlink()
    with refused(CheckpointError, "part-missing", "part-missing") as caught:
        open_checkpoint(tmp_path / "m-00001-of-00004.gguf")
    assert [Path(problem.where).name[:7] for problem in caught.value.problems] == ["m-00002", "m-00004"]


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 1, parts=2)
    shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / "renamed.gguf")
    with refused(CheckpointError, "split-mismatch", "split-mismatch"):  # one of two, and it lacks tensors
        open_checkpoint(tmp_path / "renamed.gguf")
    shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf")
    with refused(CheckpointError, "split-mismatch"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("llama", {"general.type": "adapter"}),
        ("llama", {"general.type": "mmproj"}),
        ("clip", {}),
        ("llama", {"general.type": "imatrix"}),
        ("controlvector", {}),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, architecture: str, values: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", 1, architecture=architecture, values=values)
    with refused(CheckpointError, "not-a-model") as caught:
        open_checkpoint(path)
    assert caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (raw_gguf([raw_value("general.architecture", 8, text("llama"))]), "no-tensors"),
        (raw_gguf([]), "invalid-header"),
        (raw_gguf([raw_value("general.architecture", 4, bytes(4))]), "invalid-header"),
        (raw_gguf([raw_value("general.architecture", 8, text("\x1b[2J"))]), "invalid-header"),
    ],
    ids=["vocabulary only", "no architecture", "number", "unprintable"],
)
def test_a_file_without_a_model_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with refused(CheckpointError, code):
        open_checkpoint(tmp_path / "m.gguf")


def test_fewer_layers_than_the_key_values_say_are_refused(tmp_path: Path) -> None:
    without = [name for name in shapes() if name.startswith("blk.3.")]
    with refused(CheckpointError, "layers-missing"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", 1, without=without))


def test_a_missing_file_is_refused_and_one_on_the_hub_is_to_be_downloaded(tmp_path: Path) -> None:
    for source in ("m.gguf", "org/name.gguf", "org/name/m.gguf", tmp_path / "m.gguf"):
        with refused(CheckpointError, "no-checkpoint") as caught:
            open_checkpoint(source)
        assert ("hf download org/name m.gguf" in caught.value.problems[0].remedy) == (source == "org/name/m.gguf")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), Path.mkdir], ids=["link", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "m.gguf")
    with refused(CheckpointError, "no-checkpoint"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_gguf_file_and_a_safetensors_folder_are_no_pair(tmp_path: Path) -> None:
    folder, file = write_checkpoint(tmp_path / "m", llama_tensors(1)), write_gguf(tmp_path / "m.gguf", 1)
    for sides in ((folder, file), (file, folder)):
        with refused(CheckpointError, "different-formats") as caught:
            open_pair(*sides)
        assert caught.value.problems[0].where == str(file)


def test_a_file_and_a_link_to_it_are_no_pair(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 1)
    (tmp_path / "n.gguf").symlink_to("m.gguf")
    with refused(CheckpointError, "same-checkpoint"):
        open_pair(tmp_path / "m.gguf", tmp_path / "n.gguf")


def test_key_values_that_change_the_computation_are_compared(tmp_path: Path) -> None:
    same = {"llama.head_count_kv": [2, 2, 4, 4], "llama.eps": 1e-5}
    pre = opened(
        write_gguf(tmp_path / "pre.gguf", 1, values={
            **same, "general.name": "base", "tokenizer.ggml.tokens": ["a"], "llama.context_length": 10,
            "quantize.imatrix.file": "x",
        })
    )  # fmt: skip
    post = opened(
        write_gguf(tmp_path / "post.gguf", 1, values={
            **same, "general.name": "chat", "tokenizer.ggml.tokens": ["b"], "llama.rope.freq_base": 5e5,
            "tokenizer.chat_template": "{{ x }}",
        })
    )  # fmt: skip
    assert list(differing_values(pre, post)) == [
        "llama.context_length (10 and not set)",
        "llama.rope.freq_base (10000 and 500000)",
        "tokenizer.ggml.tokens",
    ]
    assert list(differing_values(post, post)) == []
