"""A search: prepare it, score all candidates in one pass, the finalists in another, the selection on other prompts."""

import datetime
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from slrmerge.checkpoint.pair import ModelPair, require_layers, require_not_replaced
from slrmerge.errors import Problem, UnsupportedModelError, require_extra
from slrmerge.io.files import replace_file
from slrmerge.io.options import checks_types, make_options, takes_options
from slrmerge.io.output_folder import OutputFolder, remove, resolve_target, staging_folder
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.progress import Progress
from slrmerge.recipe.load import AnyRecipe, RecipeLike, as_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.searching.candidates import Candidate
from slrmerge.searching.device import parse_device, require_device
from slrmerge.searching.estimate import Estimate, estimate, estimate_parts
from slrmerge.searching.held_out import look_again, reselect
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.passes import PASSES, Pass, PassResult
from slrmerge.searching.prepare import Prepared, also_recipes, prepare, recipe_of
from slrmerge.searching.prompt_scores import KeptScores, PromptScores, write_prompts
from slrmerge.searching.prompts import answer_log_probs
from slrmerge.searching.proxy_tasks import Question, Scores, make_task
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import RECIPES, why_not_results, write_result
from slrmerge.searching.scorer import LocalScorer, Scorer, ScorerOptions, torch_threads
from slrmerge.searching.selection import ScoredCandidate, Selection, finalists, mark_feasible, select_from
from slrmerge.searching.sweep.cost import Cost

if TYPE_CHECKING:
    from slrmerge.searching.cluster import RayScorer

RESCORED_AT_LEAST = 10
"""Candidates of each space that are scored again exactly, besides all that may be selected."""

ROUNDING_MARGIN, QUICK_MARGIN = 0.01, 0.05
"""The error of a first pass's scores: bfloat16 changes D by up to 7e-3, eight prompts instead of forty by more."""

PREPARING = "reading headers, loading transformers, tokenizing the prompts"

_DATE = "date"
"""A file beside the passes: the date in the prompts, for a search that resumes on another day."""


class Search:
    """A search of a recipe's pair, or of an open one. The constructor checks the options and opens nothing.

    `make_scorer` makes the scorer of a pair, by default a LocalScorer; before scoring, the weights of the pair are
    downloaded and the scorer is made again where that changed the pair. Raises OptionError and RecipeError.
    """

    def __init__(
        self,
        pair: RecipeLike | ModelPair,
        options: SearchOptions | None = None,
        *,
        make_scorer: Callable[[ModelPair], Scorer] | None = None,
    ) -> None:
        require_extra("search", "transformers", "matplotlib", "plotly", "jinja2")
        self.options = options or SearchOptions()
        self._open = pair if isinstance(pair, ModelPair) else None
        self.recipe: AnyRecipe = recipe_of(pair) if isinstance(pair, ModelPair) else as_recipe(pair)
        self.also = also_recipes(self.options.also)
        self.task = make_task(self.options.task)
        self._day = self.options.day
        self.questions = self.task.questions()
        self.held_out = self.task.held_out_questions() if self.options.held_out else ()
        check_device = parse_device if self.options.ray else require_device  # only a cluster's workers know what it has
        check_device(self.options.device)
        self._make_scorer = make_scorer or (self._ray_scorer if self.options.ray else self._local_scorer)
        self._scorer: tuple[ModelPair, Scorer] | None = None

    def __repr__(self) -> str:
        return f"<Search of {self.recipe.pretrained} and {self.recipe.posttrained}>"

    @cached_property
    def prepared(self) -> Prepared:
        """The open pair, the prompts and the candidates.

        Raises CheckpointError, HubError, PlanError and UnsupportedModelError.
        """
        pair = self._open or self.recipe.open_pair()
        return prepare(pair, self.recipe, self.also, self.questions, self.held_out, options=self.options, day=self._day)

    def estimate(self) -> Estimate:
        """What the passes would take; reads no weights.

        From shapes and a matrix product measured here. Where the first pass is rough, all candidates count as
        finalists, as they are where their scores tie.
        """
        with torch_threads(self.options.threads):
            prepared = self.prepared
            pair, first = prepared.pair, prepared.first
            requests = [first.request]
            if not first.is_exact(prepared.prompts):
                requests.append(prepared.final_pass(prepared.candidates, name="finalists at most").request)
            if prepared.held_out:
                requests.append(prepared.held_out_pass(prepared.likely_choice()).request)
            if self.options.ray:
                with self._ray_scorer(pair) as cluster:
                    return estimate_parts(cluster.local, [cluster.parts(request) for request in requests])
            scorer = self._scorer_of(pair)
            local = scorer if isinstance(scorer, LocalScorer) else self._local_scorer(pair)
            made = estimate(local, requests)
            return replace(made, prompts=len(first.prompts))

    def output_folder(self, out: str | os.PathLike[str], *, overwrite: bool) -> OutputFolder:
        """The folder of the results. Raises OutputError and NoSpaceError where it cannot be written."""
        pair = self.prepared.pair
        output = OutputFolder(
            out,
            sources=[place for _, checkpoint in pair.items() for place in checkpoint.locations],
            overwrite=overwrite,
            why_not_replaceable=why_not_results,
            durable=False,
        )
        output.check()
        self._require_space(output, self._scorer_of(pair).cost(self.prepared.first.request))
        return output

    def run(
        self, out: str | os.PathLike[str], *, overwrite: bool = False, progress: Progress | None = None
    ) -> SearchResult:
        """Search, and write the results to the folder `out`, which appears complete or not at all.

        A killed search resumes after the last layer that it finished, unless hidden states are not kept.
        """
        started, progress = monotonic(), progress or Progress()
        progress.status(PREPARING)
        self._resume_date(staging_folder(resolve_target(out)), progress)
        output = self.output_folder(out, overwrite=overwrite)
        with output.locked(progress), torch_threads(self.options.threads):
            output.create_staging()
            remove(path for path in output.staging.iterdir() if path.name not in (*PASSES, _DATE))
            self._keep_date(output.staging / _DATE)
            with output.staged(lambda _: self._what_is_kept(output.staging)):
                result, prompt_scores = self._search(output, progress)
                result = replace(result, elapsed_s=monotonic() - started)
                write_prompts(output.staging, prompt_scores)
                write_result(output.staging, result)
                output.check_target()
                remove(output.staging / name for name in (*PASSES, _DATE))
                output.publish(progress)
        return result

    def _search(self, output: OutputFolder, progress: Progress) -> tuple[SearchResult, KeptScores]:
        """Download the pair, score, and select; returns the scores of each prompt, too."""
        pair = self.prepared.pair
        if not self.options.ray:  # whose workers download into their own caches
            pair = pair.download(progress)
        with self._scorer_of(pair) as scorer:
            scored = self._score_candidates(scorer, output, progress)
            result = self._select(scored, self._base(pair, output.path))
            held_out = self._ask_held_out(result.choice, scorer, output, progress)
            require_not_replaced(pair)
        progress.status("writing the results")
        asked = _prompt_scores([row.label for row in result.rows], self.questions, scored.scores)
        reselected = reselect(result.rows, asked, min_quality=self.options.min_quality)
        result = replace(result, held_out=look_again(result.choice, held_out), reselected=reselected)
        return result, KeptScores(asked, held_out)

    def _score_candidates(self, scorer: Scorer, output: OutputFolder, progress: Progress) -> PassResult:
        """Score all candidates, and then the finalists exactly where the first pass was not exact."""
        prepared = self.prepared
        progress.status("checking the sweep against the model's own forward pass")
        ends = [prompt.contexts[place] for prompt in (prepared.prompts[0], prepared.prompts[-1]) for place in (0, -1)]
        scorer.check(prepared.candidates[0].alphas, list(dict.fromkeys(ends)))
        first = self._run_pass(prepared.first, scorer, output, progress)
        post = first.rows[0]
        if not post.quality > 0:
            what = "gives valid answers no probability, so candidates cannot be compared"
            where = str(prepared.pair.posttrained)
            raise UnsupportedModelError(Problem("no-valid-answers", where, what, "name an instruct model"))
        if post.exact:
            return first
        final = prepared.final_pass(self._finalists(first.rows))
        return first.replaced_by(self._run_pass(final, scorer, output, progress))

    def _run_pass(self, wanted: Pass, scorer: Scorer, output: OutputFolder, progress: Progress) -> PassResult:
        return PassResult.of(wanted, self._scores(wanted, scorer, output, progress), self.prepared.prompts)

    def _ask_held_out(
        self, choice: Selection, scorer: Scorer, output: OutputFolder, progress: Progress
    ) -> PromptScores | None:
        """The scores of the selection on prompts that were not used to select it; None where there are none."""
        if not self.prepared.held_out:
            return None
        wanted = self.prepared.held_out_pass(choice)
        scores = self._scores(wanted, scorer, output, progress)
        return _prompt_scores([each.info.label for each in wanted.candidates], self.held_out, scores)

    def _scores(self, wanted: Pass, scorer: Scorer, output: OutputFolder, progress: Progress) -> Scores:
        """The scores of a pass, each of shape (candidates, prompts)."""
        cost = scorer.cost(wanted.request)
        self._require_space(output, cost)
        progress.start(PASSES[wanted.name], cost.states, unit="")
        folder = output.staging / wanted.name if self._uses_disk(cost) else None
        log_probs = scorer.score(wanted.request, folder, progress)
        progress.finish()  # layers that are the same on both sides were computed once
        return self.task.score(answer_log_probs(wanted.prompts, log_probs))

    def _finalists(self, rows: list[ScoredCandidate]) -> list[Candidate]:
        margin = max(
            QUICK_MARGIN if self.options.quick else 0.0,
            ROUNDING_MARGIN if self.prepared.first.dtype != torch.float32 else 0.0,
        )
        chosen = finalists(rows, min_quality=self.options.min_quality, margin=margin, at_least=RESCORED_AT_LEAST)
        labels = {row.label for row in chosen}
        return [each for each in self.prepared.candidates if each.info.label in labels]

    def _select(self, scored: PassResult, base: Recipe) -> SearchResult:
        min_quality = self.options.min_quality
        rows = mark_feasible(scored.rows, post_quality=scored.post_quality, min_quality=min_quality)
        notes = list(self.prepared.notes)
        if len(scored.post_quality) > 1:
            first, final = scored.post_quality
            notes.append(
                f"all {len(rows)} candidates were scored with {first}; {sum(row.exact for row in rows)} finalists and "
                f"controls were scored again with {final}"
            )
        return SearchResult(
            rows=tuple(rows),
            choice=select_from(rows, base=base, min_quality=min_quality),
            post_quality=scored.post_quality,
            layers=require_layers(self.prepared.pair).count,
            task=Path(self.options.task).name,
            notes=tuple(notes),
            elapsed_s=0.0,
            prompt=self.prepared.prompts[0].text,
            date=self.prepared.day.isoformat() if self.prepared.day else None,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def _scorer_of(self, pair: ModelPair) -> Scorer:
        if self._scorer is None or self._scorer[0] is not pair:
            self._scorer = pair, self._make_scorer(pair)
        return self._scorer[1]

    def _local_scorer(self, pair: ModelPair) -> LocalScorer:
        return LocalScorer(pair, self._scorer_options())

    def _ray_scorer(self, pair: ModelPair) -> "RayScorer":
        from slrmerge.searching.cluster import RayScorer

        assert self.options.ray is not None
        return RayScorer(pair, self.options.ray, self._scorer_options(), threads=self.options.threads)

    def _scorer_options(self) -> ScorerOptions:
        return ScorerOptions(
            output_dtype=self.recipe.dtype,
            shares_vocabulary=self.recipe.vocabulary == "shared",
            device=self.options.device,
            max_memory_bytes=self.options.max_memory_bytes,
        )

    def _base(self, pair: ModelPair, folder: Path) -> Recipe:
        """The recipe of the pair, without rules, as a file in `folder` names it."""
        named = self.recipe if isinstance(self.recipe, Recipe) else recipe_of(pair)
        content = named.relative_to(folder, pair)
        sides = {side: content[side] for side in ("pretrained", "posttrained")}
        kept = {key: getattr(self.recipe, key) for key in ("dtype", "tokenizer", "vocabulary")}
        return Recipe(**sides, **kept).loaded_from(folder / RECIPES["slr"])

    def _resume_date(self, staging: Path, progress: Progress) -> None:
        """Ask with the date of an interrupted search, unless the options give one."""
        if self._day is None and self.options.resume:
            with suppress(OSError, ValueError):  # there is none
                self._day = datetime.date.fromisoformat((staging / _DATE).read_text(encoding="ascii"))
            if self._day:
                progress.message(f"the prompts keep the date of the interrupted search, {self._day}")

    def _keep_date(self, path: Path) -> None:
        """Write the date of the prompts, for a search that resumes on another day."""
        day = self.prepared.day
        with translate_os_errors(path):
            if self.options.resume and day:
                replace_file(path, day.isoformat().encode())
            else:
                path.unlink(missing_ok=True)

    def _uses_disk(self, cost: Cost) -> bool:
        """Whether hidden states are written to files: to resume, or because memory cannot hold them."""
        return self.options.resume or cost.states_bytes > self.options.max_memory_bytes

    def _require_space(self, output: OutputFolder, cost: Cost) -> None:
        if self._uses_disk(cost):
            kept = sum(path.stat().st_size for path in output.staging.rglob("*") if path.is_file())
            fits = cost.states_bytes <= self.options.max_memory_bytes
            remedy = "choose an output folder on another disk" + (", or pass resume=False" if fits else "")
            output.require_space(cost.states_bytes - kept, what="the search's hidden states", remedy=remedy)

    def _what_is_kept(self, staging: Path) -> str | None:
        finished = ("*/progress.json", "*/log_probs.npz")
        kept = self.options.resume and any(any(staging.glob(pattern)) for pattern in finished)
        return "finished layers are kept; run the same command again to resume" if kept else None


@checks_types
@takes_options(SearchOptions)
def search(
    pair: RecipeLike | ModelPair,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SearchResult:
    """Score every interval and soup of a pair by a proxy task, and select the layers to restore (paper, section 3).

    `pair` is an open pair, or a recipe that names one; a recipe's own rules are scored too. Writes the results to the
    folder `out`; `merge(result.choice, ...)` merges the selected hybrid. The options are those of `SearchOptions`.
    Raises OptionError, RecipeError, CheckpointError, PlanError, UnsupportedModelError, OutputError and HubError.
    """
    return Search(pair, make_options(SearchOptions, options)).run(out, overwrite=overwrite, progress=progress)


def _prompt_scores(labels: Sequence[str], questions: Sequence[Question], scores: Scores) -> PromptScores:
    return PromptScores(tuple(labels), tuple(question.text for question in questions), scores)
