"""Checkpoints, recipes, manifests, results, samples and questions from others."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import OptionError, OutputError, SlrmergeError, VerificationError
from slrmerge.evaluation.output import claim
from slrmerge.evaluation.questions import parse_questions, read_data
from slrmerge.evaluation.samples import Answer, SampleFile, SampleKey, Settings
from slrmerge.evaluation.tasks import TASKS
from slrmerge.merging.executor import merge
from slrmerge.merging.finding import find_search_result
from slrmerge.merging.plan.planner import plan
from slrmerge.merging.plan.summary import describe_plan
from slrmerge.merging.verify import verify
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.results_folder import read_result
from tests.checkpoints import llama_config, llama_tensors, raw_file, write_checkpoint
from tests.conftest import Pair
from tests.fuzz.damage import RAW, YAML_ONLY, damaged, damaged_bytes, fuzzed
from tests.gguf_files import write_gguf
from tests.merging.test_manifest import signed
from tests.problems import refused

CONFIG = llama_config(
    vocab_size=16,
    rope_scaling={"factor": 2.0},
    torch_dtype="float32",
    auto_map={"AutoModel": "x.Y"},
    text_config={"a": 1},
)
RECIPE = {
    "pretrained": "./pre",
    "posttrained": "./post",
    "restore": [[0, 1], [3, 3]],
    "alpha": 0.5,
    "layers": [{"range": [0, 4], "alpha": [0.1, 0.9], "modules": ["mlp"]}],
    "tensors": [{"match": "lm_head.*", "alpha": 1}],
    "dtype": "float32",
    "max_shard_size": "5GB",
}


def mergekit(folder: Path) -> dict[str, Any]:
    pre, post = ({"model": str(folder / side), "layer_range": [0, 6]} for side in ("pre", "post"))
    weights = {"weight": [0.1, {"filter": "mlp", "value": [0.2, 1]}], "normalize": True}
    return {
        "merge_method": "linear",
        "base_model": post["model"],
        "slices": [{"sources": [{**pre, "parameters": weights}, {**post, "parameters": {"weight": 0.5}}]}],
        "dtype": "float32",
        "tokenizer_source": "base",
    }


def attempt(use: Callable[[], object]) -> None:
    """Nothing but a SlrmergeError may be raised, and it can be printed."""
    try:
        use()
    except OptionError:
        raise  # a mistake of the test
    except SlrmergeError as error:
        str(error).encode("utf-8", "replace")


@fuzzed
@given(data=st.data())
def test_headers(tmp_path: Path, data: st.DataObject) -> None:
    entries = {"__metadata__": {"format": "pt"}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    header = data.draw(damaged_bytes(damaged(entries)))
    path = tmp_path / "m" / "model.safetensors"
    if not path.parent.exists():
        write_checkpoint(path.parent, llama_tensors(0))
    path.write_bytes(raw_file(header, b"xx"))
    attempt(lambda: open_folder(path.parent))


@fuzzed
@given(data=st.data())
def test_indexes(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        write_checkpoint(folder, llama_tensors(0), shards=2)
        shutil.copy(folder / "model.safetensors.index.json", tmp_path / "index")
    index = json.loads((tmp_path / "index").read_bytes())
    (folder / "model.safetensors.index.json").write_bytes(data.draw(damaged_bytes(damaged(index))))
    attempt(lambda: open_folder(folder))


NUMBERS = [0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@fuzzed
@given(data=st.data())
def test_gguf_files(tmp_path: Path, data: st.DataObject) -> None:
    for side in ("pre", "post"):
        if not (tmp_path / f"{side}.gguf").exists():
            values = {
                "a": ["b", "c"],
                "llama.list": [1, 2],
                "split.count": 1,
                "general.alignment": 32,
                "llama.text": "d",
            }
            write_gguf(tmp_path / f"{side}.gguf", side, layers=1, values=values)
            (tmp_path / f"{side}.valid").write_bytes((tmp_path / f"{side}.gguf").read_bytes())
    content = bytearray((tmp_path / "post.valid").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)) | st.integers(0, 1500))
        if data.draw(st.booleans()):
            number = data.draw(st.sampled_from(NUMBERS) | st.integers(0, 300))
            content[start : start + 8] = number.to_bytes(8, "little")[: data.draw(st.sampled_from([1, 4, 8]))]
        else:
            content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    (tmp_path / "post.gguf").write_bytes(content)
    recipe = {"pretrained": str(tmp_path / "pre.gguf"), "posttrained": str(tmp_path / "post.gguf"), "restore": [0, 0]}

    def use() -> None:
        list(describe_plan(plan(recipe)))
        merge(recipe, tmp_path / "out", overwrite=True, fsync=False)
        verify(tmp_path / "out")

    attempt(use)


@fuzzed
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "README.md"])
def test_side_files_of_a_merge(pair: Pair, data: st.DataObject, name: str) -> None:
    front = {"license": "mit", "language": ["en"], "base_model": "org/base"}
    content = data.draw(damaged_bytes(damaged(front if name == "README.md" else CONFIG)))
    (pair.folder / "post" / name).write_bytes(b"---\n" + content + b"\n---\n" if name == "README.md" else content)
    shutil.rmtree(pair.out, ignore_errors=True)
    attempt(lambda: merge(pair.recipe(restore=[0, 1], dtype="bfloat16"), pair.out, allow_code=True, fsync=False))


@pytest.mark.parametrize("value", [[], {}, "x", 10**400, -1, True, None], ids=lambda value: repr(value)[:5])
def test_configs_with_a_value_of_another_type(pair: Pair, value: object) -> None:
    path = pair.folder / "post" / "config.json"
    for key in (*CONFIG, "tie_word_embeddings", "num_experts", "layer_types", "quantization_config"):
        path.write_text(json.dumps({**CONFIG, key: value}))
        attempt(lambda: list(describe_plan(pair.plan(restore=[0, 1]))))


@fuzzed
@given(data=st.data())
def test_recipes(pair: Pair, data: st.DataObject) -> None:
    path = pair.folder / "recipe.yaml"
    path.write_bytes(data.draw(damaged_bytes(damaged(RECIPE, *YAML_ONLY))))
    attempt(lambda: list(describe_plan(plan(load_recipe(path)))))


@fuzzed
@given(data=st.data())
def test_mergekit_configs(pair: Pair, data: st.DataObject) -> None:
    path = pair.folder / "recipe.yaml"
    path.write_bytes(data.draw(damaged_bytes(damaged(mergekit(pair.folder), *YAML_ONLY))))
    attempt(lambda: list(describe_plan(plan(load_recipe(path)))))


@fuzzed
@given(text=st.text("-:?[]{}&*!|>'\"%@`#,<~ \n\t\x00a1.é", max_size=60))
def test_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    attempt(lambda: load_recipe(path))


@fuzzed
@given(data=st.data(), is_signed=st.booleans())
def test_manifests(pair: Pair, data: st.DataObject, is_signed: bool) -> None:
    path = pair.out / "slrmerge.json"
    if not path.exists():
        merge(pair.recipe(restore=[0, 1]), pair.out)
        shutil.copy(path, pair.folder / "manifest")
    manifest = json.loads((pair.folder / "manifest").read_bytes())
    raw = data.draw(damaged_bytes(damaged(manifest)))
    with suppress(ValueError, RecursionError):
        content = json.loads(raw) if is_signed else None
        if isinstance(content, dict):
            raw = signed(content)
    path.write_bytes(raw)
    attempt(lambda: verify(pair.out))


def test_a_manifest_with_a_size_that_no_file_has_takes_no_memory(pair: Pair) -> None:
    merge(pair.recipe(restore=[0, 1]), pair.out)
    path = pair.out / "slrmerge.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["config.json"]["bytes"] = 2**63
    path.write_bytes(signed(manifest))
    with refused(VerificationError, "file-altered"):
        verify(pair.out)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b", ""])
def test_a_manifest_names_files_of_its_folder_only(pair: Pair, name: str) -> None:
    merge(pair.recipe(restore=[0, 1]), pair.out)
    path = pair.out / "slrmerge.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = {"bytes": 1, "digest": "xxh3_128:0"}
    path.write_bytes(signed(manifest))
    with refused(VerificationError, "manifest-altered"):
        verify(pair.out)


@fuzzed
@given(data=st.data(), name=st.sampled_from(["summary.json", "results.csv", "slr.yaml"]))
def test_search_results(tiny_search: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = tmp_path / "search"
    shutil.copytree(tiny_search / "search", folder, dirs_exist_ok=True)
    if name == "summary.json":
        content = data.draw(damaged_bytes(damaged(json.loads((folder / name).read_bytes()))))
    elif name == "results.csv":
        lines = [line.split(",") for line in (folder / name).read_text().splitlines()]
        for _ in range(data.draw(st.integers(1, 3))):
            line = data.draw(st.sampled_from(lines))
            line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.sampled_from([*RAW, ""]))
        text = "\n".join(",".join(line) for line in lines)
        content = data.draw(damaged_bytes(st.just(text)))
    else:
        content = data.draw(damaged_bytes(damaged({**RECIPE, "alpha": None}, *YAML_ONLY)))
    (folder / name).write_bytes(content)

    def use() -> None:
        with suppress(SlrmergeError):
            find_search_result(load_recipe(folder / "slr.yaml"))
        result = read_result(folder)
        result.summary()
        result.to_rows()
        result._repr_html_()

    attempt(use)


SAMPLE = {
    "model": "m", "prompt": "p", "sample": 0, "seed": 1, "text": "t", "finish_reason": "stop",
    "settings": {"model_id": "m", "temperature": 1.0, "min_p": 0.1, "max_tokens": 5, "seed": 0},
}  # fmt: skip


@fuzzed
@given(data=st.data())
def test_samples(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "samples.jsonl"
    content = data.draw(damaged_bytes(damaged(SAMPLE))) + data.draw(st.sampled_from([b"", b"\n"]))
    path.write_bytes(content)

    def use() -> None:
        try:
            with SampleFile(path) as file:
                file.append(SampleKey("new", "p", 0), Answer("a", "stop"), Settings("m", 1.0, 0.1, 5))
                kept = len(file)
        except OutputError:
            assert path.read_bytes() == content
            raise
        with SampleFile(path) as file:
            assert len(file) == kept

    attempt(use)


@fuzzed
@given(content=damaged_bytes(damaged({"slrmerge": "1", "task": "creative"})))
def test_summaries_of_evaluations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluation.json").write_bytes(content)
    attempt(lambda: claim(tmp_path, "creative"))


@fuzzed
@given(
    content=damaged_bytes(damaged([{"id": "a", "prompt": "b", "answer": "1", "answers": ["c", ["d", "e"]]}]))
    | damaged_bytes(st.text('question,answers"|[]{}:\n\r\t 1', max_size=50)),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".txt"]),
    task=st.sampled_from(sorted(TASKS)),
)
def test_questions(tmp_path: Path, content: bytes, suffix: str, task: str) -> None:
    path = tmp_path / f"questions{suffix}"
    path.write_bytes(content)

    def use() -> None:
        for question in parse_questions(TASKS[task]().question, read_data(path).rows):
            assert question.text.strip()
            assert question.text.encode()

    attempt(use)
