"""Colours that everyone can tell apart, one for each model, also in the style of pages."""

import random
import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray

from slrmerge.io.figures import DPI, MODEL_COLOURS, Label, model_colours, place_labels

Colour = NDArray[np.float64]

# Machado, Oliveira, Fernandes 2009: what people without one kind of cone see, in linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
OKABE_ITO = 0.076
"""The least distance within the usual palette for colour-blind readers, Okabe and Ito's, measured in the same way."""


def linear(colour: str) -> Colour:
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear: Colour = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear


def oklab(rgb: Colour) -> Colour:
    """Ottosson's Oklab, in which distances are as seen."""
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    axes = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    lab: Colour = np.array(axes) @ np.cbrt(np.array(cones) @ rgb)
    return lab


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    light = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (one, other))
    return light[1] / light[0]


def page_colours() -> list[dict[str, str]]:
    """The colours of pages: light, and dark."""
    style = (files("slrmerge.io") / "page.css").read_text()
    light, dark = style.partition("@media screen and (prefers-color-scheme: dark)")[::2]
    found = [dict(re.findall(r"--([\w-]+): (#\w+);", part)) for part in (light, dark.partition("* {")[0])]
    return [
        {name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for name, value in each.items()}
        for each in found
    ]


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_no_two_colours_look_alike(blindness: str) -> None:
    seen = [oklab(np.clip(np.array(BLINDNESS[blindness]) @ linear(colour), 0, 1)) for colour in MODEL_COLOURS.values()]
    assert min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)) > OKABE_ITO


def test_colours_contrast_with_white_and_pages_with_their_ground() -> None:
    assert min(contrast(colour, "#ffffff") for colour in MODEL_COLOURS.values()) >= 3
    for colours in page_colours():
        assert min(contrast(colours[name], colours["card"]) for name in MODEL_COLOURS) >= 3
        assert min(contrast(colours[name], colours["card"]) for name in ("ink", "muted")) >= 4.5
        assert contrast(colours["muted"], colours["ground"]) >= 4.5


def test_pages_have_the_colours_of_figures() -> None:
    light, _ = page_colours()
    assert {name: light[name] for name in MODEL_COLOURS} == MODEL_COLOURS


def test_a_model_has_the_colour_of_its_name_or_one_of_its_own() -> None:
    assert model_colours(["slr", "post"]) == {name: MODEL_COLOURS[name] for name in ("slr", "post")}
    for labels in ([f"model {n}" for n in range(8)], ["a", "post", "b", "slr", "c", "d", "e", "f"]):
        colours = model_colours(labels)
        assert len(set(colours.values())) == 8
        assert colours.get("post") in (None, MODEL_COLOURS["post"])
    assert len(model_colours([f"model {n}" for n in range(20)])) == 20
    assert len(model_colours([*MODEL_COLOURS, "x", "y"])) == 10


def strokes_and_crossings(seed: int) -> tuple[int, int]:
    """How many labels of a crowded plot have strokes, and how many times a stroke goes through the label of another."""
    figure, rng = Figure(figsize=(8, 6), dpi=DPI), random.Random(seed)
    figure.canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    names = [f"a control: layers {n}–{n + 9}" for n in range(6)] + ["0.5"] * 40
    labels = [Label(rng.gauss(0.5, 0.03), rng.gauss(0.5, 0.03), n, "#000000", n != "0.5") for n in names]
    place_labels(axes, labels)
    figure.canvas.draw()
    written = [text for text in axes.texts if isinstance(text, Annotation)]
    assert {text.get_text() for text in written} == set(names)
    boxes = [Text.get_window_extent(text) for text in written]
    strokes = [
        np.linspace(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), axes.transData.transform(text.xy), 200)
        for text, box in zip(written, boxes, strict=True)
        if text.arrow_patch is not None and text.arrow_patch.get_visible()
    ]
    crossed = [stroke for box in boxes for stroke in strokes if any(box.contains(x, y) for x, y in stroke)]
    return len(strokes), len(crossed) - len(strokes)  # each begins in its own label


def test_no_stroke_goes_through_a_label() -> None:
    strokes, crossings = zip(*map(strokes_and_crossings, range(10)), strict=True)
    assert sum(strokes) > 10
    assert crossings == (0,) * 10
