"""The paper's comparison: which branch from a dense checkpoint is best at equal extra cost?"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upcycle import cost
from upcycle.errors import UserError
from upcycle.log_lines import is_number
from upcycle.report.runs import Axis, Curve, Role, Run
from upcycle.report.sample import Sample

METRICS = ('loss', 'accuracy')


@dataclasses.dataclass(frozen=True)
class Row:
    """One branch. Costs count from the dense checkpoint. None: not logged, or the run has not come that far.

    `total_flops` includes the sunk cost; `extra_flops_share` is a fraction of the sunk cost; `extra_core_days` is an estimate
    (`cost.py`). `*_at_budget` are validation values interpolated at the report's FLOPs budget.
    """

    branch: str
    role: Role
    final_step: int | None
    extra_steps: float | None
    extra_flops: float | None
    extra_flops_share: float | None
    extra_core_days: float | None
    extra_seconds: float | None
    total_flops: float | None
    loss: float | None
    accuracy: float | None
    loss_at_budget: float | None
    accuracy_at_budget: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """A comparison of runs that share one dense checkpoint, by their validation values.

    Values between evaluations are interpolated linearly.

    Attributes:
      runs: the compared runs.

    Raises:
      UserError: there are no runs, or two have the same name.
    """

    runs: Sequence[Run]

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError('no runs to compare: give at least one run folder.')
        names = [run.name for run in self.runs]
        twice = next((run for run in self.runs if names.count(run.name) > 1), None)
        if twice:
            raise UserError(f'two runs are named {twice.name!r} (one is {twice.path}): rename one of the folders.')

    @functools.cached_property
    def _started(self) -> list[Run]:
        """The runs that started from the dense checkpoint."""
        return [run for run in self.runs if not run.from_zero]

    @property
    def warnings(self) -> list[str]:
        """Sentences about runs that do not compare."""
        if len({run.start[Axis.STEPS] for run in self._started}) <= 1:
            return []
        starts = ', '.join(f'{run.name} at {run.start[Axis.STEPS]:,.0f}' for run in self._started)
        return [f'The branches start from different steps, so their extra costs do not compare: {starts}.']

    @functools.cached_property
    def sunk(self) -> dict[Axis, float]:
        """Cost of the dense checkpoint, per axis."""
        sunk = {a: next((r.start[a] for r in self._started if r.start[a]), 0.0) for a in Axis}
        dense = self.find(Role.DENSE)
        if dense and self._started:
            steps, _ = dense.curve('loss', Axis.STEPS)
            for axis in Axis:
                value = interpolate((steps, dense.curve('loss', axis)[0]), sunk[Axis.STEPS])
                sunk[axis] = sunk[axis] or value or 0.0
        return sunk

    @functools.cached_property
    def budget(self) -> dict[Axis, float]:
        """The smallest extra cost that the dense continuation and every upcycled run reached, per axis; {} without these."""
        pair = [r for r in self._started if r.role in (Role.DENSE_CONTINUATION, Role.UPCYCLED)]
        if len({r.role for r in pair}) < 2:
            return {}
        ends = {a: [x[-1] for r in pair for x in [self.curve(r, 'loss', a)[0]] if len(x)] for a in Axis}
        return {a: float(min(end)) for a, end in ends.items() if len(end) == len(pair)}

    @property
    def rows(self) -> list[Row]:
        """The rows of the table, one per run."""
        return [self._row(run) for run in self.runs]

    @property
    def branches(self) -> list[Run]:
        """The runs drawn against extra cost: all but the dense run; all runs if none started from it."""
        if all(run.from_zero for run in self.runs):
            return list(self.runs)
        return [run for run in self.runs if run.role is not Role.DENSE]

    def find(self, role: Role) -> Run | None:
        """Returns the first run with a role, or None."""
        return next((run for run in self.runs if run.role is role), None)

    def curve(self, run: Run, metric: str, axis: Axis, split: str = 'validation') -> Curve:
        """Returns (extra cost, metric). For a run from scratch: its whole cost minus the sunk cost, which can be negative."""
        x, y = run.curve(metric, axis, split)
        return (x - self.sunk[axis] if run.from_zero else x), y

    @property
    def dense(self) -> Mapping[str, float]:
        """Validation loss and accuracy of the dense checkpoint, from the dense continuation or else the dense run."""
        return {m: v for m in METRICS if (v := self._dense(m)) is not None}

    def _dense(self, metric: str) -> float | None:
        for role in (Role.DENSE_CONTINUATION, Role.DENSE) if any(not r.from_zero for r in self.runs) else ():
            run = self.find(role)
            value = run and interpolate(self.curve(run, metric, Axis.STEPS), 0.0)
            if value is not None:
                return value
        return None

    def _row(self, run: Run) -> Row:
        lines = run.split('validation') or run.split('train')
        if run.role is Role.DENSE and self.sunk[Axis.STEPS]:
            # The dense run may have continued after the checkpoint from which the branches start.
            lines = [r for r in lines if r['step'] <= self.sunk[Axis.STEPS]] or lines
        last = lines[-1] if lines else {}
        own = {a: run.cost(last, a) for a in Axis}
        extra = {a: _finite(own[a] - (self.sunk[a] if run.from_zero else 0.0)) for a in Axis}
        sunk, budget = self.sunk[Axis.FLOPS], self.budget.get(Axis.FLOPS)
        at = {m: interpolate(self.curve(run, m, Axis.FLOPS), budget) for m in METRICS}
        value = {m: _finite(last.get(m)) if last.get('split') == 'validation' else None for m in METRICS}
        return Row(
            branch=run.name,
            role=run.role,
            final_step=last.get('step'),
            extra_steps=extra[Axis.STEPS],
            extra_flops=extra[Axis.FLOPS],
            extra_flops_share=extra[Axis.FLOPS] / sunk if sunk and extra[Axis.FLOPS] is not None else None,
            extra_core_days=_core_days(extra[Axis.FLOPS]),
            extra_seconds=extra[Axis.SECONDS],
            total_flops=_finite(own[Axis.FLOPS] + (0.0 if run.from_zero else sunk)),
            loss=value['loss'],
            accuracy=value['accuracy'],
            loss_at_budget=at['loss'],
            accuracy_at_budget=at['accuracy'],
        )

    def difference(self, branch: str, axis: Axis, metric: str) -> float | None:
        """Returns a metric of a branch minus that of the dense continuation at the budget of an axis; None if unknown."""
        base = self.find(Role.DENSE_CONTINUATION)
        run = next((run for run in self.branches if run.name == branch and run is not base), None)
        if base is None or run is None:
            return None
        ours, theirs = (interpolate(self.curve(r, metric, axis), self.budget.get(axis)) for r in (run, base))
        return None if ours is None or theirs is None else ours - theirs

    def passes(self, run: Run, other: Run, axis: Axis = Axis.FLOPS) -> float | None:
        """Returns the extra cost from which the loss of `run` stays below that of `other`, as far as both go, or None."""
        (x, y), reference = self.curve(run, 'loss', axis), self.curve(other, 'loss', axis)
        if not len(x) or not len(reference[0]):
            return None
        grid = np.unique(np.concatenate([x, reference[0]]))
        grid = grid[(grid >= max(x[0], reference[0][0])) & (grid <= min(x[-1], reference[0][-1]))]
        gap = np.interp(grid, x, y) - np.interp(grid, *reference)
        above = np.flatnonzero(gap >= 0)
        if not len(grid) or gap[-1] >= 0:
            return None
        if not len(above):
            return float(grid[0])
        i = above[-1]
        return float(grid[i] + (grid[i + 1] - grid[i]) * gap[i] / (gap[i] - gap[i + 1]))


def reaches(curve: Curve, loss: float) -> float | None:
    """Returns the first cost at which the interpolated `curve` reaches `loss`; None if it never does."""
    x, y = curve
    below = np.flatnonzero(y <= loss)
    if not len(below):
        return None
    i = below[0]
    return float(x[0] if i == 0 else x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - loss) / (y[i - 1] - y[i]))


def interpolate(curve: Curve, x: float | None) -> float | None:
    """Interpolates the curve linearly at `x`; None outside its points: nothing is extrapolated."""
    xs, ys = curve
    if x is None or not len(xs):
        return None
    # Subtracting the sunk cost leaves a rounding error in a curve that ends at `x`.
    slack = 1e-12 * max(abs(xs[-1]), abs(xs[0]), abs(x))
    return float(np.interp(x, xs, ys)) if xs[0] - slack <= x <= xs[-1] + slack else None


def _core_days(flops: float | None) -> float | None:
    return None if flops is None else cost.core_days(flops, cost.TPU_V4_CORE, cost.UTILIZATION)


def _finite(value: Any) -> float | None:
    return value if is_number(value) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Sample):
    """Differences of a branch to the dense continuation of the same seed, in one metric at the budget of one axis."""

    branch: str
    axis: Axis
    metric: str


def paired(reports: Sequence[Report]) -> list[Paired]:
    """Returns the paired differences over seeds, given one report per seed. A seed without a branch has the value None."""
    result = []
    for branch in dict.fromkeys(run.name for report in reports for run in report.branches):
        for axis in Axis:
            for metric in METRICS:
                values = tuple(report.difference(branch, axis, metric) for report in reports)
                pair = Paired(branch=branch, axis=axis, metric=metric, values=values)
                if pair.known:
                    result.append(pair)
    return result


def mean_rows(reports: Sequence[Report]) -> list[Row]:
    """Averages the table's rows over seeds, branch by branch; a value is None if any seed lacks it."""
    rows: dict[str, list[Row]] = {}
    for row in (row for report in reports for row in report.rows):
        rows.setdefault(row.branch, []).append(row)
    return [rs[0] if len(rs) == 1 else _mean_row(rs) for rs in rows.values()]


def _mean_row(rows: Sequence[Row]) -> Row:
    numbers = [f.name for f in dataclasses.fields(Row) if f.name not in ('branch', 'role')]
    columns = {name: [getattr(row, name) for row in rows] for name in numbers}
    means = {n: None if None in vs else statistics.fmean(vs) for n, vs in columns.items()}
    return dataclasses.replace(rows[0], **means)


def compare_seeds(seeds: Sequence[Mapping[str, Run]]) -> list[Report]:
    """Makes one report per seed; the keys of a mapping become the names of its runs, so that seeds can be paired."""
    return [Report([dataclasses.replace(run, name=name) for name, run in runs.items()]) for runs in seeds]


def warnings_of(reports: Sequence[Report]) -> list[str]:
    """Returns the warnings of all seeds, each once."""
    return list(dict.fromkeys(warning for report in reports for warning in report.warnings))
