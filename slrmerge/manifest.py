"""What a finished merge says of itself: sources, the origin of every tensor, a digest of every file, and of itself.

`slrmerge.json` is canonical JSON with its own digest inside, so that not a bit of it can change unnoticed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

import slrmerge
from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import Problem, VerificationError
from slrmerge.plan import MANIFEST_NAME, MergePlan
from slrmerge.writer import DIGEST_NAME, Written

FORMAT = 1


def build_manifest(plan: MergePlan, written: Mapping[str, Written]) -> bytes:
    """The manifest of a merge whose files are all written but this one."""
    pre_files, post_files = plan.read_files()
    post_files |= {file.name for file in plan.files if isinstance(file.source, Path)}
    sides = zip(("pretrained", "posttrained"), plan.sides, (pre_files, post_files), strict=True)
    content = {
        "format": FORMAT,
        "slrmerge": slrmerge.__version__,
        "allow_code": plan.allow_code,
        "sources": {
            side: {"model": checkpoint.model_name, **source_state(checkpoint), **_on_the_hub(checkpoint, files)}
            for side, checkpoint, files in sides
        },
        "files": {name: {"bytes": file.file_bytes, "digest": file.digest} for name, file in sorted(written.items())},
        "tensors": plan.origins(),
    }
    return _canonical({"digest": _digest(content), **content})


def _on_the_hub(checkpoint: Checkpoint, files: Iterable[str]) -> dict[str, Any]:
    """Of a source from the Hub: at which commit it was read, and which of the `files` that were read could not be held
    against the Hub's own digests, since only ranges of them were fetched or they were in its cache already. What the
    Hub says of them stands there, None where it could not be asked.
    """
    if not checkpoint.snapshot:
        return {}
    known = checkpoint.snapshot.files
    return {
        "repository": checkpoint.snapshot.repository.name,
        "revision": checkpoint.snapshot.repository.revision,
        "commit": checkpoint.snapshot.commit,
        "unchecked": {
            file: known[file].digest if file in known else None for file in sorted({*files} - checkpoint.checked)
        },
    }


def source_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest keeps of a source, to know it again: its config, and its files' sizes and headers, as digests."""
    return {
        "config": _digest(checkpoint.config),
        "files": {
            name: {"bytes": shard.identity.file_bytes, "header": f"{DIGEST_NAME}:{shard.header_digest}"}
            for name, shard in checkpoint.shards.items()
        },
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, found unaltered. Raises VerificationError."""
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except OSError:
        raise VerificationError(
            Problem(str(path), "is not there", "only folders that slrmerge wrote can be verified")
        ) from None
    try:
        content: dict[str, Any] = json.loads(raw)
        sound = _canonical(content) == raw and content.pop("digest") == _digest(content) and _is_complete(content)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise VerificationError(Problem(str(path), "was altered after it was written", "merge again"))
    if content["format"] != FORMAT:
        raise VerificationError(
            Problem(str(path), f"has format {content['format']}", "verify it with a newer slrmerge")
        )
    return content


def _is_complete(content: Mapping[str, Any]) -> bool:
    """Whether everything is there that a verification looks up."""
    files = content["files"].values()
    sources = content["sources"]
    return (
        type(content["format"]) is int
        and all(type(file["bytes"]) is int and type(file["digest"]) is str for file in files)
        and all("files" in sources[side] for side in ("pretrained", "posttrained"))
        and type(content["allow_code"]) is bool
    )


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return f"{DIGEST_NAME}:{xxhash.xxh3_128_hexdigest(_canonical(content))}"
