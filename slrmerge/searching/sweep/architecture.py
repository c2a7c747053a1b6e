"""Builds the transformers model of a checkpoint without weights, and refuses models that a sweep does not support."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.errors import Problem, UnsupportedModelError, first_line, raise_all

REMEDY = "dense decoder-only models that transformers loads without custom code can be searched"

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def model_without_weights(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str) -> Any:
    """The `AutoModelForCausalLM` of a checkpoint: parameters on the meta device, buffers with their values.

    Raises UnsupportedModelError for quantised weights, custom code, mixtures of experts, layers other than attention,
    layers that share keys and values, and parameters that the checkpoint lacks or has in another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configs of unsupported models fail in any way
        what = f"transformers cannot read its config ({first_line(error)})"
        raise UnsupportedModelError(Problem("config-not-readable", where, what, REMEDY)) from error
    raise_all(_config_problems(config, where), UnsupportedModelError)
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers' own lack of types
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:  # constructors of unsupported models fail in any way
        code, what = "model-not-buildable", f"transformers cannot build it ({first_line(error)})"
        if isinstance(error, KeyError) and error.args == (attention,):
            code = "attention-not-replaceable"
            what = f"transformers does not let the attention of this architecture ({config.model_type}) be replaced"
        raise UnsupportedModelError(Problem(code, where, what, REMEDY)) from error
    model.eval()
    raise_all(_parameter_problems(checkpoint, model), UnsupportedModelError)
    return model


def is_tied(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether the head is the embedding: the config ties them and the checkpoint does not store a head of its own."""
    return bool(getattr(model.config, "tie_word_embeddings", False)) and head_name(model) not in checkpoint


def head_name(model: Any) -> str:
    """The name of the head's weight in the checkpoint."""
    return weight_name(model, model.get_output_embeddings())


def weight_name(model: Any, wanted: Any) -> str:
    """The name of the weight of one of the model's modules in the checkpoint."""
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)


def _config_problems(config: Any, where: str) -> Iterator[Problem]:
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        yield Problem("quantised-model", where, "is quantised", REMEDY)
    if getattr(config, "is_encoder_decoder", False):
        yield Problem("encoder-decoder", where, "is an encoder-decoder model", REMEDY)
    if any((getattr(text, key, None) or 0) > 1 for key in _EXPERT_KEYS):
        what = f"is a mixture of experts ({config.model_type}), which is not supported yet"
        yield Problem("mixture-of-experts", where, what, REMEDY)
    if getattr(text, "num_kv_shared_layers", None):
        what = f"has layers that share keys and values ({config.model_type})"
        yield Problem("shared-keys-and-values", where, what, REMEDY)
    unsupported = set(getattr(text, "layer_types", None) or ()) - _SUPPORTED_LAYER_TYPES
    if unsupported:
        what = f"has layers other than plain attention: {', '.join(sorted(unsupported))} ({config.model_type})"
        yield Problem("unsupported-layer-type", where, what, REMEDY)


def _parameter_problems(checkpoint: Checkpoint, model: Any) -> Iterator[Problem]:
    where, kind = str(checkpoint), type(model).__name__
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        yield Problem("no-embedding-or-head", where, f"{kind} has no embedding or no head", REMEDY)
        return
    ignored = {head_name(model)} if is_tied(checkpoint, model) else set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mismatches = [
        f"{kind} has {name} of shape {list(parameter.shape)}, the checkpoint has "
        + (f"{list(checkpoint[name].shape)}" if name in checkpoint else "no such tensor")
        for name, parameter in parameters.items()
        if name not in ignored and not (name in checkpoint and checkpoint[name].shape == tuple(parameter.shape))
    ]
    for what in mismatches[:3]:
        yield Problem("parameter-mismatch", where, what, REMEDY)
    if buffers := sorted(name for name in model.state_dict() if name in checkpoint and name not in parameters):
        what = f"{kind} has {buffers[0]} as a buffer, and buffers are not loaded"
        yield Problem("stored-buffer", where, what, REMEDY)
    if len(mismatches) > 3:
        yield Problem("parameter-mismatch", where, f"and {len(mismatches) - 3} more")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made in the block have their parameters on the meta device; buffers keep their values."""

    def on_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # its stub omits the result
    try:
        yield
    finally:
        hook.remove()
