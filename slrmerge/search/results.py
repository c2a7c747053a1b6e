"""What a search leaves in its folder: a table, the values of each prompt, a summary, recipes. And reading it again."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import slrmerge
from slrmerge.crc import Scores
from slrmerge.errors import OutputError, Problem
from slrmerge.files import replace_file
from slrmerge.plan import SUMMARY_NAME
from slrmerge.plots import PICTURES
from slrmerge.search.candidates import Candidate, recipe_of
from slrmerge.search.choose import Choice, Row, choose, conditions, interval_space, may_be_better
from slrmerge.writer import output_error

TABLE, PROMPTS = "results.csv", "prompts.npz"
RECIPES = {"slr": "slr.yaml", "soup": "soup.yaml", "early": "early.yaml", "late": "late.yaml"}

_COLUMNS = (
    "space", "label", "start", "end", "alpha", "modules", "layers_restored",
    "quality", "diversity", "feasible", "pareto", "exact", "prompts", "dtype", "rules",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A search's outcome: judged rows, the choice among them, and how they came about.

    `pretrained`, `posttrained` and `dtype` are what recipes are to say; `post_quality` is by conditions. `notes` say
    what was skipped or is uncertain.
    """

    rows: tuple[Row, ...]
    choice: Choice
    post_quality: Mapping[str, float]
    layers: int
    task: str
    pretrained: str
    posttrained: str
    dtype: str | None
    notes: tuple[str, ...]
    elapsed_s: float

    @property
    def intervals(self) -> list[Row]:
        """The rows of the space in which the choice is made."""
        return [row for row in self.rows if row.candidate.space == interval_space(self.rows)]

    @property
    def doubts(self) -> tuple[str, ...]:
        """What may make another choice the better one: near-ties, and candidates that only a rough pass asked."""
        slr = self.choice.slr
        doubts = [
            f"near-tie: {row.candidate.label} has only {slr.diversity - row.diversity:.1e} nats less than "
            f"{slr.candidate.label}"
            for row in self.choice.near_ties
            if slr is not None
        ]
        rough = may_be_better(self.rows, self.choice)
        if rough:
            named = ", ".join(row.candidate.label for row in rough[:3]) + (", …" if len(rough) > 3 else "")
            remedy = "search without --quick and with --dtype float32 to be sure"
            doubts.append(f"asked only roughly, and maybe better: {named}; {remedy}")
        return tuple(doubts)

    def summary(self) -> dict[str, Any]:
        """The outcome as plain values, for `summary.json` and `--json`."""
        return {
            "slrmerge": slrmerge.__version__,
            "task": self.task,
            "pretrained": self.pretrained,
            "posttrained": self.posttrained,
            "dtype": self.dtype,
            "layers": self.layers,
            "candidates": len(self.rows),
            "min_quality": self.choice.min_quality,
            "chosen": {name: _described(row) for name, row in self.choice.named().items()},
            "near_ties": [_described(row) for row in self.choice.near_ties],
            "post_quality": dict(self.post_quality),
            "notes": list(self.notes),
            "doubts": list(self.doubts),
            "elapsed_s": round(self.elapsed_s, 1),
        }


def _described(row: Row) -> dict[str, Any]:
    return {
        "label": row.candidate.label,
        **row.candidate.rules,
        "quality": row.quality,
        "diversity": row.diversity,
        "exact": row.exact,
    }


def write_report(folder: Path, report: Report) -> None:
    """The table, the recipes of the choice and the summary, the summary last; a recipe without a choice is removed."""
    _write(folder / TABLE, _table(report.rows))
    for name, file in RECIPES.items():
        row = report.choice.named().get(name)
        if row is None:
            (folder / file).unlink(missing_ok=True)
        else:
            _write(folder / file, _recipe(report, name, row))
    _write(folder / SUMMARY_NAME, json.dumps(report.summary(), indent=2, ensure_ascii=False).encode() + b"\n")


def write_prompts(path: Path, rows: Sequence[Row], questions: Sequence[str], scores: Scores) -> None:
    """Each prompt's Q and D, float64 of shape (candidates, prompts), NaN where a candidate was not asked."""
    labels = [row.candidate.label for row in rows]
    kept = BytesIO()
    np.savez_compressed(
        kept, candidates=labels, questions=list(questions), quality=scores.quality, diversity=scores.diversity
    )
    _write(path, kept.getvalue())


def read_report(folder: Path) -> Report:
    """What `write_report` wrote, its choice as it was. Raises OutputError where it is not there or not whole."""
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_bytes())
        with open(folder / TABLE, encoding="utf-8", newline="") as file:
            rows = tuple(map(_row, csv.DictReader(file)))
        if strange := {conditions(row) for row in rows} - summary["post_quality"].keys():
            raise ValueError(f"no quality of the post-trained model for {strange}")
        return Report(
            rows=rows,
            choice=choose(rows, min_quality=summary["min_quality"]),
            post_quality=summary["post_quality"],
            elapsed_s=summary["elapsed_s"],
            notes=tuple(summary["notes"]),
            **{name: summary[name] for name in ("layers", "task", "pretrained", "posttrained", "dtype")},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        what = "does not hold the results of a search"
        raise OutputError(Problem(str(folder), what, "name the folder that slrmerge search wrote")) from error


def no_mere_results(folder: Path) -> str | None:
    """Why a folder is more or less than a search's results; nothing else is ever replaced by them."""
    names = {path.name for path in folder.iterdir()}
    if SUMMARY_NAME not in names or TABLE not in names:
        return "does not hold the results of a search"
    others = sorted(
        {name.removesuffix(".new") for name in names} - {SUMMARY_NAME, TABLE, PROMPTS, *RECIPES.values(), *PICTURES}
    )
    return f"holds more than the results of a search ({', '.join(others)})" if others else None


def _table(rows: Sequence[Row]) -> bytes:
    """A line a candidate, in the order they were tried; empty where a number has no meaning."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        both = {**vars(row.candidate), **vars(row), "rules": json.dumps(row.candidate.rules)}
        writer.writerow([_written(both[name]) for name in _COLUMNS])
    return text.getvalue().encode()


def _written(value: object) -> object:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def _row(line: Mapping[str, str]) -> Row:
    candidate = Candidate(
        space=line["space"],
        rules=json.loads(line["rules"]),
        label=line["label"],
        start=int(line["start"]) if line["start"] else None,
        end=int(line["end"]) if line["end"] else None,
        alpha=float(line["alpha"]) if line["alpha"] else None,
        modules=line["modules"] or None,
        layers_restored=int(line["layers_restored"]),
    )
    flags = {name: line[name] == "true" for name in ("exact", "feasible", "pareto")}
    return Row(
        candidate, float(line["quality"]), float(line["diversity"]), int(line["prompts"]), line["dtype"], **flags
    )


_WHY = {
    "slr": "the interval with the highest D whose Q is at least {ratio:g} of the post-trained model's",
    "soup": "the soup with the highest D whose Q is at least {ratio:g} of the post-trained model's",
    "early": "a control: as many layers as slr.yaml, the first ones",
    "late": "a control: as many layers as slr.yaml, the last ones",
}


def _recipe(report: Report, name: str, row: Row) -> bytes:
    post = report.choice.post
    content = recipe_of(row.candidate, pretrained=report.pretrained, posttrained=report.posttrained, dtype=report.dtype)
    return (
        f"# {row.candidate.label}: {_WHY[name].format(ratio=report.choice.min_quality)}.\n"
        f"# Found by `slrmerge search` ({report.task}, {conditions(row)}) among {len(report.rows)} candidates:\n"
        f"# Q {row.quality:.4f}, D {row.diversity:.4f} nats; the post-trained model has {post.quality:.4f} and "
        f"{post.diversity:.4f}.\n"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    ).encode()


def _write(path: Path, data: bytes) -> None:
    """A whole file or the old one."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise output_error(path, error) from error
