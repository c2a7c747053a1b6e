"""A folder is read as one checkpoint, or refused with every problem in it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.header import TensorInfo, header_bytes, read_shard
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.safetensors import SafetensorsFolder, open_folder, read_local_shard
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem
from slrmerge.io.progress import Progress
from tests.checkpoint import locked, read
from tests.checkpoints import (
    llama_config,
    llama_tensors,
    random_tensor,
    raw_file,
    safetensors_bytes,
    write_checkpoint,
)
from tests.problems import refused

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", llama_tensors(0))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", llama_tensors(0), shards=2)


def refusal(folder: Path, *codes: str) -> list[Problem]:
    """The problems with the checkpoint in `folder`, which have these codes."""
    with refused(CheckpointError, *codes) as caught:
        open_folder(folder)
    return list(caught.value.problems)


def places(problems: list[Problem], folder: Path) -> list[str]:
    """The files, relative to `folder`, that the problems are in."""
    return [Path(problem.where).relative_to(folder).as_posix() for problem in problems]


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def add_tensor(file: Path, name: str) -> None:
    """Put one more tensor, of one byte, at the end of a shard."""
    shard = read_shard(LocalFile.at(file))
    end = max(info.end for info in shard.tensors.values())
    header = header_bytes([*shard.tensors.items(), (name, TensorInfo("U8", (1,), 1, end))])
    file.write_bytes(header + file.read_bytes()[shard.data_start :] + b"x")


def test_a_checkpoint_in_one_file_is_read(single: Path) -> None:
    checkpoint = open_folder(single)
    tensors = llama_tensors(0)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in checkpoint.items()} == {
        name: (tensor.dtype, tensor.shape, len(tensor.data)) for name, tensor in tensors.items()
    }
    assert checkpoint.folder == single
    assert checkpoint.config == llama_config()
    assert checkpoint.weight_map == dict.fromkeys(tensors, SINGLE)
    assert checkpoint.total_bytes == sum(len(tensor.data) for tensor in tensors.values())
    assert checkpoint.stack == LayerStack("model.layers", 6)
    assert checkpoint.model_name == "m"
    assert "lm_head.weight" in checkpoint
    assert "lm_head.bias" not in checkpoint
    assert checkpoint["lm_head.weight"].shape == (16, 8)


def test_a_sharded_checkpoint_is_read_in_the_order_of_its_files_and_data(sharded: Path) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=dict(reversed(index["weight_map"].items()))))
    checkpoint = open_folder(sharded)
    assert list(checkpoint.weight_map) == list(llama_tensors(0))
    assert list(checkpoint.shards) == [ONE, TWO]
    assert dict(checkpoint.items()).keys() == llama_tensors(0).keys()


def test_tensors_come_in_the_order_of_their_data_not_of_the_header(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {}, {})
    entry = {"dtype": "U8", "shape": [1]}
    header = {"late": entry | {"data_offsets": [1, 2]}, "early": entry | {"data_offsets": [0, 1]}}
    (folder / SINGLE).write_bytes(raw_file(json.dumps(header), b"ab"))
    assert list(open_folder(folder).weight_map) == ["early", "late"]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["metadata"].update(total_size=1),
        lambda index: index.pop("metadata"),
        lambda index: index.update(metadata=None),
        lambda index: index.update(more={"x": 1}),
    ],
    ids=["wrong total_size", "no metadata", "null metadata", "more keys"],
)
def test_what_an_index_says_besides_its_weight_map_does_not_matter(
    sharded: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_index(sharded, change)
    assert open_folder(sharded).total_bytes == sum(len(tensor.data) for tensor in llama_tensors(0).values())


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "/etc/model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "model.bin",
        "..",
        "",
        "a\0.safetensors",
        "a\n.safetensors",
        5,
        [ONE],
    ],
)
def test_an_index_may_name_plain_safetensors_files_only(sharded: Path, name: Any) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"x": name}))
    (problem,) = refusal(sharded, "invalid-index")
    assert (problem.where, repr(str(name)) in problem.what) == (f"{sharded}/{INDEX}", True)


def test_all_bad_names_in_an_index_are_reported_at_once(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(x="../x.safetensors", y="/y.safetensors", z=ONE))
    assert len(refusal(sharded, "invalid-index")) == 2


@pytest.mark.parametrize("name", ["", "a\nb", "a" * 1001])
def test_a_tensor_name_that_no_shard_can_have_is_refused_in_an_index(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({name: ONE}))
    (problem,) = refusal(sharded, "index-mismatch")
    assert len(str(problem).removeprefix(problem.where)) < 200


def test_of_many_wrong_entries_in_an_index_the_first_are_reported(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({str(k): ONE for k in range(2 * MAX_PROBLEMS)}))
    with refused(CheckpointError, *["index-mismatch"] * MAX_PROBLEMS):
        open_folder(sharded)


def test_a_file_name_too_long_for_the_disk_is_refused(sharded: Path) -> None:
    long = "x" * 300 + ".safetensors"
    edit_index(sharded, lambda index: index["weight_map"].update(x=long))
    assert places(refusal(sharded, "unreadable"), sharded) == [long]


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"",
        b'{"a" 1}',
        b"\xff",
        pytest.param(b'{"a":' * 200_000, id="deeply nested"),
    ],
)
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_config_or_index_that_is_not_a_json_object_is_refused(sharded: Path, file: str, text: bytes) -> None:
    (sharded / file).write_bytes(text)
    assert places(refusal(sharded, "invalid-json"), sharded) == [file]


@pytest.mark.parametrize("text", [b'{"a": 1, "\\u0061": 2}', b'{"a": {"b": 1, "b": 1}}'])
def test_an_index_with_duplicate_keys_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    assert places(refusal(sharded, "invalid-json"), sharded) == [INDEX]


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_folder_in_place_of_a_config_or_index_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    (sharded / file).mkdir()
    assert places(refusal(sharded, "not-a-file"), sharded) == [file]


@pytest.mark.timeout(2)
@pytest.mark.skipif("os.name == 'nt'")
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_fifo_in_place_of_a_config_or_index_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    os.mkfifo(sharded / file)
    assert places(refusal(sharded, "not-a-file"), sharded) == [file]


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert places(refusal(sharded, "invalid-index"), sharded) == [INDEX]


def test_a_missing_config_is_reported(single: Path) -> None:
    (single / CONFIG).unlink()
    assert places(refusal(single, "no-config"), single) == [CONFIG]


def test_a_tensor_in_the_index_but_not_in_its_shard_is_reported(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(x=ONE, y=TWO))
    assert places(refusal(sharded, "index-mismatch"), sharded) == [INDEX, INDEX]


def test_a_tensor_in_a_shard_but_not_in_the_index_is_reported(sharded: Path) -> None:
    add_tensor(sharded / TWO, "x")
    assert places(refusal(sharded, "index-mismatch"), sharded) == [TWO]


def test_a_tensor_in_two_shards_is_reported(sharded: Path) -> None:
    add_tensor(sharded / TWO, "model.embed_tokens.weight")
    assert places(refusal(sharded, "index-mismatch"), sharded) == [TWO]


def test_every_missing_or_broken_shard_is_reported(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / TWO).write_bytes(b"")
    assert places(refusal(sharded, "shard-missing", "truncated"), sharded) == [ONE, TWO]


def test_problems_of_config_and_shards_are_reported_together(sharded: Path) -> None:
    (sharded / CONFIG).write_text("[]")
    (sharded / TWO).unlink()
    assert places(refusal(sharded, "invalid-json", "shard-missing"), sharded) == [CONFIG, TWO]


def test_a_folder_in_place_of_the_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    assert places(refusal(single, "not-a-file"), single) == [SINGLE]


def test_a_single_file_beside_an_index_of_others_is_two_models(sharded: Path) -> None:
    (sharded / SINGLE).write_bytes(safetensors_bytes(llama_tensors("stale")))
    refusal(sharded, "two-models")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_two_models(single: Path, weights: str) -> None:
    for file in ("adapter_config.json", weights):
        (single / file).write_text("{}")
    refusal(single, "two-models")


@pytest.mark.parametrize("named", ["model.fp16.safetensors", INDEX])
def test_a_config_that_names_other_weights_than_those_that_are_read_is_two_models(single: Path, named: str) -> None:
    config = json.loads((single / CONFIG).read_text())
    (single / CONFIG).write_text(json.dumps({**config, "transformers_weights": named}))
    assert places(refusal(single, "two-models"), single) == [CONFIG]


def test_a_config_may_name_the_weights_that_are_read(single: Path) -> None:
    config = json.loads((single / CONFIG).read_text())
    (single / CONFIG).write_text(json.dumps({**config, "transformers_weights": SINGLE}))
    assert open_folder(single).weight_map == dict.fromkeys(llama_tensors(0), SINGLE)


def test_a_single_file_that_the_index_names_is_one_model(single: Path) -> None:
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(llama_tensors(0), SINGLE)}))
    assert open_folder(single).weight_map == dict.fromkeys(llama_tensors(0), SINGLE)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([], "no-checkpoint"),
        (["README.md"], "no-checkpoint"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "pickles-only"),
        (["consolidated.00.pth"], "pickles-only"),
        (["model.pt"], "pickles-only"),
        (["model-Q4_K_M.gguf"], "gguf-only"),
        (["consolidated.safetensors"], "no-index"),
        ([ONE, TWO], "no-index"),
        (["consolidated.safetensors", "consolidated.00.pth"], "no-index"),
        ([ONE, TWO, "training_args.bin"], "no-index"),
    ],
)
def test_a_folder_without_a_readable_model_is_refused_by_what_it_has(
    tmp_path: Path, files: list[str], code: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in [CONFIG, *files] if files else []:
        (folder / file).write_text("{}")
    (problem,) = refusal(folder, code)
    assert problem.where == str(folder)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["consolidated.safetensors", "params.json"], "transformers' format"),
        (["model.fp16.safetensors"], "variant="),
        (["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"], "variant="),
        (["diffusion_pytorch_model.safetensors"], "text_encoder"),
        (["model_index.json"], "text_encoder"),
        ([ONE, TWO, "consolidated.safetensors"], "restore its index"),
    ],
)
def test_a_folder_without_a_readable_model_has_a_remedy_that_works(tmp_path: Path, files: list[str], word: str) -> None:
    for file in [CONFIG, *files]:
        (tmp_path / file).write_text("{}")
    (problem,) = refusal(tmp_path, "no-index")
    assert word in problem.remedy


def test_pickles_and_gguf_beside_safetensors_do_not_matter(single: Path) -> None:
    for file in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "adapter_config.json"):
        (single / file).write_text("{}")
    assert list(open_folder(single).shards) == [SINGLE]


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_with_more_layers_than_the_weights_is_refused(tmp_path: Path, nested: bool) -> None:
    config = {"text_config": llama_config(layers=7)} if nested else llama_config(layers=7)
    refusal(write_checkpoint(tmp_path / "m", llama_tensors(0), config), "layers-missing")


def test_a_gap_in_the_layers_is_refused(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors(0).items() if ".layers.2." not in name}
    refusal(write_checkpoint(tmp_path / "m", tensors), "layers-missing")


def test_a_longer_vision_tower_does_not_hide_missing_layers(tmp_path: Path) -> None:
    tensors = llama_tensors(0, layers=5)
    tensors |= {f"vision_tower.encoder.layers.{k}.w": random_tensor("U8", (1,), k) for k in range(8)}
    refusal(write_checkpoint(tmp_path / "m", tensors), "layers-missing")


def test_fewer_layers_in_the_config_are_the_first_ones(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", llama_tensors(0), llama_config(layers=4))
    assert open_folder(folder).stack == LayerStack("model.layers", 4)


def test_a_checkpoint_without_layers_has_no_stack(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"embed.weight": random_tensor("F32", (2,), 0)}, {})
    assert open_folder(folder).stack is None


def test_a_layer_number_of_hundreds_of_digits_does_no_harm(tmp_path: Path) -> None:
    tensors = llama_tensors(0) | {f"model.layers.{'9' * 900}.w": random_tensor("U8", (1,), 0)}
    assert open_folder(write_checkpoint(tmp_path / "m", tensors)).stack == LayerStack("model.layers", 6)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    refusal(write_checkpoint(tmp_path / "m", {}), "no-tensors")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "no-checkpoint"),
        (lambda path: path.write_bytes(b""), "no-checkpoint"),
        (lambda path: path.symlink_to("nowhere"), "broken-link"),
        (os.mkdir, "no-checkpoint"),
    ],
    ids=["missing", "file", "dangling", "empty"],
)
def test_a_path_that_is_not_a_folder_with_a_model_is_refused(
    tmp_path: Path, make: Callable[[Path], None], code: str
) -> None:
    make(tmp_path / "m")
    (problem,) = refusal(tmp_path / "m", code)
    assert problem.where == str(tmp_path / "m")


def test_a_folder_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / ("x" * 300), "unreadable")


@pytest.mark.skipif("os.name == 'nt'")
@pytest.mark.parametrize("what", ["the folder", "the one above"])
def test_a_folder_without_permission_is_refused(single: Path, what: str) -> None:
    with locked(single if what == "the folder" else single.parent):
        (problem,) = refusal(single, "unreadable")
    assert problem.where == str(single)


def _symlink_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "shard-missing"),
        (lambda path: path.symlink_to("nowhere"), "shard-missing"),
        (os.mkdir, "not-a-file"),
        pytest.param(os.mkfifo, "not-a-file", marks=[pytest.mark.timeout(10), pytest.mark.skipif("os.name == 'nt'")]),
        (_symlink_to_itself, "unreadable"),
    ],
    ids=["missing", "dangling", "folder", "fifo", "loop"],
)
def test_a_shard_that_cannot_be_read_is_refused(tmp_path: Path, make: Callable[[Path], None], code: str) -> None:
    make(tmp_path / "x.safetensors")
    with refused(CheckpointError, code) as caught:
        read_local_shard(tmp_path / "x.safetensors")
    assert caught.value.problems[0].where == str(tmp_path / "x.safetensors")


@pytest.mark.skipif("os.name == 'nt'")
def test_a_shard_without_permission_is_refused(single: Path) -> None:
    with locked(single / SINGLE), refused(CheckpointError, "unreadable") as caught:
        read_local_shard(single / SINGLE)
    assert caught.value.problems[0].where == str(single / SINGLE)


def hub_snapshot(cache: Path, folder: Path) -> Path:
    """The files of `folder` as huggingface_hub keeps them: symlinks in a snapshot to blobs named by digest."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_symlinks(tmp_path: Path, sharded: Path) -> None:
    checkpoint = open_folder(hub_snapshot(tmp_path / "hub", sharded))
    assert list(checkpoint.weight_map) == list(llama_tensors(0))
    assert checkpoint.model_name == "org/name"


def test_a_symlink_to_a_snapshot_has_its_name(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "link").symlink_to(hub_snapshot(tmp_path / "hub", sharded))
    assert open_folder(tmp_path / "link").model_name == "org/name"


def test_a_blob_that_is_missing_from_the_hubs_cache_is_reported(tmp_path: Path, sharded: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", sharded)
    (snapshot / ONE).resolve().unlink()
    assert places(refusal(snapshot, "shard-missing"), snapshot) == [ONE]


def test_a_model_that_merely_lies_below_a_folder_named_like_the_cache_has_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "models--old").mkdir()
    folder = write_checkpoint(tmp_path / "models--old" / "llama", llama_tensors(0))
    assert open_folder(folder).model_name == "llama"


def test_a_folder_named_by_dots_or_a_symlink_has_the_name_it_stands_for(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(single)
    assert open_folder(Path()).model_name == "m"
    assert open_folder(Path("..") / "m").model_name == "m"
    (single.parent / "link").symlink_to("m")
    assert open_folder(single.parent / "link").model_name == "m"


def test_a_checkpoint_is_a_mapping(sharded: Path) -> None:
    checkpoint = open_folder(sharded)
    assert isinstance(checkpoint, Mapping)
    assert list(checkpoint) == list(checkpoint.keys()) == list(llama_tensors(0))
    assert dict(checkpoint) == {name: checkpoint[name] for name in llama_tensors(0)}
    assert len(checkpoint) == len(llama_tensors(0))
    assert ("model.norm.weight" in checkpoint, "x" in checkpoint) == (True, False)
    assert checkpoint.get("x") is None
    with pytest.raises(KeyError):
        checkpoint["x"]


def test_a_checkpoint_is_true_and_represented_in_one_line(sharded: Path) -> None:
    checkpoint = open_folder(sharded)
    assert checkpoint
    assert repr(checkpoint).startswith(f"<SafetensorsFolder {sharded}: {len(llama_tensors(0))} tensors, ")
    assert "\n" not in repr(checkpoint)


def test_a_pickled_checkpoint_is_equal_and_readable(sharded: Path) -> None:
    checkpoint = open_folder(sharded)
    for original in (checkpoint, _used(checkpoint)):
        copy = pickle.loads(pickle.dumps(original))
        assert type(copy) is SafetensorsFolder
        assert copy == checkpoint
        assert copy.fingerprint() == checkpoint.fingerprint()
        with copy.open() as reader:
            assert {name: read(reader, name) for name in copy} == {n: t.data for n, t in llama_tensors(0).items()}


def _used(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint, after its derived values were computed."""
    assert checkpoint.stack
    assert checkpoint.weight_map
    return checkpoint


def test_checkpoints_are_equal_until_a_file_changes(sharded: Path, tmp_path: Path) -> None:
    checkpoint = open_folder(sharded)
    assert checkpoint == open_folder(sharded)
    assert checkpoint != open_folder(write_checkpoint(tmp_path / "other", llama_tensors(0), shards=2))
    (sharded / TWO).write_bytes((sharded / TWO).read_bytes())
    os.utime(sharded / TWO, ns=(0, 0))
    again = open_folder(sharded)
    assert again != checkpoint
    assert again.identity != checkpoint.identity
    assert again.fingerprint() == checkpoint.fingerprint()


def test_a_folder_is_not_remote_and_downloads_nothing(sharded: Path) -> None:
    checkpoint = open_folder(sharded)
    assert not checkpoint.is_remote
    assert checkpoint.download(Progress()) is checkpoint
    assert checkpoint.reference == str(sharded.resolve())
    assert checkpoint.parameters == sum(len(tensor.data) // 2 for tensor in llama_tensors(0).values())


def test_side_files_are_those_that_belong_to_the_model(single: Path) -> None:
    for name in (
        "LICENSE",
        "chat_template.jinja",
        "code.py",
        "README.md",
        "x.png",
        "additional_chat_templates/t.jinja",
    ):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text("x")
    names = ["LICENSE", "additional_chat_templates/t.jinja", "chat_template.jinja", "code.py", CONFIG, "tokenizer.json"]
    assert sorted(open_folder(single).side_files) == sorted(names)


def test_names_are_the_same_objects_in_index_headers_and_other_checkpoints(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "again")
    one, two = open_folder(sharded), open_folder(tmp_path / "again")
    assert all(name is other for name, other in zip(one, two, strict=True))
