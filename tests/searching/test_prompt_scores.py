"""prompts.npz is read back as it was written; damage is an error."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from slrmerge.errors import OutputError
from slrmerge.searching.prompt_scores import KeptScores, PromptScores, read_prompts, write_prompts
from slrmerge.searching.proxy_tasks import Scores
from tests.problems import refused
from tests.searching.pairs import prompt_scores, prompts_of

LABELS = ["post-trained", "layers 1–1", "größer"]


def equal(one: PromptScores, other: PromptScores) -> bool:
    named = (one.candidates, one.questions) == (other.candidates, other.questions)
    return named and all(a.tobytes() == b.tobytes() for a, b in zip(one.scores, other.scores, strict=True))


@pytest.mark.parametrize("has_held_out", [True, False])
def test_scores_are_read_back_exactly(tmp_path: Path, has_held_out: bool) -> None:
    asked, held_out = prompt_scores(LABELS, 4, seed=0), prompt_scores(LABELS[:2], 6, seed=1)
    asked.scores.quality[2, 1:] = np.nan
    write_prompts(tmp_path, KeptScores(asked, held_out if has_held_out else None))
    found = read_prompts(tmp_path, LABELS)
    assert found is not None
    assert equal(found.asked, asked)
    assert equal(found.held_out, held_out) if found.held_out else not has_held_out


def test_the_values_of_each_prompt_are_kept_with_candidates_and_questions(tmp_path: Path) -> None:
    asked = prompt_scores(LABELS, 2, seed=0)
    write_prompts(tmp_path, KeptScores(asked, None))
    kept = prompts_of(tmp_path)
    assert list(kept) == ["candidates", "questions", "quality", "diversity"]
    assert (list(kept["candidates"]), list(kept["questions"])) == (LABELS, ["question 0", "question 1"])
    assert kept["quality"].tobytes() == asked.scores.quality.tobytes()


def test_scores_have_a_row_for_each_candidate_and_a_column_for_each_question() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        PromptScores(("a",), ("why?", "how?"), Scores(np.zeros((1, 2)), np.zeros((2, 1))))


def test_a_folder_without_scores_has_none(tmp_path: Path) -> None:
    assert read_prompts(tmp_path, LABELS) is None


def with_arrays(**changed: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with np.load(path) as file:
            arrays = {**dict(file), **changed}
        data = BytesIO()
        np.savez(data, **{name: values for name, values in arrays.items() if values is not None})  # type: ignore[arg-type]
        path.write_bytes(data.getvalue())

    return write


def with_quality(header: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with ZipFile(path, "w") as file:
            file.writestr("quality.npy", header)

    return write


def npy(shape: str, kind: str = "<f8") -> bytes:
    """The header of an array, without its values."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "a folder": lambda path: path.unlink() or path.mkdir(),  # type: ignore[func-returns-value]
    "no diversity": with_arrays(diversity=None),
    "half of the held-out scores": with_arrays(held_out_quality=np.zeros((3, 2))),
    "another shape": with_arrays(quality=np.zeros((3, 5))),
    "another dtype": with_arrays(quality=np.zeros((3, 2), np.float32)),
    "objects": with_arrays(candidates=np.array(LABELS, dtype=object)),
    "more memory than there is": with_quality(npy(f"({10**15},)")),
    "a header without end": with_quality(b"\x93NUMPY\x02\x00" + (9000).to_bytes(4, "little") + b"(" * 9000),
    "not an array": with_quality(b"text"),
    "one candidate without a list": with_arrays(candidates=np.array("x")),
    "letters that no text has": with_arrays(candidates=np.full(3, 0x7FFFFFFF, np.uint32).view("<U1")),
    "encrypted": encrypted,
    "other candidates": with_arrays(candidates=np.array(["post-trained", "layers 1–1", "kleiner"])),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_scores_are_refused(tmp_path: Path, case: str) -> None:
    write_prompts(tmp_path, KeptScores(prompt_scores(LABELS, 2, seed=0), None))
    DAMAGED[case](tmp_path / "prompts.npz")
    with refused(OutputError, "results-damaged") as caught:
        read_prompts(tmp_path, LABELS)
    assert caught.value.problems[0].where == str(tmp_path / "prompts.npz")


def test_scores_that_decompress_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path, KeptScores(prompt_scores(LABELS, 100, seed=0), None))
    monkeypatch.setattr("slrmerge.searching.prompt_scores._MAX_BYTES", 4000)
    with refused(OutputError, "results-damaged"):
        read_prompts(tmp_path, LABELS)
