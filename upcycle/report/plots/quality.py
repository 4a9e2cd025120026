"""Loss and accuracy against cost."""

import functools
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from upcycle.report.compare import Report
from upcycle.report.plots.axes import leave_empty, name_lines, set_ticks
from upcycle.report.plots.figure import ROLE_COLOURS, SOFT, WORDS, Plot
from upcycle.report.plots.lines import MANY, bundles_of, draw_dots, draw_lines, frame
from upcycle.report.runs import Axis, Role
from upcycle.report.text import unit

METRICS = ('loss', 'accuracy')


def main_plots(reports: Sequence[Report], evaluated_on: str | None = None) -> list[Plot]:
    """Plots validation loss and accuracy against extra FLOPs, steps and seconds (the paper's figure 2)."""
    n = f' Evaluated on {evaluated_on}.' if evaluated_on else ''
    many = ''
    if len(reports) > 1:
        few = len(reports[0].branches) <= MANY
        many = f' Thin lines: {len(reports)} seeds; bold: their mean.' if few else f' Means over {len(reports)} seeds.'
    sunk = any(report.sunk[Axis.FLOPS] for report in reports)
    scratch = any(report.find(Role.SCRATCH) for report in reports) and sunk
    whole = (
        ' MoE from scratch is charged its whole budget: its total less what the dense checkpoint had cost, drawn '
        'from zero on (before that it spends what the others had already spent).'
    )
    seconds = ' Seconds are those of training steps alone: no compilation, evaluation or saving.'
    return [
        Plot(
            f'extra_{axis.word.lower()}',
            f'Against extra {axis.word}',
            f'Validation loss, the mean per target (lower is better), and accuracy over the same (higher is '
            f'better), against the {axis.word} spent '
            f'after the dense checkpoint; dashed: that checkpoint itself.{n}{many}{whole if scratch else ""}'
            f'{seconds if axis is Axis.SECONDS else ""}',
            tuple(functools.partial(_against_extra, reports, metric, axis, 1.0) for metric in METRICS),
        )
        for axis in Axis
    ]


def _against_extra(reports: Sequence[Report], metric: str, axis: Axis, until: float, ax: Axes) -> None:
    """Draws one metric of every branch against extra cost.

    Args:
      reports: one per seed.
      metric: a validation metric.
      axis: the cost.
      until: share of the longest branch to draw. Below 1 the panel is a close-up of the branches that started from the
        checkpoint, with their training batches.
      ax: a panel.
    """
    is_whole = until == 1
    runs = [run for run in reports[0].branches if is_whole or not run.from_zero]
    bundles = bundles_of(reports, runs, lambda report, run: report.curve(run, metric, axis))
    largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
    if largest <= 0:
        leave_empty(ax)
        return
    if not is_whole:
        # A close-up shows at least the second evaluation after the start.
        largest = max(until * largest, *(x[min(2, len(x) - 1)] for b in bundles for x, _ in b.curves))
    size, name = unit(axis, largest)
    if is_whole:
        labels = draw_lines(ax, bundles, size, largest)
    else:
        train = {'loss': 'cross_entropy_loss'}.get(metric, metric)
        labels = draw_dots(ax, bundles, size, largest, train, axis)
    dense = [report.dense[metric] for report in reports if metric in report.dense]
    if dense:
        value = sum(dense) / len(dense)
        ax.axhline(value, color=ROLE_COLOURS[Role.DENSE], linestyle=(0, (4, 3)), linewidth=1)
        labels.append((value, 'dense checkpoint', ROLE_COLOURS[Role.DENSE]))
    frame(ax, bundles, largest, dense, skip=0.08 if is_whole else 0.0)
    ax.set_xlim(-0.015 * largest / size, largest / size)
    words = {Axis.FLOPS: f'extra compute ({name})', Axis.SECONDS: f'extra training time ({name})'}
    ax.set(ylabel=WORDS[metric] if is_whole else WORDS[metric].removeprefix('validation '))
    ax.set_xlabel(words.get(axis, 'extra steps'))
    set_ticks(ax.xaxis)
    if reports[0].sunk[axis]:
        _add_shares(ax, size / reports[0].sunk[axis])
    name_lines(ax, labels)


def _add_shares(ax: Axes, share: float) -> None:
    """Adds a second x axis on top: shares of the sunk cost."""
    top = ax.secondary_xaxis('top', functions=(lambda x: x * share, lambda x: x / share))
    set_ticks(top.xaxis, PercentFormatter(1.0, decimals=None))
    top.set_xlabel("of the dense checkpoint's cost", size=7.5, color=SOFT)
    top.tick_params(colors=SOFT, labelsize=7, length=2)
    top.spines['top'].set_color('#d1d5db')


def drop_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """Plots the first tenth after the dense checkpoint, in which upcycled models first lose quality and then recover."""
    if reports[0].find(Role.UPCYCLED):
        yield Plot(
            'initial_drop',
            'Right after upcycling',
            'The first tenth of the extra steps. Dots: validation; thin lines: single training batches, where logged. '
            'The value at zero is measured before any training.',
            tuple(functools.partial(_against_extra, reports, metric, Axis.STEPS, 0.1) for metric in METRICS),
        )


def from_zero_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """Plots MoE from scratch and upcycling against each run's own cost, as in the paper's figure 4."""
    report = reports[0]
    if report.find(Role.SCRATCH) and report.sunk[Axis.FLOPS] and report.find(Role.UPCYCLED):
        yield Plot(
            'from_scratch',
            'When does a MoE from scratch catch up?',
            "Each curve counts only its own FLOPs: the upcycled one none of the dense checkpoint's, as if that came free "
            "(the convention of the paper's figure 4). The upcycled curve ends where its run ends.",
            tuple(functools.partial(_against_own, reports, metric) for metric in METRICS),
        )


def _against_own(reports: Sequence[Report], metric: str, ax: Axes) -> None:
    """Draws one metric of upcycled runs and of runs from scratch against each run's own FLOPs."""
    sunk = reports[0].sunk[Axis.FLOPS]
    runs = [r for r in reports[0].branches if r.role in (Role.SCRATCH, Role.UPCYCLED)]
    bundles = bundles_of(reports, runs, lambda _, run: run.curve(metric, Axis.FLOPS))
    largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
    if largest <= 0:
        leave_empty(ax)
        return
    labels = draw_lines(ax, bundles, sunk, largest)
    frame(ax, bundles, largest, [], skip=0.15)
    ax.set(ylabel=WORDS[metric], xlabel="own FLOPs, of the dense checkpoint's")
    ax.set_xlim(0, largest / sunk)
    set_ticks(ax.xaxis, PercentFormatter(1.0, decimals=None))
    name_lines(ax, labels)
