"""The wording of everything that is wrong with a recipe or a mergekit config.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/recipe/test_problems.py`, then read the diff.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.errors import SlrmergeError, raise_all
from slrmerge.io.strict_yaml import MAX_BYTES
from slrmerge.recipe.load import AnyRecipe, as_recipe, load_recipe, require_rules
from slrmerge.recipe.mergekit.write import write_config
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import LayerRule
from tests.conftest import Pair

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe-problems.txt"

S = "pretrained: ./pre\nposttrained: ./post\n"

FILES: dict[str, str | bytes] = {
    "an empty file": "",
    "a list": "- pretrained: ./pre\n",
    "a duplicate key": S + "alpha: 1\nalpha: 0\n",
    "a tab": S + "layers:\n\t- 1\n",
    "a list without an end": S + "restore: [1, 2\n",
    "two documents": S + "---\nalpha: 1\n",
    "an unknown alias": S + "alpha: *half\n",
    "an alias inside itself": S + "layers: &all [*all]\n",
    "a key that is a list": "[1, 2]: 3\n",
    "a Python object": S + "alpha: !!python/object:os.system {}\n",
    "a time": S + "alpha: 0:30\n",
    "not UTF-8": b"pretrained: caf\xe9\n",
    "a control character": S + "alpha: \x01\n",
    "too large": b"#" * (MAX_BYTES + 1),
    "no sides": "restore: [2, 3]\n",
    "nothing to merge": S,
    "misspelled keys": S + "restor: [2, 3]\nlayers:\n- {range: [0, 1], alpha: 1, module: [mlp]}\n",
    "a key of something else": S + "weights: 1\n",
    "intervals": S + "restore: [[3, 2], [-1, 2], 5, [0, 1.5], [0, 99999999999]]\n",
    "one interval": S + "restore: 2-3\n",
    "alphas": S
    + "alpha: 1.5\nlayers:\n- {range: [0, 1], alpha: [0]}\n- {range: [0, 1], alpha: [0, half]}\n"
    + "- {range: [2, 2], alpha: [0, 1]}\ntensors:\n- {match: lm_head.*, alpha: true}\n",
    "types": "pretrained: 3\nposttrained: ''\nlayers: all\ntensors: [lm_head]\n",
    "modules": S + "layers:\n- {range: [0, 1], alpha: 1, modules: mlp}\n- {range: [0, 1], alpha: 1, modules: []}\n",
    "missing keys": S + "layers: [{}]\ntensors: [{match: '*'}]\n",
    "choices": S + "alpha: 1\ndtype: bf16\nblend: nlerp\ntokenizer: pre\n",
    "a size": S + "alpha: 1\nmax_shard_size: five\n",
    "a size of nothing": S + "alpha: 1\nmax_shard_size: 0GB\n",
    "layers that do not exist": S + "restore: [[0, 1], [4, 9]]\nlayers: [{range: [5, 6], alpha: 1}]\n",
    "patterns that match nothing": S
    + "layers: [{range: [0, 1], alpha: 1, modules: [self_atn]}]\ntensors: [{match: lm_haed.*, alpha: 1}]\n",
}

BASE = {"base_model": "post"}


def models(*weights: object) -> list[dict[str, Any]]:
    return [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in zip(("post", "pre", "third"), weights, strict=False)
    ]


def slices(*spans: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": model, "layer_range": [first, stop]}]} for model, first, stop in spans]


CONFIGS: dict[str, dict[str, Any]] = {
    "another method": {"merge_method": "ties", "models": models(1, 1)},
    "one model": {"merge_method": "linear", "models": models(1)},
    "three models": {"merge_method": "linear", "models": models(1, 1, 1)},
    "neither models nor slices": {"merge_method": "linear"},
    "modules and a tokenizer": {"merge_method": "linear", "models": models(1, 1), "modules": {}, "tokenizer": {}},
    "a tokenizer of both": {"merge_method": "linear", "models": models(1, 1), "tokenizer_source": "union"},
    "another tokenizer": {"merge_method": "linear", "models": models(1, 1), "tokenizer_source": "third"},
    "a chat template": {"merge_method": "linear", "models": models(1, 1), "chat_template": "chatml"},
    "a LoRA": {"merge_method": "linear", "models": [{"model": "post"}, {"model": "pre+lora"}]},
    "not a model": {"merge_method": "linear", "models": [{"model": 3}, {"model": {"name": "x"}}]},
    "no base model": {"merge_method": "slerp", "models": models(1, 1)},
    "another base model": {
        "merge_method": "linear",
        **BASE,
        "slices": [{"sources": models(1, 1)}, {"sources": models(1, 1), "base_model": "pre"}],
    },
    "unknown keys": {
        "merge_method": "linear",
        "models": [{"model": "post", "weight": 1}, {"model": "pre"}],
        "dtyp": "x",
    },
    "unknown parameters": {
        "merge_method": "linear",
        "models": models(1, 1),
        "parameters": {"wieght": 1, "density": 0.5},
    },
    "parameters of passthrough": {
        "merge_method": "passthrough",
        "slices": slices(("post", 0, 3), ("pre", 3, 6)),
        "parameters": {"scale": 1},
    },
    "a reversed range": {"merge_method": "passthrough", "slices": slices(("post", 0, 3), ("pre", 6, 3))},
    "a gap": {"merge_method": "passthrough", "slices": slices(("post", 0, 2), ("pre", 3, 6))},
    "too few layers": {"merge_method": "passthrough", "slices": slices(("post", 0, 2), ("pre", 2, 5))},
    "layers of different depth": {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "post", "layer_range": [0, 6]}, {"model": "pre", "layer_range": [1, 6]}]}],
    },
    "two sources to pass through": {"merge_method": "passthrough", "models": [{"model": "post"}, {"model": "pre"}]},
    "no weights": {"merge_method": "linear", "models": [{"model": "post"}, {"model": "pre"}]},
    "weights of 0": {"merge_method": "linear", "models": models(0, 0)},
    "not a mean": {"merge_method": "linear", "models": models(1, 1), "parameters": {"normalize": False}},
    "past the model": {"merge_method": "slerp", **BASE, "models": [{"model": "pre"}], "parameters": {"t": 1.5}},
    "not a number": {"merge_method": "slerp", **BASE, "models": [{"model": "pre"}], "parameters": {"t": "half"}},
    "not a filter": {
        "merge_method": "slerp",
        **BASE,
        "models": [{"model": "pre"}],
        "parameters": {"t": [{"filter": "mlp"}]},
    },
}


def use(load: Callable[[], AnyRecipe], pair: Pair) -> None:
    """What a merge does with a recipe before it writes."""
    recipe = load()
    require_rules(recipe)
    raise_all(recipe.resolve(pair.open()).problems, SlrmergeError)


def export_nothing(pair: Pair) -> AnyRecipe:
    opened = pair.open()
    assert opened.stack is not None
    write_config(pair.recipe(alpha=0).resolve(opened).alphas, opened.stack, pretrained="./pre", posttrained="./post")
    raise AssertionError


def cases(pair: Pair) -> dict[str, Callable[[], AnyRecipe]]:
    found: dict[str, Callable[[], AnyRecipe]] = {}
    for name, text in FILES.items():
        path = Path(f"{name.replace(' ', '-')}.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        found[name] = lambda path=path: load_recipe(path)  # type: ignore[misc]
    for name, config in CONFIGS.items():
        path = Path(f"mergekit-{name.replace(' ', '-')}.yml")
        path.write_text(yaml.safe_dump(config))
        found[f"mergekit: {name}"] = lambda path=path: load_recipe(path)  # type: ignore[misc]
    unnamed: Any = 5
    return found | {
        "a missing file": lambda: load_recipe("missing.yaml"),
        "a folder": lambda: load_recipe("pre"),
        "an override": lambda: load_recipe("nothing-to-merge.yaml", dtype="int8"),
        "an override of a config": lambda: load_recipe("mergekit-no-weights.yml", alpha=0.5),
        "a wrong override of a config": lambda: load_recipe("mergekit-no-weights.yml", dtype="int8"),
        "Python: a recipe": lambda: Recipe(pretrained="a", posttrained="b", alpha=2),
        "Python: a rule": lambda: Recipe(pretrained="a", posttrained="b", layers=(LayerRule(range=(3, 1), alpha=1),)),
        "Python: a dict": lambda: as_recipe({"pretrained": "a", "posttrained": "b", "aplha": 1}),
        "Python: something else": lambda: as_recipe(unnamed),
        "export: nothing to merge": lambda: export_nothing(pair),
    }


def test_every_problem_reads_well(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.folder)
    lines: list[str] = []
    for name, load in cases(pair).items():
        with pytest.raises(SlrmergeError) as caught:
            use(load, pair)
        lines += [f"# {name}", *(f"[{problem.code}] {problem}" for problem in caught.value.problems), ""]
    found = "\n".join(lines)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")
