"""The result of a comparison: its numbers, a figure, and an HTML page to explore."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge._version import __version__
from slrmerge.errors import require_extra
from slrmerge.io.figures import figure_text, save_figure
from slrmerge.io.files import write_file
from slrmerge.io.page import plotly_js, plotly_js_version, render_page
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.text import printable, to_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

OUTSIDE = -1
"""The layer of tensors outside the layers: embedding, last norm, head."""


@dataclass
class Distance:
    """Sums over pairs of elements, pre-trained p and post-trained q, in float64: p², q², (q − p)² and p·q."""

    parameters: int = 0
    pre: float = 0.0
    post: float = 0.0
    moved: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def relative_change(self) -> float:
        """|post − pre| / |pre|; infinite where only the pre-trained side is zero, 0 where both are."""
        if self.pre == 0:
            return 0.0 if self.moved == 0 else float("inf")
        return sqrt(self.moved / self.pre)

    @property
    def cosine(self) -> float:
        """The cosine between the two as vectors; 1 where they are equal, NaN where one is zero."""
        if self.moved == 0:
            return 1.0
        return self.product / (sqrt(self.pre) * sqrt(self.post)) if self.pre and self.post else float("nan")


@dataclass(frozen=True, repr=False)
class DiffResult:
    """Distances by (layer, module), modules as `self_attn.q_proj`; `OUTSIDE` is the layer of everything else.

    `notes` name the tensors that were not compared by value. `pretrained` and `posttrained` name the two checkpoints.
    """

    layers: int
    by_module: Mapping[tuple[int, str], Distance]
    notes: tuple[str, ...] = ()
    pretrained: str = ""
    posttrained: str = ""

    def of_layer(self, layer: int, prefix: str = "") -> Distance:
        """The distance of a layer, or of its modules at or below `prefix`, such as `mlp` or `self_attn.q_proj`."""
        start = prefix and f"{prefix}."
        inside = ((f"{name}.", distance) for (k, name), distance in self.by_module.items() if k == layer)
        return sum((distance for name, distance in inside if name.startswith(start)), Distance())

    def modules(self) -> list[str]:
        """The modules inside layers, in the order of the checkpoint."""
        return list(dict.fromkeys(name for layer, name in self.by_module if layer != OUTSIDE))

    def to_rows(self) -> list[dict[str, float | str | None]]:
        """A row per module: layer (None outside the layers), module, parameters, relative_change, cosine."""
        return [
            {
                "layer": None if layer == OUTSIDE else layer,
                "module": name,
                "parameters": found.parameters,
                "relative_change": found.relative_change,
                "cosine": found.cosine,
            }
            for (layer, name), found in self.by_module.items()
        ]

    def to_pandas(self) -> "DataFrame":
        """`to_rows` as a table. Raises MissingExtraError without pandas."""
        require_extra("search", "pandas")
        from pandas import DataFrame

        return DataFrame(self.to_rows()).astype({"layer": "Int64"})

    def to_csv(self) -> str:
        """`to_rows` as CSV."""
        header = ["layer", "module", "parameters", "relative_change", "cosine"]
        return to_csv(header, ([row[name] for name in header] for row in self.to_rows()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `diff.csv`, `report.html` and, where there are layers, the heat map `diff.png` and `diff.svg`.

        Raises OutputError, and MissingExtraError without matplotlib, jinja2 and plotly.
        """
        require_extra("search", "matplotlib", "jinja2", "plotly")
        folder = Path(folder)
        with translate_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / "diff.csv", self.to_csv().encode(), durable=False)
            write_file(folder / "report.html", diff_page(self).encode(), durable=False)
            if self.layers:
                save_figure(diff_figure(self), folder / "diff")

    def __repr__(self) -> str:
        total = sum(self.by_module.values(), Distance())
        return f"<DiffResult: {self.layers} layers, relative change {three_digits(total.relative_change)}>"

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(index=False))


def diff_page(result: DiffResult) -> str:
    """The page as HTML; it loads nothing, and its Content-Security-Policy forbids it to. Needs jinja2 and plotly."""
    layers = [(str(layer), result.of_layer(layer)) for layer in range(result.layers)]
    outside = [(name, found) for (layer, name), found in result.by_module.items() if layer == OUTSIDE]
    return render_page(
        "slrmerge.merging",
        "diff.html.jinja",
        result=result,
        rows=[*layers, *outside],
        three_digits=three_digits,
        parameters=sum(found.parameters for found in result.by_module.values()),
        data={
            "modules": [printable(name) for name in result.modules()],
            "by_layer": [_finite(found.relative_change) for _, found in layers],
            "relative_change": grid(result, "relative_change"),
            "cosine": grid(result, "cosine"),
        },
        plotly=plotly_js(),
        plotly_version=plotly_js_version(),
        version=__version__,
    )


def grid(result: DiffResult, measure: str) -> list[list[float | None]]:
    """A property of `Distance` for each module (a row) in each layer; None where there is none, or it is not finite."""
    return [
        [
            _finite(getattr(result.by_module[layer, module], measure)) if (layer, module) in result.by_module else None
            for layer in range(result.layers)
        ]
        for module in result.modules()
    ]


def diff_figure(result: DiffResult) -> "Figure":
    """The relative change and the cosine of each module in each layer. Needs matplotlib."""
    import numpy as np
    from matplotlib.figure import Figure

    modules = result.modules()
    size = (2.5 + 0.28 * result.layers, 1.6 + 0.6 * len(modules))
    figure = Figure(figsize=size, layout="constrained")
    panels = (("relative_change", "|post − pre| / |pre|", "viridis"), ("cosine", "cosine", "viridis_r"))
    for number, (name, label, colours) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 1, number)
        image = axes.imshow(np.array(grid(result, name), dtype=float), cmap=colours, aspect="auto")
        figure.colorbar(image, ax=axes, label=label)
        axes.set_yticks(range(len(modules)), list(map(figure_text, modules)))
        axes.set_xlabel("layer")
    figure.suptitle("how far post-training moved the weights")
    return figure


def three_digits(value: float) -> str:
    """A relative change as tables show it: 0.245, 1.09, 6.20e-07."""
    return f"{value:#.3g}".removesuffix(".")


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
