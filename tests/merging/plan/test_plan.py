"""The plan as a value: pure, comparable, picklable, and complete before a byte of weights is read."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slrmerge
from slrmerge.checkpoint import files
from slrmerge.errors import PlanError, RecipeError
from slrmerge.merging.executor import execute
from slrmerge.merging.finding import SUMMARY_NAME
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan, plan_merge
from slrmerge.recipe.blend import BLEND_RULES
from tests.checkpoints import llama_config, llama_tensors, random_tensor, safetensors_bytes, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import snapshot
from tests.merging.plan import plan_of, write_pair
from tests.merging.plan.test_findings import SUMMARY
from tests.problems import refused

NO_FSYNC = MergeOptions(fsync=False)


def test_planning_an_open_pair_reads_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, opened = pair.recipe(alpha=0.5, restore=[1, 2], dtype="float32"), pair.open()
    expected = plan_merge(recipe)

    def refusing(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    with monkeypatch.context() as patch:
        for name in ("os.open", "builtins.open", "io.open"):
            patch.setattr(name, refusing)
        planned = plan_merge(recipe, opened)
    assert planned == expected


def test_opening_and_planning_read_headers_and_configs_and_no_weights(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pair.recipe(alpha=0.5, blend="slerp")
    paths = [*pair.folder.glob("*/*.safetensors")]
    headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths]
    reads: list[int] = []
    read_at = files._read_at

    def counting(fd: int, position: int, buffer: memoryview) -> int:
        reads.append(position + len(buffer))
        return read_at(fd, position, buffer)

    monkeypatch.setattr(files, "_read_at", counting)
    plan_merge(recipe)
    assert max(reads) <= max(headers)
    assert sorted(reads)[-len(paths) :] == sorted(headers)


def test_planning_reads_no_weights(pair: Pair) -> None:
    recipe = pair.recipe(alpha=0.5, restore=[1, 2], dtype="float32")
    expected = pair.plan(alpha=0.5, restore=[1, 2], dtype="float32")
    opened = recipe.open_pair()
    weights = list(pair.folder.glob("*/*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        path.unlink()
    planned = plan_merge(recipe, opened)
    assert planned.to_dict() == expected.to_dict()
    assert planned.fingerprint() == expected.fingerprint()


def test_planning_changes_nothing_on_disk(pair: Pair) -> None:
    recipe = pair.recipe(restore=[1, 2])
    before = {path: path.stat().st_mtime_ns for path in pair.folder.rglob("*")}
    plan_merge(recipe).to_dict()
    assert {path: path.stat().st_mtime_ns for path in pair.folder.rglob("*")} == before


def test_the_same_inputs_give_equal_plans(pair: Pair) -> None:
    one, two = pair.plan(restore=[1, 2], alpha=0.3), pair.plan(restore=[1, 2], alpha=0.3)
    assert one == two
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    "other", [{"restore": [1, 3]}, {"alpha": 0.1}, {"dtype": "float16"}, {"max_shard_size": "1KB"}], ids=str
)
def test_another_recipe_gives_another_plan_and_fingerprint(pair: Pair, other: dict[str, object]) -> None:
    one, two = pair.plan(restore=[1, 2]), pair.plan(**{"restore": [1, 2], **other})
    assert one != two
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("file", ["pre/model.safetensors", "post/model-00002-of-00002.safetensors"])
def test_the_fingerprint_changes_with_a_source_files_time(pair: Pair, file: str) -> None:
    before = pair.plan(restore=[1, 2]).fingerprint()
    status = (pair.folder / file).stat()
    os.utime(pair.folder / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_the_fingerprint_changes_with_a_source_files_size(pair: Pair) -> None:
    path = pair.folder / "pre/model.safetensors"
    before, status = pair.plan(restore=[1, 2]).fingerprint(), path.stat()
    path.write_bytes(safetensors_bytes(pair.pre, {"format": "pt", "more": "text"}))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_the_fingerprint_changes_with_a_file_put_in_anothers_place(pair: Pair) -> None:
    path = pair.folder / "pre/model.safetensors"
    before, status = pair.plan(restore=[1, 2]).fingerprint(), path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_a_plan_can_be_printed_as_json(pair: Pair) -> None:
    content = json.loads(json.dumps(pair.plan(restore=[1, 2]).to_dict()))
    assert content["recipe"] == {"pretrained": "./pre", "posttrained": "./post", "restore": [1, 2]}
    assert content["tensors"]["model.layers.1.mlp.up_proj.weight"] == {
        "file": "model-00001-of-00002.safetensors",
        "dtype": "BF16",
        "shape": [16, 8],
        "alpha": 1.0,
        "kind": "copy",
        "pretrained": "model.layers.1.mlp.up_proj.weight",
        "posttrained": None,
    }
    assert content["tensors"].keys() == pair.post.keys()
    assert content["output_bytes"] == sum(content["shards"].values()) + sum(content["files"].values())
    assert (content["resharded"], content["unchanged_shards"]) == ("", ["model-00002-of-00002.safetensors"])


def test_a_restoration_reads_one_side_of_each_tensor_and_a_blend_both(pair: Pair) -> None:
    total = sum(len(tensor.data) for tensor in pair.post.values())
    headers = headers_of(pair)
    restored, blended = pair.plan(restore=[1, 2]), pair.plan(alpha=0.5)
    assert (restored.read_bytes, restored.needs_arithmetic) == (total + headers, False)
    assert (blended.read_bytes, blended.needs_arithmetic) == (2 * total + headers, True)
    cast = pair.plan(restore=[1, 2], dtype="float32")
    assert (cast.read_bytes, cast.needs_arithmetic) == (total, True)


def headers_of(pair: Pair) -> int:
    """The bytes of the headers of the post-trained shards, which are kept."""
    files = sorted((pair.folder / "post").glob("*.safetensors"))
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)


@pytest.mark.parametrize("blend", BLEND_RULES)
def test_a_merge_reads_as_many_bytes_as_planned(pair: Pair, monkeypatch: pytest.MonkeyPatch, blend: str) -> None:
    """Every pass counts: a rule that needs sums over whole tensors reads them twice."""
    planned = pair.plan(alpha=0.5, blend=blend)
    total = sum(len(tensor.data) for tensor in pair.post.values())
    assert planned.read_bytes == 2 * total * BLEND_RULES[blend].passes + headers_of(pair)
    read = 0
    read_at = files._read_at

    def counting(fd: int, position: int, buffer: memoryview) -> int:
        nonlocal read
        count = read_at(fd, position, buffer)
        read += count
        return count

    monkeypatch.setattr(files, "_read_at", counting)
    execute(planned, pair.out, options=MergeOptions(fsync=False, threads=1))
    assert read == planned.read_bytes + sum(file.file_bytes for file in planned.files if file.source)


def test_the_passes_of_a_merge_are_those_of_its_rules() -> None:
    assert {name: rule.passes for name, rule in BLEND_RULES.items() if rule.sums} == {"slerp": 2}
    assert BLEND_RULES["linear"].passes == 1


# a value

PLANS: dict[str, dict[str, Any]] = {
    "restored": {"restore": [1, 2]},
    "sharded": {"restore": [[0, 0], [3, 5]], "max_shard_size": "2KB"},
    "slerp": {"alpha": 0.5, "blend": "slerp"},
    "cast": {"alpha": 0.25, "dtype": "float32"},
    "by layers": {"layers": [{"range": [1, 4], "alpha": [1, 0], "modules": ["mlp"]}], "tokenizer": "pretrained"},
}


@pytest.mark.parametrize("rules", PLANS.values(), ids=PLANS)
def test_a_pickled_plan_is_equal_and_gives_the_same_files(pair: Pair, rules: dict[str, Any]) -> None:
    planned = pair.plan(**rules)
    first = execute(planned, pair.folder / "a" / "hybrid", options=NO_FSYNC)
    again: MergePlan = pickle.loads(pickle.dumps(planned))
    assert again == planned
    assert again.fingerprint() == planned.fingerprint()
    second = execute(again, pair.folder / "b" / "hybrid", options=NO_FSYNC)
    assert second.files == first.files
    assert snapshot(second.folder) == snapshot(first.folder)


def test_a_pickled_plan_executes_in_another_process(pair: Pair) -> None:
    planned = pair.plan(alpha=0.5, blend="slerp")
    (pair.folder / "plan.pickle").write_bytes(pickle.dumps(planned))
    code = "import pickle, sys, slrmerge; slrmerge.execute(pickle.load(open(sys.argv[1], 'rb')), sys.argv[2])"
    elsewhere = pair.folder / "elsewhere" / "hybrid"
    command = [sys.executable, "-W", "ignore", "-c", code, str(pair.folder / "plan.pickle"), str(elsewhere)]
    subprocess.run(command, check=True)
    execute(planned, pair.folder / "here" / "hybrid", options=NO_FSYNC)
    assert snapshot(elsewhere) == snapshot(pair.folder / "here" / "hybrid")


def test_the_pickled_plan_of_a_mergekit_config_with_the_result_of_a_search_is_equal(pair: Pair) -> None:
    config = {"merge_method": "slerp", "base_model": "post", "models": [{"model": "pre"}], "parameters": {"t": 0.5}}
    for name in ("pre", "post"):
        config = json.loads(json.dumps(config).replace(f'"{name}"', json.dumps(str(pair.folder / name))))
    planned = plan_merge(config)
    assert pickle.loads(pickle.dumps(planned)) == planned


@pytest.mark.parametrize("rules", PLANS.values(), ids=PLANS)
def test_the_repr_of_a_plan_is_one_line(pair: Pair, rules: dict[str, Any]) -> None:
    planned = pair.plan(**rules)
    assert "\n" not in repr(planned)
    assert len(repr(planned)) < 400
    assert all(kind in repr(planned) for kind in planned.kinds)


def test_plan_adds_the_result_of_the_search_to_plan_merge(pair: Pair) -> None:
    own = {"label": "slr", "restore": [1, 2], "quality": 1.0, "diversity": 1.0, "exact": True}
    summary = SUMMARY | {"selected": {"slr": own}}
    (pair.folder / SUMMARY_NAME).write_text(json.dumps(summary))
    file = pair.recipe_file(restore=[1, 2])
    assert plan_merge(file).finding is None
    finding = plan(file).finding
    assert finding is not None
    assert finding.own.label == "slr"
    assert slrmerge.plan is plan


def test_a_recipe_without_rules_has_nothing_to_merge(pair: Pair) -> None:
    with refused(RecipeError, "nothing-to-merge"):
        plan_merge(pair.recipe_file())


# what is refused or noted


def test_configs_that_differ_are_noted_where_layers_would_compute_otherwise(tmp_path: Path) -> None:
    write_pair(
        tmp_path,
        llama_tensors("pre"),
        llama_tensors("post"),
        pre_config=llama_config(
            eos_token_id=1, rope_theta=5, dtype="float32", transformers_version="4", use_cache=True
        ),
        post_config=llama_config(eos_token_id=2, max_position_embeddings=9, _name_or_path="x", rope_theta=7),
    )
    (note,) = plan_of(tmp_path, restore=[1, 2]).notes
    assert "rope_theta" in note
    assert not any(key in note for key in ("eos_token_id", "max_position_embeddings", "dtype", "use_cache"))


def test_everything_that_does_not_fit_is_reported_together_with_the_recipe_file(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    pre["model.norm.weight"] = random_tensor("BF16", (9,), "pre")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post)
    pair = Pair(tmp_path, pre, post)
    with refused(PlanError, "layer-out-of-range", "layer-out-of-range", "different-shapes") as caught:
        pair.plan(restore=[[0, 1], [4, 6]], alpha=1, layers=[{"range": [0, 9], "alpha": 1}])
    where = tmp_path / "recipe.yaml"
    assert [problem.where for problem in caught.value.problems] == [
        f"{where}: $.restore[1]",
        f"{where}: $.layers[0].range",
        "model.norm.weight",
    ]


def test_models_of_different_depth_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre", layers=8), llama_config(layers=8))
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=6))
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path, restore=[1, 2])
    found = [(problem.code, problem.where) for problem in caught.value.problems]
    assert ("different-depth", f"{tmp_path}/pre") in found
