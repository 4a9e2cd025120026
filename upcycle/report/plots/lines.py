"""The lines of a branch: one per seed, and their mean."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from upcycle.report.compare import Report
from upcycle.report.plots.axes import Label, set_limits
from upcycle.report.plots.figure import colours
from upcycle.report.runs import Axis, Curve, Run

# With more branches than this, only means are drawn: the lines of all seeds would hide them.
MANY = 8


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The same branch of every seed.

    Attributes:
      name, colour: of the branch.
      runs, curves: one per seed.
    """

    name: str
    colour: str
    runs: list[tuple[Report, Run]]
    curves: list[Curve]


def bundles_of(reports: Sequence[Report], runs: Sequence[Run], curve: Callable[[Report, Run], Curve]) -> list[Bundle]:
    """Returns the branches with the names of `runs` whose curves have points."""
    palette, result = colours(reports), []
    for name in dict.fromkeys(run.name for run in runs):
        pairs = {(r.path, r.name): (report, r) for report in reports for r in report.runs if r.name == name}
        known = [(pair, c) for pair in pairs.values() if len((c := curve(*pair))[0])]
        if known:
            result.append(Bundle(name, palette[name], *map(list, zip(*known, strict=True))))
    return result


def draw_lines(ax: Axes, bundles: Sequence[Bundle], size: float, high: float) -> list[Label]:
    """Draws each bundle within [0, high], thin per seed and bold for their mean.

    Args:
      ax: a panel.
      bundles: with x in the axis's own unit.
      size: size of the unit that the panel shows.
      high: upper limit of x.

    Returns:
      The labels of the means.
    """
    labels = []
    for bundle in bundles:
        curves = [c for c in (_cut(curve, 0, high) for curve in bundle.curves) if len(c[0])]
        for x, y in curves if len(curves) > 1 and len(bundles) <= MANY else ():
            ax.plot(x / size, y, color=bundle.colour, linewidth=0.7, alpha=0.4)
        x, y = _mean(curves) if curves else ((), ())
        if len(x):
            ax.plot(x / size, y, color=bundle.colour, linewidth=1.8)
            real = np.isin(x, bundle.curves[0][0])
            if real.sum() <= 30:
                ax.plot(x[real] / size, y[real], 'o', color=bundle.colour, markersize=2.8)
            labels.append((y[-1], bundle.name, bundle.colour))
    return labels


def draw_dots(ax: Axes, bundles: Sequence[Bundle], size: float, high: float, train: str, axis: Axis) -> list[Label]:
    """Draws evaluations as dots and training batches as thin lines: a line between few dots would invent a slope.

    Args:
      ax, bundles, size, high: as for `draw_lines`.
      train: the metric of training batches.
      axis: the cost on the x axis.

    Returns:
      The labels of the means at `high`.
    """
    labels = []
    for bundle in bundles:
        ends = []
        for (report, run), curve in zip(bundle.runs, bundle.curves, strict=True):
            batches = report.curve(run, train, axis, 'train')
            for (x, y), style in ((batches, {'linewidth': 0.8}), (curve, {'marker': 'o', 'ms': 4, 'ls': ''})):
                keep = (x >= 0) & (x <= high)
                ax.plot(x[keep] / size, y[keep], color=bundle.colour, **style)
            ends.append(np.interp(high, *curve))
        labels.append((float(np.mean(ends)), bundle.name, bundle.colour))
    return labels


def frame(ax: Axes, bundles: Sequence[Bundle], largest: float, levels: Sequence[float], skip: float) -> None:
    """Sets the limits of y.

    Args:
      ax: a panel.
      bundles: the lines drawn in it.
      largest: upper limit of x.
      levels: heights of horizontal lines, which are always shown.
      skip: share of x in which the initial drop may lie outside the limits.
    """
    parts = [(b, _cut(c, 0, largest)) for b in bundles for c in b.curves]
    every = np.concatenate([y for _, (_, y) in parts] + [np.array(levels)])
    late = np.concatenate([y[x >= skip * largest] for _, (x, y) in parts] + [np.array(levels)])
    set_limits(ax, every, late, {b.name: (b.colour, y[0]) for b, (_, y) in parts if len(y)})


def _cut(curve: Curve, low: float, high: float) -> Curve:
    """Cuts a curve to [low, high], with interpolated points at the bounds that it crosses."""
    x, y = curve
    edges = [e for e in (low, high) if len(x) and x[0] < e < x[-1]]
    xs = np.unique(np.concatenate([x[(x >= low) & (x <= high)], edges]))
    return xs, np.interp(xs, x, y) if len(x) else xs


def _mean(curves: Sequence[Curve]) -> Curve:
    """Averages curves over their common range, at the points of the first one."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    # Seeds take different times, so the bounds are seldom points of the first curve.
    x = _cut(curves[0], low, high)[0]
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)
