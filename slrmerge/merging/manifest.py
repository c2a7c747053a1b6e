"""The manifest of a merge: its sources, the origin of every tensor, a digest of every file, and of itself.

`slrmerge.json` is canonical JSON that contains its own digest, so that any change to it is detected.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import xxhash
from pydantic import Field, ValidationError

from slrmerge._version import __version__
from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import LocalFile, open_within, unreadable
from slrmerge.checkpoint.pair import Side
from slrmerge.checkpoint.side_files import MANIFEST_NAME
from slrmerge.errors import CheckpointError, Problem, VerificationError
from slrmerge.io.model import InvalidValue, Model
from slrmerge.io.names import is_inside
from slrmerge.io.pieces import DIGEST_NAME, FileDigest, digest_bytes
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import canonical_json
from slrmerge.merging.plan.model import MergePlan

FORMAT = 2

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_MAX_BYTES = 1 << 27
"""A model of 300,000 tensors has a manifest of about this size."""


class FileEntry(Model):
    """A file of the merge; `sha256` is the Hub's digest of the post-trained shard that it is a copy of."""

    bytes: int
    digest: str
    sha256: str = ""


class SourceEntry(Model):
    """A source: its name, digests by which it is recognized, and for one on the Hub its commit.

    `unchecked` are files that were not compared with the Hub's digests, since only ranges of them were downloaded or
    they were cached already; the values are those digests, None where the Hub was not asked.
    """

    model: str
    config: str
    files: dict[str, Any]
    repository: str = ""
    revision: str | None = None
    commit: str = ""
    unchecked: dict[str, str | None] = Field(default={})

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` is the one that was merged."""
        return checkpoint.fingerprint() == {"config": self.config, "files": self.files}


class Manifest(Model):
    """The content of a manifest, without its own digest."""

    error = VerificationError

    format: int
    slrmerge: str
    allow_code: bool
    output: str = "model"
    max_shard_size: int
    sources: dict[Side, SourceEntry]
    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, Any]]

    def model_post_init(self, _: Any) -> None:
        places = [*self.files, *(origin.get("file") for origin in self.tensors.values())]
        is_valid = all(isinstance(place, str) and is_inside(place) for place in places)
        if not is_valid or self.sources.keys() != {*get_args(Side)}:
            raise InvalidValue("manifest-altered", "names files or sources that no merge has")


def build_manifest(plan: MergePlan, written: Mapping[str, FileDigest]) -> Iterator[bytes]:
    """The manifest of a merge whose other files are all written, a tensor at a time: it is larger than the plan."""
    read = plan.read_files()
    for side, source in plan.pair.items():  # files that this disk had already
        is_own = ((file, source.side_files.get(file.name)) for file in plan.files)
        read[side] |= {file.name for file, own in is_own if isinstance(own, LocalFile) and file.source == own}
    unchanged = (shard.name for shard in plan.shards if shard.is_unchanged)
    digests = {name: {"sha256": known} for name in unchanged if (known := plan.pair.posttrained.sha256(name))}
    manifest = Manifest(
        format=FORMAT,
        slrmerge=__version__,
        allow_code=plan.allow_code,
        **({"output": "adapter"} if plan.whole else {}),
        max_shard_size=plan.recipe.max_shard_size,
        sources={
            side: {"model": source.model_name, **source.fingerprint(), **source.provenance(read[side])}
            for side, source in plan.pair.items()
        },
        files={
            name: {"bytes": file.file_bytes, "digest": file.digest, **digests.get(name, {})}
            for name, file in sorted(written.items())
        },
        tensors={},
    )
    content = manifest.model_dump(exclude_unset=True)
    digest = xxhash.xxh3_128()
    for part in _with_tensors(content, plan):
        digest.update(part)
    yield from _with_tensors({"digest": f"{DIGEST_NAME}:{digest.hexdigest()}", **content}, plan)


def _with_tensors(content: Mapping[str, Any], plan: MergePlan) -> Iterator[bytes]:
    """What `canonical_json` makes of `content`, whose last entry is `"tensors": {}`, with the tensors of `plan`."""
    before, separator = canonical_json(content).removesuffix(b"}\n}\n"), ""
    yield before
    for name, origin in plan.origins():
        entry = json.dumps({name: origin}, indent=1, ensure_ascii=False)[1:-2]
        yield (separator + entry.replace("\n", "\n ")).encode("utf-8", "surrogatepass")
        separator = ","
    yield b"\n }\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`. Raises VerificationError where it is missing, is not a file, or was altered."""
    path = folder / MANIFEST_NAME
    try:
        with open_within(folder, MANIFEST_NAME) as file:
            raw = file.read(_MAX_BYTES + 1)
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    except OSError as error:
        if error.errno not in _ABSENT:
            raise VerificationError(*unreadable(path, error).problems) from error
        exists = os.path.exists(folder)  # noqa: PTH110 (a name that is too long is not an error here)
        what = "was not written by slrmerge: it has no manifest" if exists else "no such folder"
        raise VerificationError(Problem("no-manifest", str(folder), what, "name the folder of a merge")) from None
    if len(raw) > _MAX_BYTES:
        what = f"is larger than any manifest ({_MAX_BYTES:,} bytes)"
        raise VerificationError(Problem("manifest-altered", str(path), what, "merge again"))
    try:
        content = json.loads(raw)
        is_intact = isinstance(content, dict) and _is_intact(raw, content.pop("digest", ""), content)
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise VerificationError(
            Problem("manifest-altered", str(path), "was altered after it was written", "merge again")
        )
    if content.get("format") != FORMAT:
        what = f"has format {shorten(content.get('format'))}, this version reads format {FORMAT}"
        raise VerificationError(
            Problem("manifest-format", str(path), what, "verify it with the slrmerge that wrote it")
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError:
        raise VerificationError(Problem("manifest-altered", str(path), "is incomplete", "merge again")) from None


def _is_intact(raw: bytes, digest: object, content: Mapping[str, Any]) -> bool:
    """Whether `raw` is `content` after its own digest, in the canonical spelling."""
    rest = canonical_json(content)
    first = canonical_json({"digest": digest}).removesuffix(b"\n}\n") + b","
    return digest == digest_bytes(rest) and raw.startswith(first) and memoryview(raw)[len(first) :] == rest[1:]
