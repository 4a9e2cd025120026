"""Parts that panels share: ticks, limits, and names at the ends of lines."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator

from upcycle.report.plots.figure import INK, SOFT

# The value at the right edge, the text, and the colour.
Label = tuple[float, str, str]


def set_ticks(axis: MatplotlibAxis, formatter: Formatter | None = None) -> None:
    """Sets at most five round numbers as ticks."""
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(formatter or FuncFormatter(lambda x, _: f'{x:,.10g}'))


def add_legend(ax: Axes) -> None:
    """Adds a small legend without a frame."""
    ax.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def set_title(ax: Axes, title: str) -> None:
    """Sets a small title."""
    ax.set_title(title)
    ax.title.set(size=9, color=INK)


def leave_empty(ax: Axes) -> None:
    """Writes that nothing was logged yet."""
    ax.text(0.5, 0.5, 'nothing logged yet', transform=ax.transAxes, ha='center', color=SOFT, size=9)
    ax.set(xticks=[], yticks=[])


def set_limits(ax: Axes, every: np.ndarray, late: np.ndarray, firsts: Mapping[str, tuple[str, float]]) -> None:
    """Sets limits of y that cut off a brief, tall initial drop, and notes the first value of each line cut off.

    Args:
      ax: a panel.
      every: all values.
      late: the values after the initial drop; empty if there is no drop.
      firsts: colour and first value of each line, by its name.
    """
    shown = every if not len(late) or np.ptp(every) <= 2.5 * np.ptp(late) else late
    span = float(np.ptp(shown) or abs(shown[0]) or 1.0)
    low, high = float(shown.min() - 0.07 * span), float(shown.max() + 0.07 * span)
    ax.set_ylim(low, high)
    far = {name: first for name, first in firsts.items() if not low - 0.3 * span < first[1] < high + 0.3 * span}
    for i, (name, (colour, value)) in enumerate(far.items()):
        up = value > high
        ax.annotate(
            f'{name} starts at {value:.3g} {"↑" if up else "↓"}',
            (0.985, 0.98 - 0.075 * i if up else 0.03 + 0.075 * i),
            xycoords='axes fraction',
            ha='right',
            va='top' if up else 'bottom',
            size=7.5,
            color=colour,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
        )


def name_lines(ax: Axes, labels: Sequence[Label]) -> None:
    """Writes the names of lines at the right edge, at their last values, moved apart so that no two overlap."""
    # More names than fit are set smaller, within 1.05 of the axis.
    gap = min(0.068, 1.05 / max(len(labels), 1))
    size = 8 if gap == 0.068 else 6.5
    place = ax.transData + ax.transAxes.inverted()
    middle = ax.get_xlim()[1]
    order = sorted((min(max(place.transform((middle, y))[1], 0.0), 1.0), text, colour) for y, text, colour in labels)
    heights = _pushed_apart([y for y, _, _ in order], gap)
    line = {'arrowstyle': '-', 'linewidth': 0.5, 'shrinkA': 0, 'shrinkB': 0, 'relpos': (0, 0.5)}
    for y, (true, text, colour) in zip(heights, order, strict=True):
        ax.annotate(
            text,
            (1.005, true),
            (1.035, y),
            xycoords='axes fraction',
            va='center',
            size=size,
            color=colour,
            annotation_clip=False,
            arrowprops={**line, 'color': colour} if abs(y - true) > 0.02 else None,
        )


def _pushed_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Moves sorted heights apart until each is a gap above the previous one, and then back onto the axis."""
    at = list(heights)
    for _ in range(200):
        for i in range(1, len(at)):
            push = (gap - (at[i] - at[i - 1])) / 2
            if push > 0:
                at[i], at[i - 1] = at[i] + push, at[i - 1] - push
    # Many names at one end push each other past the end of the axis.
    lift = max(0.01 - at[0], min(0.0, 1.05 - at[-1])) if at else 0.0
    return [y + lift for y in at]
