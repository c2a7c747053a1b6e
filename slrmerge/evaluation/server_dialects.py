"""How servers take the settings that OpenAI's protocol does not have."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from slrmerge.evaluation.samples import Settings


def _vllm_extras(settings: Settings) -> dict[str, Any]:
    """For vLLM and llama.cpp: min_p after temperature, and nothing else that changes the distribution."""
    off = {"top_k": -1, "repetition_penalty": 1.0}
    return {"min_p": settings.min_p, **off, "samplers": ["temperature", "min_p"]}


def _transformers_extras(settings: Settings) -> dict[str, Any]:
    """For `transformers serve`: a generation config."""
    config: dict[str, Any] = {"do_sample": bool(settings.temperature), "max_new_tokens": settings.max_tokens}
    config |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    if settings.temperature:
        config |= {"temperature": settings.temperature, "min_p": settings.min_p, "top_k": 0, "top_p": 1.0}
    return {"generation_config": json.dumps(config)}


class Dialect(NamedTuple):
    """How a server takes settings outside OpenAI's protocol; tried after others were rejected with `tried_after`."""

    extras: Callable[[Settings], dict[str, Any]]
    tried_after: tuple[int, ...] = ()
    has_min_p: bool = True


DIALECTS = (
    Dialect(_vllm_extras),
    Dialect(_transformers_extras, tried_after=(422,)),
    Dialect(lambda _: {}, tried_after=(400, 422), has_min_p=False),
)
