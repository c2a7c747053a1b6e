"""Quantized checkpoints: transformers turns some of them into dense weights when it loads them."""

from collections.abc import Iterator
from typing import Any

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.quantized import Quantization, quantization_config
from slrmerge.errors import Problem

DENSE_ON_LOAD = ("fp8", "mxfp4")
"""The methods whose weights transformers makes dense where it has no kernels for them, and that are tested here."""

_REMEDY = "search the unquantized pair, and restore the selected layers here"


def quantization_problems(checkpoint: Checkpoint, config: Any) -> Iterator[Problem]:
    """Why no dense weights can be made of a quantized checkpoint; nothing for others. `config` is transformers'."""
    section = _section(config)
    if section is not None:
        method = section.get("quant_method")
        if method not in DENSE_ON_LOAD:
            what = f"is quantized ({method}), and a search makes dense weights of {' and '.join(DENSE_ON_LOAD)} only"
            yield Problem("quantized-model", str(checkpoint), what, _REMEDY)
    elif (found := Quantization.of(checkpoint)) or quantization_config(checkpoint.config) is not None:
        name = found.name if found else ""
        what = f"is quantized{name}, and its config.json does not say so as transformers reads it"
        yield Problem("quantized-model", str(checkpoint), what, _REMEDY)


def dequantizer(config: Any) -> Any | None:
    """transformers' quantizer for a model with this config, which makes dense weights; None for a plain model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    section = _section(config)
    if section is None:
        return None
    quantizer = AutoHfQuantizer.from_config(dict(section), pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


def _section(config: Any) -> dict[str, Any] | None:
    """Where transformers looks for it."""
    sections = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config(decoder=True)))
    return next(filter(None, sections), None)
