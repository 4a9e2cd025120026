"""The pictures of a report are small files."""

import io

import numpy as np
from PIL import Image

from upcycle.report.plots.figure import COLOURS, DPI, Plot

NOISE = np.random.default_rng(0).normal(size=5000)


def _plot(number: int) -> Plot:
    return Plot('key', 'title', 'caption', (lambda ax: ax.plot(NOISE, label='a run'),) * number, height=3.0)


def test_a_picture_has_a_palette_and_panels_two_in_a_row():
    image = Image.open(io.BytesIO(_plot(3).png()))
    assert (image.format, image.mode, image.size) == ('PNG', 'P', (2 * 441, 2 * 3 * DPI))
    assert len(image.getcolors()) <= COLOURS


def test_equal_figures_are_equal_files():
    assert _plot(1).png() == _plot(1).png()
