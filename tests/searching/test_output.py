"""Output folders of a search: what is replaced, what is refused, nothing mixed."""

import shutil
from collections.abc import Callable

import pytest

from slrmerge.errors import BusyError, OutputError
from slrmerge.io.output_folder import OutputFolder, staging_folder
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import merge
from slrmerge.searching.results_folder import read_result
from tests.merging.faults import Stop, leftovers, snapshot, stop, tree, write_files
from tests.problems import refused
from tests.searching.pairs import ALL, SmallPair, Watcher, hurried


@hurried
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_may_be_filled(small: SmallPair, overwrite: bool) -> None:
    small.out.mkdir()
    small.run(overwrite=overwrite, spaces=())
    assert (small.out / "results.csv").exists()


REFUSED: dict[str, tuple[Callable[[SmallPair], object], bool, str]] = {
    "other files": (lambda pair: write_files(pair.out, {"notes.md": b"mine"}), False, "output-exists"),
    "other files, overwriting": (
        lambda pair: write_files(pair.out, {"notes.md": b"mine"}), True, "output-not-replaceable",
    ),
    "results and more, overwriting": (
        lambda pair: write_files(pair.out, dict.fromkeys(["results.csv", "summary.json", "z.md", "hybrid/x"], b"")),
        True,
        "output-not-replaceable",
    ),
    "a checkpoint, overwriting": (
        lambda pair: shutil.copytree(pair.folder / "pre", pair.out), True, "output-not-replaceable",
    ),
    "a file": (lambda pair: pair.out.write_text("mine"), True, "output-is-a-file"),
}  # fmt: skip


@hurried
@pytest.mark.parametrize("case", REFUSED)
def test_only_the_results_of_a_search_are_replaced(small: SmallPair, case: str) -> None:
    prepare, overwrite, code = REFUSED[case]
    prepare(small)
    recipe = small.recipe()
    before = tree(small.folder)
    with refused(OutputError, code) as caught:
        small.search(recipe).run(small.out, overwrite=overwrite)
    assert caught.value.problems[0].where == str(small.out)
    assert tree(small.folder) == before


@hurried
def test_older_results_are_replaced_only_with_overwrite(small: SmallPair) -> None:
    small.run(spaces="soups")
    old = snapshot(small.out)
    with refused(OutputError, "output-exists"):
        small.run(spaces="intervals")
    assert snapshot(small.out) == old
    small.run(spaces="intervals", overwrite=True)
    assert len(read_result(small.out).rows) == 12
    assert not (small.out / "soup.yaml").exists()
    assert leftovers(small.out) == []


@hurried
@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_source_is_never_written_to(small: SmallPair, side: str) -> None:
    for out in (small.folder / side, small.folder / side / "search"):
        with refused(OutputError, "output-overlaps") as caught:
            small.run(out, overwrite=True)
        assert caught.value.problems[0].where == str(out)


@hurried
def test_an_output_that_another_process_writes_is_busy(small: SmallPair) -> None:
    with OutputFolder(small.out).locked(Progress()), refused(BusyError, "output-busy"):
        small.run()
    assert not small.out.exists()
    assert not staging_folder(small.out).exists()


@hurried
def test_the_staging_folder_of_a_killed_merge_is_not_mixed_with_results(small: SmallPair) -> None:
    write_files(
        staging_folder(small.out),
        {"model.safetensors": b"half", ".slrmerge-journal": b"x", "plots/x.png": b"", "x.csv.new": b""},
    )
    small.run(spaces=())
    assert sorted(snapshot(small.out) or {}) == sorted({*ALL} - {"slr.yaml", "soup.yaml", "early.yaml", "late.yaml"})
    assert leftovers(small.out) == []


@hurried
def test_a_merge_after_a_killed_search_is_not_mixed_with_its_states(small: SmallPair) -> None:
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop))
    merge(small.recipe(restore=[1, 2]), small.out, fsync=False)
    assert "results.csv" not in (snapshot(small.out) or {})
    assert not (small.out / "first").exists()
    assert leftovers(small.out) == []
