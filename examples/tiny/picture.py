"""Draw the README's picture: which layers are restored, and what the example pair answers before and after.

    python examples/tiny/picture.py --out docs/images

Every answer is sampled from the checkpoints in this folder, merged by `recipe.yaml`.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from show import first_token_probs, load, score
from transformers.utils.logging import disable_progress_bar

import slrmerge as slr
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter

HERE = Path(__file__).parent
LAYERS = range(10)
RESTORED = range(2, 9)
QUESTIONS = (2, 22)  # of CRC's 40: integers from 0 to 7, letters from B to S
DRAWS = 20


@dataclass(frozen=True)
class Answered:
    """One question: its text, its valid answers, and one model's answers to it."""

    text: str
    valid: tuple[str, ...]
    given: tuple[str, ...]

    @property
    def found(self) -> int:
        return len(set(self.given) & set(self.valid))


@dataclass(frozen=True)
class Theme:
    ground: str
    text: str
    muted: str
    posttrained: str
    restored: str
    on_colour: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#6e7781", "#0969da", "#ffffff"),
    "dark": Theme("#0d1117", "#f0f6fc", "#9198a1", "#9198a1", "#58a6ff", "#0d1117"),
}


def ask(folder: Path) -> tuple[list[Answered], float, float]:
    """A checkpoint's sampled answers to `QUESTIONS`, and its quality and diversity on all of CRC's."""
    model, tokenizer = load(folder)
    questions = ConstrainedRandomCharacter().questions()
    probs = first_token_probs(model, tokenizer, questions)
    answered = []
    for number in QUESTIONS:
        draws = probs[number].multinomial(DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))
        given = tuple(str(tokenizer.decode([token])) for token in draws.tolist())
        answered.append(Answered(questions[number].text.split(".")[0], tuple(questions[number].answers), given))
    return answered, *score(probs, tokenizer, questions)


def box(axes: Axes, x: float, y: float, width: float, height: float, *, face: str, edge: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", fc=face, ec=edge, lw=1.2)
    )


def draw_model(
    axes: Axes, top: float, title: str, restored: Sequence[int], answers: list[Answered], scores: str, theme: Theme
) -> None:
    """One row of the picture: the stack of layers on the left, the answers on the right. `top` is its upper edge."""
    axes.text(0, top, title, color=theme.text, fontsize=13, weight="bold", va="center")
    axes.text(12.6, top, scores, color=theme.muted, fontsize=10.5, ha="right", va="center")
    for layer in LAYERS:
        colour = theme.restored if layer in restored else theme.posttrained
        box(axes, 0.29 * layer, top - 1.78, 0.24, 1.4, face=colour, edge=colour)
        axes.text(
            0.29 * layer + 0.12, top - 1.08, str(layer), color=theme.on_colour, fontsize=9, ha="center", va="center"
        )
    for row, answered in enumerate(answers):
        y = top - 0.52 - 0.82 * row
        found = f"{answered.found} of {len(answered.valid)} valid answers"
        axes.text(3.5, y, f"“{answered.text}”", color=theme.muted, fontsize=9.5, va="center")
        axes.text(12.6, y, found, color=theme.text, fontsize=9.5, ha="right", va="center")
        for number, answer in enumerate(answered.given):
            x = 3.5 + 0.457 * number
            valid = answer in answered.valid
            colour = (theme.restored if restored else theme.posttrained) if valid else theme.ground
            box(axes, x, y - 0.5, 0.4, 0.32, face=colour, edge=colour if valid else theme.muted)
            ink = theme.on_colour if valid else theme.muted
            axes.text(x + 0.2, y - 0.345, answer, color=ink, fontsize=10, ha="center", va="center")


def draw(models: dict[str, tuple[list[Answered], float, float]], theme: Theme) -> Figure:
    """The picture: one row for each model, the post-trained one first."""
    figure = Figure(figsize=(10, 4.05), facecolor=theme.ground)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.025, 0.03, 0.95, 0.94))
    axes.set(xlim=(-0.02, 12.62), ylim=(-4.85, 0.25))
    axes.axis("off")
    for row, (title, (answers, quality, diversity)) in enumerate(models.items()):
        scores = f"quality {quality:.2f}   diversity {diversity:.2f} nats"
        draw_model(axes, -2.35 * row, title, RESTORED if row else (), answers, scores, theme)
    for x, colour, words in (
        (0, theme.posttrained, "post-trained layer"),
        (2.3, theme.restored, "layer with its pre-trained weights"),
    ):
        box(axes, x, -4.8, 0.2, 0.2, face=colour, edge=colour)
        axes.text(x + 0.3, -4.7, words, color=theme.muted, fontsize=9.5, va="center")
    axes.text(
        12.6, -4.7, f"{DRAWS} samples each; outlined: not a valid answer", color=theme.muted, fontsize=9.5,
        ha="right", va="center",
    )  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no annotations there
    with tempfile.TemporaryDirectory() as folder:
        hybrid = Path(folder) / "hybrid"
        slr.merge(HERE / "recipe.yaml", out=hybrid)
        models = {
            "Post-trained": ask(HERE / "posttrained"),
            f"Layers {RESTORED[0]}–{RESTORED[-1]} restored": ask(hybrid),
        }
    with mpl.rc_context({"svg.hashsalt": "slrmerge", "svg.fonttype": "path"}):
        for name, theme in THEMES.items():
            draw(models, theme).savefig(out / f"restored-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
