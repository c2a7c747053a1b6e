"""Merges of GGUF files: blocks byte for byte, everything else the post-trained file's, as the gguf package reads it."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import OutputError, PlanError, VerificationError
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.export import export_mergekit
from slrmerge.merging.plan.planner import plan
from slrmerge.merging.verify import verify
from tests.gguf_files import read_gguf_back, write_gguf
from tests.merging.faults import Recorder, Stop, kept_pieces, stop
from tests.problems import refused

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]


def pair_of(folder: Path, kind: str = "Q8_0", **options: Any) -> dict[str, str]:
    """The sources of a recipe for two files beside each other in `folder`."""
    for side in ("pre", "post"):
        write_gguf(folder / f"{side}.gguf", side, kind, values={"general.name": side}, **options)
    return {"pretrained": str(folder / "pre.gguf"), "posttrained": str(folder / "post.gguf")}


def mixed(folder: Path, *layers: int) -> dict[str, tuple[str, bytes]]:
    """The pre-trained tensors of `layers`, and the post-trained ones of everything else."""
    pre, post = read_gguf_back(folder / "pre.gguf"), read_gguf_back(folder / "post.gguf")
    inside = tuple(f"blk.{layer}." for layer in layers)
    return {name: (pre if name.startswith(inside) else post)[name] for name in post}


@pytest.mark.parametrize("kind", KINDS)
def test_restored_layers_are_the_pretrained_blocks_and_the_rest_the_posttrained_file(tmp_path: Path, kind: str) -> None:
    merge({**pair_of(tmp_path, kind), "restore": [1, 2]}, tmp_path / "out")
    assert read_gguf_back(tmp_path / "out" / "post.gguf") == mixed(tmp_path, 1, 2)
    names = {"post.gguf", "README.md", "slrmerge.json", "slrmerge.yaml"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    before, after = (path.read_bytes() for path in (tmp_path / "post.gguf", tmp_path / "out" / "post.gguf"))
    data_start = GGUFReader(tmp_path / "post.gguf").data_offset
    assert len(after) == len(before)
    assert after[:data_start] == before[:data_start]
    assert verify(tmp_path / "out").against_sources


def test_what_lies_between_tensors_is_the_post_trained_files(tmp_path: Path) -> None:
    recipe = pair_of(tmp_path, "F32", more={"odd": (3,), "odder": (5,)})
    post = open_checkpoint(tmp_path / "post.gguf")
    shard = post.shards["post.gguf"]
    content = bytearray((tmp_path / "post.gguf").read_bytes())
    gap = shard.data_start + post["odd"].end
    content[gap : gap + 20] = b"between two tensors!"
    (tmp_path / "post.gguf").write_bytes(content)
    merge({**recipe, "tensors": [{"match": "odd*", "alpha": 1}]}, tmp_path / "out")
    written = (tmp_path / "out" / "post.gguf").read_bytes()
    assert written[gap : gap + 20] == b"between two tensors!"
    assert verify(tmp_path / "out").against_sources


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_soup_is_computed_in_float32_and_rounded_once(tmp_path: Path, kind: str) -> None:
    merge({**pair_of(tmp_path, kind), "alpha": 0.25}, tmp_path / "out")
    files = (tmp_path / "pre.gguf", tmp_path / "post.gguf", tmp_path / "out" / "post.gguf")
    pre, post, out = (read_gguf_back(path) for path in files)
    for name, (dtype, data) in out.items():
        p, q = (as_float32(dtype, side[name][1]) for side in (pre, post))
        expected = np.float32(0.25) * p + np.float32(0.75) * q
        step = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
        np.testing.assert_allclose(as_float32(dtype, data), expected, rtol=step, atol=1e-6)
        assert data != post[name][1]


def as_float32(dtype: str, data: bytes) -> Any:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4")


def test_the_parts_of_a_split_model_are_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "pre.gguf", "pre")
    write_gguf(tmp_path / "post" / "post.gguf", "post", parts=3)
    write_gguf(tmp_path / "post.gguf", "post")
    sources = {"pretrained": str(tmp_path / "pre.gguf"), "posttrained": str(tmp_path / "post")}
    merge({**sources, "restore": [0, 1]}, tmp_path / "out")
    parts = [f"post-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == parts
    assert read_gguf_back(*(tmp_path / "out" / part for part in parts)) == mixed(tmp_path, 0, 1)
    assert verify(tmp_path / "out").against_sources
    merge({**sources, "posttrained": str(tmp_path / "out"), "restore": [3, 3]}, tmp_path / "more")
    assert read_gguf_back(*(tmp_path / "more" / part for part in parts)) == mixed(tmp_path, 0, 1, 3)


def test_files_larger_than_the_shards_of_safetensors_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("slrmerge.recipe.model", "slrmerge.merging.plan.gguf"):
        monkeypatch.setattr(f"{module}.DEFAULT_SHARD_BYTES", 100)
    recipe = {**pair_of(tmp_path), "restore": [0, 0], "max_shard_size": 100}
    (shard,) = plan(recipe).shards
    assert shard.name == "post.gguf"


def test_a_licence_in_a_folder_that_was_named_is_copied(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_gguf(tmp_path / side / "model.gguf", side)
    (tmp_path / "post" / "LICENSE").write_text("terms")
    merge(
        {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), "restore": [0, 0]}, tmp_path / "h"
    )
    assert (tmp_path / "h" / "LICENSE").read_text() == "terms"


def test_a_plan_is_picklable_and_says_what_the_types_are(tmp_path: Path) -> None:
    planned = plan({**pair_of(tmp_path, "Q4_0"), "restore": [1, 1]})
    assert pickle.loads(pickle.dumps(planned)) == planned
    origins = json.loads(json.dumps(planned.to_dict()))["tensors"]
    assert origins["blk.1.attn_q.weight"]["dtype"] == "Q4_0"
    assert origins["blk.1.attn_q.weight"]["shape"] == [32, 32]


def test_a_merge_replaces_an_older_one_and_no_other_folder(tmp_path: Path) -> None:
    sources = pair_of(tmp_path)
    merge({**sources, "restore": [1, 1]}, tmp_path / "out")
    with refused(OutputError, "output-exists"):
        merge({**sources, "restore": [2, 2]}, tmp_path / "out")
    merge({**sources, "restore": [2, 2]}, tmp_path / "out", overwrite=True)
    assert read_gguf_back(tmp_path / "out" / "post.gguf") == mixed(tmp_path, 2)
    write_gguf(tmp_path / "mine" / "mine.gguf", 1)
    with refused(OutputError, "output-not-replaceable"):
        merge({**sources, "restore": [2, 2]}, tmp_path / "mine", overwrite=True)


def test_the_output_may_be_beside_the_sources_and_not_around_them(tmp_path: Path) -> None:
    sources = pair_of(tmp_path / "models")
    recipe = {**sources, "restore": [1, 1]}
    merge(recipe, tmp_path / "models" / "out")
    with refused(OutputError, "output-overlaps"):
        merge(recipe, tmp_path / "models", overwrite=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "post.gguf").symlink_to(tmp_path / "models" / "post.gguf")
    with refused(OutputError, "output-overlaps"):
        linked = {**recipe, "posttrained": str(tmp_path / "linked" / "post.gguf")}
        merge(linked, tmp_path / "linked", overwrite=True)


def test_a_stopped_merge_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", 8 << 10)
    recipe = {**pair_of(tmp_path, "F32"), "restore": [1, 2]}
    with pytest.raises(Stop) as caught:
        merge(recipe, tmp_path / "out", threads=1, progress=Recorder(9, stop))
    kept = kept_pieces(caught.value)
    assert kept is not None
    assert 0 < kept[0] < kept[1]
    assert merge(recipe, tmp_path / "out").resumed_pieces == kept[0]
    assert read_gguf_back(tmp_path / "out" / "post.gguf") == mixed(tmp_path, 1, 2)
    assert verify(tmp_path / "out").against_sources


def test_an_altered_tensor_is_named(tmp_path: Path) -> None:
    merge({**pair_of(tmp_path), "restore": [1, 2]}, tmp_path / "out")
    path = tmp_path / "out" / "post.gguf"
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.2.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset] ^= 1
    path.write_bytes(content)
    with refused(VerificationError, "file-altered") as caught:
        verify(tmp_path / "out")
    assert "blk.2.ffn_up.weight" in caught.value.problems[0].what


def test_sources_that_moved_are_named_to_verify(tmp_path: Path) -> None:
    merge({**pair_of(tmp_path), "restore": [1, 2]}, tmp_path / "out")
    (tmp_path / "pre.gguf").rename(tmp_path / "moved.gguf")
    assert not verify(tmp_path / "out").against_sources
    assert verify(tmp_path / "out", pretrained=tmp_path / "moved.gguf").against_sources
    write_gguf(tmp_path / "moved.gguf", "other", values={"general.name": "pre"})
    with refused(VerificationError, "sources-differ"):
        verify(tmp_path / "out", pretrained=tmp_path / "moved.gguf")


def test_a_recipe_for_safetensors_merges_gguf_files_with_other_sources(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("pretrained: pre.gguf\nposttrained: post.gguf\nrestore: [2, 3]\n")
    pair_of(tmp_path)
    merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert read_gguf_back(tmp_path / "out" / "post.gguf") == mixed(tmp_path, 2, 3)


def test_the_card_names_both_files_and_runs_the_output_in_llama_cpp(tmp_path: Path) -> None:
    planned = plan({**pair_of(tmp_path), "restore": [1, 2]})
    execute(planned, tmp_path / "my out")
    card = (tmp_path / "my out" / "README.md").read_text()
    assert "transformers" not in card
    assert "llama-server --model 'my out/post.gguf'" in card
    execute(planned, tmp_path / "pushed", name="me/hybrid")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "llama-server --hf-repo me/hybrid --hf-file post.gguf" in card


def test_a_gguf_merge_has_no_mergekit_config(tmp_path: Path) -> None:
    with refused(PlanError, "gguf-mergekit"):
        export_mergekit(plan({**pair_of(tmp_path), "restore": [1, 2]}))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    ("name", "fits"),
    [("llama:8b.gguf", False), ("a\\b.gguf", False), ("a\udce9.gguf", True), ("\x1b[31m\u202e\n.gguf", True)],
)
def test_a_file_of_any_name_is_merged_or_refused_before_anything_is_written(
    tmp_path: Path, name: str, fits: bool
) -> None:
    sources = pair_of(tmp_path)
    recipe = {**sources, "posttrained": str((tmp_path / "post.gguf").rename(tmp_path / name)), "restore": [1, 2]}
    if fits:
        merge(recipe, tmp_path / "out")
        assert verify(tmp_path / "out").against_sources
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.replace("\n", "").isprintable()
    else:
        with refused(PlanError, "invalid-name"):
            merge(recipe, tmp_path / "out")
