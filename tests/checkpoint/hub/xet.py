"""What the client uploaded through Xet, read back from the folder that stands in for Xet's own servers.

The client says nothing to the hub but the sha256 of such a file; the folder's shards tell which Xet file has it.
"""

import struct
from pathlib import Path

RECORD = 48  # bytes, of everything in a shard


def read_back(folder: Path, digest: str) -> bytes | None:
    """The uploaded content with this sha256, None without one."""
    import hf_xet

    for shard in folder.rglob("xorbs/shards/*.mdb"):
        for sha256, xet_hash, size in _files(shard.read_bytes()):
            if sha256 == digest:
                group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{folder}")
                return b"".join(group.download_stream(hf_xet.XetFileInfo(xet_hash, size)))
    return None


def _files(shard: bytes) -> list[tuple[str, str, int]]:
    """The sha256, Xet hash and size of each file in a shard: a head, then its segments, their proofs, the sha256."""
    files, at = [], RECORD
    while shard[at : at + 32] != b"\xff" * 32:
        head, flags, segments = at, *struct.unpack_from("<II", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, head + RECORD * n + 36)[0] for n in range(1, segments + 1))
        at += RECORD * (1 + segments * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            files.append((_hash(shard, at), _hash(shard, head), size))
            at += RECORD
    return files


def _hash(shard: bytes, at: int) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))
