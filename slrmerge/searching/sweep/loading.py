"""A checkpoint's tensors as a model's weights, through transformers' own conversion on load.

Renamed tensors, experts that are stored one by one, and stored buffers come out as in `from_pretrained`. This is the
only module that uses transformers' internal API.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any, NamedTuple

import torch

from slrmerge.checkpoint.header import TensorInfo
from slrmerge.errors import Problem, UnsupportedModelError, raise_all
from slrmerge.searching.sweep.architecture import QUANTIZED_REMEDY, dequantizer

Weights = Mapping[str, torch.Tensor]
"""Parameters and buffers of a model by their names in the model."""

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16",
    "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}
"""Those of this torch: 2.6 has no F8_E8M0."""


def stored_dtype(name: str, info: TensorInfo) -> torch.dtype:
    """The dtype of a stored tensor. Raises UnsupportedModelError for one that torch lacks."""
    if info.dtype not in _DTYPES:
        what, remedy = f"is stored as {info.dtype}, which torch does not support", "search the unquantized models"
        raise UnsupportedModelError(Problem("unknown-dtype", name, what, remedy))
    return _DTYPES[info.dtype]


class Placement(NamedTuple):
    """Where a tensor of the checkpoint goes: a name in the model, alone and unchanged or as a part of a conversion."""

    target: str
    is_converted: bool


class _PlainWeight(NamedTuple):
    """The weight that a tensor is, unchanged, and the dtype that it is loaded in."""

    name: str
    dtype: torch.dtype


class WeightLoader:
    """Converts tensors of a checkpoint into weights of a model that has its parameters on the meta device.

    Works on a copy of the model, so that weights can be loaded while the model runs. Raises UnsupportedModelError where
    transformers lacks the API.
    """

    def __init__(self, model: Any, *, where: str, dtype: torch.dtype, device: torch.device) -> None:
        self._api, mapping_of, self._make_config = _internal_api(where)
        self._model, self._where = deepcopy(model), where
        self._quantizer = dequantizer(model.config)
        self._mapping = mapping_of(self._model, hf_quantizer=self._quantizer)
        self._settings = {
            "dtype": dtype,
            "dtype_plan": model._get_dtype_plan(dtype),
            "weight_mapping": self._mapping,
            "hf_quantizer": self._quantizer,
        }
        self._device = device
        self._renamings = [each for each in self._mapping if isinstance(each, self._api.WeightRenaming)]
        self._converters = [each for each in self._mapping if isinstance(each, self._api.WeightConverter)]
        of_quantizer = self._quantizer.get_weight_conversions() if self._quantizer is not None else ()
        self._dequantized = {pattern for each in of_quantizer for pattern in each.source_patterns}
        self._plain: dict[str, _PlainWeight] = {}
        self._own = dict(self._model.state_dict(keep_vars=True))

    def placements(self, names: Iterable[str]) -> dict[str, Placement]:
        """Where tensors of the checkpoint go; those that the model has no place for are left out."""
        targets: dict[str, tuple[str, str | None]] = {}
        for name in names:
            target, pattern = self._rename(name, self._renamings, self._converters)
            if target not in self._own and name in self._own:  # as transformers does
                target, pattern = self._rename(name, [], [])
            if target in self._own:
                targets[name] = target, pattern
        parts = Counter(target for target, _ in targets.values())
        return {  # what only dequantizes changes nothing without scales
            name: Placement(target, pattern is not None and (pattern not in self._dequantized or parts[target] > 1))
            for name, (target, pattern) in targets.items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights from tensors by their names in the checkpoint, on the device and in the dtype that the model wants.

        Tensors on the meta device give weights there; after that, those of them that are weights unchanged need no
        conversion. Raises UnsupportedModelError where they do not fit the model.
        """
        plain = {
            found.name: tensor.to(self._device, found.dtype)
            for name, tensor in tensors.items()
            if (found := self._plain.get(name)) and not tensor.is_meta
        }
        others = {name: tensor for name, tensor in tensors.items() if name not in self._plain or tensor.is_meta}
        converted = self._converted(others) if others else {}
        if any(tensor.is_meta for tensor in others.values()):
            placements = self.placements(others)
            parts = Counter(placement.target for placement in placements.values())
            self._plain |= {
                name: _PlainWeight(target, converted[target].dtype)
                for name, (target, is_converted) in placements.items()
                if not is_converted and parts[target] == 1 and target in converted
            }
        return plain | converted

    def _converted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.utils import logging as transformers_logging

        logging: Any = transformers_logging  # without types
        device = next((each.device for each in tensors.values() if each.is_meta), self._device)
        config = self._make_config(device_map={"": device}, **self._settings)
        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = self._api.convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
            loaded = {
                name: self._in_wanted_dtype(name, tensor.detach())
                for name, tensor in self._model.state_dict(keep_vars=True).items()
                if tensor is not self._own[name]
            }
        finally:
            self._restore()
            if shows_progress:
                logging.enable_progress_bar()
        problems = [
            f"transformers cannot convert {name} ({text.splitlines()[-1]})"
            for name, text in info.conversion_errors.items()
        ] + [
            f"{type(self._model).__name__} has {name} of shape {list(wanted)}, the checkpoint has {list(shape)}"
            for name, shape, wanted in sorted(info.mismatched_keys)
        ]
        remedy = QUANTIZED_REMEDY if self._quantizer else "check that config.json belongs to these weights"
        raise_all(
            [Problem("parameter-mismatch", self._where, what, remedy) for what in problems[:3]], UnsupportedModelError
        )
        return loaded

    def _in_wanted_dtype(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Of a quantized checkpoint, transformers leaves tensors that are not quantized in their own dtype."""
        return tensor.to(self._own[name].dtype) if self._quantizer is not None else tensor

    def dtype_of(self, placement: Placement) -> torch.dtype:
        """The dtype that the model wants a weight in."""
        dtype: torch.dtype = self._own[placement.target].dtype
        return dtype

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = self._api.rename_source_key(
            name, renamings, converters, self._model.base_model_prefix, self._own
        )
        return renamed

    def _restore(self) -> None:
        """Put the model's own tensors back in the place of loaded ones."""
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            own = self._own[name]
            if tensor is not own:
                path, _, last = name.rpartition(".")
                module = self._model.get_submodule(path)
                (module._buffers if last in module._buffers else module._parameters)[last] = own


def _internal_api(where: str) -> tuple[Any, Any, Any]:
    """transformers' module that converts weights, what makes its mapping, and its settings.

    Raises UnsupportedModelError where this version has another.
    """
    import transformers

    try:
        from transformers import core_model_loading
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        _ = core_model_loading.WeightConverter, core_model_loading.WeightRenaming, core_model_loading.rename_source_key
        wanted = ["model", "state_dict", "load_config", "disk_offload_index"]
        is_known = list(signature(core_model_loading.convert_and_load_state_dict_in_model).parameters) == wanted
    except (ImportError, AttributeError):
        is_known = False
    if not is_known:
        what = f"transformers {transformers.__version__} loads weights in an unknown way"
        remedy = "install transformers 5.20 to 5.23, with which searches are tested"
        raise UnsupportedModelError(Problem("unknown-transformers", where, what, remedy))
    return core_model_loading, get_model_conversion_mapping, LoadStateDictConfig
