"""What headers say besides tensors goes with the tensors that it is about, or the merge is refused."""

import json
from pathlib import Path

import pytest

from slrmerge import merge, verify
from slrmerge.errors import PlanError
from tests.checkpoints import llama_tensors, random_tensor, safetensors_bytes, write_checkpoint
from tests.merging.plan import plan_of
from tests.problems import refused
from tests.streams import shard_bytes

UP = "model.layers.{}.mlp.up_proj"


def write(folder: Path, pre: dict[str, str], post: dict[str, str], *, quantized: bool = False) -> None:
    for side, metadata in (("pre", pre), ("post", post)):
        scales = {f"{UP.format(0)}.weight_scale": random_tensor("F32", (1,), side)} if quantized else {}
        tensors = llama_tensors(side) | scales
        path = write_checkpoint(folder / side, tensors) / "model.safetensors"
        path.write_bytes(safetensors_bytes(tensors, {"format": "pt", **metadata}))


def planned(folder: Path, **rules: object) -> dict[str, str]:
    """The metadata in the header of the output's file, without the format."""
    (raw,) = shard_bytes(plan_of(folder, **rules))
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {key: value for key, value in header["__metadata__"].items() if key != "format"}


def test_a_key_under_a_tensors_or_modules_name_comes_from_the_side_of_the_tensor(tmp_path: Path) -> None:
    sides = {
        side: {
            **{f"{UP.format(k)}.weight": f"{side} {k}" for k in range(6)},  # a tensor
            **{f"{UP.format(k)}.packed": f"{side} {k}" for k in range(6)},  # of the module
            "lm_head.weight:type": side,
        }
        for side in ("pre", "post")
    }
    write(tmp_path, sides["pre"], sides["post"])
    found = planned(tmp_path, restore=[1, 2])
    for k in range(6):
        side = "pre" if k in (1, 2) else "post"
        assert found[f"{UP.format(k)}.weight"] == found[f"{UP.format(k)}.packed"] == f"{side} {k}"
    assert found["lm_head.weight:type"] == "post"
    assert planned(tmp_path, alpha=0) == sides["post"]
    assert planned(tmp_path, alpha=1) == sides["pre"]


def test_a_list_of_names_has_those_of_both_sides_that_are_in_the_output(tmp_path: Path) -> None:
    names = {
        "pre": ["lm_head.weight", UP.format(1), UP.format(2), "only pre"],
        "post": [UP.format(1), UP.format(3), "only post"],
    }
    write(tmp_path, *({"tensor_names": json.dumps(names[side])} for side in ("pre", "post")))
    found = json.loads(planned(tmp_path, restore=[1, 2])["tensor_names"])
    assert sorted(found) == sorted([UP.format(1), UP.format(2), UP.format(3), "only pre", "only post"])


@pytest.mark.parametrize(
    ("pre", "post", "kept"),
    [
        ({"layout": "x"}, {"layout": "x"}, {"layout": "x"}),
        ({"layout": "x"}, {}, {"layout": "x"}),
        ({}, {"layout": "x"}, {"layout": "x"}),
        ({"mergekit_version": "0.1"}, {"mergekit_version": "0.2"}, {"mergekit_version": "0.2"}),
        ({"modelspec.author": "a"}, {"modelspec.author": "b"}, {"modelspec.author": "b"}),
        ({"total_size": "1"}, {"total_size": "2"}, {"total_size": "2"}),  # the post-trained file is kept
        ({"format": "mlx"}, {"format": "pt"}, {}),
    ],
)
def test_keys_that_are_about_no_tensor_of_quantized_models_are_kept_where_both_agree(
    tmp_path: Path, pre: dict[str, str], post: dict[str, str], kept: dict[str, str]
) -> None:
    write(tmp_path, pre, post, quantized=True)
    assert planned(tmp_path, restore=[1, 2]) == kept


def test_metadata_of_quantized_models_that_contradict_each_other_are_refused_by_key(tmp_path: Path) -> None:
    write(tmp_path, {"layout": "row"}, {"layout": "column"}, quantized=True)
    with refused(PlanError, "different-metadata") as caught:
        plan_of(tmp_path, restore=[1, 2])
    assert caught.value.problems[0].where == "layout"
    assert planned(tmp_path, alpha=0) == {"layout": "column"}


@pytest.mark.parametrize("rules", [{"restore": [1, 2]}, {"alpha": 0.5}, {"alpha": 1}])
def test_texts_in_the_metadata_of_other_models_are_the_posttrained_sides(
    tmp_path: Path, rules: dict[str, object]
) -> None:
    post = {"training_args": '{"lr": 1e-5}', "tags": '["chat"]'}
    write(tmp_path, {"training_args": "{}", "tags": '["base"]', "title": "a base"}, post)
    assert planned(tmp_path, **rules) == post
    assert not plan_of(tmp_path, **rules).resharded


def test_a_blended_tensor_whose_metadata_differ_is_refused(tmp_path: Path) -> None:
    key = f"{UP.format(1)}.weight"
    write(tmp_path, {key: "a"}, {key: "b"})
    with refused(PlanError, "different-metadata"):
        plan_of(tmp_path, alpha=0.5)
    assert planned(tmp_path, restore=[1, 1]) == {key: "a"}


def test_metadata_are_in_every_written_file_and_verified(tmp_path: Path) -> None:
    write(tmp_path, {"layout": "é"}, {"layout": "é"})
    sides = {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post")}
    merge({**sides, "restore": [1, 2], "max_shard_size": "2KB"}, tmp_path / "out", fsync=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert header["__metadata__"] == {"layout": "é", "format": "pt"}
    assert verify(tmp_path / "out").against_sources
