"""The token embeddings and the output head, and which of them are one tensor under several names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.config_defaults import config_defaults
from slrmerge.checkpoint.layers import TOWER, split_layer, text_sections

_EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "embed_in", "word_embeddings", "shared", "tok_embeddings", "token_embd", "embeddings",
    "tokens_embed", "word_embedding", "input_embedding", "w",
})  # fmt: skip
"""Modules whose `weight` is a token embedding."""

_HEADS = frozenset({
    "lm_head", "embed_out", "cls.predictions.decoder", "predictions.decoder", "lm_head.decoder", "proj_out",
    "vocab_projector", "generator_lm_head", "output_layer", "output", "output_projection", "pred_layer.proj", "lm_loss",
    "lm_head.out_proj", "head", "head.decoder", "decoder",
})  # fmt: skip
"""Modules whose `weight` is the output head, without prefixes."""

_SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
"""The embeddings of an encoder-decoder, which are one tensor where the first is stored."""

_BIASES = (
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("predictions.bias", "predictions.decoder.bias"),
    ("lm_head.bias", "lm_head.decoder.bias"),
)
"""Names of one tensor, without prefixes."""

_ALSO_TIED = frozenset({"paligemma", "shieldgemma2", "t5", "umt5"})
"""Model types whose head is the embedding unless their config says otherwise, besides those of `config_defaults`."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The names of a checkpoint's token embeddings and of its head, and whether they are one tensor.

    `is_shared`: all token embeddings are one. `is_tied`: head and embedding are, though both may be stored.
    `may_lack_one`: where only one of the two is stored, it serves as both.
    """

    tokens: tuple[str, ...]
    head: str | None
    is_shared: bool
    is_tied: bool
    may_lack_one: bool
    biases: tuple[tuple[str, ...], ...]

    @property
    def token(self) -> str | None:
        """The embedding that a head is tied to: the only one, or the decoder's; None where there is none."""
        decoders = [name for name in self.tokens if ".decoder." in f".{name}"]
        return next(iter(self.tokens if self.is_shared else decoders), None)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Stored tensors that are one, each group with the embedding first."""
        head = (self.head,) if self.head and self.is_tied and self.token else ()
        tied = (*self.tokens, *head) if self.is_shared else (*((self.token,) if self.token else ()), *head)
        return [group for group in (tied, *self.biases) if len(group) > 1]


def find_embeddings(checkpoint: Checkpoint, outside: Mapping[str, str]) -> Embeddings:
    """The embeddings and the head; `outside` are the tensors outside the layers, by their names without prefixes."""
    tokens = {
        key: name
        for key, name in outside.items()
        if key.endswith(".weight")
        and _is_embedding(key.removesuffix(".weight"))
        and len(checkpoint[name].shape) == 2
        and not split_layer(key)  # a copy in a layer that predicts further tokens
    }
    heads = [outside[f"{key}.weight"] for key in sorted(_HEADS) if f"{key}.weight" in outside]
    biases = tuple(tuple(outside[key] for key in keys if key in outside) for keys in _BIASES)
    given = [section.get("tie_word_embeddings") for section in text_sections(checkpoint.config)]
    flags = {flag for flag in given if isinstance(flag, int)}  # a config may have anything there
    by_default = _is_tied_by_default(checkpoint.config) if not flags else None
    return Embeddings(
        tuple(sorted(tokens.values(), key=lambda name: (not name.endswith("shared.weight"), name))),
        heads[0] if len(heads) == 1 else None,
        is_shared=len(tokens) == 1 or ("shared.weight" in tokens and _shares_halves(checkpoint.config)),
        is_tied=flags == {True} or by_default is True,
        may_lack_one=True in flags or (not flags and by_default is not False),
        biases=biases,
    )


def is_vocabulary_tensor(key: str) -> bool:
    """Whether a tensor has a row for every token, by its name without prefixes."""
    module, _, last = key.rpartition(".")
    is_bias = any(key in keys for keys in _BIASES)
    return is_bias or (last == "weight" and (module in _HEADS or _is_embedding(module)))


def are_halves(first: str, second: str) -> bool:
    """Whether two names without prefixes are embeddings of one encoder-decoder."""
    return {first, second} <= {f"{module}.weight" for module in _SHARED}


def synonym(key: str) -> str | None:
    """The other name of a bias of the head, without prefixes."""
    return next((other for pair in _BIASES for other in pair if key in pair and other != key), None)


def _is_embedding(module: str) -> bool:
    """Whether a module, named without prefixes, embeds tokens; one of a vision or audio tower does not."""
    *owner, last = module.split(".")
    return last in _EMBEDDINGS and len(owner) <= 2 and not TOWER.search(module)


def _shares_halves(config: Mapping[str, Any]) -> bool:
    return config.get("share_encoder_decoder_embeddings") is not False


def _is_tied_by_default(config: Mapping[str, Any]) -> bool | None:
    """Whether models of this type tie their head; None where that is not known.

    The type is the text section's where there is one. A type without the key in `config_defaults` does not tie; what
    the model that contains a text section does is not known then.
    """
    *_, section = sections = text_sections(config)
    model_type = str(section.get("model_type") or config.get("model_type"))
    if model_type in _ALSO_TIED or config_defaults().get(model_type, {}).get("tie_word_embeddings"):
        return True
    return False if model_type in config_defaults() and len(sections) == 1 else None
