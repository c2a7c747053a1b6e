"""Small GGUF files: written and read by the gguf package, or put together byte by byte to be wrong."""

import random
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

HIDDEN, VOCABULARY = 32, 48


def shapes(*, layers: int = 4, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-like model."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    for k in range(layers):
        for inner, shape in {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "ffn_up.weight": (2 * HIDDEN, HIDDEN),
            "ffn_down.weight": (HIDDEN, 2 * HIDDEN),
        }.items():
            found[f"blk.{k}.{inner}"] = shape
    found["output_norm.weight"] = (HIDDEN,)
    return found if tied else {**found, "output.weight": (VOCABULARY, HIDDEN)}


def write_gguf(
    path: Path,
    seed: object,
    kind: str = "Q8_0",
    *,
    layers: int = 4,
    tied: bool = False,
    kinds: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    more: Mapping[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    values: Mapping[str, Any] | None = None,
    parts: int = 1,
) -> Path:
    """A GGUF file of random weights in `kind`, vectors in F32, others as in `kinds`; split into `parts`.

    `values` are key-values besides the number of layers; those that are None are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = {**shapes(layers=layers, tied=tied), **(more or {})}
    wanted = {name: shape for name, shape in wanted.items() if name not in without}
    writer = GGUFWriter(path, architecture, split_max_tensors=-(-len(wanted) // parts) if parts > 1 else 0)
    pairs = {f"{architecture}.block_count": layers, f"{architecture}.rope.freq_base": 1e4, **(values or {})}
    for key, value in pairs.items():
        add_value(writer, key, value)
    for name, shape in wanted.items():
        own = (kinds or {}).get(name) or (kind if len(shape) > 1 else "F32")
        rng = np.random.default_rng(list(f"{seed}/{name}".encode()))
        array = rng.standard_normal(shape, dtype=np.float32)
        raw_dtype = GGMLQuantizationType[own]
        data = (100 * array).astype(np.int32) if own == "I32" else quantize(array, raw_dtype)
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def read_gguf_back(*paths: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's type and bytes, as the gguf package reads them."""
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for path in paths
        for tensor in GGUFReader(path).tensors
    }


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def raw_value(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCHITECTURE = raw_value("general.architecture", 8, text("llama"))


def raw_tensor(name: str | bytes, shape: Iterable[int], kind: int = 0, begin: int = 0) -> bytes:
    """The entry of a tensor, with its shape as it is stored: the fastest dimension first."""
    sizes = list(shape)
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, begin)


def raw_gguf(
    values: Iterable[bytes] = (ARCHITECTURE,),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file with these entries; `counts` are the numbers of tensors and key-values that it claims to have."""
    values, tensors = list(values), list(tensors)
    claimed = counts or (len(tensors), len(values))
    header = magic + struct.pack("<IQQ", version, *claimed) + b"".join(values) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def random_bytes(count: int, seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(count)
