"""How far post-training moved the weights, on the terminal."""

from math import isfinite

import click

from slrmerge.cli.show import print_json, print_table, table
from slrmerge.diff import OUTSIDE, Differences, Distance


def print_differences(differences: Differences, *, as_json: bool) -> None:
    """A line a layer with its parts, then what is outside the layers."""
    if as_json:
        print_json(
            {
                "modules": [
                    {
                        "layer": None if layer == OUTSIDE else layer,
                        "module": name,
                        "parameters": found.parameters,
                        "relative_change": _finite(found.relative_change),
                        "cosine": _finite(found.cosine),
                    }
                    for (layer, name), found in differences.by_module.items()
                ],
                "notes": list(differences.notes),
            }
        )
        return
    parts = list(dict.fromkeys(name.partition(".")[0] for name in differences.modules()))
    rows = table("layer", ">parameters", ">relative change", ">cosine", *(f">{part}" for part in parts))
    for layer in range(differences.layers):
        whole = differences.of_layer(layer)
        inside = (differences.of_layer(layer, part) for part in parts)
        rows.add_row(str(layer), *_distance(whole), *(f"{found.relative_change:.2e}" for found in inside))
    for (layer, name), found in differences.by_module.items():
        if layer == OUTSIDE:
            rows.add_row(name, *_distance(found), *("" for _ in parts))
    print_table(rows)
    for note in differences.notes:
        click.echo(f"note: {note}")
    click.echo("relative change: |post − pre| / |pre|, of a layer as a whole and of its parts")


def _finite(value: float) -> float | None:
    """What JSON has a number for."""
    return value if isfinite(value) else None


def _distance(found: Distance) -> tuple[str, str, str]:
    return f"{found.parameters:,}", f"{found.relative_change:.2e}", f"{found.cosine:.6f}"
