"""Branches against one of them at several budgets: which is ahead early, and which late?"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from upcycle.report.claims import WINDOW
from upcycle.report.compare import Report, half_width, interpolate
from upcycle.report.plots.axes import set_title
from upcycle.report.plots.figure import INK, ROLE_COLOURS, RULE, SOFT, Panel, Plot
from upcycle.report.runs import Axis, Role

SHARES = (0.1, 0.25, 0.5, 1.0)
# Runs of equal budgets end this close together: their steps are whole numbers.
_ROUNDING = 0.01


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """A branch's validation loss less the base's, at equal extra FLOPs, seed by seed.

    Attributes:
      branch: its name.
      share: of the whole budget.
      differences: one for each seed that has both.
      half_width: of the 95% interval of their mean; None for a single seed.
    """

    branch: str
    share: float
    differences: tuple[float, ...]
    half_width: float | None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.differences)


def at_budgets(reports: Sequence[Report], base: str, shares: Sequence[float] = SHARES) -> list[AtBudget]:
    """Every branch but the base at every budget that it reached, averaged over the last `WINDOW` of the whole budget.

    The whole budget is what the base spent, in FLOPs.
    """
    found = []
    for branch in dict.fromkeys(run.name for report in reports for run in report.branches):
        for share in shares:
            differences = [d for report in reports if (d := _difference(report, branch, base, share)) is not None]
            if branch != base and differences:
                found.append(AtBudget(branch, share, tuple(differences), half_width(differences)))
    return found


def _difference(report: Report, branch: str, base: str, share: float) -> float | None:
    runs = {run.name: run for run in report.runs}
    if branch not in runs or base not in runs:
        return None
    ours, theirs = (report.curve(runs[name], 'loss', Axis.FLOPS) for name in (branch, base))
    if not len(ours[0]) or not len(theirs[0]):
        return None
    budget = theirs[0][-1]
    if math.isclose(ours[0][-1], budget, rel_tol=_ROUNDING):
        budget = min(ours[0][-1], budget)
    places = np.linspace((share - WINDOW) * budget, share * budget, 5)
    gaps = [(interpolate(ours, x), interpolate(theirs, x)) for x in places]
    if any(value is None for gap in gaps for value in gap):
        return None
    return statistics.fmean(a - b for a, b in gaps)


def _sorted(rows: Sequence[AtBudget]) -> tuple[list[float], dict[str, dict[float, AtBudget]]]:
    """Shares, and rows by branch and share, the branch that is best at the largest share first."""
    shares = sorted({row.share for row in rows})
    by_branch: dict[str, dict[float, AtBudget]] = {}
    for row in rows:
        by_branch.setdefault(row.branch, {})[row.share] = row
    last = shares[-1] if shares else 1.0
    order = sorted(by_branch, key=lambda b: by_branch[b][last].mean if last in by_branch[b] else math.inf)
    return shares, {branch: by_branch[branch] for branch in order}


def as_plot(rows: Sequence[AtBudget], base: str) -> Plot:
    """The table as a plot: a panel a budget, a line a branch, in the same order in all."""
    shares, by_branch = _sorted(rows)
    bars = (
        ' Dots: seeds; bars: the 95% interval of their mean.' if any(len(row.differences) > 1 for row in rows) else ''
    )
    return Plot(
        'budgets',
        'Who is ahead early, and who late?',
        f'Validation loss less that of {base} after so much of its extra FLOPs: left of the line is better.{bars} Coloured: the '
        'interval leaves the line out. One in twenty such intervals would by chance.',
        tuple(_forest(by_branch, share, base) for share in shares),
        height=1.0 + 0.17 * len(by_branch),
    )


def _forest(by_branch: dict[str, dict[float, AtBudget]], share: float, base: str) -> Panel:
    def draw(ax: Axes) -> None:
        for place, at in enumerate(by_branch.values()):
            row = at.get(share)
            if row is None:
                continue
            colour = SOFT
            if row.half_width is not None and abs(row.mean) > row.half_width:
                colour = ROLE_COLOURS[Role.SCRATCH if row.mean < 0 else Role.UPCYCLED]
            ax.plot(row.differences, [place] * len(row.differences), 'o', color=colour, markersize=2.5, alpha=0.4)
            ax.errorbar(
                row.mean, place, xerr=row.half_width, fmt='o', color=colour, markersize=4, capsize=2, linewidth=1.3
            )
        ax.axvline(0, color=INK, linewidth=0.9)
        ax.set(xlabel=f'loss less that of {base} (nats)')
        set_title(ax, f'after {share:.0%} of the extra FLOPs')
        ax.set_yticks(range(len(by_branch)), by_branch)
        ax.set_ylim(len(by_branch) - 0.5, -0.5)
        ax.grid(axis='x', color=RULE, linewidth=0.7)

    return draw


def as_markdown(rows: Sequence[AtBudget], base: str) -> str:
    """A table: a line a branch, best at the end of the budget first."""
    shares, by_branch = _sorted(rows)
    lines = [
        f'Validation loss (nats) less that of `{base}`, at shares of its extra FLOPs; mean over seeds, 95% interval.',
        '',
        '| branch | ' + ' | '.join(f'{share:.0%}' for share in shares) + ' |',
        '|---' * (len(shares) + 1) + '|',
    ]
    for branch, at in by_branch.items():
        cells = [_cell(at.get(share)) for share in shares]
        lines.append(f'| {branch} | ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, ''])


def _cell(row: AtBudget | None) -> str:
    if row is None:
        return '-'
    return f'{row.mean:+.4f}' + ('' if row.half_width is None else f' ± {row.half_width:.4f}')
