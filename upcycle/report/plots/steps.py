"""Logged values over the step of training."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from upcycle.log_lines import is_number
from upcycle.report.compare import Report
from upcycle.report.plots.axes import Label, leave_empty, name_lines, set_ticks
from upcycle.report.plots.figure import SOFT, Plot
from upcycle.report.plots.lines import Bundle, bundles_of
from upcycle.report.runs import Axis, Curve, Role, Run


def schedule_plot(reports: Sequence[Report]) -> Plot:
    """Learning rate and gradient norm."""
    return Plot(
        'schedule',
        'Learning rate and gradient norm',
        'Over the steps of the dense run and of its branches. Identical schedules lie on each other. '
        'Gradient norm: faint as logged, bold the running median.',
        (
            OverSteps(reports, 'learning_rate', 'learning rate', 'train'),
            OverSteps(reports, 'gradient_norm', 'gradient norm', 'train', log=True, median=True),
        ),
    )


def throughput_plot(reports: Sequence[Report]) -> Plot:
    """Steps per second."""
    return Plot(
        'throughput',
        'Throughput',
        'Training steps per second on the machine that ran them, without compilation, evaluation and saving: '
        'faint as logged, bold the running median.',
        (OverSteps(reports, 'steps_per_second', 'steps per second', 'train', median=True),),
    )


@dataclasses.dataclass(frozen=True)
class OverSteps:
    """A panel: a logged value over the absolute step.

    Attributes:
      reports: one a seed.
      key: of the value.
      ylabel: in words.
      split: whose lines hold it; None: of training and validation the one that has more of it.
      log: the value's axis is logarithmic.
      dense: the dense run is drawn, too.
      median: the values are faint, and a running median bold.
    """

    reports: Sequence[Report]
    key: str
    ylabel: str
    split: str | None = None
    log: bool = False
    dense: bool = True
    median: bool = False

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        runs = [r for r in self.reports[0].runs if self.dense or r.role is not Role.DENSE]
        bundles = bundles_of(self.reports, runs, lambda _, run: self._curve(run))
        if not bundles:
            leave_empty(ax)
            return
        labels = self._lines(ax, bundles)
        if self.log:
            _set_decades(ax)
        start = self.reports[0].sunk[Axis.STEPS]
        if start and self.dense:
            ax.axvline(start, color='#9ca3af', linewidth=0.8, linestyle=(0, (1, 2)))
            placement = {'xycoords': ('data', 'axes fraction'), 'ha': 'center', 'va': 'bottom'}
            ax.annotate('dense checkpoint', (start, 1.01), size=7, color=SOFT, **placement)
        ax.set(xlabel='step', ylabel=self.ylabel)
        ax.set_xlim(right=max(x[-1] for b in bundles for x, _ in b.curves))
        set_ticks(ax.xaxis)
        if self.key == 'experts/router_entropy':
            labels += _uniform_entropy(ax, runs)
        name_lines(ax, labels)

    def _curve(self, run: Run) -> Curve:
        return over_steps(run, self.key, self.split) if self.split else denser(run, self.key)

    def _lines(self, ax: Axes, bundles: Sequence[Bundle]) -> list[Label]:
        labels = []
        for i, bundle in enumerate(bundles):
            # Branches may lie on each other exactly (one schedule): wide under narrow shows both.
            width = 1.3 if self.median else 1.2 + min(0.9, 3.6 / len(bundles)) * (len(bundles) - 1 - i)
            for x, y in bundle.curves:
                if self.median:
                    ax.plot(x, y, color=bundle.colour, linewidth=0.5, alpha=0.25)
                    y = _running_median(y)
                ax.plot(x, y, color=bundle.colour, linewidth=width, alpha=1 if len(bundle.curves) == 1 else 0.6)
            labels.append((float(y[-1]), bundle.name, bundle.colour))
        return labels


def over_steps(run: Run, key: str, split: str) -> Curve:
    """(step, value) of the lines of a split that hold a number, at most some hundreds of them."""
    points = np.array([(r['step'], r[key]) for r in run.split(split) if is_number(r.get(key))], float).reshape(-1, 2)
    # A figure is some hundreds of pixels wide: more points only make a heavier file.
    points = points[:: -max(1, len(points) // 400)][::-1]
    return points[:, 0], points[:, 1]


def denser(run: Run, key: str) -> Curve:
    """(step, value) of the split that has more of a value, validation or training."""
    return max((over_steps(run, key, split) for split in ('validation', 'train')), key=lambda c: len(c[0]))


def _set_decades(ax: Axes) -> None:
    ax.set_yscale('log')
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    # Within a decade the powers of ten alone would leave an axis without a number.
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f'{v:g}' if high < 10 * low else ''))


def _uniform_entropy(ax: Axes, runs: Sequence[Run]) -> list[Label]:
    """Lines at the entropies of uniform routers, and their labels."""
    experts = {len(v) for run in runs for r in run.records[-3:] for k, v in r.items() if k.endswith('/load')}
    for number in experts:
        ax.axhline(np.log(number), color=SOFT, linestyle=(0, (1, 2)), linewidth=0.9)
    return [(np.log(number), f'uniform, ln {number}', SOFT) for number in experts]


def _running_median(y: np.ndarray) -> np.ndarray:
    half = max(1, len(y) // 40)
    return np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])
