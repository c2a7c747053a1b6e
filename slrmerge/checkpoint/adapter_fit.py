"""Which tensor of its base each tensor of a LoRA adapter changes, and how; or why the two do not fit."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from slrmerge.checkpoint.adapter_config import MERGE_WITH_PEFT, NAME_BASE, NO_REMEDY, AdapterFolder
from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.correspondence import embeddings_of, names_outside_layers, without_prefixes
from slrmerge.checkpoint.header import DTYPE_BITS, FLOATING, TensorInfo
from slrmerge.checkpoint.layers import TEXT_CONFIG_KEYS, split_layer, text_sections
from slrmerge.errors import Problem
from slrmerge.io.sizes import shorten

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)(?P<adapter>[^.]+))?(\.(?P<leaf>weight|bias))?"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight$|bias$)[^.]+)?)(?=\.(weight|bias)$)")
_ORIGINAL = re.compile(r"\.original_module(?=\.(weight|bias)$)")
"""What peft also saves of an embedding that is stored whole: its weights before the training."""

_HEAD = "lm_head.weight"
_MAX_EXTRA_COMPONENTS = 2
"""How many components a name in the model may have before the name in the base's files, or the other way round."""


class Delta(NamedTuple):
    """What is added to a tensor: scale·left·right, two matrices in the adapter's file; or scale·left, a vector.

    `transposed` says that the file has both matrices transposed.
    """

    left: str
    right: str | None
    transposed: bool
    scale: float


class Update(NamedTuple):
    """Where a tensor's values are: tensor `base` of the base, or `value` of the adapter's file; plus a delta."""

    base: str | None
    value: str | None = None
    delta: Delta | None = None


class _Refused(NamedTuple):
    code: str
    what: str
    remedy: str


class Fitting:
    """Finds the tensor of the base that each tensor of an adapter belongs to."""

    def __init__(self, adapter: AdapterFolder, base: Checkpoint) -> None:
        self.adapter, self.base = adapter, base
        self.stored = adapter.shard.tensors
        self.updates: dict[str, Update] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.notes: list[str] = []
        self._factors: dict[str, dict[str, str]] = defaultdict(dict)
        self._values: dict[str, str] = {}
        self._refused: dict[_Refused, list[str]] = defaultdict(list)
        self._unties = False
        self._embeddings = embeddings_of(base)

    def run(self) -> None:
        """Fill `updates` and `infos`, or collect why that is not possible."""
        adapters: set[str] = set()
        for name in self.stored:
            short = name.removeprefix(_PREFIX)
            if found := _FACTOR.fullmatch(short):
                part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
                self._factors[found["module"]][part] = name
                adapters |= {found["adapter"]} - {None}
            elif (plain := _WRAPPED.sub("", short)) == short or plain not in self._values:
                self._values[plain] = name
        for name in [name for name in self._values if _ORIGINAL.sub("", name) in self._values.keys() - {name}]:
            del self._values[name]
        if len(adapters) > 1:
            what = f"has {len(adapters)} adapters in one file: {', '.join(sorted(adapters))}"
            self._refuse(str(self.adapter.shard.file), "unsupported-adapter", what, "save each by itself")
        if not self._factors and not self._values:
            self._refuse(str(self.adapter.shard.file), "invalid-adapter", "has no tensors", "train and save it again")
        wanted = (*(f"{module}.weight" for module in self._factors), *self._values)
        self._names = _Names(self.base, self._embeddings.head, wanted)
        for name, stored in self._values.items():
            self._add_value(name, stored)
        for module, parts in self._factors.items():
            self._add_factors(module, parts)
        self._check_tied()

    def problems(self) -> Iterator[Problem]:
        """Why the adapter cannot be used; one problem for each reason."""
        for refused, names in self._refused.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            yield Problem(refused.code, f"{self.adapter}: {names[0]}{more}", refused.what, refused.remedy)

    def config(self) -> Mapping[str, Any]:
        """The base's config, with the size of the vocabulary and the tie of the embeddings as the adapter has them."""
        changed: dict[str, Any] = {"tie_word_embeddings": False} if self._unties else {}
        sizes = {info.shape[0] for name, info in self.infos.items() if self._is_embedding(name)}
        old = {self.base[name].shape[0] for name in self.infos if self._is_embedding(name) and name in self.base}
        if sizes and sizes != old:
            changed["vocab_size"] = sizes.pop()
        return _with_values(self.base.config, changed) if changed else self.base.config

    def _add_value(self, name: str, stored: str) -> None:
        """A tensor that is stored whole: of `modules_to_save`, a trained bias, a resized embedding."""
        info = self.stored[stored]
        target = self._names.find(name)
        if target is None and name.endswith(_HEAD) and (embedding := self._tied_embedding):  # the base's is tied
            target, like = name, self.base[embedding]
        elif target is None:
            what, remedy = "is not in the base", "name the base that it was trained on"
            if not _is_in_layer(name):  # a classifier's head
                remedy = f"if it is a head that the adapter adds, {MERGE_WITH_PEFT}; otherwise {remedy}"
            return self._refuse(name, "adapter-does-not-fit", what, remedy)
        else:
            like = self.base[target]
        resized = self._is_embedding(target) and len(info.shape) == 2 and info.shape[1:] == like.shape[1:]
        if info.shape != like.shape and not resized:
            what = f"has shape {list(info.shape)}, in the base {list(like.shape)}"
            return self._refuse(name, "adapter-does-not-fit", what, "name the base that it was trained on")
        if not {info.dtype, like.dtype} <= FLOATING:
            return self._refuse_dtype(name, like)
        nbytes = prod(info.shape) * DTYPE_BITS[like.dtype] // 8
        begin = like.begin if target in self.base else 0
        self.updates[target] = Update(None, stored)
        self.infos[target] = TensorInfo(like.dtype, info.shape, nbytes, begin)
        return None

    def _add_factors(self, module: str, parts: Mapping[str, str]) -> None:
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        needed = {"lora_embedding_A", "lora_embedding_B"} if is_embedding else {"lora_A", "lora_B"}
        if parts.keys() - {"lora_B.bias"} != needed:
            if "lora_magnitude_vector" in parts:
                return self._refuse(module, "unsupported-adapter", "is a DoRA module", "merge it with peft")
            missing = needed - parts.keys()
            what = f"lacks {' and '.join(sorted(missing))}" if missing else "has factors of two kinds"
            return self._refuse(module, "invalid-adapter", what, "save the adapter again")
        first, second = (self.stored[parts[name]] for name in sorted(needed))
        target = self._names.find(f"{module}.weight")
        if target is None and f".{module}.weight".endswith(f".{_HEAD}") and self._tied_embedding:
            target = self._add_head(f"{module}.weight", self._tied_embedding)
        if target is None:
            what = "is not a module of the base"
            return self._refuse(module, "adapter-does-not-fit", what, "name the base that it was trained on")
        info = self._info(target)
        if info.dtype not in FLOATING or not {first.dtype, second.dtype} <= FLOATING:
            return self._refuse_dtype(module, info)
        if len(first.shape) != 2 or len(second.shape) != 2 or len(info.shape) != 2:
            if 1 in (len(first.shape), len(second.shape)) or 0 in first.shape:
                what = "has a factor that is not a matrix"
                return self._refuse(module, "invalid-adapter", what, "save the adapter again, with all parts gathered")
            what = "is a convolution, which is not supported"
            return self._refuse(module, "unsupported-adapter", what, "merge the adapter with peft")
        rank = self.adapter.config.rank(module)
        if first.shape[0] != rank or second.shape[1] != rank:
            what = f"has factors of rank {first.shape[0]} and {second.shape[1]}, the config says {shorten(rank)}"
            return self._refuse(module, "adapter-rank", what, "restore the adapter_config.json that belongs to it")
        shapes = {(second.shape[0], first.shape[1]), (first.shape[1], second.shape[0])}
        if info.shape not in ({(first.shape[1], second.shape[0])} if is_embedding else shapes):
            sizes = [second.shape[0], first.shape[1]]
            what = f"changes a weight of shape {sizes}, in the base it is {list(info.shape)}"
            return self._refuse(module, "adapter-does-not-fit", what, "name the base that it was trained on")
        transposed = is_embedding or self._is_transposed(module, target, (second.shape[0], first.shape[1]))
        left, right = (parts[name] for name in (sorted(needed) if transposed else sorted(needed, reverse=True)))
        scale = self.adapter.config.scale(module)
        self.updates[target] = self._update(target)._replace(delta=Delta(left, right, transposed, scale))
        self.infos[target] = info
        if "lora_B.bias" in parts:
            self._add_bias(module, parts["lora_B.bias"], scale)
        return None

    def _add_bias(self, module: str, stored: str, scale: float) -> None:
        target = self._names.find(f"{module}.bias")
        if target is None or self.base[target].shape != self.stored[stored].shape:
            what = "adds a bias (lora_bias), and its module in the base has none of this size"
            remedy = f"name the base that it was trained on; if this is the one, {NO_REMEDY}"
            return self._refuse(module, "adapter-does-not-fit", what, remedy)
        if not {self.stored[stored].dtype, self.base[target].dtype} <= FLOATING:
            return self._refuse_dtype(module, self.base[target])
        self.updates[target] = self._update(target)._replace(delta=Delta(stored, None, False, scale))
        self.infos.setdefault(target, self.base[target])
        return None

    def _add_head(self, name: str, embedding: str) -> str:
        """Give a base whose head is its embedding a head of its own, with the embedding's values; returns its name."""
        self.updates.setdefault(name, Update(embedding))
        self.infos.setdefault(name, self.base[embedding]._replace(begin=0))
        return name

    def _info(self, target: str) -> TensorInfo:
        """A tensor of the base, which the adapter may have resized, or the head that it adds."""
        return self.infos[target] if target in self.infos else self.base[target]

    def _update(self, target: str) -> Update:
        return self.updates.get(target, Update(target))

    def _is_transposed(self, module: str, target: str, linear: tuple[int, int]) -> bool:
        """Whether a weight is stored as (inputs, outputs), as Conv1D of GPT-2 does.

        Its shape says so. Where it is square, the modules beside it do, or else the config.
        """
        shape = self._info(target).shape
        if linear[0] != linear[1]:
            return bool(shape != linear)
        evidence = self._orientations[_is_in_layer(target)]
        if len(evidence) > 1:
            what = "is square, and the modules beside it do not tell whether it is transposed (fan_in_fan_out)"
            self._refuse(module, "unsupported-adapter", what, "merge the adapter with peft")
        return next(iter(evidence), self.adapter.config.fan_in_fan_out)

    @cached_property
    def _orientations(self) -> Mapping[bool, set[bool]]:
        """Whether weights are transposed, inside layers and outside, as those that are not square show."""
        found: dict[bool, set[bool]] = {True: set(), False: set()}
        for module, parts in self._factors.items():
            target = self._names.find(f"{module}.weight")
            if target and parts.keys() >= {"lora_A", "lora_B"}:
                linear = self.stored[parts["lora_B"]].shape[:1] + self.stored[parts["lora_A"]].shape[1:]
                if linear != linear[::-1]:
                    found[_is_in_layer(target)].add(self._info(target).shape != linear)
        for name, info in self.base.items():
            bias = self.base.get(f"{name.removesuffix('.weight')}.bias")
            if name.endswith(".weight") and bias and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
                found[_is_in_layer(name)].add(bias.shape == info.shape[1:])
        return found

    def _check_tied(self) -> None:
        """Untie embeddings where the adapter changes one: peft trains and runs the input embedding and the head apart.

        peft's `merge_and_unload` adds the deltas of both to the one tensor, which is not what it runs.
        """
        changed = [name for name in self.updates if self._is_embedding(name)]
        embedding, stored_head = self._embeddings.token, self._embeddings.head
        if not changed or embedding is None:
            return None
        head = stored_head or next((name for name in changed if name.endswith(_HEAD)), None)
        is_tied = stored_head is None or self._embeddings.is_tied
        before = self.base[embedding].shape[0]
        rows, head_rows = (self.infos[name].shape[0] if name in self.infos else before for name in (embedding, head))
        if rows != head_rows:
            what = f"has {rows:,} tokens in the embedding and {head_rows:,} in the head"
            remedy = (
                "train it again with both in `target_modules` or `modules_to_save`: else peft stores the rows of one"
            )
            return self._refuse(changed[0], "adapter-does-not-fit", what, remedy)
        if is_tied:
            if self._ties_more:
                what = "is tied, with more than the head and the embedding: untying these two changes other parts"
                remedy = "name an adapter that changes neither embedding nor head, or a whole model"
                return self._refuse(changed[0], "unsupported-adapter", what, remedy)
            if head is None:
                self._add_head(_HEAD, embedding)
            self._unties = True
            self.notes.append("the adapter changes the input embedding or the head by itself: they are no longer tied")
        return None

    @property
    def _ties_more(self) -> bool:
        """Whether the key that ties the head also ties both halves' embeddings or a bias, or scales T5's output."""
        both_halves = self.base.config.get("is_encoder_decoder") and ".decoder." not in f".{self._embeddings.token}"
        return bool(both_halves) or any(self._embeddings.biases)

    @property
    def _tied_embedding(self) -> str | None:
        """The base's input embedding where its head is not stored, so that they are tied."""
        return self._embeddings.token if self._embeddings.head is None else None

    def _is_embedding(self, name: str) -> bool:
        """Whether a tensor is an embedding or the head, of the base or one that the adapter adds."""
        return name in self._embeddings.tokens or name == self._embeddings.head or name.endswith(_HEAD)

    def _refuse_dtype(self, name: str, info: TensorInfo) -> None:
        what = f"changes a weight of dtype {info.dtype}: a quantized base cannot be changed"
        self._refuse(name, "adapter-on-quantized", what, f"name the unquantized base: {NAME_BASE}")

    def _refuse(self, name: str, code: str, what: str, remedy: str) -> None:
        self._refused[_Refused(code, what, remedy)].append(name)


class _Names:
    """Finds a tensor of the base by its name in the model that was trained.

    The two may differ in the components before the layers: `h.0.attn` in a file is `transformer.h.0.attn` in the model.
    Outside the layers, modules that only contain the model do not count.
    """

    def __init__(self, base: Checkpoint, head: str | None, wanted: Iterable[str]) -> None:
        self._base = base
        self._outside = names_outside_layers(base)
        if head is not None:
            self._outside.setdefault(_HEAD, head)  # as transformers calls it, whatever its name in the base
        self._by_end: dict[str, str | None] = {}
        for name in base:
            for end in _ends(name):
                self._by_end[end] = None if end in self._by_end else name
        others = {place[0] for name in wanted if self._find(name) is None and (place := split_layer(name))}
        self._other_prefix = others.pop() if len(others) == 1 else None

    def find(self, name: str) -> str | None:
        """The base's name, or None."""
        found, place, stack = self._find(name), split_layer(name), self._base.stack
        if found is None and place and stack and place[0] == self._other_prefix:
            moved = f"{stack.prefix}.{place[1]}.{place[2]}"
            return moved if moved in self._base else None
        return found

    def _find(self, name: str) -> str | None:
        if name in self._base:
            return name
        found = next((end for end in _ends(name) if end in self._base), None) or self._by_end.get(name)
        return found or self._outside.get(without_prefixes(name))


def _ends(name: str) -> Iterator[str]:
    """A name without its first component, without its first two, and so on."""
    parts = name.split(".")
    for count in range(1, min(_MAX_EXTRA_COMPONENTS, len(parts) - 2) + 1):
        yield ".".join(parts[count:])


def _is_in_layer(name: str) -> bool:
    return split_layer(name) is not None


def _with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values, also in the section of the decoder where it has them."""
    changed = dict(config)
    for key in TEXT_CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            changed[key] = {name: values.get(name, value) for name, value in config[key].items()}
    inside = {name for section in text_sections(config)[1:] for name in section}
    return changed | {name: value for name, value in values.items() if name in config or name not in inside}
