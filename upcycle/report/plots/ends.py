"""First and last values of runs: the step-0 sweep of a receipt, and final values against a setting."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes

from upcycle.log_lines import is_number
from upcycle.report.claims import curve_of
from upcycle.report.compare import Report
from upcycle.report.plots.axes import add_legend, leave_empty
from upcycle.report.plots.figure import EXTRA_COLOURS, ROLE_COLOURS, SOFT, WORDS, Plot, of_the_first
from upcycle.report.runs import Axis, Role, Run
from upcycle.report.sample import Sample


def step_zero_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """Yields the paper's figure 15 for the first upcycled run whose receipt has a step-0 sweep."""
    runs = [r for r in reports[0].branches if r.role is Role.UPCYCLED and (r.receipt or {}).get('step_0')]
    if not runs:
        return
    base = reports[0].find(Role.DENSE_CONTINUATION)
    panels = (('loss', WORDS['loss']), ('accuracy', 'accuracy'), ('fraction_tokens_left_behind', 'tokens left behind'))
    yield Plot(
        'step_0',
        'Before any training',
        'The upcycled model as surgery made it, at other capacity factors: with combine weights normalised, a token that '
        'some expert took starts with the dense output; raw, with a part of it. On the first batches of the evaluation '
        f'split; dashed: the dense model on all of it.{of_the_first(reports)}',
        tuple(functools.partial(_step_zero, runs[0], base, metric, words) for metric, words in panels),
    )


def _step_zero(run: Run, base: Run | None, metric: str, words: str, ax: Axes) -> None:
    """Draws a metric before any training against the capacity factor.

    Args:
      run: a run with a step-0 sweep in its receipt.
      base: the dense continuation.
      metric: a metric of both runs.
      words: label of the axis.
      ax: a panel.
    """
    rows = run.receipt['step_0']
    for normalized, colour, name in ((True, '#d55e00', 'normalised'), (False, '#b8860b', 'raw')):
        points = sorted((row['capacity_factor'], row[metric]) for row in rows if row['normalized'] is normalized)
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, marker='o', markersize=3, linewidth=1.4, label=name)
    evaluations = base.split('validation') if base else []
    dense = evaluations[0].get(metric) if evaluations else None
    if is_number(dense):
        ax.axhline(dense, color=SOFT, linestyle='--', linewidth=1, label='dense')
    factors = sorted({row['capacity_factor'] for row in rows})
    ax.set_xscale('log', base=2)
    ax.set_xticks(factors, [f'{factor:g}' for factor in factors])
    ax.set(xlabel='capacity factor', ylabel=words)
    add_legend(ax)


@dataclasses.dataclass(frozen=True)
class Final:
    """The contents of a plot of final (or first) values.

    Attributes:
      xlabel: the name of the setting in which the runs differ.
      series: (value of the setting, branch) pairs, by the name of the series.
      log: whether the x axis is logarithmic, with base 2.
      metrics: validation metrics, or 'SPLIT/NAME'; one panel each.
      at_start: use the first evaluation instead of the last.
    """

    xlabel: str
    series: Mapping[str, Sequence[tuple[float, str]]]
    log: bool = False
    metrics: Sequence[str] = ('loss', 'accuracy')
    at_start: bool = False


def final_plot(final: Final, seeds: Sequence[Mapping[str, Run]], key: str) -> Plot:
    """Plots means over seeds with 95% intervals, and a dot for every seed.

    Args:
      final: what to draw.
      seeds: runs by branch, one mapping per seed.
      key: the file name, without its suffix.
    """
    when = 'before training' if final.at_start else 'at the end of each run'
    bars = ' Dots: seeds; bars: the 95% interval of their mean.' if len(seeds) > 1 else ''
    return Plot(
        key,
        f'Against {final.xlabel}',
        f'Validation values {when}; all runs of a seed had the same extra FLOPs, where nothing else is said.{bars}',
        tuple(functools.partial(_final_panel, final, seeds, metric) for metric in final.metrics),
    )


def _final_panel(final: Final, seeds: Sequence[Mapping[str, Run]], metric: str, ax: Axes) -> None:
    """Draws one metric of a `final_plot`."""
    palette = [ROLE_COLOURS[Role.UPCYCLED], ROLE_COLOURS[Role.DENSE_CONTINUATION], *EXTRA_COLOURS]
    for colour, (name, points) in zip(palette, final.series.items(), strict=False):
        means = []
        for x, branch in points:
            values = [_value(runs[branch], metric, final.at_start) for runs in seeds if branch in runs]
            sample = Sample(values=tuple(values))
            if sample.known:
                means.append((x, sample.mean, sample.half_width or 0.0))
                ax.plot([x] * len(sample.known), sample.known, 'o', color=colour, markersize=2.5, alpha=0.45)
        if means:
            x, y, width = zip(*means, strict=True)
            ax.errorbar(x, y, width, color=colour, linewidth=1.5, capsize=2, elinewidth=0.9, label=name)
    if not ax.lines:
        leave_empty(ax)
        return
    if final.log:
        ax.set_xscale('log', base=2)
    ticks = sorted({x for points in final.series.values() for x, _ in points})
    ax.set_xticks(ticks, [f'{x:g}' for x in ticks])
    ax.minorticks_off()
    words = WORDS.get(metric, metric.replace('/', ', ').replace('_', '-'))
    ax.set(xlabel=final.xlabel, ylabel=words)
    add_legend(ax)


def _value(run: Run, metric: str, at_start: bool) -> float | None:
    _, y = curve_of(run, metric, Axis.STEPS)
    return float(y[0 if at_start else -1]) if len(y) else None
