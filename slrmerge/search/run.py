"""A search from a recipe to a folder of results: prepare, check, ask everything in one pass, the leaders in another."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Self

import numpy as np
import torch

from slrmerge import files
from slrmerge.chat import tokenise
from slrmerge.checkpoint import Checkpoint
from slrmerge.crc import TASKS, Scores
from slrmerge.errors import (
    NoSpaceError,
    OutputError,
    PlanError,
    Problem,
    UnsupportedModelError,
    raise_all,
    require_extra,
)
from slrmerge.hub import open_pair
from slrmerge.merge import folder_problems, resolve_target
from slrmerge.plan import NO_STACK, depth_problems, fetch_side_files
from slrmerge.plots import draw_report
from slrmerge.progress import Progress, Silent
from slrmerge.recipe import Recipe, Side
from slrmerge.repository import Repository, Source
from slrmerge.search.candidates import SPACES, ends, from_recipe
from slrmerge.search.choose import Row, choose, conditions, judge, leaders
from slrmerge.search.estimate import Estimate, estimate
from slrmerge.search.options import SearchOptions, physical_memory_bytes
from slrmerge.search.results import PROMPTS, Report, no_mere_results, write_prompts, write_report
from slrmerge.search.scoring import PairSweeper, Pass
from slrmerge.sweep.cost import Cost
from slrmerge.writer import os_errors_at

BIG_PARAMETERS = 1_000_000_000
"""From here a first pass runs in bfloat16 unless told otherwise."""

QUICK_PROMPTS = 8
"""Prompts of a quick first pass, spread over the task's."""

RESCORED_AT_LEAST = 10
"""How many of each space are asked again exactly, besides all that may win."""

ROUNDING_MARGIN, QUICK_MARGIN = 0.01, 0.05
"""How far a first pass's scores may be off: bf16 moves D by up to 7e-3; eight prompts instead of forty by more."""

_PASSES = {"first": "all candidates", "leaders": "the leaders again, exactly"}


class Search:
    """A search that is ready to run: both checkpoints are open, the questions are tokens, the candidates are known.

    Use it in a `with`. Raises RecipeError, CheckpointError, PlanError and UnsupportedModelError for what cannot be
    searched.
    """

    def __init__(self, recipe: Recipe, options: SearchOptions) -> None:
        require_extra("search", "transformers", "matplotlib")
        if options.threads:
            torch.set_num_threads(options.threads)
        self.recipe, self.options = recipe, options
        pretrained, posttrained = open_pair(*recipe.sources())
        raise_all(depth_problems(pretrained, posttrained), PlanError)
        if posttrained.stack is None:
            raise PlanError(Problem(str(posttrained), NO_STACK))
        self.layers = posttrained.stack.count
        self.task = TASKS[options.task]()
        self.questions = self.task.questions()
        fetch_side_files(posttrained)
        self.prompts = tokenise(self.questions, posttrained.folder)
        self.candidates = [*ends(posttrained, self.layers)]
        for space in options.spaces:
            self.candidates += SPACES[space](posttrained, self.layers)
        raise_all(_other_pairs((pretrained, posttrained), options), PlanError)
        own = [("the recipe's own", recipe)] if recipe.has_rules else []
        self.candidates += [from_recipe(other, label, posttrained) for label, other in (*own, *options.also)]
        big = posttrained.parameters >= BIG_PARAMETERS
        self.dtype: torch.dtype = getattr(torch, options.dtype or ("bfloat16" if big else "float32"))
        self._sweeper = self._sweeper_of(pretrained, posttrained)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sweeper.__exit__()

    def _sweeper_of(self, pretrained: Checkpoint, posttrained: Checkpoint) -> PairSweeper:
        device = torch.device(self.options.device)
        return PairSweeper(pretrained, posttrained, output_dtype=self.recipe.dtype, device=device)

    def estimate(self) -> Estimate:
        """What the first pass costs, from shapes and a matrix product measured here; reads no weights."""
        return estimate(self._sweeper, self._first_pass, device=torch.device(self.options.device))

    def require_target(self, out: Path, *, overwrite: bool) -> Path:
        """Where the results go. Raises OutputError where they must not, NoSpaceError where the states find no room."""
        target = resolve_target(out)
        sources = [self._sweeper.pretrained.folder, self._sweeper.posttrained.folder]
        raise_all(folder_problems(target, sources, overwrite=overwrite, reluctance=no_mere_results), OutputError)
        self._require_space(target, self._sweeper.cost(self._first_pass))
        return target

    def run(self, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Report:
        """Search, and leave the results in the folder `out`, which appears complete or not at all.

        Killed, the same search goes on after the last layer that it finished, unless it was told not to keep states.
        """
        started, progress = monotonic(), progress or Silent()
        target = self.require_target(out, overwrite=overwrite)
        with os_errors_at(target):
            files.create_folder(target.parent, fsync=False)
            with files.exclusive(target):
                files.recover(target)
                self.require_target(out, overwrite=overwrite)
                with self._staging(target) as staging:
                    report = self._search(target, started, progress)
                    _remove(staging / name for name in _PASSES)
                    leftover = files.publish(staging, target)
                if leftover is not None:
                    shutil.rmtree(leftover)
        return report

    @contextmanager
    def _staging(self, target: Path) -> Iterator[Path]:
        """The folder to work in; after a failure it stays if it holds finished layers, and that is said."""
        staging = files.staging_folder(target)
        staging.mkdir(exist_ok=True)
        _remove(path for path in staging.iterdir() if path.name not in _PASSES)
        try:
            yield staging
        except BaseException as error:
            kept = [*staging.glob("*/progress.json"), *staging.glob("*/log_probs.npz")]
            if self.options.resumable and kept:
                error.add_note("finished layers are kept, and the same command goes on from there")
            else:
                _remove([staging])
            raise

    def _search(self, target: Path, started: float, progress: Progress) -> Report:
        staging = files.staging_folder(target)
        self._fetch_weights(progress)
        post = self.candidates[0]
        first = self._first_pass
        progress.say(f"checking that {self._sweeper.model(torch.float32).name} answers in a sweep as it does by itself")
        self._sweeper.check([self.prompts[0], self.prompts[-1]], post)
        rows, scores = self._pass(first, target, progress)
        if not rows[0].quality > 0:
            what = "gives no valid answer any probability, so there is nothing to hold hybrids against"
            raise UnsupportedModelError(Problem(str(self._sweeper.posttrained), what, "name an instruct model"))
        notes: list[str] = []
        post_quality = {conditions(rows[0]): rows[0].quality}
        if not rows[0].exact:
            again = leaders(
                rows, min_quality=self.options.min_quality, margin=self._margin(), at_least=RESCORED_AT_LEAST
            )
            notes.append(
                f"all {len(rows)} candidates were asked {conditions(rows[0])}; the {len(again)} that may win or that "
                f"the winner is held against were asked again: {len(self.prompts)} prompts, float32"
            )
            second = Pass("leaders", again, self.prompts, torch.float32)
            exact, exact_scores = self._pass(second, target, progress)
            post_quality[conditions(exact[0])] = exact[0].quality
            rows, scores = _merged(rows, scores, exact, exact_scores)
        judged = judge(rows, post_quality=post_quality, min_quality=self.options.min_quality)
        report = Report(
            rows=tuple(judged),
            choice=choose(judged, min_quality=self.options.min_quality),
            post_quality=post_quality,
            layers=self.layers,
            task=self.options.task,
            pretrained=self._said("pretrained", target),
            posttrained=self._said("posttrained", target),
            dtype=self.recipe.dtype,
            notes=tuple(notes),
            elapsed_s=monotonic() - started,
        )
        write_prompts(staging / PROMPTS, report.rows, [question.text for question in self.questions], scores)
        write_report(staging, report)
        draw_report(staging, report)
        return report

    def _fetch_weights(self, progress: Progress) -> None:
        """Bring to this disk what is still on the Hub: a search reads every layer, more than once."""
        sides = (self._sweeper.pretrained, self._sweeper.posttrained)
        if any(side.is_remote for side in sides):
            from slrmerge.hub.snapshots import fetch_shards

            fetched = fetch_shards([(side, side.shards) for side in sides], progress)
            self._sweeper.__exit__()
            self._sweeper = self._sweeper_of(*fetched)

    def _pass(self, wanted: Pass, target: Path, progress: Progress) -> tuple[list[Row], Scores]:
        """Score a pass's candidates; scores have a column for every prompt, NaN where it was not asked."""
        cost = self._sweeper.cost(wanted)
        self._require_space(target, cost)
        progress.start(_PASSES[wanted.name], cost.states, " states")
        folder = files.staging_folder(target) / wanted.name if self._uses_disk(cost) else None
        log_probs = self._sweeper.run(wanted, folder, max_bytes=self._max_memory_bytes(), progress=progress)
        asked = self.task.score(log_probs)
        exact = wanted.dtype == torch.float32 and len(wanted.prompts) == len(self.prompts)
        rows = [
            Row(candidate, float(q), float(d), len(wanted.prompts), wanted.dtype_name, exact)
            for candidate, q, d in zip(wanted.candidates, asked.quality.mean(1), asked.diversity.mean(1), strict=True)
        ]
        columns = [self.prompts.index(prompt) for prompt in wanted.prompts]
        wide = [np.full((len(rows), len(self.prompts)), np.nan) for _ in asked]
        for side, values in zip(wide, asked, strict=True):
            side[:, columns] = values
        return rows, Scores(*wide)

    @cached_property
    def _first_pass(self) -> Pass:
        prompts = self.prompts
        if self.options.quick:
            prompts = prompts[:: max(1, len(prompts) // QUICK_PROMPTS)]
        return Pass("first", self.candidates, prompts, self.dtype)

    def _margin(self) -> float:
        return max(QUICK_MARGIN if self.options.quick else 0, ROUNDING_MARGIN if self.dtype != torch.float32 else 0)

    def _max_memory_bytes(self) -> int:
        return self.options.max_memory_bytes or physical_memory_bytes() // 2

    def _uses_disk(self, cost: Cost) -> bool:
        """Whether states are written to a file: to go on after a kill, or because memory cannot hold them."""
        return self.options.resumable or cost.states_bytes > self._max_memory_bytes()

    def _require_space(self, target: Path, cost: Cost) -> None:
        needed = cost.states_bytes if self._uses_disk(cost) else 0
        free = files.free_bytes(target) + _bytes_in(files.staging_folder(target))
        if needed > free:
            what = f"the search's states need {needed / 1e9:,.2f} GB there, the disk has {free / 1e9:,.2f} GB free"
            fits = cost.states_bytes <= self._max_memory_bytes()
            remedy = "choose --out on another disk" + (", or --no-resume to keep none" if fits else "")
            raise NoSpaceError(Problem(str(target), what, remedy))

    def _said(self, side: Side, target: Path) -> str:
        """A side as a recipe in `target` has to name it: as it was written, or from there where that was relative; a
        repository at the commit that was searched."""
        checkpoint: Checkpoint = getattr(self._sweeper, side)
        if checkpoint.snapshot:
            return str(checkpoint.snapshot.pinned)
        written: str = getattr(self.recipe, side)
        if Path(written).expanduser().is_absolute():
            return written
        return os.path.relpath(os.path.realpath(checkpoint.folder), target)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _other_pairs(sides: Sequence[Checkpoint], options: SearchOptions) -> Iterator[Problem]:
    """Recipes to be tried besides that are for other checkpoints."""
    names: tuple[Side, Side] = ("pretrained", "posttrained")
    for label, other in options.also:
        for side, checkpoint in zip(names, sides, strict=True):
            if not _is_at(checkpoint, other.source(side)):
                what = f"names {getattr(other, side)}, which is not the {side} side of this search"
                yield Problem(f"{label}: $.{side}", what, "try only recipes for the same two checkpoints")


def _is_at(checkpoint: Checkpoint, source: Source) -> bool:
    if checkpoint.snapshot:
        named = checkpoint.snapshot.repository
        revisions = {named.revision or "main", checkpoint.snapshot.commit}
        return isinstance(source, Repository) and source.name == named.name and (source.revision or "main") in revisions
    return isinstance(source, Path) and os.path.realpath(source) == os.path.realpath(checkpoint.folder)


def _merged(rows: list[Row], scores: Scores, exact: list[Row], exact_scores: Scores) -> tuple[list[Row], Scores]:
    """The rows of both passes, a candidate once; what was asked exactly counts."""
    place = {id(row.candidate): number for number, row in enumerate(rows)}
    rows, merged = list(rows), Scores(*(side.copy() for side in scores))
    for number, row in enumerate(exact):
        at = place[id(row.candidate)]
        rows[at] = row
        for side, values in zip(merged, exact_scores, strict=True):
            side[at] = values[number]
    return rows, merged
