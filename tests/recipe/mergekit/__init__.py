"""Small mergekit configs, and the alphas that they give."""

from collections.abc import Mapping
from typing import Any

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.recipe.alphas import Resolution, TensorAlphas
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from slrmerge.recipe.mergekit.weights import resolve_config

STACK = LayerStack("model.layers", 5)  # so that a gradient's steps are quarters
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{k}.{inner}" for k in range(5) for inner in ("mlp.up.weight", "self_attn.q.weight")),
    "model.norm.weight",
    "lm_head.weight",
]
BASE = {"base_model": "post"}


def source(model: object, *layer_range: int, **parameters: object) -> dict[str, Any]:
    """A source of a merge: a model, its layers where they are given, its own parameters."""
    layers = {"layer_range": list(layer_range)} if layer_range else {}
    return {"model": model, **layers, **({"parameters": parameters} if parameters else {})}


def part(*sources: Mapping[str, Any], **more: object) -> dict[str, Any]:
    return {"sources": list(sources), **more}


def both(*layer_range: int, **more: object) -> dict[str, Any]:
    """A slice of the same layers of both sides."""
    return part(source("post", *layer_range), source("pre", *layer_range), **more)


def linear(post: object, pre: object, **more: object) -> dict[str, Any]:
    models = [source("post", weight=post), source("pre", weight=pre)]
    return {"merge_method": "linear", "models": models, **more}


def unweighted(**more: object) -> dict[str, Any]:
    """A mean whose sources name no weight of their own."""
    return {"merge_method": "linear", "models": [source("post"), source("pre")], **more}


def slerp(t: object, **more: object) -> dict[str, Any]:
    models = {} if "slices" in more else {"models": [source("post"), source("pre")]}
    return {"merge_method": "slerp", **BASE, **models, "parameters": {"t": t}, **more}


def arithmetic(task: Mapping[str, Any], **parameters: object) -> dict[str, Any]:
    """A task arithmetic of one task on the post-trained side."""
    return {"merge_method": "task_arithmetic", **BASE, "models": [task], "parameters": parameters}


def passthrough(*slices: tuple[str, int, int], **more: object) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [part(source(*own)) for own in slices], **more}


def resolve(config: Mapping[str, Any]) -> Resolution:
    recipe = MergekitRecipe.from_dict(config)
    other = recipe.config.model_names[1]
    return resolve_config(recipe.config, other, NAMES, STACK, blend=recipe.blend, where="recipe")


def alphas_of(config: Mapping[str, Any]) -> TensorAlphas:
    alphas, problems = resolve(config)
    assert problems == []
    assert list(alphas) == NAMES
    return alphas


def problems_of(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The code and the place of each problem of a valid config."""
    return [(problem.code, problem.where) for problem in resolve(config).problems]


def view(alphas: Mapping[str, float]) -> list[float | tuple[float, float]]:
    """The alphas of embeddings, each layer, norm, head; where a layer's MLP and attention differ, both."""
    layers = [
        (alphas[f"model.layers.{k}.mlp.up.weight"], alphas[f"model.layers.{k}.self_attn.q.weight"]) for k in range(5)
    ]
    return [
        alphas["model.embed_tokens.weight"],
        *(mlp if mlp == attention else (mlp, attention) for mlp, attention in layers),
        alphas["model.norm.weight"],
        alphas["lm_head.weight"],
    ]


def everywhere(alpha: float) -> list[float]:
    return [alpha] * 8
