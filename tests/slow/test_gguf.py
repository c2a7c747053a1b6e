"""A merge of GGUF files is the conversion of the merge of the originals, and llama.cpp runs it in the same way.

That llama.cpp runs such a conversion as transformers runs the merge is in `test_downstream`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import slrmerge
from slrmerge.checkpoint.opening import open_checkpoint
from tests.slow.conftest import RESTORED, WITH_SMOLLM2
from tests.slow.llama_cpp import gguf_of, serve

pytestmark = WITH_SMOLLM2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gguf")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def converted(folder: Path, real_hybrid: Path) -> Path:
    """The merge of the pair, converted."""
    return gguf_of(real_hybrid / "hybrid", folder / "converted.gguf", outtype="q8_0")


@pytest.fixture(scope="module")
def merged(folder: Path, real_pair: Path) -> Path:
    """The merge of conversions of the pair."""
    sides = {
        side: str(gguf_of(real_pair / side, folder / f"{side}.gguf", outtype="q8_0"))
        for side in ("pretrained", "posttrained")
    }
    slrmerge.merge({**sides, "restore": RESTORED}, folder / "merged")
    assert slrmerge.verify(folder / "merged").against_sources
    return folder / "merged" / "posttrained.gguf"


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    checkpoint = open_checkpoint(path)
    found: dict[str, tuple[str, bytes]] = {}
    with checkpoint.open() as reader:
        for name, info in checkpoint.items():
            data = bytearray(info.nbytes)
            reader.read_into(name, 0, memoryview(data))
            found[name] = info.dtype, bytes(data)
    return found


def test_a_merge_of_conversions_is_the_conversion_of_the_merge(merged: Path, converted: Path) -> None:
    assert tensors(merged) == tensors(converted)


def continued(gguf: Path) -> list[int]:
    options = {"max_tokens": 6, "temperature": 0, "logprobs": 1}
    answer = serve(gguf).handle_completions({"prompt": "The capital of France is", **options})["choices"][0]
    return [token["id"] for token in answer["logprobs"]["content"]]


def test_llama_cpp_runs_both_alike(merged: Path, converted: Path) -> None:
    tokens = continued(merged)
    assert len(tokens) > 1
    assert tokens == continued(converted)
