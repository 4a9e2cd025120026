"""Loss and accuracy against cost."""

import dataclasses
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from upcycle.report.compare import Report
from upcycle.report.plots.axes import Label, leave_empty, name_lines, set_ticks
from upcycle.report.plots.figure import ROLE_COLOURS, SOFT, WORDS, Plot
from upcycle.report.plots.lines import MANY, Bundle, bundles_of, draw_dots, draw_lines, frame
from upcycle.report.quantities import unit
from upcycle.report.runs import Axis, Role

METRICS = ('loss', 'accuracy')


def main_plots(reports: Sequence[Report], evaluated_on: str | None = None) -> list[Plot]:
    """Validation loss and accuracy against extra cost (the paper's figure 2): FLOPs, steps, seconds."""
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
            tuple(Against(reports, metric, axis) for metric in METRICS),
        )
        for axis in Axis
    ]


@dataclasses.dataclass(frozen=True)
class Against:
    """A panel: one metric of every branch against extra cost.

    Attributes:
      reports: one a seed.
      metric: of validation.
      axis: of cost.
      until: up to this fraction of the longest branch. Below 1 it is a close-up of the branches that started from the checkpoint,
        with their training batches.
    """

    reports: Sequence[Report]
    metric: str
    axis: Axis
    until: float = 1.0

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        bundles = self._bundles()
        largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
        if largest <= 0:
            leave_empty(ax)
            return
        if self.until < 1:
            # At least the second evaluation after the start belongs in a close-up.
            largest = max(self.until * largest, *(x[min(2, len(x) - 1)] for b in bundles for x, _ in b.curves))
        size, name = unit(self.axis, largest)
        labels = self._lines(ax, bundles, size, largest)
        dense = [report.dense[self.metric] for report in self.reports if self.metric in report.dense]
        if dense:
            value = sum(dense) / len(dense)
            ax.axhline(value, color=ROLE_COLOURS[Role.DENSE], linestyle=(0, (4, 3)), linewidth=1)
            labels.append((value, 'dense checkpoint', ROLE_COLOURS[Role.DENSE]))
        frame(ax, bundles, largest, dense, skip=0.08 if self.until == 1 else 0.0)
        ax.set_xlim(-0.015 * largest / size, largest / size)
        words = {Axis.FLOPS: f'extra compute ({name})', Axis.SECONDS: f'extra training time ({name})'}
        ylabel = WORDS[self.metric]
        ax.set(ylabel=ylabel if self.until == 1 else ylabel.removeprefix('validation '))
        ax.set_xlabel(words.get(self.axis, 'extra steps'))
        set_ticks(ax.xaxis)
        if self.reports[0].sunk[self.axis]:
            _add_shares(ax, size / self.reports[0].sunk[self.axis])
        name_lines(ax, labels)

    def _bundles(self) -> list[Bundle]:
        runs = [run for run in self.reports[0].branches if self.until == 1 or not run.from_zero]
        return bundles_of(self.reports, runs, lambda report, run: report.curve(run, self.metric, self.axis))

    def _lines(self, ax: Axes, bundles: Sequence[Bundle], size: float, largest: float) -> list[Label]:
        if self.until == 1:
            return draw_lines(ax, bundles, size, largest)
        train = {'loss': 'cross_entropy_loss'}.get(self.metric, self.metric)
        return draw_dots(ax, bundles, size, largest, train, self.axis)


def _add_shares(ax: Axes, share: float) -> None:
    """A second x axis, on top: shares of the sunk cost."""
    top = ax.secondary_xaxis('top', functions=(lambda x: x * share, lambda x: x / share))
    set_ticks(top.xaxis, PercentFormatter(1.0, decimals=None))
    top.set_xlabel("of the dense checkpoint's cost", size=7.5, color=SOFT)
    top.tick_params(colors=SOFT, labelsize=7, length=2)
    top.spines['top'].set_color('#d1d5db')


def drop_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """The first tenth after the dense checkpoint, where upcycled models first lose and then recover."""
    if reports[0].find(Role.UPCYCLED):
        yield Plot(
            'initial_drop',
            'Right after upcycling',
            'The first tenth of the extra steps. Dots: validation; thin lines: single training batches, where logged. '
            'The value at zero is measured before any training.',
            tuple(Against(reports, metric, Axis.STEPS, until=0.1) for metric in METRICS),
        )


def from_zero_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """MoE from scratch as the paper's figure 4 draws it: it and the branches each count their own cost."""
    report = reports[0]
    if report.find(Role.SCRATCH) and report.sunk[Axis.FLOPS] and report.find(Role.UPCYCLED):
        yield Plot(
            'from_scratch',
            'When does a MoE from scratch catch up?',
            "Each curve counts only its own FLOPs: the upcycled one none of the dense checkpoint's, as if that came free "
            "(the convention of the paper's figure 4). The upcycled curve ends where its run ends.",
            tuple(AgainstOwn(reports, metric) for metric in METRICS),
        )


@dataclasses.dataclass(frozen=True)
class AgainstOwn:
    """A panel: one metric of upcycled runs and of those from scratch against each run's own FLOPs.

    Attributes:
      reports: one a seed.
      metric: of validation.
    """

    reports: Sequence[Report]
    metric: str

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        sunk = self.reports[0].sunk[Axis.FLOPS]
        runs = [r for r in self.reports[0].branches if r.role in (Role.SCRATCH, Role.UPCYCLED)]
        bundles = bundles_of(self.reports, runs, lambda _, run: run.curve(self.metric, Axis.FLOPS))
        largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
        if largest <= 0:
            leave_empty(ax)
            return
        labels = draw_lines(ax, bundles, sunk, largest)
        frame(ax, bundles, largest, [], skip=0.15)
        ax.set(ylabel=WORDS[self.metric], xlabel="own FLOPs, of the dense checkpoint's")
        ax.set_xlim(0, largest / sunk)
        set_ticks(ax.xaxis, PercentFormatter(1.0, decimals=None))
        name_lines(ax, labels)
