"""LoRA adapters, written byte by byte, and what they make of their base in exact arithmetic."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Tensor, random_tensor, safetensors_bytes

PREFIX = "base_model.model."
Q = "self_attn.q_proj"

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def lora_tensors(
    base: Mapping[str, Tensor], modules: Sequence[str], *, rank: int = 2, dtype: str = "F32", seed: object = "lora"
) -> dict[str, Tensor]:
    """The factors of modules, named as in the base."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            tensors[f"{PREFIX}{module}.{part}.weight"] = random_tensor(dtype, shape, f"{seed}/{module}/{part}")
    return tensors


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], *, side_files: Mapping[str, str] | None = None, **config: Any
) -> Path:
    """An adapter's folder."""
    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    for name, text in (side_files or {}).items():
        (folder / name).write_text(text)
    return folder


def values(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """A tensor in fp64."""
    flat = torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype])
    return flat.double().reshape(tensor.shape).numpy()


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], module: str, scale: float) -> Any:
    """W + scale·B·A in fp64."""
    a, b = (values(adapter[f"{PREFIX}{module}.{part}.weight"]) for part in ("lora_A", "lora_B"))
    return values(base[f"{module}.weight"]) + scale * (b @ a)
