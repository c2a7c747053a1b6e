"""A merge writes the planned bytes and nothing else, the same every time, and syncs them to the disk."""

import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from slrmerge.checkpoint.header import DTYPE_BITS
from slrmerge.errors import OptionError, OutputError
from slrmerge.io.output_folder import staging_folder
from slrmerge.merging import stream
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.verify import verify
from slrmerge.recipe.load import load_recipe
from slrmerge.recipe.model import Recipe
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, read_back, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import Recorder, leftovers, snapshot, write_files
from tests.problems import refused

MERGE = "import sys, slrmerge; slrmerge.merge(sys.argv[1], sys.argv[2], overwrite=True)"
NO_FSYNC = MergeOptions(fsync=False)


def expected(pair: Pair, layers: set[int]) -> dict[str, Tensor]:
    """The pre-trained side's tensors in `layers`, the post-trained side's everywhere else."""
    restored = tuple(f"model.layers.{k}." for k in layers)
    return {name: (pair.pre if name.startswith(restored) else pair.post)[name] for name in pair.post}


@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
@pytest.mark.parametrize("size", ["5GB", "2KB", 128])
@pytest.mark.parametrize(
    ("restore", "layers"), [([2, 3], {2, 3}), ([[0, 0], [3, 5]], {0, 3, 4, 5}), ([0, 5], {0, 1, 2, 3, 4, 5})]
)
def test_restored_layers_are_the_pretrained_bytes_and_the_rest_the_posttrained(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, restore: list[Any], layers: set[int], size: object, chunk_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    execute(pair.plan(restore=restore, max_shard_size=size), pair.out, options=NO_FSYNC)
    assert read_back(pair.out) == expected(pair, layers)


def test_a_sharded_output_has_numbered_files_and_a_true_index(pair: Pair) -> None:
    execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out)
    names = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert sorted(path.name for path in pair.out.glob("*.safetensors")) == names
    index = json.loads((pair.out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(len(tensor.data) for tensor in pair.post.values())}
    found: dict[str, str] = {}
    for name in names:
        with safe_open(pair.out / name, "numpy") as opened:
            found |= dict.fromkeys(opened.keys(), name)
            assert opened.metadata() == {"format": "pt"}
    assert index["weight_map"] == found


def test_an_output_in_one_file_has_no_index(pair: Pair) -> None:
    execute(pair.plan(restore=[2, 3], dtype="float32"), pair.out)
    weights = sorted(path.name for path in pair.out.iterdir() if path.name.startswith("model"))
    assert weights == ["model.safetensors"]


@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_the_safetensors_library_reads_the_same_tensors(pair: Pair, size: str) -> None:
    import torch

    execute(pair.plan(restore=[2, 3], max_shard_size=size), pair.out)
    wanted = expected(pair, {2, 3})
    for path in pair.out.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                data = torch.frombuffer(bytearray(wanted[name].data), dtype=torch.bfloat16)
                assert torch.equal(opened.get_tensor(name), data.reshape(wanted.pop(name).shape))
    assert not wanted


def test_config_tokenizer_and_template_are_the_posttrained_sides(pair: Pair) -> None:
    mine = {"config.json": b'{"num_hidden_layers": 6}', "README.md": b"# theirs", "tokenizer.json": b"[]"}
    write_files(pair.folder / "pre", mine | {"generation_config.json": b"{}"})
    copied = {
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id": 7}',
        "LICENSE": b"be kind",
        "tokenizer_config.json": b"{ }",
    }
    left_behind = {
        "modeling.py": b"import os",
        "optimizer.pt": b"\x80",
        "README.md": b"# theirs",
        ".gitattributes": b"",
    }
    write_files(pair.folder / "post", copied | left_behind)
    result = execute(pair.plan(restore=[2, 3]), pair.out)
    written = snapshot(pair.out) or {}
    for name in ("config.json", "tokenizer.json"):
        copied[name] = (pair.folder / "post" / name).read_bytes()
    assert {name: written.get(name) for name in copied} == copied
    weights = {path.name for path in (pair.folder / "post").glob("model[.-]*")}
    assert written.keys() - copied.keys() == {"README.md", "slrmerge.json", "slrmerge.yaml", *weights}
    assert result.files.keys() == written.keys()


def test_the_result_describes_the_files_on_the_disk(pair: Pair) -> None:
    plan, recorder = pair.plan(restore=[2, 3], max_shard_size="2KB"), Recorder()
    result = execute(plan, pair.out, progress=recorder)
    written = snapshot(pair.out) or {}
    once = {name: xxhash.xxh3_128_digest(raw) for name, raw in written.items()}  # each is a single piece
    digests = {name: (len(raw), f"xxh3_128:{xxhash.xxh3_128_hexdigest(once[name])}") for name, raw in written.items()}
    assert result.files == digests
    assert result.output_bytes == sum(map(len, written.values()))
    assert (result.folder, result.resumed_pieces, result.notes) == (pair.out, 0, plan.notes)
    assert "\n" not in repr(result)
    weights = sum(shard.file_bytes for shard in plan.shards)
    assert (recorder.started, recorder.advanced, recorder.said) == ([("merging", weights)], weights, [])
    assert leftovers(pair.out) == []


def test_the_recipe_as_run_gives_the_same_weights_again(pair: Pair) -> None:
    first = merge(pair.recipe(restore=[[1, 1], [4, 5]], max_shard_size="2KB"), pair.folder / "a" / "first")
    again = merge(load_recipe(pair.folder / "a" / "first" / "slrmerge.yaml"), pair.folder / "again")
    weights = {name: file for name, file in first.files.items() if name.startswith("model")}
    assert {name: file for name, file in again.files.items() if name.startswith("model")} == weights
    assert len(weights) == 4


def test_the_recipe_as_run_contains_overrides(pair: Pair) -> None:
    file = pair.recipe_file(restore=[2, 3])
    merge(load_recipe(file, max_shard_size="3KB", dtype="bfloat16"), pair.out)
    assert yaml.safe_load((pair.out / "slrmerge.yaml").read_text()) == {
        "pretrained": "../pre",
        "posttrained": "../post",
        "restore": [2, 3],
        "dtype": "bfloat16",
        "max_shard_size": 3000,
    }


def test_the_model_card_inherits_the_licence_and_contains_the_recipe(pair: Pair) -> None:
    theirs = "---\nlicense: llama3.1\nlanguage: [en]\ntags: [theirs]\n---\n# theirs\n"
    write_files(pair.folder / "post", {"README.md": theirs.encode()})
    execute(pair.plan(restore=[2, 3]), pair.out)
    _, front, body = (pair.out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["merge", "slrmerge", "selective-layer-restoration"],
        "license": "llama3.1",
        "language": ["en"],
    }
    assert 'model="hybrid"' in body
    assert f"```yaml\n{(pair.out / 'slrmerge.yaml').read_text()}```\n" in body


def test_the_model_card_loads_the_model_by_its_name(pair: Pair) -> None:
    execute(pair.plan(restore=[2, 3]), pair.out, name="me/hybrid")
    assert 'model="me/hybrid"' in (pair.out / "README.md").read_text()


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(pair: Pair, umask: int, file: int, folder: int) -> None:
    write_files(pair.folder / "post", {"chat_templates/tools.jinja": b"x"})
    (pair.folder / "post" / "config.json").chmod(0o755)
    plan, out = pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.folder / "new" / "hybrid"
    before = os.umask(umask)
    try:
        execute(plan, out)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (out.parent, out, *out.rglob("*"))}
    assert modes == {path: folder if path.is_dir() else file for path in modes}


# what merge accepts


@dataclass
class Choice:
    """What a search selects."""

    recipe: Recipe


@pytest.mark.parametrize(
    "wrap",
    [
        lambda recipe, file: recipe,
        lambda recipe, file: file,
        lambda recipe, file: str(file),
        lambda recipe, file: yaml.safe_load(file.read_text()),
        lambda recipe, file: Choice(recipe),
    ],
    ids=["Recipe", "Path", "str", "dict", "object with a recipe"],
)
def test_merge_accepts_everything_that_names_a_recipe(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any, Path], Any]
) -> None:
    monkeypatch.chdir(pair.folder)
    file = pair.recipe_file(restore=[2, 3])
    merge(wrap(load_recipe(file), file), str(pair.out), fsync=False)
    assert read_back(pair.out) == expected(pair, {2, 3})


@pytest.mark.parametrize("recipe", [None, 3, ["restore"]])
def test_merge_refuses_what_is_not_a_recipe(pair: Pair, recipe: Any) -> None:
    with refused(OptionError, "wrong-type"):
        merge(recipe, pair.out)


def test_merge_refuses_what_is_not_a_pair(pair: Pair) -> None:
    not_a_pair: Any = ("pre", "post")
    with refused(OptionError, "wrong-type"):
        merge(pair.recipe(restore=[2, 3]), pair.out, pair=not_a_pair)


@pytest.mark.parametrize("plan", [None, "recipe.yaml", {"restore": [2, 3]}])
def test_execute_refuses_what_is_not_a_plan(pair: Pair, plan: Any) -> None:
    with refused(OptionError, "wrong-type"):
        execute(plan, pair.out)


def test_merge_accepts_the_open_pair_of_a_recipe(pair: Pair) -> None:
    moved = pair.folder / "moved"
    recipe, opened = pair.recipe(restore=[2, 3], pretrained="./elsewhere"), pair.open()
    merge(recipe, moved, pair=opened, fsync=False)
    assert read_back(moved) == expected(pair, {2, 3})


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({"overwrit": True}, ["unknown-option"]),
        ({"name": "x", "quiet": True}, ["unknown-option"]),
        ({"threads": 0}, ["out-of-range"]),
        ({"threads": -1}, ["out-of-range"]),
        ({"download": "all"}, ["invalid-choice"]),
        ({"threads": 0, "download": "all"}, ["invalid-choice", "out-of-range"]),
    ],
)
def test_invalid_options_are_refused(pair: Pair, options: dict[str, Any], codes: list[str]) -> None:
    with refused(OptionError, *codes) as caught:
        merge(pair.recipe(restore=[2, 3]), pair.out, **options)
    assert {problem.where for problem in caught.value.problems} == options.keys()
    assert not pair.out.exists()


def test_the_signature_of_merge_lists_its_options() -> None:
    names = inspect.signature(merge).parameters.keys()
    assert {each.name for each in fields(MergeOptions)} <= names
    assert "options" not in names


@pytest.mark.parametrize("blend", ["linear", "slerp"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_blend_with_a_value_that_is_not_a_number_is_noted_by_name(
    tmp_path: Path, blend: str, dtype: str | None
) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    norm = post["model.norm.weight"]
    post["model.norm.weight"] = norm._replace(data=b"\xc0\x7f" + norm.data[2:])
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post)
    pair = Pair(tmp_path, pre, post)
    rules = {"blend": blend, "dtype": dtype}
    result = merge(pair.recipe(alpha=0.5, **rules), pair.out, fsync=False)
    assert [note for note in result.notes if "NaN" in note] == [note for note in result.notes if "model.norm" in note]
    assert any("model.norm.weight" in note for note in result.notes)
    kept = [{"match": "model.norm.weight", "alpha": 0}]
    clean = merge(pair.recipe(alpha=0.5, tensors=kept, **rules), pair.out, overwrite=True, fsync=False)
    assert not any("NaN" in note for note in clean.notes)


# the same every time


@pytest.mark.parametrize(
    "rules", [{"restore": [2, 3]}, {"alpha": 0.85, "layers": [{"range": [1, 4], "alpha": [1, 0]}]}]
)
def test_the_output_does_not_depend_on_the_number_of_threads(pair: Pair, rules: dict[str, Any]) -> None:
    recipe = pair.recipe(**rules, max_shard_size="2KB")
    results = [merge(recipe, pair.out, threads=threads, overwrite=threads > 1).files for threads in (1, 2, 3, 50)]
    assert results[1:] == results[:-1]


def test_the_output_does_not_depend_on_hash_seed_folder_order_or_time_zone(pair: Pair) -> None:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="2KB")
    found: list[object] = []
    for seed, zone in (("0", "UTC"), ("1", "Asia/Tokyo")):
        command = [sys.executable, "-c", MERGE, str(recipe), str(pair.out)]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed, "TZ": zone}, check=True)
        found.append(snapshot(pair.out))
        for side in ("pre", "post"):
            config = pair.folder / side / "config.json"
            config.rename(config.with_name("moved")).rename(config)
    assert found[0] == found[1]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], int, tuple[int, int], int]:
    """Two sides with the same shapes and dtypes, their layer count, an interval, and a shard size."""
    layers = draw(st.integers(1, 5))
    inner = draw(
        st.dictionaries(
            st.text("abc.", min_size=1, max_size=6).map(lambda text: f"m{text}".replace(".", ".w").rstrip(".")),
            st.tuples(
                st.sampled_from(sorted(DTYPE_BITS.keys() - {"F4", "F6_E2M3", "F6_E3M2"})),
                st.lists(st.integers(0, 3), max_size=3).filter(lambda shape: shape != [0]),  # a DeepSpeed placeholder
            ),
            min_size=1,
            max_size=4,
        )
    )
    kinds = {f"model.layers.{k}.{name}": kind for k in range(layers) for name, kind in inner.items()}
    kinds["model.embed.weight"] = ("F32", [2, 2])
    sides = [{name: random_tensor(*kind, f"{side}{name}") for name, kind in kinds.items()} for side in ("pre", "post")]
    first = draw(st.integers(0, layers - 1))
    usual = sorted(len(tensor.data) for tensor in sides[0].values())[len(kinds) // 2]
    size = draw(st.integers(max(usual, 1), usual + 200))
    return sides[0], sides[1], layers, (first, draw(st.integers(first, layers - 1))), size


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_any_restoration_of_any_pair_verifies_and_moves_bytes_only(
    made: tuple[dict[str, Tensor], dict[str, Tensor], int, tuple[int, int], int],
) -> None:
    pre, post, layers, (first, last), size = made
    with tempfile.TemporaryDirectory() as name:
        pair = Pair(Path(name), pre, post)
        write_checkpoint(pair.folder / "pre", pre, llama_config(layers=layers))
        write_checkpoint(pair.folder / "post", post, llama_config(layers=layers))
        execute(pair.plan(restore=[first, last], max_shard_size=size), pair.out, options=NO_FSYNC)
        assert read_back(pair.out) == expected(pair, set(range(first, last + 1)))
        assert verify(pair.out).against_sources


# on the disk


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are fsynced from now on, and the names that folders take, in order."""
    steps: list[str] = []
    replace = os.replace

    def noted_sync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        steps.append(f"{path}{' with its journal' if (path / '.slrmerge-journal').exists() else ''}")

    def noted_replace(old: Path, new: Path) -> None:
        steps.append(f"> {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return steps


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell a descriptor's path")


@needs_proc
def test_every_file_and_folder_reaches_the_disk_before_the_target_appears(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(pair.folder / "post", {"chat_templates/tools.jinja": b"x"})
    plan, steps = pair.plan(restore=[2, 3], max_shard_size="2KB"), synced(monkeypatch)
    result = execute(plan, pair.out)
    appears = steps.index(f"> {pair.out}")
    staging = pair.folder / ".hybrid.slrmerge-partial"
    wanted = {str(staging / name) for name in (*result.files, "chat_templates", ".")}
    assert wanted - set(steps[:appears]) == set()
    assert steps[appears - 1] == str(staging)
    assert steps[appears + 1 :] == [str(pair.folder)]


@needs_proc
def test_the_folders_above_a_new_target_reach_the_disk_too(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, steps = pair.plan(restore=[2, 3]), synced(monkeypatch)
    execute(plan, pair.folder / "a" / "b" / "hybrid")
    assert {str(pair.folder), str(pair.folder / "a"), str(pair.folder / "a" / "b")} - set(steps) == set()


@pytest.mark.parametrize("overwrite", [False, True])
def test_without_fsync_nothing_waits_for_the_disk(pair: Pair, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    if overwrite:
        write_files(pair.out, {"config.json": b"{}", "model.safetensors": b""})
    plan = pair.plan(restore=[2, 3], max_shard_size="2KB")
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    execute(plan, pair.out, options=MergeOptions(fsync=False, overwrite=overwrite))
    assert calls == []


def test_a_restoration_needs_neither_torch_nor_numpy(pair: Pair) -> None:
    code = f"import sys; sys.modules.update(torch=None, numpy=None)\n{MERGE}"
    command = [sys.executable, "-c", code, str(pair.recipe_file(restore=[2, 3])), str(pair.out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_merge_leaves_its_sources_alone(pair: Pair) -> None:
    before = [snapshot(pair.folder / side) for side in ("pre", "post")]
    execute(pair.plan(restore=[2, 3]), pair.out)
    shutil.rmtree(pair.out)
    assert [snapshot(pair.folder / side) for side in ("pre", "post")] == before


@pytest.mark.skipif("os.name == 'nt'")
def test_a_merge_of_many_shards_needs_few_descriptors(tmp_path: Path) -> None:
    import resource

    pair = Pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    write_checkpoint(tmp_path / "pre", pair.pre, shards=len(pair.pre))
    write_checkpoint(tmp_path / "post", pair.post, shards=len(pair.post))
    recipe = pair.recipe_file(alpha=0.5, max_shard_size="2KB")
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(recipe), str(pair.out)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert verify(pair.out).against_sources


@pytest.mark.parametrize(
    "names",
    [["Config.json"], ["Slrmerge.json"], ["Model.safetensors.Index.json"], ["LICENSE_\u00e9", "LICENSE_e\u0301"]],
)
@pytest.mark.parametrize("ignores_case", [False, True])
def test_files_that_would_be_one_on_the_disk_are_refused(pair: Pair, names: list[str], ignores_case: bool) -> None:
    write_files(pair.folder / "post", dict.fromkeys(names, b"{}"))
    if ignores_case:
        (pair.folder / staging_folder(pair.out).name.swapcase()).mkdir()  # as such a disk shows the folder itself
        with refused(OutputError, "names-collide"):
            execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, options=NO_FSYNC)
        assert not pair.out.exists()
        assert not staging_folder(pair.out).exists()
    else:
        execute(pair.plan(restore=[2, 3], max_shard_size="2KB"), pair.out, options=NO_FSYNC)
        verify(pair.out)
