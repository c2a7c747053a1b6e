"""A merge of GGUF files is the conversion of the merge of the originals, and llama.cpp runs it like transformers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import slrmerge
from slrmerge.checkpoint.pair import open_checkpoint
from tests.slow.conftest import RESTORED
from tests.slow.llama_cpp import gguf_of, serve
from tests.slow.test_downstream import OPENINGS, continued_by_transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test may wait for the pair
]

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For conversions of both sides, and their merges: up to 1.6 GB at a time."""
    folder = tmp_path_factory.mktemp("gguf")
    yield folder
    shutil.rmtree(folder)


def merged(folder: Path, real_pair: Path, outtype: str) -> Path:
    """The merge of conversions of the pair."""
    sides = {
        side: gguf_of(real_pair / side, folder / f"{side}-{outtype}.gguf", outtype=outtype)
        for side in ("pretrained", "posttrained")
    }
    out = folder / f"merged-{outtype}"
    slrmerge.merge({**{side: str(path) for side, path in sides.items()}, "restore": RESTORED}, out)
    assert slrmerge.verify(out).against_sources
    for path in sides.values():
        path.unlink()
    return out / f"posttrained-{outtype}.gguf"


@pytest.fixture(scope="module")
def merged_f32(folder: Path, real_pair: Path) -> Path:
    return merged(folder, real_pair, "f32")


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    checkpoint = open_checkpoint(path)
    found: dict[str, tuple[str, bytes]] = {}
    with checkpoint.open() as reader:
        for name, info in checkpoint.items():
            data = bytearray(info.nbytes)
            reader.read_into(name, 0, memoryview(data))
            found[name] = info.dtype, bytes(data)
    return found


def test_a_merge_of_conversions_is_the_conversion_of_the_merge(merged_f32: Path, real_hybrid: Path) -> None:
    assert tensors(merged_f32) == tensors(real_hybrid / "hybrid.gguf")


def test_a_merge_of_quantised_conversions_is_the_quantised_conversion_of_the_merge(
    folder: Path, real_pair: Path, real_hybrid: Path
) -> None:
    converted = gguf_of(real_hybrid / "hybrid", folder / "hybrid-q8_0.gguf", outtype="q8_0")
    assert tensors(merged(folder, real_pair, "q8_0")) == tensors(converted)


def test_llama_cpp_continues_prompts_with_the_merge_as_transformers_does(merged_f32: Path, real_hybrid: Path) -> None:
    from transformers import AutoTokenizer

    server = serve(merged_f32)
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    answers = [server.handle_completions({"prompt": prompt, **options})["choices"][0] for prompt in OPENINGS]
    prompts = AutoTokenizer.from_pretrained(real_hybrid / "hybrid")(list(OPENINGS))["input_ids"]
    expected = continued_by_transformers(real_hybrid / "hybrid", prompts, NEW_TOKENS)
    assert [[token["id"] for token in answer["logprobs"]["content"]] for answer in answers] == expected
