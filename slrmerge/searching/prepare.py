"""What a search knows before it scores: the pair is open, the prompts are tokens, the candidates are listed."""

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.header import FLOATING, TORCH_DTYPES
from slrmerge.checkpoint.location import AdapterOnBase, Repository, Source
from slrmerge.checkpoint.pair import ModelPair, require_layers, require_same_depth
from slrmerge.checkpoint.side_files import fetch_side_files
from slrmerge.errors import PlanError, Problem, UnsupportedModelError, raise_all
from slrmerge.recipe.load import AnyRecipe, RecipeLike, as_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.searching.candidates import Candidate, leave_out_blends, leave_out_unlike, make_candidates
from slrmerge.searching.device import default_dtype, parse_device
from slrmerge.searching.held_out import candidates_to_ask
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.passes import Pass
from slrmerge.searching.prompts import Prompt, contexts_of, tokenize
from slrmerge.searching.proxy_tasks import Question
from slrmerge.searching.selection import ScoredCandidate, Selection, select_from

QUICK_PROMPTS = 8
"""Prompts of a quick first pass, spread over the task's."""

_SHOWN = 40
"""Characters of the end of a prompt in a note."""


@dataclass(frozen=True)
class Prepared:
    """A search whose pair is open, whose prompts are tokens and whose candidates are known."""

    pair: ModelPair
    prompts: list[Prompt]
    held_out: list[Prompt]
    candidates: list[Candidate]
    first: Pass
    notes: tuple[str, ...]

    @property
    def day(self) -> datetime.date | None:
        """The date that the chat template wrote into the prompts."""
        return self.prompts[0].day

    def final_pass(self, candidates: Sequence[Candidate], *, name: str = "finalists") -> Pass:
        """A pass whose scores can be selected by."""
        return Pass(name, candidates, self.prompts, torch.float32)

    def held_out_pass(self, choice: Selection) -> Pass:
        """The pass of a selection over the held-out prompts."""
        labels = {row.label for row in candidates_to_ask(choice).values()}
        candidates = [each for each in self.candidates if each.info.label in labels]
        return Pass("held-out", candidates, self.held_out, torch.float32)

    def likely_choice(self) -> Selection:
        """A selection such as the search may make: an interval of half of the layers."""
        half = require_layers(self.pair).count // 2
        scored: dict[str, Any] = {"quality": 1.0, "feasible": True, "exact": True, "prompts": 1, "dtype": "float32"}
        rows = [
            ScoredCandidate(**vars(each.info), **scored, diversity=-abs(each.info.layers_restored - half))
            for each in self.candidates
        ]
        return select_from(rows, base=recipe_of(self.pair), min_quality=0)


def prepare(
    pair: ModelPair,
    recipe: AnyRecipe,
    also: Sequence[tuple[str, AnyRecipe]],
    questions: Sequence[Question],
    held_out_questions: Sequence[Question],
    *,
    options: SearchOptions,
    day: datetime.date | None,
) -> Prepared:
    """Tokenize the questions and list the candidates of a pair. `recipe` is the pair's, `also` are scored too.

    Raises CheckpointError, HubError, PlanError and UnsupportedModelError.
    """
    _require_searchable(pair, recipe, also)
    with_tokenizer = pair[recipe.tokenizer]  # the side whose tokenizer and template the hybrids have
    for checkpoint in {id(each): each for each in (pair.posttrained, with_tokenizer)}.values():
        fetch_side_files(checkpoint.side_files)
    tokenized = tokenize((*questions, *held_out_questions), with_tokenizer.tokenizer_folder, day=day)
    raise_all(_unknown_tokens(pair, tokenized), UnsupportedModelError)
    prompts, held_out = tokenized[: len(questions)], tokenized[len(questions) :]
    own = [("the recipe's own", recipe)] if recipe.has_rules else []
    made = make_candidates(pair, options.spaces, [*own, *also])
    shared = recipe.vocabulary == "shared"
    blends = leave_out_blends(pair, made)
    candidates, notes = leave_out_unlike(pair, blends.candidates, shares_vocabulary=shared)
    notes = [*blends.notes, *notes, *_notes_on_ends(prompts[0])]
    if options.held_out and not held_out:
        notes.append("the task has no held-out prompts; list some under `held_out` to check the selection with them")
    first_prompts = prompts[:: max(1, len(prompts) // QUICK_PROMPTS)] if options.quick else prompts
    if options.dtype:
        dtype: torch.dtype = getattr(torch, options.dtype)
    else:
        dtype = default_dtype(pair.posttrained.parameters, parse_device(options.device))
    first = Pass("first", candidates, first_prompts, dtype)
    return Prepared(pair, prompts, held_out, candidates, first, tuple(notes))


def _require_searchable(pair: ModelPair, recipe: AnyRecipe, also: Sequence[tuple[str, AnyRecipe]]) -> None:
    if pair.posttrained.format == "gguf":
        what = "is a GGUF file, which a search cannot run"
        remedy = "search the original checkpoints; the recipe that it writes merges the GGUF files too"
        raise UnsupportedModelError(Problem("gguf", str(pair.posttrained), what, remedy))
    raise_all(require_same_depth(pair), PlanError)
    require_layers(pair)
    raise_all((*_other_pairs(pair, also), *_other_settings(pair, recipe, also)), PlanError)


def _notes_on_ends(prompt: Prompt) -> Iterator[str]:
    """Notes on how the prompts end, of which `prompt` is one."""
    if prompt.added:
        yield f"the prompts end with {prompt.added!r}, which the chat template writes before an answer"
    if not prompt.is_continued:
        end = repr(prompt.text[-_SHOWN:])
        yield (
            f"the prompts end with {end}, after which the chat template itself writes no answer; check that an answer "
            "belongs there, and not a thought"
        )


def recipe_of(pair: ModelPair) -> Recipe:
    """A recipe of an open pair, without rules."""
    return Recipe(pretrained=pair.pretrained.reference, posttrained=pair.posttrained.reference)


def also_recipes(also: Sequence[RecipeLike]) -> list[tuple[str, AnyRecipe]]:
    """Recipes to score too, each with its label. Raises RecipeError."""
    return [(_label(each, number), as_recipe(each)) for number, each in enumerate(also, 1)]


def _label(recipe: object, number: int) -> str:
    """The name of a recipe's file, as one printable line; a number for a recipe that is not a file."""
    if not isinstance(recipe, str | os.PathLike):
        return f"recipe {number}"
    return "".join(character if character.isprintable() else "?" for character in Path(recipe).name)


def _other_pairs(pair: ModelPair, also: Sequence[tuple[str, AnyRecipe]]) -> Iterator[Problem]:
    """Recipes in `also` that name other checkpoints."""
    for label, other in also:
        for side, checkpoint in pair.items():
            if getattr(other, side) is None:  # the base of the adapter
                continue
            if not _is_at(checkpoint, other.source(side)):
                what = f"names {getattr(other, side)}, which is not the {side} side of this search"
                remedy = "score only recipes for the same two checkpoints"
                yield Problem("other-checkpoint", f"{label}: $.{side}", what, remedy)


def _other_settings(pair: ModelPair, recipe: AnyRecipe, also: Sequence[tuple[str, AnyRecipe]]) -> Iterator[Problem]:
    """Recipes in `also` whose hybrids would be stored, or asked, otherwise than in this search."""
    for label, other in also:
        for key in ("dtype", "tokenizer", "vocabulary"):
            own, theirs = getattr(recipe, key), getattr(other, key)
            if own == theirs or (key == "dtype" and _dtypes(pair, own) == _dtypes(pair, theirs)):
                continue
            given, searched = (value or "not given" for value in (theirs, own))
            what = f"is {given}, but {searched} in the recipe that is searched"
            remedy = "give both the same, or search that recipe alone"
            yield Problem("other-settings", f"{label}: $.{key}", what, remedy)


def _dtypes(pair: ModelPair, dtype: str | None) -> set[str]:
    """The dtypes of a hybrid's floating tensors, which are the post-trained side's unless a recipe says otherwise."""
    stored = {info.dtype for info in pair.posttrained.values()} & FLOATING
    return {dtype} if dtype else {TORCH_DTYPES[each] for each in stored}


def _unknown_tokens(pair: ModelPair, prompts: Sequence[Prompt]) -> Iterator[Problem]:
    """Tokens without a row in the embedding, for example because the tokenizer belongs to another model."""
    post = pair.posttrained
    rows = {info.shape[0] for name, info in post.items() if pair.correspondence.is_vocabulary(name)}
    highest = max(token for context in contexts_of(prompts) for token in (*context.ids, *context.targets))
    if rows and highest >= min(rows):
        what = f"the tokenizer makes token {highest}, and the embedding has {min(rows)} rows"
        yield Problem("token-without-embedding", str(post), what, "give the model its own tokenizer")


def _is_at(checkpoint: Checkpoint, source: Source) -> bool:
    """Whether a source names a checkpoint; a repository without revision names any commit."""
    if isinstance(source, AdapterOnBase):
        source = source.adapter
    if isinstance(source, Repository):
        name, _, commit = checkpoint.reference.rpartition("+")[2].rpartition("@")
        return source.name == name and source.revision in (None, "main", commit)
    return os.path.realpath(source) == os.path.realpath(checkpoint.locations[-1])
