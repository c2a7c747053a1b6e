"""A folder is read as one checkpoint, or refused with everything that is wrong with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint import LayerStack, TensorInfo, header_bytes, read_shard
from slrmerge.errors import CheckpointError
from slrmerge.hub import open_checkpoint, open_pair
from tests.checkpoint import locked
from tests.checkpoints import (
    llama_config,
    llama_tensors,
    random_tensor,
    raw_file,
    safetensors_bytes,
    write_checkpoint,
)

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KNOWN = "name a folder with config.json and safetensors files"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", llama_tensors(0))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", llama_tensors(0), shards=2)


def refusal(folder: Path) -> str:
    """What is said of the checkpoint in `folder`, which stands as DIR."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    return str(error.value).replace(str(folder), "DIR")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def add_tensor(file: Path, name: str) -> None:
    """Put one more tensor, of one byte, at the end of a shard."""
    shard = read_shard(file)
    end = max(info.data_offsets[1] for info in shard.tensors.values())
    header = header_bytes([*shard.tensors.items(), (name, TensorInfo("U8", (1,), (end, end + 1)))])
    file.write_bytes(header + file.read_bytes()[shard.data_start :] + b"x")


def test_a_checkpoint_in_one_file_is_read(single: Path) -> None:
    checkpoint = open_checkpoint(single)
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
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.weight_map) == list(llama_tensors(0))
    assert list(checkpoint.shards) == [ONE, TWO]
    assert dict(checkpoint.items()).keys() == llama_tensors(0).keys()


def test_tensors_come_in_the_order_of_their_data_not_of_the_header(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {}, {})
    entry = {"dtype": "U8", "shape": [1]}
    header = {"late": entry | {"data_offsets": [1, 2]}, "early": entry | {"data_offsets": [0, 1]}}
    (folder / SINGLE).write_bytes(raw_file(json.dumps(header), b"ab"))
    assert list(open_checkpoint(folder).weight_map) == ["early", "late"]


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
    assert open_checkpoint(sharded).total_bytes == sum(len(tensor.data) for tensor in llama_tensors(0).values())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../model.safetensors", "'../model.safetensors'"),
        ("sub/model.safetensors", "'sub/model.safetensors'"),
        ("./model.safetensors", "'./model.safetensors'"),
        ("/etc/model.safetensors", "'/etc/model.safetensors'"),
        ("..\\model.safetensors", "'..\\\\model.safetensors'"),
        ("C:\\model.safetensors", "'C:\\\\model.safetensors'"),
        ("C:model.safetensors", "'C:model.safetensors'"),
        ("model.bin", "'model.bin'"),
        ("..", "'..'"),
        ("", "''"),
        ("a\0.safetensors", "'a\\x00.safetensors'"),
        ("a\n.safetensors", "'a\\n.safetensors'"),
        ("\ud800.safetensors", "'\\ud800.safetensors'"),
        (5, "'5'"),
        ([ONE], f"\"['{ONE}']\""),
    ],
)
def test_an_index_may_name_plain_safetensors_files_only(sharded: Path, name: Any, shown: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"x": name}))
    assert refusal(sharded) == (
        f"DIR/{INDEX}: $.weight_map names {shown}; only plain *.safetensors names beside the index are read"
    )


def test_all_bad_names_of_an_index_are_told_at_once(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(x="../x.safetensors", y="/y.safetensors", z=ONE))
    assert refusal(sharded).splitlines() == [
        f"DIR/{INDEX}: $.weight_map names {name!r}; only plain *.safetensors names beside the index are read"
        for name in ("../x.safetensors", "/y.safetensors")
    ]


def test_a_file_name_too_long_for_the_disk_is_refused(sharded: Path) -> None:
    long = "x" * 300 + ".safetensors"
    edit_index(sharded, lambda index: index["weight_map"].update(x=long))
    assert refusal(sharded).startswith(f"DIR/{long}: ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"", "is not sound JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"a" 1}', "is not sound JSON (Expecting ':' delimiter: line 1 column 6 (char 5))"),
        (b'{"a": 1, "\\u0061": 2}', "is not sound JSON (the key 'a' stands twice)"),
        (b'{"a": {"b": 1, "b": 1}}', "is not sound JSON (the key 'b' stands twice)"),
        (b"\xff", "is not sound JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
    ],
)
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_config_or_index_that_is_not_a_sound_json_object_is_refused(
    sharded: Path, file: str, text: bytes, what: str
) -> None:
    (sharded / file).write_bytes(text)
    assert refusal(sharded) == f"DIR/{file}: {what}; fetch it again"


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_deeply_nested_config_or_index_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).write_text('{"a":' * 200_000)
    said = refusal(sharded)
    assert said.startswith(f"DIR/{file}: is not sound JSON (maximum recursion depth exceeded")
    assert said.endswith("); fetch it again")


@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_folder_in_place_of_a_config_or_index_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    (sharded / file).mkdir()
    assert refusal(sharded) == f"DIR/{file}: is not a regular file"


@pytest.mark.timeout(2)
@pytest.mark.skipif("os.name == 'nt'")
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_a_fifo_in_place_of_a_config_or_index_is_refused(sharded: Path, file: str) -> None:
    (sharded / file).unlink()
    os.mkfifo(sharded / file)
    assert refusal(sharded) == f"DIR/{file}: is not a regular file"


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert refusal(sharded) == f"DIR/{INDEX}: has no weight_map; fetch it again"


def test_a_missing_config_is_told(single: Path) -> None:
    (single / CONFIG).unlink()
    assert refusal(single) == f"DIR/{CONFIG}: is missing; a checkpoint needs it to be loaded"


def test_a_tensor_in_the_index_but_not_in_its_shard_is_told(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(x=ONE, y=TWO))
    assert refusal(sharded) == (
        f"DIR/{INDEX}: puts x in {ONE}, which does not hold it; fetch index and shards again\n"
        f"DIR/{INDEX}: puts y in {TWO}, which does not hold it; fetch index and shards again"
    )


def test_a_tensor_in_a_shard_but_not_in_the_index_is_told(sharded: Path) -> None:
    add_tensor(sharded / TWO, "x")
    assert refusal(sharded) == f"DIR/{TWO}: holds x, which the index does not name; fetch both again"


def test_a_tensor_in_two_shards_is_told(sharded: Path) -> None:
    add_tensor(sharded / TWO, "model.embed_tokens.weight")
    assert refusal(sharded) == (
        f"DIR/{TWO}: holds model.embed_tokens.weight, which {ONE} holds too; fetch both again"
    )  # fmt: skip


def test_every_missing_or_broken_shard_is_told(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / TWO).write_bytes(b"")
    assert refusal(sharded) == (
        f"DIR/{ONE}: is in the index but not in the folder; finish the download\n"
        f"DIR/{TWO}: is cut short at 0 bytes, inside its header; fetch it again"
    )


def test_a_folder_in_place_of_the_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    assert refusal(single) == f"DIR/{SINGLE}: is not a regular file"


def test_a_single_file_beside_an_index_of_others_is_two_models(sharded: Path) -> None:
    (sharded / SINGLE).write_bytes(safetensors_bytes(llama_tensors("stale")))
    assert refusal(sharded) == (
        f"DIR: holds two models: {SINGLE} and the shards of {INDEX}; "
        "loaders disagree on which counts: move the stale one away"
    )


def test_a_single_file_that_the_index_names_is_one_model(single: Path) -> None:
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(llama_tensors(0), SINGLE)}))
    assert open_checkpoint(single).weight_map == dict.fromkeys(llama_tensors(0), SINGLE)


NEITHER = f"DIR: has safetensors files, but neither {SINGLE} nor {INDEX}; "
NEITHER += "name the folder that save_pretrained wrote, or restore its index"
PICKLES = 'DIR: has pickles only, no safetensors; convert it: python -c "import transformers as t; '
PICKLES += "t.AutoModelForCausalLM.from_pretrained('DIR').save_pretrained('DIR-safetensors')\""


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], f"DIR: has no safetensors files; {KNOWN}"),
        (["README.md"], f"DIR: has no safetensors files; {KNOWN}"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], PICKLES),
        (["consolidated.00.pth"], PICKLES),
        (["model.pt"], PICKLES),
        (["model-Q4_K_M.gguf"], "DIR: has GGUF files only, no safetensors; name the original checkpoint"),
        (["consolidated.safetensors"], NEITHER),
        ([ONE, TWO], NEITHER),
        (["consolidated.safetensors", "consolidated.00.pth"], NEITHER),
        ([ONE, TWO, "training_args.bin"], NEITHER),
    ],
)
def test_a_folder_without_a_model_to_read_is_said_to_hold_what_it_holds(
    tmp_path: Path, files: list[str], what: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in [CONFIG, *files] if files else []:
        (folder / file).write_text("{}")
    assert refusal(folder) == what


def test_pickles_and_gguf_beside_safetensors_do_not_matter(single: Path) -> None:
    for file in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "adapter_config.json"):
        (single / file).write_text("{}")
    assert list(open_checkpoint(single).shards) == [SINGLE]


def adapter(tmp_path: Path, config: str) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text(config)
    (tmp_path / "a/adapter_model.safetensors").write_bytes(raw_file("{}"))
    return tmp_path / "a"


def test_an_adapter_is_refused_with_the_name_of_its_base(tmp_path: Path) -> None:
    assert refusal(adapter(tmp_path, '{"base_model_name_or_path": "org/base"}')) == (
        "DIR: is an adapter for org/base; merge it into that base first (PEFT merge_and_unload)"
    )


@pytest.mark.parametrize("config", ["{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_does_not_name_its_base_is_not_said_to_be_for_none(tmp_path: Path, config: str) -> None:
    said = refusal(adapter(tmp_path, config))
    assert said.startswith("DIR: is an adapter")
    assert "None" not in said


@pytest.mark.parametrize("nested", [False, True])
def test_a_config_with_more_layers_than_the_weights_is_refused(tmp_path: Path, nested: bool) -> None:
    config = {"text_config": llama_config(layers=7)} if nested else llama_config(layers=7)
    folder = write_checkpoint(tmp_path / "m", llama_tensors(0), config)
    assert refusal(folder) == (
        "DIR: the config says 7 layers, the weights have 6; "
        "fetch the missing shards, or the config that belongs to these weights"
    )


def test_a_gap_in_the_layers_is_too_few_layers(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors(0).items() if ".layers.2." not in name}
    assert refusal(write_checkpoint(tmp_path / "m", tensors)).startswith(
        "DIR: the config says 6 layers, the weights have 2;"
    )


def test_a_longer_vision_tower_does_not_hide_missing_layers(tmp_path: Path) -> None:
    tensors = llama_tensors(0, layers=5)
    tensors |= {f"vision_tower.encoder.layers.{k}.w": random_tensor("U8", (1,), k) for k in range(8)}
    assert refusal(write_checkpoint(tmp_path / "m", tensors)).startswith(
        "DIR: the config says 6 layers, the weights have 5;"
    )


def test_fewer_layers_in_the_config_are_the_first_ones(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", llama_tensors(0), llama_config(layers=4))
    assert open_checkpoint(folder).stack == LayerStack("model.layers", 4)


def test_a_checkpoint_without_layers_has_no_stack(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"embed.weight": random_tensor("F32", (2,), 0)}, {})
    assert open_checkpoint(folder).stack is None


def test_a_layer_number_of_thousands_of_digits_does_no_harm(tmp_path: Path) -> None:
    tensors = llama_tensors(0) | {f"model.layers.{'9' * 5000}.w": random_tensor("U8", (1,), 0)}
    assert open_checkpoint(write_checkpoint(tmp_path / "m", tensors)).stack == LayerStack("model.layers", 6)


def test_a_file_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(write_checkpoint(tmp_path / "m", {})) == "DIR: holds no tensors; fetch it again"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, f"DIR: no such folder; {KNOWN}"),
        (lambda path: path.write_bytes(b""), f"DIR: is a file, not a checkpoint folder; {KNOWN}"),
        (lambda path: path.symlink_to("nowhere"), f"DIR: no such folder; {KNOWN}"),
        (os.mkdir, f"DIR: has no safetensors files; {KNOWN}"),
    ],
    ids=["missing", "file", "dangling", "empty"],
)
def test_what_is_no_folder_with_a_model_is_refused(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    make(tmp_path / "m")
    assert refusal(tmp_path / "m") == what


def test_a_folder_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / ("x" * 300)).startswith("DIR: ")


@pytest.mark.skipif("os.name == 'nt'")
@pytest.mark.parametrize("what", ["the folder", "the one above"])
def test_a_folder_that_may_not_be_read_is_refused(single: Path, what: str) -> None:
    with locked(single if what == "the folder" else single.parent):
        assert refusal(single) == "DIR: cannot be read (Permission denied)"


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
    checkpoint = open_checkpoint(hub_snapshot(tmp_path / "hub", sharded))
    assert list(checkpoint.weight_map) == list(llama_tensors(0))
    assert checkpoint.model_name == "org/name"


def test_a_symlink_to_a_snapshot_has_its_name(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "link").symlink_to(hub_snapshot(tmp_path / "hub", sharded))
    assert open_checkpoint(tmp_path / "link").model_name == "org/name"


def test_a_blob_that_is_missing_from_the_hubs_cache_is_told(tmp_path: Path, sharded: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", sharded)
    (snapshot / ONE).resolve().unlink()
    assert refusal(snapshot) == f"DIR/{ONE}: is a link to nothing; finish the download"


def test_a_model_that_merely_lies_below_a_folder_named_like_the_cache_has_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "models--old").mkdir()
    folder = write_checkpoint(tmp_path / "models--old" / "llama", llama_tensors(0))
    assert open_checkpoint(folder).model_name == "llama"


def test_a_folder_named_by_dots_or_a_symlink_has_the_name_it_stands_for(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(single)
    assert open_checkpoint(Path()).model_name == "m"
    assert open_checkpoint(Path("..") / "m").model_name == "m"
    (single.parent / "link").symlink_to("m")
    assert open_checkpoint(single.parent / "link").model_name == "m"


def test_a_pair_is_opened_in_order(tmp_path: Path) -> None:
    pre = write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    post = write_checkpoint(tmp_path / "post", llama_tensors("post"), shards=3)
    assert [side.folder for side in open_pair(pre, post)] == [pre, post]


def test_the_problems_of_both_sides_are_told_at_once(tmp_path: Path) -> None:
    post = write_checkpoint(tmp_path / "post", llama_tensors(0), shards=2)
    (post / ONE).unlink()
    (post / TWO).unlink()
    with pytest.raises(CheckpointError) as error:
        open_pair(tmp_path / "pre", post)
    assert str(error.value) == (
        f"{tmp_path}/pre: no such folder; {KNOWN}\n"
        f"{post}/{ONE}: is in the index but not in the folder; finish the download\n"
        f"{post}/{TWO}: is in the index but not in the folder; finish the download"
    )
    assert error.value.exit_code == 4
