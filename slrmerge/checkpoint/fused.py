"""Modules that some checkpoints store as one tensor and others as several."""

import re

_FUSED = {
    "experts": (r"experts\.[a-z]", r"experts\.\d+\."),
    "queries, keys and values": (
        r"\b(?:qkv_proj|query_key_value|qkv|c_attn|Wqkv|W_pack|wqkv|in_proj)\b",
        r"\b(?:[qkv]_proj|query|key|value|[qkv]_lin|w[qkv]|[qkv])\b",
    ),
    "gate and up projections": (r"\bgate_up_proj\b", r"\b(?:gate|up)_proj\b"),
}
"""What is fused: a pattern of the one tensor's name, and one of the several tensors' names."""


def fusion(name: str) -> tuple[str, bool] | None:
    """What a tensor's name says is fused or split in its layer, and whether it is fused; None where it says neither."""
    for what, patterns in _FUSED.items():
        for pattern, is_fused in zip(patterns, (True, False), strict=True):
            if re.search(pattern, name):
                return what, is_fused
    return None


def is_regrouped(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two shapes differ only in how neighbouring dimensions are grouped: the elements have the same order."""
    if first == second:
        return True
    short, long = sorted(([size for size in shape if size != 1] for shape in (first, second)), key=len)
    remaining = iter(long)
    for size in short:
        product = 1
        while product < size:
            product *= next(remaining, size + 1)
        if product != size:
            return False
    return next(remaining, None) is None and 0 not in long
