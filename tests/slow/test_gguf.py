"""A merge of GGUF files is the conversion of the merge of the originals, and llama.cpp runs it like transformers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import slrmerge
from slrmerge.checkpoint.pair import open_checkpoint
from tests.slow.llama_cpp import gguf_of, serve
from tests.slow.test_downstream import NEW_TOKENS, OPENINGS, continued_by_transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first test may wait for the pair
]

RESTORE = [17, 28]


@pytest.fixture(scope="module")
def folder(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The merge of the pair, in `hybrid`; conversions of both sides and of it are written next to it."""
    folder = tmp_path_factory.mktemp("gguf")
    sides = {side: str(real_pair / side) for side in ("pretrained", "posttrained")}
    slrmerge.merge({**sides, "restore": RESTORE}, folder / "hybrid")
    yield folder
    shutil.rmtree(folder)


def merged_gguf(folder: Path, real_pair: Path, outtype: str) -> Path:
    """The merge of conversions of the pair."""
    sides = {
        side: str(gguf_of(real_pair / side, folder / f"{side}-{outtype}.gguf", outtype=outtype))
        for side in ("pretrained", "posttrained")
    }
    out = folder / f"merged-{outtype}"
    slrmerge.merge({**sides, "restore": RESTORE}, out)
    assert slrmerge.verify(out).against_sources
    return out / f"posttrained-{outtype}.gguf"


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    checkpoint = open_checkpoint(path)
    found: dict[str, tuple[str, bytes]] = {}
    with checkpoint.open() as reader:
        for name, info in checkpoint.items():
            data = bytearray(info.nbytes)
            reader.read_into(name, 0, memoryview(data))
            found[name] = info.dtype, bytes(data)
    return found


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_a_merge_of_conversions_is_the_conversion_of_the_merge(folder: Path, real_pair: Path, outtype: str) -> None:
    merged = merged_gguf(folder, real_pair, outtype)
    converted = gguf_of(folder / "hybrid", folder / f"hybrid-{outtype}.gguf", outtype=outtype)
    assert tensors(merged) == tensors(converted)


def continued_by_llama_cpp(gguf: Path) -> list[list[int]]:
    server = serve(gguf)
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    answers = [server.handle_completions({"prompt": prompt, **options})["choices"][0] for prompt in OPENINGS]
    return [[token["id"] for token in answer["logprobs"]["content"]] for answer in answers]


def test_llama_cpp_continues_prompts_with_the_hybrid_as_transformers_does(folder: Path, real_pair: Path) -> None:
    from transformers import AutoTokenizer

    merged = folder / "merged-f32" / "posttrained-f32.gguf"
    merged = merged if merged.exists() else merged_gguf(folder, real_pair, "f32")
    prompts = AutoTokenizer.from_pretrained(folder / "hybrid")(list(OPENINGS))["input_ids"]
    hybrid = continued_by_llama_cpp(merged)
    assert hybrid == continued_by_transformers(folder / "hybrid", prompts)
    for side in ("pretrained", "posttrained"):
        assert continued_by_llama_cpp(folder / f"{side}-f32.gguf") != hybrid
