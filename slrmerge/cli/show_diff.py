"""A comparison on the terminal: how far post-training moved the weights."""

from math import isfinite

from slrmerge.cli.output import Table, echo, print_json
from slrmerge.merging.diff_result import OUTSIDE, DiffResult, Distance, three_digits


def print_result(result: DiffResult, *, as_json: bool) -> None:
    """A row per layer with its modules, then everything outside the layers."""
    if as_json:
        rows = [{name: _finite(value) for name, value in row.items()} for row in result.to_rows()]
        print_json({"modules": rows, "notes": list(result.notes)})
        return
    parts = list(dict.fromkeys(name.partition(".")[0] for name in result.modules()))
    shown = Table("layer", ">relative change", ">cosine", *(f">{part}" for part in parts))
    for layer in range(result.layers):
        inside = (three_digits(result.of_layer(layer, part).relative_change) for part in parts)
        shown.add_row(str(layer), *_cells(result.of_layer(layer)), *inside)
    for (layer, name), found in result.by_module.items():
        if layer == OUTSIDE:
            shown.add_row(name, *_cells(found), *("" for _ in parts))
    shown.print()
    for note in result.notes:
        echo(f"note: {note}")
    echo("relative change: |post − pre| / |pre|, of a whole layer and of its modules")


def _finite(value: object) -> object:
    """The value, or None for a number that JSON cannot represent."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _cells(found: Distance) -> tuple[str, str]:
    return three_digits(found.relative_change), f"{found.cosine:.6f}"
