"""mergekit configs on the command line: merged, verified, exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.checkpoint.side_files import INDEX_NAME, MANIFEST_NAME
from tests.checkpoints import llama_config, llama_tensors, read_back, write_checkpoint
from tests.cli import refusal, run
from tests.conftest import Pair
from tests.merging.faults import snapshot, write_files

RESTORATION = """\
# layers 0 and 1, and with them the embeddings
merge_method:   passthrough
base_model: post
slices:
- sources: [{model: pre, layer_range: [0, 2]}]
- sources: [{model: post, layer_range: [2, 6]}]
"""
SLERP = """\
merge_method: slerp
base_model: post
models: [{model: post}, {model: pre}]
parameters: {t: [{filter: self_attn, value: [0, 1]}, {value: 0.3}]}
dtype: float32
out_dtype: bfloat16
"""
MEAN = """\
merge_method: linear
models:
- {model: post, parameters: {weight: 3}}
- {model: pre, parameters: {weight: 1}}
"""
CONFIGS = {"a restoration": RESTORATION, "a slerp": SLERP, "a mean": MEAN}


@pytest.fixture
def here(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The pair, from whose folder everything is run."""
    monkeypatch.chdir(pair.folder)
    return pair


def done(*arguments: object) -> str:
    """The stdout of a command that succeeds."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def merge(config: str, out: str = "hybrid", *options: object, name: str = "config.yml") -> str:
    Path(name).write_text(config)
    return done(name, "--out", out, "--no-fsync", *options)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in (snapshot(folder) or {}).items() if name.endswith(".safetensors")}


def front_matter(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def pinned(value: Any, folder: Path) -> Any:
    """A config with its two models as absolute folders."""
    if isinstance(value, dict):
        return {key: pinned(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [pinned(each, folder) for each in value]
    return str(folder / value) if value in ("pre", "post") else value


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_contains_its_config_with_both_models_pinned(here: Pair, name: str) -> None:
    merge(CONFIGS[name])
    written = (here.out / "mergekit_config.yml").read_bytes()
    assert yaml.safe_load(written) == pinned(yaml.safe_load(CONFIGS[name]), here.folder)
    assert (here.out / "slrmerge.yaml").read_bytes() == written


def test_a_restoration_by_config_is_the_bytes_of_both_sides(here: Pair) -> None:
    merge(RESTORATION)
    restored = ("model.layers.0.", "model.layers.1.", "model.embed_tokens.")
    assert read_back(here.out) == {
        name: (here.pre if name.startswith(restored) else here.post)[name] for name in here.post
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_by_config_is_verified(here: Pair, name: str) -> None:
    merge(CONFIGS[name])
    done("verify", "hybrid")
    done("verify", "hybrid", "--full")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_written_recipe_and_its_export_give_the_same_weights(here: Pair, name: str) -> None:
    merge(CONFIGS[name])
    done("hybrid/slrmerge.yaml", "--out", "again", "--no-fsync")
    exported = done("export", "hybrid/slrmerge.yaml")
    assert done("export", "config.yml") == exported
    merge(exported, "exported", name="exported.yml")
    assert weights(here.out) == weights(here.folder / "again") == weights(here.folder / "exported")


def test_the_card_of_a_merge_by_config_has_the_tag_mergekit(here: Pair) -> None:
    merge(MEAN)
    assert front_matter(here.out)["tags"] == ["mergekit", "merge", "slrmerge"]
    done(here.recipe_file(alpha=0.25), "--out", "other", "--no-fsync")
    assert front_matter(here.folder / "other")["tags"] == ["merge", "slrmerge"]
    assert not (here.folder / "other" / "mergekit_config.yml").exists()


def notes(*arguments: object) -> list[str]:
    return list(json.loads(done("plan", *arguments, "--json"))["notes"])


def test_a_plan_notes_which_side_supplies_config_and_tokenizer(here: Pair) -> None:
    Path("config.yml").write_text(MEAN)
    assert sum(str(here.folder / "post") in note for note in notes("config.yml")) == 1
    assert notes(here.recipe_file(alpha=0.25)) == []


@pytest.mark.parametrize(
    ("rules", "config"),
    [
        (
            {"restore": [2, 3]},
            {
                "merge_method": "passthrough",
                "base_model": "POST",
                "slices": [
                    {"sources": [{"model": side, "layer_range": layers}]}
                    for side, layers in (("POST", [0, 2]), ("PRE", [2, 4]), ("POST", [4, 6]))
                ],
                "dtype": "bfloat16",
            },
        ),
        (
            {"alpha": 0.85, "tokenizer": "pretrained"},
            {
                "merge_method": "linear",
                "base_model": "POST",
                "models": [
                    {"model": "POST", "parameters": {"weight": 0.15}},
                    {"model": "PRE", "parameters": {"weight": 0.85}},
                ],
                "dtype": "float32",
                "out_dtype": "bfloat16",
                "tokenizer_source": "PRE",
            },
        ),
        (
            {"alpha": 0.5, "blend": "slerp", "dtype": "float64"},
            {
                "merge_method": "slerp",
                "base_model": "POST",
                "models": [{"model": "POST"}, {"model": "PRE"}],
                "parameters": {"t": 0.5},
                "dtype": "float64",
                "out_dtype": "float64",
            },
        ),
    ],
)
def test_an_export_is_a_config_with_folders_and_dtypes(
    here: Pair, rules: dict[str, Any], config: dict[str, Any]
) -> None:
    printed = done("export", here.recipe_file(**rules))
    named = printed.replace(f"{here.folder}/pre", "PRE").replace(f"{here.folder}/post", "POST")
    assert yaml.safe_load(named) == config
    assert list(yaml.safe_load(named)) == list(config)


def export_refusal(recipe: Path) -> tuple[int, str]:
    result = run("export", recipe)
    assert len(result.stderr.splitlines()) == 1
    return result.exit_code, result.stdout


def test_a_recipe_that_mergekit_cannot_express_is_not_exported(here: Pair) -> None:
    assert export_refusal(here.recipe_file(alpha=0)) == (3, "")


def test_a_model_without_layers_is_not_exported(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"x": llama_tensors(side)["lm_head.weight"]}, {})
    (tmp_path / "r.yaml").write_text("pretrained: ./pre\nposttrained: ./post\nalpha: 0.5\n")
    assert export_refusal(tmp_path / "r.yaml") == (5, "")


REFUSED = {
    "unknown method": ("merge_method: ties\nmodels: [{model: post}, {model: pre}]\n", 3, "unsupported-method"),
    "one model": ("merge_method: linear\nmodels: [{model: post}, {model: post}]\n", 3, "not-two-models"),
    "one folder": ("merge_method: linear\nmodels: [{model: post}, {model: ./post}]\n", 4, "same-checkpoint"),
    "another depth": (RESTORATION.replace("[2, 6]", "[2, 5]"), 5, "layers-reordered"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_is_not_a_merge_of_two_models_is_refused(here: Pair, name: str) -> None:
    config, exit_code, code = REFUSED[name]
    Path("config.yml").write_text(config)
    assert refusal("config.yml", "--out", "hybrid") == (exit_code, [code])
    assert not here.out.exists()


def test_options_of_the_command_line_override_the_config(here: Pair) -> None:
    merge(SLERP, "hybrid", "--dtype", "float16", "--max-shard-size", "2KB")
    assert {tensor.dtype for tensor in read_back(here.out).values()} == {"F16"}
    assert len(weights(here.out)) == 3


# the tokenizer


TOKENIZERS = {
    "added_tokens.json", "additional_chat_templates/rag.jinja", "chat_template.jinja", "merges.txt",
    "sentencepiece.bpe.model", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
}  # fmt: skip
OTHERS = {"config.json", "generation_config.json", "LICENSE", "preprocessor_config.json"}


@pytest.fixture
def dressed(here: Pair) -> Pair:
    """The pair, each side with all files beside the weights that there are, and some of its own."""
    for side in ("pre", "post"):
        own = {f"tokenizer_{side}.json": side.encode(), f"{side}.json": side.encode()}
        names = (TOKENIZERS | OTHERS) - {"config.json"}
        write_files(here.folder / side, {name: f"{name} of {side}".encode() for name in names} | own)
        (here.folder / side / "config.json").write_text(json.dumps(llama_config(of=side)))
    return here


@pytest.mark.parametrize("way", ["recipe", "config"])
@pytest.mark.parametrize("side", ["pre", "post"])
def test_only_the_tokenizer_comes_from_the_requested_side(dressed: Pair, way: str, side: str) -> None:
    if way == "recipe":
        done(dressed.recipe_file(restore=[2, 3], tokenizer=f"{side}trained"), "--out", "hybrid", "--no-fsync")
    else:
        merge(RESTORATION + f"tokenizer_source: {side}\n")
    written = snapshot(dressed.out) or {}
    expected = {f"tokenizer_{side}.json", "post.json"} | TOKENIZERS | OTHERS
    made = {"README.md", "slrmerge.yaml", MANIFEST_NAME, "mergekit_config.yml", INDEX_NAME, *weights(dressed.out)}
    assert written.keys() - made == expected
    for name in expected:
        of = side if name in TOKENIZERS or name.startswith("tokenizer_") else "post"
        assert written[name] == (dressed.folder / of / name).read_bytes(), name
    done("verify", "hybrid", "--full")


@pytest.mark.parametrize("option", ["tokenizer_source: base\n", "tokenizer_source: post\n", ""])
def test_the_base_supplies_the_tokenizer_by_default(dressed: Pair, option: str) -> None:
    merge(RESTORATION + option)
    assert (dressed.out / "tokenizer.json").read_bytes() == b"tokenizer.json of post"


def test_a_chat_template_of_the_base_is_left_out_with_its_tokenizer(dressed: Pair) -> None:
    (dressed.folder / "pre" / "chat_template.jinja").unlink()
    merge(RESTORATION + "tokenizer_source: pre\n")
    assert not (dressed.out / "chat_template.jinja").exists()


def test_a_plan_does_not_note_that_the_base_supplies_the_tokenizer_of_the_other_side(dressed: Pair) -> None:
    Path("config.yml").write_text(RESTORATION + "tokenizer_source: pre\n")
    (note,) = (note for note in notes("config.yml") if str(dressed.folder / "post") in note)
    assert "tokenizer" not in note


def test_mistrals_tokenizer_is_a_tokenizer_too(dressed: Pair) -> None:
    for side in ("pre", "post"):
        (dressed.folder / side / "tekken.json").write_text(f"of {side}")
    merge(RESTORATION + "tokenizer_source: pre\n")
    assert (dressed.out / "tekken.json").read_bytes() == b"of pre"
