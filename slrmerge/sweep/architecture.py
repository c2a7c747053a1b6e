"""A checkpoint's config → a transformers model without weights, or the reasons why a sweep cannot serve it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import Problem, UnsupportedModelError, first_line, raise_all

REMEDY = "dense decoder-only models that transformers loads without custom code can be searched"

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def model_without_weights(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str) -> Any:
    """The `AutoModelForCausalLM` of a checkpoint, parameters on the meta device and buffers real.

    Raises UnsupportedModelError for what a sweep cannot serve: quantised weights, custom code, mixtures of experts,
    layers that are no attention, layers that share keys and values, parameters that the checkpoint does not have under
    the names and shapes that the model gives them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UnsupportedModelError(
            Problem(where, f"transformers does not read its config ({first_line(error)})", REMEDY)
        ) from error
    raise_all((Problem(where, what, REMEDY) for what in _refusals(config)), UnsupportedModelError)
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:
        what = f"transformers cannot build it ({first_line(error)})"
        if isinstance(error, KeyError) and error.args == (attention,):
            what = f"transformers keeps the attention of this architecture ({config.model_type}) to itself"
        raise UnsupportedModelError(Problem(where, what, REMEDY)) from error
    model.eval()
    raise_all(_parameter_problems(checkpoint, model), UnsupportedModelError)
    return model


def is_tied(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether the head is the embedding: the config ties them and the checkpoint does not store a head of its own."""
    return bool(getattr(model.config, "tie_word_embeddings", False)) and head_name(model) not in checkpoint


def head_name(model: Any) -> str:
    """The head's weight as the checkpoint names it."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _refusals(config: Any) -> Iterator[str]:
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        yield "is quantised"
    if getattr(config, "is_encoder_decoder", False):
        yield "is an encoder-decoder model"
    if any((getattr(text, key, None) or 0) > 1 for key in _EXPERT_KEYS):
        yield f"is a mixture of experts ({config.model_type}), which has not been tried"
    if getattr(text, "num_kv_shared_layers", None):
        yield f"has layers that share keys and values ({config.model_type}), so they do not stand alone"
    others = set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if others:
        yield f"has layers that are not plain attention: {', '.join(sorted(others))} ({config.model_type})"


def _parameter_problems(checkpoint: Checkpoint, model: Any) -> Iterator[Problem]:
    kind = type(model).__name__
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        yield Problem(str(checkpoint), f"{kind} has no embedding or no head", REMEDY)
        return
    skip = {head_name(model)} if is_tied(checkpoint, model) else set()
    strange = [
        f"{kind} needs {name} of shape {list(parameter.shape)}, the checkpoint has "
        + (f"{list(checkpoint[name].shape)}" if name in checkpoint else "no such tensor")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in skip and not (name in checkpoint and checkpoint[name].shape == tuple(parameter.shape))
    ]
    for what in strange[:3]:
        yield Problem(str(checkpoint), what, REMEDY)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if kept := sorted(name for name in model.state_dict() if name in checkpoint and name not in parameters):
        yield Problem(str(checkpoint), f"{kind} keeps {kept[0]} as a buffer, which a sweep does not load", REMEDY)
    if len(strange) > 3:
        yield Problem(str(checkpoint), f"and {len(strange) - 3} more")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are put on the meta device as modules register them; buffers, which are computed, stay real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
