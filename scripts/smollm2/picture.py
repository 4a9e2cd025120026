"""A picture of the runs that are finished."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from smollm2.results import WORDS, sample
from smollm2.schedule import BRANCHES, CONTINUED, DENSE, RATES, START, UPCYCLED, Row
from upcycle.report.plots.axes import add_legend, leave_empty, set_ticks, set_title
from upcycle.report.plots.figure import DPI, ROLE_COLOURS
from upcycle.report.runs import Role

COLOURS = {DENSE: ROLE_COLOURS[Role.DENSE_CONTINUATION], UPCYCLED: ROLE_COLOURS[Role.UPCYCLED]}


def draw(rows: Sequence[Row], curves: Sequence[Row], file: pathlib.Path) -> None:
    """Writes a PNG of three panels: the choice of rates, validation losses by FLOPs, and other texts."""
    figure = Figure(figsize=(11, 3.4), layout='constrained')
    FigureCanvasAgg(figure)
    for ax, panel in zip(figure.subplots(1, 3), (_rates, _curves, _forgetting), strict=True):
        if not panel(ax, rows, curves):
            leave_empty(ax)
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=7.5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)


def _rates(ax: Axes, rows: Sequence[Row], curves: Sequence[Row]) -> bool:
    set_title(ax, 'validation loss by peak rate (short runs)')
    found = [row for row in rows if row['part'] == RATES]
    for branch, colour in COLOURS.items():
        mine = [row for row in found if row['branch'] == branch]
        x, y = [float(row['peak rate']) for row in mine], [float(row['loss']) for row in mine]
        ax.plot(x, y, 'o', color=colour, alpha=0.4, markersize=4)
        rates = sorted({row['peak rate'] for row in mine}, key=float)
        means = [sample(rows, RATES, branch, 'loss', rate).mean for rate in rates]
        ax.plot([float(rate) for rate in rates], means, color=colour, label=branch)
    if found:
        ax.set_xscale('log')
        add_legend(ax)
    return bool(found)


def _curves(ax: Axes, rows: Sequence[Row], curves: Sequence[Row]) -> bool:
    set_title(ax, 'validation loss by TFLOP (a line per seed)')
    found = [row for row in curves if (row['part'], row['split']) == (CONTINUED, 'validation')]
    for branch, colour in COLOURS.items():
        for number, seed in enumerate(sorted({row['seed'] for row in found if row['branch'] == branch})):
            mine = [row for row in found if (row['branch'], row['seed']) == (branch, seed)]
            x, y = [float(row['TFLOP']) for row in mine], [float(row['loss']) for row in mine]
            ax.plot(x, y, color=colour, alpha=0.8, label=branch if number == 0 else None)
    if found:
        set_ticks(ax.xaxis)
        add_legend(ax)
    return bool(found)


def _forgetting(ax: Axes, rows: Sequence[Row], curves: Sequence[Row]) -> bool:
    set_title(ax, 'perplexity, over that before (95% interval)')
    texts = [text for text in WORDS if sample(rows, START, DENSE, f'{text} loss').known]
    drawn = False
    for shift, branch in zip((-0.12, 0.12), BRANCHES, strict=True):
        for x, text in enumerate(texts):
            start = sample(rows, START, DENSE, f'{text} loss').mean
            ends = sample(rows, CONTINUED, branch, f'{text} loss')
            if ends.mean is None:
                continue
            ratio, width = math.exp(ends.mean - start), ends.half_width or 0.0
            label = None if drawn and x else branch
            ax.errorbar(x + shift, ratio, ratio * width, fmt='o', color=COLOURS[branch], label=label, capsize=3)
            drawn = True
    if drawn:
        ax.axhline(1, color='#e5e7eb', zorder=0)
        ax.set_xticks(range(len(texts)), [WORDS[text] for text in texts], fontsize=7.5)
        handles, names = ax.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        ax.legend(unique.values(), unique.keys(), fontsize=7.5, frameon=False)
    return drawn
