"""A mergekit config given to the command line, and given back by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.plan.sidefiles import MANIFEST_NAME
from tests.checkpoints import llama_config, llama_tensors, read_back, write_checkpoint
from tests.cli import run
from tests.conftest import Pair
from tests.merge.faults import snapshot, write_files

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
    """What a command printed to stdout that went well."""
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


@pytest.mark.parametrize("words", CONFIGS)
def test_the_config_goes_along_byte_for_byte_and_the_recipe_is_explicit(here: Pair, words: str) -> None:
    merge(CONFIGS[words])
    assert (here.out / "mergekit_config.yml").read_bytes() == CONFIGS[words].encode()
    sides = {"pretrained": str(here.folder / "pre"), "posttrained": str(here.folder / "post")}
    recipe = yaml.safe_load((here.out / "slrmerge.yaml").read_text())
    attention = [{"range": [k, k], "alpha": k / 5, "modules": ["self_attn"]} for k in range(1, 6)]
    rest = [{"range": [k, k], "alpha": 0.3, "modules": ["input_layernorm", "mlp"]} for k in range(6)]
    assert {key: recipe[key] for key in recipe.keys() - sides.keys()} == {
        "a restoration": {"restore": [[0, 1]], "tensors": [{"match": "model.embed_tokens.weight", "alpha": 1.0}]},
        "a slerp": {
            "layers": sorted(attention + rest, key=lambda rule: (rule["range"], rule["alpha"])),
            "tensors": [
                {"match": name, "alpha": 0.3}
                for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
            ],
            "dtype": "bfloat16",
            "blend": "slerp",
        },
        "a mean": {"alpha": 0.25},
    }[words]
    for side, folder in sides.items():
        assert (here.out / recipe[side]).samefile(folder)


def test_a_restoration_by_config_is_the_bytes_of_both_sides(here: Pair) -> None:
    merge(RESTORATION)
    restored = ("model.layers.0.", "model.layers.1.", "model.embed_tokens.")
    assert read_back(here.out) == {
        name: (here.pre if name.startswith(restored) else here.post)[name] for name in here.post
    }


@pytest.mark.parametrize("words", CONFIGS)
def test_what_a_config_made_is_verified(here: Pair, words: str) -> None:
    merge(CONFIGS[words])
    done("verify", "hybrid")
    done("verify", "hybrid", "--full")


@pytest.mark.parametrize("words", CONFIGS)
def test_the_explicit_recipe_and_its_export_give_the_same_weights_again(here: Pair, words: str) -> None:
    merge(CONFIGS[words])
    done("hybrid/slrmerge.yaml", "--out", "again", "--no-fsync")
    exported = done("export", "hybrid/slrmerge.yaml")
    assert done("export", "config.yml") == exported
    merge(exported, "exported", name="exported.yml")
    assert len(weights(here.out)) == 1
    assert weights(here.out) == weights(here.folder / "again") == weights(here.folder / "exported")


def test_the_card_has_the_tag_that_people_find_mergekits_merges_by(here: Pair) -> None:
    merge(MEAN)
    assert front_matter(here.out)["tags"] == ["mergekit", "merge", "slrmerge", "selective-layer-restoration"]
    done(here.recipe_file(alpha=0.25), "--out", "other", "--no-fsync")
    assert front_matter(here.folder / "other")["tags"] == ["merge", "slrmerge", "selective-layer-restoration"]
    assert not (here.folder / "other" / "mergekit_config.yml").exists()


def test_a_plan_says_which_side_gives_config_and_tokenizer(here: Pair) -> None:
    Path("config.yml").write_text(MEAN)
    note = f"as mergekit has it, {here.folder}/post gives config and tokenizer: it is the post-trained side"
    assert sum(line.strip().endswith(note) for line in done("plan", "config.yml").splitlines()) == 1
    assert "as mergekit has it" not in done("plan", here.recipe_file(alpha=0.25))


@pytest.mark.parametrize(
    ("rules", "words"),
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
    here: Pair, rules: dict[str, Any], words: dict[str, Any]
) -> None:
    printed = done("export", here.recipe_file(**rules))
    named = printed.replace(f"{here.folder}/pre", "PRE").replace(f"{here.folder}/post", "POST")
    assert yaml.safe_load(named) == words
    assert list(yaml.safe_load(named)) == list(words)


def test_an_export_that_mergekit_has_no_words_for_ends_with_3(here: Pair) -> None:
    result = run("export", here.recipe_file(alpha=0))
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines()[-1].strip() == "the config: $: names only one model; a merge here is of two"


def test_without_a_stack_there_is_no_export(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"x": llama_tensors(side)["lm_head.weight"]}, {})
    (tmp_path / "r.yaml").write_text("pretrained: ./pre\nposttrained: ./post\nalpha: 0.5\n")
    result = run("export", tmp_path / "r.yaml")
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr.splitlines()[-1].strip() == (
        f"{tmp_path}/post: no stack of layers in these weights is as long as the config says, or more than one is"
    )


METHODS = "known: passthrough, linear, task_arithmetic, slerp; for others use mergekit"
NO_MERGE = {
    "an unknown method": (
        "merge_method: ties\nmodels: [{model: post}, {model: pre}]\n",
        f"$.merge_method: ties is no merge that takes each tensor from two checkpoints alike; {METHODS}",
    ),
    "one model": (
        "merge_method: linear\nmodels: [{model: post}, {model: post}]\n",
        "$: names only one model; a merge here is of two",
    ),
    "one folder": (
        "merge_method: linear\nmodels: [{model: post}, {model: ./post}]\n",
        "$.pretrained: is the same folder as posttrained; name the checkpoint that the other was trained from",
    ),
}


@pytest.mark.parametrize("words", NO_MERGE)
def test_a_config_that_is_no_merge_of_two_ends_with_3_and_says_why(here: Pair, words: str) -> None:
    config, line = NO_MERGE[words]
    Path("config.yml").write_text(config)
    result = run("config.yml", "--out", "hybrid")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines()[-1].strip() == f"config.yml: {line}"
    assert not here.out.exists()


def test_a_config_of_another_depth_ends_with_5_and_says_why(here: Pair) -> None:
    Path("config.yml").write_text(RESTORATION.replace("[2, 6]", "[2, 5]"))
    result = run("config.yml", "--out", "hybrid")
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr.splitlines()[-1].strip() == (
        "config.yml: $.slices: makes 5 layers of a model that has 6; mergekit would write a model of another depth"
    )


def test_options_of_the_command_line_go_before_the_configs(here: Pair) -> None:
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
def test_the_tokenizer_and_nothing_else_comes_from_the_side_that_is_asked_for(
    dressed: Pair, way: str, side: str
) -> None:
    if way == "recipe":
        done(dressed.recipe_file(restore=[2, 3], tokenizer=f"{side}trained"), "--out", "hybrid", "--no-fsync")
    else:
        merge(RESTORATION + f"tokenizer_source: {side}\n")
    written = snapshot(dressed.out) or {}
    expected = {f"tokenizer_{side}.json", "post.json"} | TOKENIZERS | OTHERS
    made = {"README.md", "slrmerge.yaml", MANIFEST_NAME, "model.safetensors", "mergekit_config.yml"}
    assert written.keys() - made == expected
    for name in expected:
        of = side if name in TOKENIZERS or name.startswith("tokenizer_") else "post"
        assert written[name] == (dressed.folder / of / name).read_bytes(), name
    done("verify", "hybrid", "--full")


@pytest.mark.parametrize("option", ["tokenizer_source: base\n", "tokenizer_source: post\n", ""])
def test_the_base_gives_the_tokenizer_where_no_other_is_named(dressed: Pair, option: str) -> None:
    merge(RESTORATION + option)
    assert (dressed.out / "tokenizer.json").read_bytes() == b"tokenizer.json of post"


def test_a_chat_template_that_only_the_base_has_stays_behind_with_its_tokenizer(dressed: Pair) -> None:
    (dressed.folder / "pre" / "chat_template.jinja").unlink()
    merge(RESTORATION + "tokenizer_source: pre\n")
    assert not (dressed.out / "chat_template.jinja").exists()


def test_a_plan_does_not_say_that_the_base_gives_the_tokenizer_where_the_other_does(dressed: Pair) -> None:
    Path("config.yml").write_text(RESTORATION + "tokenizer_source: pre\n")
    assert "post gives config and tokenizer" not in done("plan", "config.yml")


def test_mistrals_tokenizer_is_a_tokenizer_too(dressed: Pair) -> None:
    for side in ("pre", "post"):
        (dressed.folder / side / "tekken.json").write_text(f"of {side}")
    merge(RESTORATION + "tokenizer_source: pre\n")
    assert (dressed.out / "tekken.json").read_bytes() == b"of pre"
