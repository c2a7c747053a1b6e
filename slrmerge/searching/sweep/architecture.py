"""Builds the transformers model of a checkpoint without weights, and refuses models that a sweep cannot serve."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.quantized import Quantization, quantization_config
from slrmerge.errors import Problem, UnsupportedModelError, first_line, raise_all

REMEDY = "search a decoder-only model whose layers transformers runs one after the other"

DENSE_ON_LOAD = ("compressed-tensors", "fp8", "mxfp4")
"""The methods whose weights transformers can make dense as it loads them, and that are tested here."""

_DENSE_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
"""Those of compressed-tensors."""

QUANTIZED_REMEDY = "search the unquantized pair, and restore the selected layers here"


def unsupported(code: str, where: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(Problem(code, where, what, REMEDY))


def model_without_weights(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Any:
    """The causal or image-text model of a checkpoint: parameters on the meta device, buffers with their values.

    Raises UnsupportedModelError for most quantized weights, encoder-decoders, custom code, layers that share keys and
    values, and models that transformers cannot build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    where = str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
        if checkpoint.has_own_config:
            config = type(config).from_dict(deepcopy(dict(checkpoint.config)))
    except Exception as error:  # configs of unsupported models fail in any way
        what = f"transformers cannot read its config ({first_line(error)})"
        raise unsupported("config-not-readable", where, what) from error
    raise_all(_config_problems(checkpoint, config), UnsupportedModelError)
    for part in (config, config.get_text_config()):
        part.use_cache = False  # some decoders look here only; a cache would grow with every call of a layer
    known = [
        each for each in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in each._model_mapping
    ]
    if not known:
        what = f"transformers has no model that generates text for {config.model_type}"
        raise unsupported("no-language-model", where, what)
    try:
        with _parameters_on_meta():
            model = known[0].from_config(  # type: ignore[no-untyped-call]  # transformers' own lack of types
                config, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # constructors of unsupported models fail in any way
        what = f"transformers cannot build it ({first_line(error)})"
        raise unsupported("model-not-buildable", where, what) from error
    return model.eval()


def _config_problems(checkpoint: Checkpoint, config: Any) -> Iterator[Problem]:
    where, text = str(checkpoint), config.get_text_config()
    yield from _quantization_problems(checkpoint, config)
    if getattr(config, "is_encoder_decoder", False):
        yield Problem("encoder-decoder", where, f"is an encoder-decoder model ({config.model_type})", REMEDY)
    # an assistant model has all keys and values from another model, and a property that raises
    shared = getattr(text, "num_kv_shared_layers", 0) or _layers_that_reuse(getattr(text, "kv_sharing_modes", ()))
    if shared:
        what = f"{shared} of its layers use the keys and values of other layers ({config.model_type})"
        yield Problem("shared-keys-and-values", where, what, REMEDY)


def _layers_that_reuse(modes: Iterable[str | None]) -> int:
    """The number of layers that take keys and values from earlier ones, by transformers' names for what they do."""
    return sum(mode is not None and mode.startswith("reuse") for mode in modes)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made in the block have their parameters on the meta device; buffers keep their values."""

    def on_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if parameter.is_meta:  # tied to another one
            return parameter
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # its stub omits the result
    try:
        yield
    finally:
        hook.remove()


def _quantization_problems(checkpoint: Checkpoint, config: Any) -> Iterator[Problem]:
    """Why no dense weights can be made of a quantized checkpoint; nothing for others. `config` is transformers'."""
    section = _quantization_section(config)
    if section is not None:
        method = section.get("quant_method")
        if method not in DENSE_ON_LOAD:
            what = f"is quantized ({method}), and a search makes dense weights of {', '.join(DENSE_ON_LOAD)} only"
            yield Problem("quantized-model", str(checkpoint), what, QUANTIZED_REMEDY)
        elif method == "compressed-tensors":
            yield from _compressed_tensors_problems(section, str(checkpoint))
    elif (found := Quantization.of(checkpoint)) or quantization_config(checkpoint.config) is not None:
        name = found.name if found else ""
        what = f"is quantized{name}, and its config.json does not say so as transformers reads it"
        yield Problem("quantized-model", str(checkpoint), what, QUANTIZED_REMEDY)


def _compressed_tensors_problems(section: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What transformers would ignore: it reads all modules as those of one group, and no transforms."""
    given = section.get("config_groups")
    groups = [each for each in given.values() if isinstance(each, dict)] if isinstance(given, dict) else []
    ways = {json.dumps([each.get("format") or section.get("format"), each.get("weights")]) for each in groups}
    form = json.loads(ways.pop())[0] if len(ways) == 1 else "mixed-precision"
    if form not in _DENSE_FORMATS or section.get("transform_config"):
        form = "with transforms" if form in _DENSE_FORMATS else form
        what = f"is quantized (compressed-tensors, {form}), and a search makes dense weights of other formats only"
        yield Problem("quantized-model", where, what, QUANTIZED_REMEDY)
    elif find_spec("compressed_tensors") is None:
        what = "is quantized with compressed-tensors, which is not installed"
        yield Problem("missing-extra", where, what, "pip install compressed-tensors")


def dequantizer(config: Any) -> Any | None:
    """transformers' quantizer for a model with this config, which makes dense weights; None for a plain model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    section = _quantization_section(config)
    if section is None:
        return None
    quantizer = AutoHfQuantizer.from_config(dict(section), pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    quantizer.validate_environment()
    return quantizer


def _quantization_section(config: Any) -> dict[str, Any] | None:
    """How a checkpoint is quantized, from where transformers looks for it; None for a plain one."""
    sections = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config(decoder=True)))
    return next(filter(None, sections), None)
