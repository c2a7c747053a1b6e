"""Charts of an evaluation: bars and changes for each metric, or pass@k as curves, with confidence intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.io.figures import figure_text, model_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(result: EvaluationResult) -> "Figure":
    """The kind of chart that the task declares."""
    return {"bars": bars, "curves": curves}[result.plot](result)


def bars(result: EvaluationResult) -> "Figure":
    """For each metric a bar for each model and, below, the changes from the first model over the same prompts."""
    from matplotlib.figure import Figure

    metrics, models = result.shown, list(result.models)
    is_compared = len(models) > 1
    names, colours = list(map(figure_text, models)), list(model_colours(models).values())
    width = 1.2 + max(2.6, 0.75 * len(models)) * len(metrics)
    figure = Figure(figsize=(width, 5.8 if is_compared else 3.6), layout="constrained")
    panels = figure.subplots(1 + is_compared, max(1, len(metrics)), sharex="col", squeeze=False)
    for metric, column in zip(metrics, panels.T, strict=False):
        cells = [result.cell(model, metric.name) for model in models]
        means, changes = column[0], column[-1]
        means.bar(names, [cell.mean for cell in cells], color=colours, width=0.7)
        _intervals(means, [(cell.mean, cell.low, cell.high) for cell in cells], ["#1c2127"] * len(models))
        means.set_title(metric.name)
        means.set_ylim(bottom=0)
        if is_compared:
            values = [(cell.change, cell.change_low, cell.change_high) for cell in cells]
            changes.axhline(0, color=colours[0], linewidth=1)
            changes.scatter(range(len(models)), [cell.change for cell in cells], color=colours, zorder=3)
            _intervals(changes, values, colours)
        for axes in column:
            axes.spines[["top", "right"]].set_visible(False)
        column[-1].set_xticks(range(len(models)), names, rotation=30, ha="right")
    if metrics:
        panels[0, 0].set_ylabel("mean over prompts", fontsize=9)
        if is_compared:
            panels[1, 0].set_ylabel(f"change from {names[0]}", fontsize=9)
    figure.supxlabel("95% intervals", fontsize=8)
    return figure


def _intervals(axes: "Axes", values: Sequence[tuple[float, float, float]], colours: Sequence[str]) -> None:
    """Error bars from values with the ends of their intervals, in the order of the ticks."""
    for place, ((middle, low, high), colour) in enumerate(zip(values, colours, strict=True)):
        ends = [[max(middle - low, 0.0)], [max(high - middle, 0.0)]]  # by rounding the mean may be outside
        for outline, width in (("white", 3.5), (colour, 1.2)):
            axes.errorbar([place], [middle], yerr=ends, fmt="none", ecolor=outline, capsize=3, capthick=width, lw=width)


def curves(result: EvaluationResult) -> "Figure":
    """pass@k over k, one curve for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = [metric.name for metric in result.shown if metric.name.startswith("pass@")]
    ks = [int(name.partition("@")[2]) for name in names]
    for model, colour in model_colours(result.models).items():
        cells = [result.cell(model, name) for name in names]
        axes.plot(ks, [cell.mean for cell in cells], "o-", color=colour, label=figure_text(model), markersize=4)
        axes.fill_between(ks, [c.low for c in cells], [c.high for c in cells], color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="pass@k, 95% interval", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure
