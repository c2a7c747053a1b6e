"""The manifest of a merge, and that any change to it is detected."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

import slrmerge
from slrmerge.errors import VerificationError
from slrmerge.io.pieces import FileDigest
from slrmerge.merging import manifest
from slrmerge.merging.manifest import FORMAT, build_manifest, read_manifest
from slrmerge.merging.verify import verify
from tests.checkpoints import llama_config
from tests.conftest import Pair
from tests.problems import refused


@pytest.fixture
def content(pair: Pair) -> dict[str, Any]:
    """The manifest of a merge of the pair, as plain values."""
    written = {"b": FileDigest(2, "xxh3_128:bb"), "a": FileDigest(1, "xxh3_128:aa")}
    value: dict[str, Any] = json.loads(b"".join(build_manifest(pair.plan(restore=[2, 3]), written)))
    return value


def canonical(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def signed(content: dict[str, Any]) -> bytes:
    """Manifest bytes with a digest that is right."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return canonical({"digest": f"xxh3_128:{xxhash.xxh3_128_hexdigest(canonical(content))}", **content})


def test_a_manifest_names_sources_files_and_the_origin_of_every_tensor(pair: Pair, content: dict[str, Any]) -> None:
    keys = ["digest", "format", "slrmerge", "allow_code", "max_shard_size", "sources", "files", "tensors"]
    assert list(content) == keys
    assert [content[key] for key in keys[1:5]] == [FORMAT, slrmerge.__version__, False, 5_000_000_000]
    assert content["files"] == {
        "a": {"bytes": 1, "digest": "xxh3_128:aa"},
        "b": {"bytes": 2, "digest": "xxh3_128:bb"},
    }
    raw = (pair.folder / "pre" / "model.safetensors").read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    config = xxhash.xxh3_128_hexdigest(canonical(llama_config()))
    assert content["sources"]["pretrained"] == {
        "model": "pre",
        "config": f"xxh3_128:{config}",
        "files": {"model.safetensors": {"bytes": len(raw), "header": f"xxh3_128:{xxhash.xxh3_128_hexdigest(header)}"}},
    }
    assert content["sources"]["posttrained"]["model"] == "post"
    assert content["tensors"].keys() == pair.post.keys()
    name = "model.layers.2.mlp.up_proj.weight"
    assert content["tensors"][name] == {
        "file": "model-00001-of-00002.safetensors",
        "dtype": "BF16",
        "shape": [16, 8],
        "alpha": 1.0,
        "kind": "copy",
        "pretrained": name,
        "posttrained": None,
    }


def test_a_manifest_reads_back(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "slrmerge.json").write_bytes(signed(content))
    del content["digest"]
    assert read_manifest(tmp_path).model_dump(exclude_unset=True) == content


def test_a_folder_without_a_manifest_cannot_be_verified(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with refused(VerificationError, "no-manifest") as caught:
            read_manifest(folder)
        assert caught.value.problems[0].where == str(folder)


def test_a_manifest_that_cannot_be_opened_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(manifest, "open_within", fail)
    with refused(VerificationError, "unreadable"):
        read_manifest(tmp_path)


ALTERED: dict[str, Any] = {
    "empty": b"",
    "cut short": b'{"format": 1',
    "not UTF-8": b"\xff\xfe\xff",
    "NULs": bytes(100),
    "nested": b"[" * 100_000,
    "a list": canonical([]),
    "a text": canonical("x"),
    "a number": canonical(1),
    "nothing": canonical(None),
    "no digest": canonical({"format": 1}),
    "half a surrogate": b'"\\ud800"\n',
    "a digest of something else": canonical({"digest": "xxh3_128:0", "format": 1}),
    "no files": signed({"format": FORMAT}),
    "files of the wrong type": signed({"format": FORMAT, "files": [], "sources": {}, "allow_code": False}),
}


@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_manifest_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "slrmerge.json").write_bytes(ALTERED[case])
    with refused(VerificationError, "manifest-altered") as caught:
        verify(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path / "slrmerge.json")


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw + b" ",
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.decode().encode("utf-16"),
        lambda raw: json.dumps(json.loads(raw)).encode(),
        lambda raw: raw.replace(b"xxh3_128:aa", b"xxh3_128:AA"),
        lambda raw: raw.replace(b'"alpha": 1.0', b'"alpha": 1e0'),
        lambda raw: raw.replace(b'"alpha": 1.0', b'"alpha": 0.5', 1),
    ],
)
def test_a_manifest_with_the_same_values_in_other_bytes_is_refused(
    tmp_path: Path, content: dict[str, Any], rewrite: Any
) -> None:
    raw = signed(content)
    assert rewrite(raw) != raw
    (tmp_path / "slrmerge.json").write_bytes(rewrite(raw))
    with refused(VerificationError, "manifest-altered"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, None])
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, content: dict[str, Any], number: object) -> None:
    (tmp_path / "slrmerge.json").write_bytes(signed(content | {"format": number}))
    with refused(VerificationError, "manifest-format"):
        read_manifest(tmp_path)


NOT_MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "link-outside"),
    "the environment": (lambda path: path.symlink_to("/proc/self/environ"), "link-outside"),
    "a FIFO": (lambda path: os.mkfifo(path), "not-a-file"),
    "a folder": (Path.mkdir, "not-a-file"),
    "a broken link": (lambda path: path.symlink_to("missing"), "broken-link"),
}


@pytest.mark.timeout(10)
@pytest.mark.skipif("os.name == 'nt'")
@pytest.mark.parametrize("case", NOT_MANIFESTS)
def test_a_manifest_that_is_not_a_file_is_refused_at_once(tmp_path: Path, case: str) -> None:
    make, code = NOT_MANIFESTS[case]
    make(tmp_path / "slrmerge.json")
    with refused(VerificationError, code):
        verify(tmp_path)


def test_a_manifest_that_is_too_large_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slrmerge.json").touch()
    os.truncate(tmp_path / "slrmerge.json", 1 << 40)
    monkeypatch.setattr(manifest, "_MAX_BYTES", 1 << 20)
    with refused(VerificationError, "manifest-altered"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["../id_rsa", "/etc/passwd", "chat_templates/../../id_rsa"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    content["files"][name] = content["files"]["a"]
    (tmp_path / "slrmerge.json").write_bytes(signed(content))
    with refused(VerificationError, "manifest-altered"):
        read_manifest(tmp_path)
