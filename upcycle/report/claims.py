"""Checks the paper's statements: is one branch better than another, seed by seed, at equal cost?"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.report import text
from upcycle.report.compare import interpolate
from upcycle.report.runs import Axis, Curve, Run
from upcycle.report.sample import Sample

# Values are averaged over this share of the cost before the comparison: single evaluations vary by more than branches differ.
WINDOW = 0.05
LOWER_IS_BETTER = ('loss',)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that runs can contradict.

    Attributes:
      text: the statement in words.
      better, worse: branches; the first is claimed to have the better metric.
      paper: the paper's numbers, if it has any.
      metric: 'loss', or a metric that is better when larger; a validation metric, or 'SPLIT/NAME'.
      at: own FLOPs at which the branches are compared, as a fraction of the dense run's. 0: at the first evaluation. None:
        where the shorter run ends.
      whole: compare a run from scratch after it has also spent the dense run's FLOPs; these are not counted, as for a branch.
      per_step: compare at equal steps instead of equal FLOPs.
      than: two more branches; the claim is about the difference `better` - `worse` minus the difference of these two.
      within: the claim is that the absolute difference is smaller than this.
    """

    text: str
    better: str
    worse: str
    paper: str = ''
    metric: str = 'loss'
    at: float | None = None
    whole: bool = False
    per_step: bool = False
    than: tuple[str, str] | None = None
    within: float | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The compared pairs of branches: the difference of the second pair is subtracted from that of the first."""
        return [(self.better, self.worse), *([tuple(self.than)] if self.than else [])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Sample):
    """A claim and, per seed, the metric of `better` minus that of `worse`; None where a run has not come that far.

    Attributes:
      claim: the statement.
    """

    claim: Claim

    @property
    def standard_errors(self) -> float | None:
        """The mean in standard errors: positive if it supports the claim, or if the claim is of no difference."""
        if len(self.known) < 2 or not (deviation := statistics.stdev(self.known)):
            return None
        lower = self.claim.metric in LOWER_IS_BETTER
        sign = math.copysign(1.0, self.mean) if self.claim.within is not None else -1.0 if lower else 1.0
        return sign * self.mean * math.sqrt(len(self.known)) / deviation

    @property
    def word(self) -> str:
        """The verdict: 'holds', 'does not hold' or 'undecided'.

        It is decided if the interval excludes zero, or for a claim of no difference, if it lies inside or outside `within`.
        """
        if self.half_width is None:
            return 'undecided'
        low, high = self.mean - self.half_width, self.mean + self.half_width
        if (within := self.claim.within) is not None:
            holds, fails = -within < low and high < within, low > within or high < -within
        elif self.claim.metric in LOWER_IS_BETTER:
            holds, fails = high < 0, low > 0
        else:
            holds, fails = low > 0, high < 0
        return 'holds' if holds else 'does not hold' if fails else 'undecided'


def judge(claim: Claim, seeds: Sequence[Mapping[str, Run]]) -> Verdict:
    """Compares the branches of a claim in every seed.

    Args:
      claim: the statement.
      seeds: runs by branch, one mapping per seed.
    """
    return Verdict(claim=claim, values=tuple(_difference(claim, runs) for runs in seeds))


def _difference(claim: Claim, runs: Mapping[str, Run]) -> float | None:
    gaps = [_gap(claim, runs, pair) for pair in claim.pairs]
    return None if None in gaps else gaps[0] - sum(gaps[1:])


def _gap(claim: Claim, runs: Mapping[str, Run], branches: tuple[str, str]) -> float | None:
    if not runs.keys() >= set(branches):
        return None
    axis = Axis.STEPS if claim.per_step else Axis.FLOPS
    pair = [runs[name] for name in branches]
    curves = [curve_of(run, claim.metric, axis) for run in pair]
    if not all(len(x) for x, _ in curves):
        return None
    sunk = next((run.start[axis] for run in pair if run.start[axis]), math.nan)
    if claim.whole:
        curves = [(x + run.start[axis] - sunk, y) for run, (x, y) in zip(pair, curves, strict=True)]
    if claim.at == 0:
        values = [float(y[0]) for _, y in curves]
    else:
        cost = min(float(x[-1]) for x, _ in curves)
        if claim.at is not None:
            cost = claim.at * sunk
        values = [_mean_before(curve, cost) for curve in curves]
    return None if None in values else values[0] - values[1]


def curve_of(run: Run, metric: str, axis: Axis) -> Curve:
    """Returns (own cost, metric) of a run, for a validation metric or 'SPLIT/NAME'."""
    split, slash, name = metric.partition('/')
    return run.curve(name, axis, split) if slash else run.curve(metric, axis)


def _mean_before(curve: Curve, cost: float) -> float | None:
    """Averages a curve over the last `WINDOW` before a cost; None if the curve does not reach it."""
    if len(curve[0]) == 1:  # a metric that is only logged at the last step
        return float(curve[1][0]) if math.isclose(curve[0][0], cost, rel_tol=0.02) else None
    return mean_between(curve, (1 - WINDOW) * cost, cost)


def mean_between(curve: Curve, low: float, high: float) -> float | None:
    """Averages a curve over five evenly spaced costs; None if it does not reach one of them."""
    values = [interpolate(curve, float(cost)) for cost in np.linspace(low, high, 5)]
    return None if None in values else statistics.fmean(values)


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """Formats a table with one row per claim."""
    head = ['claim', 'metric', 'difference, 95% interval', 'seeds', 'verdict', 'paper']
    return text.markdown_table(head, rows(verdicts))


def write_csv(verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """Writes all numbers unrounded, one line per claim, with one column per seed."""
    seeds = max((len(v.values) for v in verdicts), default=0)
    columns = ['mean', 'half_width', 'standard_errors', 'verdict', 'paper', *(f'seed_{i + 1}' for i in range(seeds))]
    lines = [
        [v.claim.text, _compared(v.claim), v.mean, v.half_width, v.standard_errors, v.word, v.claim.paper, *v.values]
        for v in verdicts
    ]
    text.write_csv(path, ['claim', 'compared', *columns], lines)


def rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Returns the cells of the table."""
    return [
        [
            v.claim.text,
            _compared(v.claim),
            v.text('+.4f'),
            str(len(v.known)),
            v.word + ('' if v.standard_errors is None else f' ({v.standard_errors:+.1f} standard errors)'),
            v.claim.paper or '–',
        ]
        for v in verdicts
    ]


def _compared(claim: Claim) -> str:
    names = [f'{better} less {worse}' for better, worse in claim.pairs]
    between = names[0] if claim.than is None else f'({names[0]}) less ({names[1]})'
    within = '' if claim.within is None else f', within {claim.within:g}'
    return f'{claim.metric}{", step by step" if claim.per_step else ""}, {between}{within}'
