"""Branches against a base branch at several budgets: which is ahead early, and which late?"""

import dataclasses
import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from upcycle.report.claims import WINDOW, mean_between
from upcycle.report.compare import Report
from upcycle.report.plots.axes import set_title
from upcycle.report.plots.figure import INK, ROLE_COLOURS, RULE, SOFT, Panel, Plot
from upcycle.report.runs import Axis, Role
from upcycle.report.sample import Sample
from upcycle.report.text import markdown_table

SHARES = (0.1, 0.25, 0.5, 1.0)
# Runs of equal budgets end this close together: their steps are whole numbers.
_ROUNDING = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget(Sample):
    """Validation loss of a branch minus that of the base at equal extra FLOPs, per seed that has both.

    Attributes:
      branch: name of the branch.
      share: share of the whole budget.
    """

    branch: str
    share: float


def at_budgets(reports: Sequence[Report], base: str) -> list[AtBudget]:
    """Compares all other branches with the base at every budget that they reached.

    Losses are averaged over the last `WINDOW` of the whole budget, which is the FLOPs that the base spent.
    """
    rows = []
    for branch in dict.fromkeys(run.name for report in reports for run in report.branches):
        for share in SHARES:
            gaps = (_difference(report, branch, base, share) for report in reports)
            known = tuple(gap for gap in gaps if gap is not None)
            if branch != base and known:
                rows.append(AtBudget(branch=branch, share=share, values=known))
    return rows


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
    means = [mean_between(curve, (share - WINDOW) * budget, share * budget) for curve in (ours, theirs)]
    return None if None in means else means[0] - means[1]


def _sorted(rows: Sequence[AtBudget]) -> tuple[list[float], dict[str, dict[float, AtBudget]]]:
    """Returns all shares, and the rows by branch and share; the best branch at the largest share comes first."""
    shares = sorted({row.share for row in rows})
    by_branch: dict[str, dict[float, AtBudget]] = {}
    for row in rows:
        by_branch.setdefault(row.branch, {})[row.share] = row
    last = shares[-1] if shares else 1.0
    order = sorted(by_branch, key=lambda b: by_branch[b][last].mean if last in by_branch[b] else math.inf)
    return shares, {branch: by_branch[branch] for branch in order}


def as_plot(rows: Sequence[AtBudget], base: str) -> Plot:
    """Plots the table: one panel per budget, one line per branch, in the same order in all panels."""
    shares, by_branch = _sorted(rows)
    several = any(len(row.values) > 1 for row in rows)
    bars = ' Dots: seeds; bars: the 95% interval of their mean.' if several else ''
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
            ax.plot(row.values, [place] * len(row.values), 'o', color=colour, markersize=2.5, alpha=0.4)
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
    """Formats a table with one row per branch; the best at the end of the budget comes first."""
    shares, by_branch = _sorted(rows)
    intro = (
        f'Validation loss (nats) less that of `{base}`, at shares of its extra FLOPs; mean over seeds, 95% interval.'
    )
    cells = [
        [branch, *(at[share].text('+.4f') if share in at else '-' for share in shares)]
        for branch, at in by_branch.items()
    ]
    return f'{intro}\n\n{markdown_table(["branch", *(f"{share:.0%}" for share in shares)], cells)}'
