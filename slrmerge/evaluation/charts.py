"""Charts of an evaluation: bars for each metric, or pass@k as curves, with confidence intervals."""

from typing import TYPE_CHECKING

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.io.figures import figure_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#3a3a3a", "#c97b2a", "#c0392b", "#1f6f8b", "#7a9a55", "#8e6bb0", "#b58a3f", "#6d8fa8")


def draw(result: EvaluationResult) -> "Figure":
    """The kind of chart that the task declares."""
    return {"bars": bars, "curves": curves}[result.plot](result)


def bars(result: EvaluationResult) -> "Figure":
    """A panel for each metric with a bar for each model."""
    from matplotlib.figure import Figure

    metrics, models = result.shown, list(result.models)
    names = list(map(figure_text, models))
    figure = Figure(figsize=(1.2 + max(2.4, 0.7 * len(models)) * len(metrics), 3.6), layout="constrained")
    for number, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(1, len(metrics), number)
        cells = [result.cell(model, metric.name) for model in models]
        colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(models))]
        axes.bar(names, [cell.mean for cell in cells], color=colours, width=0.7)
        low = [max(cell.mean - cell.low, 0.0) for cell in cells]  # by rounding the mean may be outside
        high = [max(cell.high - cell.mean, 0.0) for cell in cells]
        axes.errorbar(names, [c.mean for c in cells], yerr=[low, high], fmt="none", ecolor="black", capsize=3, lw=1)
        axes.set_title(metric.name)
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_ylim(bottom=0)
    figure.supylabel("mean over prompts, 95 % interval", fontsize=8)
    return figure


def curves(result: EvaluationResult) -> "Figure":
    """pass@k over k, one curve for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = [metric.name for metric in result.shown if "@" in metric.name]
    ks = [int(name.partition("@")[2]) for name in names]
    for place, model in enumerate(result.models):
        cells = [result.cell(model, name) for name in names]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(ks, [cell.mean for cell in cells], "o-", color=colour, label=figure_text(model), markersize=4)
        axes.fill_between(ks, [c.low for c in cells], [c.high for c in cells], color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set(xlabel="k", ylabel="pass@k, 95 % interval", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
