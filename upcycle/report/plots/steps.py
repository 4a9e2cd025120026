"""Logged values over training steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from upcycle.log_lines import PER_DEVICE, is_number, rate_of_units
from upcycle.report.compare import Report
from upcycle.report.plots.axes import Label, leave_empty, name_lines, set_ticks
from upcycle.report.plots.figure import SOFT, Panel, Plot
from upcycle.report.plots.lines import Bundle, bundles_of
from upcycle.report.runs import Axis, Curve, Role, Run


def schedule_plot(reports: Sequence[Report]) -> Plot:
    """Plots the learning rate and the gradient norm."""
    return Plot(
        'schedule',
        'Learning rate and gradient norm',
        'Over the steps of the dense run and of its branches. Identical schedules lie on each other. '
        'Gradient norm: faint as logged, bold the running median.',
        (
            over_steps(reports, 'learning_rate', 'learning rate', 'train'),
            over_steps(reports, 'gradient_norm', 'gradient norm', 'train', log=True, median=True),
        ),
    )


def throughput_plot(reports: Sequence[Report]) -> Plot:
    """Plots the steps per second."""
    return Plot(
        'throughput',
        'Throughput',
        'Training steps per second on the machine that ran them, without compilation, evaluation and saving: '
        'faint as logged, bold the running median.',
        tuple(over_steps(reports, key, label, 'train', median=True) for key, label in _rates(reports)),
    )


def _rates(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """Returns the rates and shares that runs have logged, and labels for their axes."""
    lines = [line for report in reports for run in report.runs for line in run.split('train')[-1:]]
    units = dict.fromkeys(filter(None, map(rate_of_units, lines)))
    rates = [('steps_per_second', 'steps per second')]
    rates += [(name, f'{name.removesuffix(PER_DEVICE)} per second and device') for name in units]
    shares = {'mfu': 'model FLOPs over the peak (MFU)', 'device_busy': 'share of time in steps'}
    return rates + [(name, label) for name, label in shares.items() if any(name in line for line in lines)]


def over_steps(
    reports: Sequence[Report],
    key: str,
    ylabel: str,
    split: str | None = None,
    *,
    log: bool = False,
    dense: bool = True,
    median: bool = False,
) -> Panel:
    """Returns a panel of a logged value over the absolute step.

    Args:
      reports: one per seed.
      key: name of the value.
      ylabel: label of the axis.
      split: split of the value; None: training or validation, whichever has more values.
      log: use a logarithmic axis for the value.
      dense: draw the dense run, too.
      median: draw the values faint, and a running median bold.
    """

    def draw(ax: Axes) -> None:
        runs = [r for r in reports[0].runs if dense or r.role is not Role.DENSE]
        bundles = bundles_of(reports, runs, lambda _, run: logged(run, key, split) if split else denser(run, key))
        if not bundles:
            leave_empty(ax)
            return
        labels = _draw_lines(ax, bundles, median)
        if log:
            _set_decades(ax)
        start = reports[0].sunk[Axis.STEPS]
        if start and dense:
            ax.axvline(start, color='#9ca3af', linewidth=0.8, linestyle=(0, (1, 2)))
            placement = {'xycoords': ('data', 'axes fraction'), 'ha': 'center', 'va': 'bottom'}
            ax.annotate('dense checkpoint', (start, 1.01), size=7, color=SOFT, **placement)
        ax.set(xlabel='step', ylabel=ylabel)
        ax.set_xlim(right=max(x[-1] for b in bundles for x, _ in b.curves))
        set_ticks(ax.xaxis)
        if key == 'experts/router_entropy':
            labels += _uniform_entropy(ax, runs)
        name_lines(ax, labels)

    return draw


def _draw_lines(ax: Axes, bundles: Sequence[Bundle], median: bool) -> list[Label]:
    labels = []
    for i, bundle in enumerate(bundles):
        # Lines of equal schedules coincide: wide lines under narrow ones show both.
        width = 1.3 if median else 1.2 + min(0.9, 3.6 / len(bundles)) * (len(bundles) - 1 - i)
        for x, y in bundle.curves:
            if median:
                ax.plot(x, y, color=bundle.colour, linewidth=0.5, alpha=0.25)
                y = _running_median(y)
            ax.plot(x, y, color=bundle.colour, linewidth=width, alpha=1 if len(bundle.curves) == 1 else 0.6)
        labels.append((float(y[-1]), bundle.name, bundle.colour))
    return labels


def logged(run: Run, key: str, split: str) -> Curve:
    """Returns (step, value) of the lines of a split that hold a number, thinned to a few hundred points."""
    points = np.array([(r['step'], r[key]) for r in run.split(split) if is_number(r.get(key))], float).reshape(-1, 2)
    # A panel is a few hundred pixels wide: more points only make a larger file.
    points = points[:: -max(1, len(points) // 400)][::-1]
    return points[:, 0], points[:, 1]


def denser(run: Run, key: str) -> Curve:
    """Returns (step, value) of training or validation, whichever has more values."""
    return max((logged(run, key, split) for split in ('validation', 'train')), key=lambda c: len(c[0]))


def _set_decades(ax: Axes) -> None:
    ax.set_yscale('log')
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    # An axis within one decade shows no power of ten: number its minor ticks.
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f'{v:g}' if high < 10 * low else ''))


def _uniform_entropy(ax: Axes, runs: Sequence[Run]) -> list[Label]:
    """Draws lines at the entropies of uniform routers; returns their labels."""
    experts = {len(v) for run in runs for r in run.records[-3:] for k, v in r.items() if k.endswith('/load')}
    for number in experts:
        ax.axhline(np.log(number), color=SOFT, linestyle=(0, (1, 2)), linewidth=0.9)
    return [(np.log(number), f'uniform, ln {number}', SOFT) for number in experts]


def _running_median(y: np.ndarray) -> np.ndarray:
    half = max(1, len(y) // 40)
    return np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])
