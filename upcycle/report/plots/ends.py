"""Where runs begin and end: the step-0 sweep of a receipt, and last values against a setting."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from upcycle.log_lines import is_number
from upcycle.report.claims import curve_of
from upcycle.report.compare import Report, half_width
from upcycle.report.plots.axes import add_legend, leave_empty
from upcycle.report.plots.figure import EXTRA_COLOURS, ROLE_COLOURS, SOFT, WORDS, Plot, of_the_first
from upcycle.report.runs import Axis, Role, Run


def step_zero_plot(reports: Sequence[Report]) -> list[Plot]:
    """The paper's figure 15, of the first upcycled run whose receipt holds it."""
    runs = [r for r in reports[0].branches if r.role is Role.UPCYCLED and (r.receipt or {}).get('step_0')]
    if not runs:
        return []
    base = reports[0].find(Role.DENSE_CONTINUATION)
    panels = (('loss', WORDS['loss']), ('accuracy', 'accuracy'), ('fraction_tokens_left_behind', 'tokens left behind'))
    return [
        Plot(
            'step_0',
            'Before any training',
            'The upcycled model as surgery made it, at other capacity factors: with combine weights normalised, a token that '
            'some expert took starts with the dense output; raw, with a part of it. On the first batches of the evaluation '
            f'split; dashed: the dense model on all of it.{of_the_first(reports)}',
            tuple(StepZero(runs[0], base, metric, words) for metric, words in panels),
        )
    ]


@dataclasses.dataclass(frozen=True)
class StepZero:
    """A panel: a metric before any training against the capacity factor.

    Attributes:
      run: whose receipt.
      base: the dense continuation.
      metric: of both.
      words: of the axis.
    """

    run: Run
    base: Run | None
    metric: str
    words: str

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        rows = self.run.receipt['step_0']
        for normalized, colour, name in ((True, '#d55e00', 'normalised'), (False, '#b8860b', 'raw')):
            points = sorted(
                (row['capacity_factor'], row[self.metric]) for row in rows if row['normalized'] is normalized
            )
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker='o', markersize=3, linewidth=1.4, label=name)
        evaluations = self.base.split('validation') if self.base else []
        dense = evaluations[0].get(self.metric) if evaluations else None
        if is_number(dense):
            ax.axhline(dense, color=SOFT, linestyle='--', linewidth=1, label='dense')
        factors = sorted({row['capacity_factor'] for row in rows})
        ax.set_xscale('log', base=2)
        ax.set_xticks(factors, [f'{factor:g}' for factor in factors])
        ax.set(xlabel='capacity factor', ylabel=self.words)
        add_legend(ax)


@dataclasses.dataclass(frozen=True)
class Final:
    """What a plot of last (or first) values shows.

    Attributes:
      xlabel: the name of the setting in which runs differ.
      series: name: (value, branch) pairs.
      log: the axis counts doublings.
      metrics: of validation, or 'SPLIT/NAME'; a panel each.
      at_start: the first evaluation instead of the last.
    """

    xlabel: str
    series: Mapping[str, Sequence[tuple[float, str]]]
    log: bool = False
    metrics: Sequence[str] = ('loss', 'accuracy')
    at_start: bool = False


def final_plot(final: Final, seeds: Sequence[Mapping[str, Run]], key: str) -> Plot:
    """Means over seeds with 95% intervals, and a dot for every seed.

    Args:
      final: what to draw.
      seeds: of each, runs by branch.
      key: the name of its file.
    """
    when = 'before training' if final.at_start else 'at the end of each run'
    bars = ' Dots: seeds; bars: the 95% interval of their mean.' if len(seeds) > 1 else ''
    return Plot(
        key,
        f'Against {final.xlabel}',
        f'Validation values {when}; all runs of a seed had the same extra FLOPs, where nothing else is said.{bars}',
        tuple(FinalPanel(final, seeds, metric) for metric in final.metrics),
    )


@dataclasses.dataclass(frozen=True)
class FinalPanel:
    """A panel of a `final_plot`: one metric."""

    final: Final
    seeds: Sequence[Mapping[str, Run]]
    metric: str

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        palette = [ROLE_COLOURS[Role.UPCYCLED], ROLE_COLOURS[Role.DENSE_CONTINUATION], *EXTRA_COLOURS]
        for colour, (name, points) in zip(palette, self.final.series.items(), strict=False):
            self._draw_series(ax, colour, name, points)
        if not ax.lines:
            leave_empty(ax)
            return
        if self.final.log:
            ax.set_xscale('log', base=2)
        every = sorted({x for points in self.final.series.values() for x, _ in points})
        ax.set_xticks(every, [f'{x:g}' for x in every])
        ax.minorticks_off()
        words = WORDS.get(self.metric, self.metric.replace('/', ', ').replace('_', '-'))
        ax.set(xlabel=self.final.xlabel, ylabel=words)
        add_legend(ax)

    def _draw_series(self, ax: Axes, colour: str, name: str, points: Sequence[tuple[float, str]]) -> None:
        found = []
        for x, branch in points:
            values = [v for runs in self.seeds if branch in runs and (v := self._value(runs[branch])) is not None]
            if values:
                found.append((x, float(np.mean(values)), half_width(values) or 0.0))
                ax.plot([x] * len(values), values, 'o', color=colour, markersize=2.5, alpha=0.45)
        if found:
            x, y, width = zip(*found, strict=True)
            ax.errorbar(x, y, width, color=colour, linewidth=1.5, capsize=2, elinewidth=0.9, label=name)

    def _value(self, run: Run) -> float | None:
        _, y = curve_of(run, self.metric, Axis.STEPS)
        return float(y[0 if self.final.at_start else -1]) if len(y) else None
