"""The files beside the weights: which are copied, which are left out, and the dtype in the config."""

import json
from pathlib import Path
from typing import Any

import pytest

from slrmerge import verify
from slrmerge.checkpoint.side_files import INDEX_NAME
from slrmerge.errors import CheckpointError
from slrmerge.merging.executor import execute, why_not_a_checkpoint
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.stream import file_chunks
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.merging.plan import plan_of
from tests.problems import refused

COPIED = [
    "GEMMA-LICENSE",
    "LICENSE",
    "LICENSE.md",
    "LICENSE-MODEL",
    "MODEL_LICENSE",
    "NOTICE.rst",
    "Notice",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "spm.spm",
    "tokenizer.json",
    "tokenizer.mm.model.v7m1",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.tiktoken",
    "tokenizer_config.json",
    "vocab.bpe",
    "vocab.json",
]
LEFT = [
    ".gitattributes",
    ".hidden.json",
    "README.md",
    "all_results.json",
    "consolidated.00.pth",
    "extra.safetensors",
    "flax_model.msgpack",
    "logo.png",
    "model.safetensors.index.fp16.json",
    "onnx/model.onnx",
    "original/params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "slrmerge.json",
    "slrmerge.yaml",
    "training_args.bin",
    "trainer_state.json",
]


def plan_with(folder: Path, files: list[str], *, allow_code: bool = False, **recipe: object) -> MergePlan:
    write_checkpoint(folder / "pre", llama_tensors("pre"), side_files={"vocab.json": "pre", "only_pre.json": "pre"})
    write_checkpoint(folder / "post", llama_tensors("post"), side_files={name: f"of {name}" for name in files})
    return plan_of(folder, allow_code=allow_code, **({"restore": [1, 2]} | recipe))


def contents(plan: MergePlan) -> dict[str, bytes]:
    return {file.name: b"".join(file_chunks(file)) for file in plan.files}


def test_config_tokenizer_templates_and_licences_are_copied_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, COPIED + LEFT)
    config = (tmp_path / "post/config.json").read_bytes()
    assert contents(plan) == {"config.json": config} | {name: f"of {name}".encode() for name in COPIED}
    assert [file.name for file in plan.files] == sorted(["config.json", *COPIED])
    assert all(file.file_bytes == len(contents(plan)[file.name]) for file in plan.files)
    hidden = [".gitattributes", ".hidden.json", "README.md", "slrmerge.json", "slrmerge.yaml"]
    left_out = {name.partition("/")[0] + "/" if "/" in name else name for name in LEFT if name not in hidden}
    assert plan.to_dict()["left_out"] == sorted(left_out)
    (note,) = plan.notes
    assert sorted(left_out)[0] in note


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MODULE_FILES = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/deep/x.json"]


def with_modules(folder: Path, modules: object = MODULES) -> None:
    write_checkpoint(folder / "pre", llama_tensors("pre"))
    files = {"modules.json": json.dumps(modules), "onnx/model.onnx": "x", "1_Pooling/.hidden": "x"}
    write_checkpoint(folder / "post", llama_tensors("post"), side_files=files)
    for name in MODULE_FILES:
        (folder / "post" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "post" / name).write_text(f"of {name}")


def test_the_folders_that_modules_json_names_go_along_and_may_be_replaced(tmp_path: Path) -> None:
    with_modules(tmp_path)
    plan = plan_of(tmp_path, restore=[1, 2])
    assert contents(plan) == {
        "config.json": (tmp_path / "post/config.json").read_bytes(),
        "modules.json": json.dumps(MODULES).encode(),
        **{name: f"of {name}".encode() for name in MODULE_FILES},
    }
    assert plan.pair.posttrained.left_out == ("onnx/",)
    execute(plan, tmp_path / "out", options=MergeOptions(fsync=False))
    assert verify(tmp_path / "out").against_sources
    (tmp_path / "out" / "slrmerge.json").unlink()  # a checkpoint like any other
    assert why_not_a_checkpoint(tmp_path / "out") is None
    (tmp_path / "out" / "mine").mkdir()
    assert "mine/" in (why_not_a_checkpoint(tmp_path / "out") or "")


@pytest.mark.parametrize("rules", [{"restore": [1, 2]}, {"alpha": 0.5}, {"alpha": 1}])
def test_weights_of_modules_beside_the_model_are_noted_where_something_is_merged(
    tmp_path: Path, rules: dict[str, Any]
) -> None:
    with_modules(tmp_path)
    [note, *others] = (note for note in plan_of(tmp_path, **rules).notes if not note.startswith("left out"))
    assert "2_Dense/model.safetensors" in note
    assert not others  # that everything is pre-trained would be wrong
    assert "2_Dense" not in "".join(plan_of(tmp_path, alpha=0).notes)


@pytest.mark.parametrize("path", ["../pre", "/etc", "1_Pooling/../..", "a\\b", ".git", "c:x"])
def test_modules_outside_of_the_checkpoint_are_refused(tmp_path: Path, path: str) -> None:
    with_modules(tmp_path, [{"path": path, "type": "x"}])
    with refused(CheckpointError, "invalid-modules"):
        plan_of(tmp_path, restore=[1, 2])


def test_a_link_out_of_a_modules_folder_is_refused(tmp_path: Path) -> None:
    with_modules(tmp_path)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "post/1_Pooling/vocab.txt").symlink_to("../../secret")
    with refused(CheckpointError, "link-outside"):
        plan_of(tmp_path, restore=[1, 2])


def test_a_model_in_one_of_its_modules_folders_is_refused(tmp_path: Path) -> None:
    with_modules(tmp_path, [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}])
    with refused(CheckpointError, "invalid-modules"):
        plan_of(tmp_path, restore=[1, 2])


@pytest.mark.parametrize("modules", [{}, [], [7], [{"path": 7}], [{}], [{"path": "absent"}], "x"])
def test_other_modules_files_are_copied_as_they_are(tmp_path: Path, modules: object) -> None:
    with_modules(tmp_path, modules)
    assert contents(plan_of(tmp_path, restore=[1, 2])).keys() == {"config.json", "modules.json"}


def test_python_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, ["modeling_x.py", "tokenization_x.py"])
    assert contents(plan).keys() == {"config.json"}
    (note,) = plan.notes
    assert "modeling_x.py, tokenization_x.py" in note


def test_the_note_reports_python_files_that_the_config_needs(tmp_path: Path) -> None:
    config = llama_config(auto_map={"AutoModel": "modeling_x.Model"})
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"), config)
    write_checkpoint(tmp_path / "post", llama_tensors("post"), config, side_files={"modeling_x.py": "x"})
    (note,) = plan_of(tmp_path, restore=[1, 2]).notes
    assert "modeling_x.py" in note
    assert "auto_map" in note


def test_python_files_are_copied_where_allowed_with_a_note(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, ["modeling_x.py", "tokenizer.json"], allow_code=True)
    assert contents(plan)["modeling_x.py"] == b"of modeling_x.py"
    assert [file.name for file in plan.files] == ["config.json", "modeling_x.py", "tokenizer.json"]
    (note,) = plan.notes
    assert "modeling_x.py" in note


def test_the_config_is_copied_byte_for_byte_without_a_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", llama_tensors("post"))
    text = '{ "num_hidden_layers":6,"dtype" : "bfloat16",\r\n "eps": 1e-05, "x": "\\u00e9" }'
    (tmp_path / "post/config.json").write_bytes(text.encode())
    assert contents(plan_of(tmp_path, restore=[1, 2]))["config.json"] == text.encode()


def test_the_dtype_of_a_recipe_replaces_every_dtype_in_the_config(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 6,
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "rope": {"type": "yarn", "dtype": None}},
        "vision_config": {"torch_dtype": "float32"},
        "eps": 1e-05,
        "names": ["é", {"dtype_of": "bfloat16"}],
    }
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", llama_tensors("post"), config)
    written = contents(plan_of(tmp_path, restore=[1, 2], dtype="float16"))["config.json"]
    assert json.loads(written) == config | {
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16", "rope": {"type": "yarn", "dtype": None}},
        "vision_config": {"torch_dtype": "float16"},
    }
    assert list(json.loads(written)) == list(config)
    assert "é" in written.decode()


@pytest.mark.parametrize(("size", "sharded"), [("5GB", False), ("1KB", True)])
def test_an_index_is_written_for_several_shards_only(tmp_path: Path, size: str, sharded: bool) -> None:
    plan = plan_with(tmp_path, [], max_shard_size=size)
    assert (INDEX_NAME in contents(plan)) is (len(plan.shards) > 1) is sharded
    if sharded:
        post = llama_tensors("post")
        index = json.loads(contents(plan)[INDEX_NAME])
        assert index["metadata"] == {"total_size": sum(len(tensor.data) for tensor in post.values())}
        assert index["weight_map"] == {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
        assert index["weight_map"].keys() == post.keys()
        assert contents(plan)[INDEX_NAME].decode() == json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def test_the_index_of_the_post_trained_shards_is_written_anew_and_only_where_it_is_needed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", llama_tensors("post"), shards=3)
    path = tmp_path / "post" / INDEX_NAME
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {"total_size": 1, "more": 2}}))
    kept = contents(plan_of(tmp_path, restore=[1, 2]))
    assert json.loads(kept[INDEX_NAME]) == index
    one_file = contents(plan_of(tmp_path, restore=[1, 2], dtype="float32"))
    assert one_file.keys() == {"config.json", "tokenizer.json"}


def test_a_single_kept_shard_with_a_number_has_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", post := llama_tensors("post"))
    name = "model-00001-of-00001.safetensors"
    (tmp_path / "post/model.safetensors").rename(tmp_path / "post" / name)
    (tmp_path / "post" / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(post, name)}))
    plan = plan_of(tmp_path, restore=[1, 2])
    assert [shard.name for shard in plan.shards] == [name]
    assert json.loads(contents(plan)[INDEX_NAME])["weight_map"] == dict.fromkeys(post, name)


def test_files_of_the_hubs_cache_are_followed_through_their_links(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    repository = tmp_path / "models--org--post"
    write_checkpoint(repository / "snapshots/1234", llama_tensors("post"), side_files={})
    (tmp_path / "post").symlink_to(repository / "snapshots/1234")
    (repository / "blobs").mkdir()
    (repository / "blobs/5678").write_text("tokens")
    (repository / "snapshots/1234/tokenizer.json").symlink_to("../../blobs/5678")
    assert contents(plan_of(tmp_path, restore=[1, 2]))["tokenizer.json"] == b"tokens"


def test_tokenizer_files_of_the_pretrained_side_replace_all_of_the_other(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"]
    found = contents(plan_with(tmp_path, names, tokenizer="pretrained"))
    assert found.keys() == {"config.json", "generation_config.json", "LICENSE", "vocab.json"}
    assert found["vocab.json"] == b"pre"
