"""Small checkpoints, written byte by byte: what the tests merge, break and repair."""

import json
import math
import random
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from slrmerge.checkpoint.header import DTYPE_BITS


class Tensor(NamedTuple):
    """A tensor to be written: its dtype, shape and little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_tensor(dtype: str, shape: Sequence[int], seed: object) -> Tensor:
    """A tensor of finite values (BF16, F16, F32, F64) or of any bytes (everything else), the same for the same seed."""
    return Tensor(dtype, tuple(shape), _random_bytes(dtype, math.prod(shape), str(seed)))


@lru_cache(maxsize=4096)
def _random_bytes(dtype: str, count: int, seed: str) -> bytes:
    rng = random.Random(seed)
    values = [rng.gauss(0, 1) for _ in range(count)]
    packers = {
        "F64": lambda: struct.pack(f"<{count}d", *values),
        "F32": lambda: struct.pack(f"<{count}f", *values),
        "F16": lambda: struct.pack(f"<{count}e", *values),
        "BF16": lambda: b"".join(struct.pack("<f", value)[2:] for value in values),
        "BOOL": lambda: bytes(value > 0 for value in values),
    }
    return packers[dtype]() if dtype in packers else rng.randbytes(count * DTYPE_BITS[dtype] // 8)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """A safetensors file with the tensors in the order given, padded as writers do."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return raw_file(json.dumps(header), b"".join(tensor.data for tensor in tensors.values()))


def raw_file(header: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header text, padded to 8 bytes, and this data; for headers that lie."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def llama_tensors(
    seed: object, *, layers: int = 6, hidden: int = 8, vocabulary: int = 16, dtype: str = "BF16", tied: bool = False
) -> dict[str, Tensor]:
    """The tensors of a Llama-like model, different for every seed."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for k in range(layers):
        for inner, shape in {
            "input_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, 2 * hidden),
            "mlp.up_proj.weight": (2 * hidden, hidden),
            "self_attn.k_proj.weight": (hidden, hidden),
            "self_attn.q_proj.weight": (hidden, hidden),
        }.items():
            shapes[f"model.layers.{k}.{inner}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: random_tensor(dtype, shape, f"{seed}/{name}") for name, shape in shapes.items()}


def llama_config(*, layers: int = 6, **more: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, **more}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    side_files: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder: config, tokenizer, and the tensors in one file or in `shards` files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama_config() if config is None else config))
    for name, text in ({"tokenizer.json": "{}"} if side_files is None else side_files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    names = list(tensors)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
        return folder
    weight_map: dict[str, str] = {}
    each = -(-len(names) // shards)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * each : (number + 1) * each]
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(len(t.data) for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_back(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a written checkpoint, parsed without slrmerge."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    return tensors
