"""The paper's statements, checked: is one branch better than another, seed by seed, at equal cost?"""

import csv
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.report.compare import half_width, interpolate
from upcycle.report.runs import Axis, Curve, Run

# Share of the cost before the comparison over which values are averaged: one evaluation varies by more than branches differ.
WINDOW = 0.05
LOWER_IS_BETTER = ('loss',)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that runs can contradict.

    Attributes:
      text: in words.
      better, worse: branches; the first is said to have the better metric.
      paper: the paper's numbers, where they exist.
      metric: 'loss', or one of which more is better; of validation, or 'SPLIT/NAME'.
      at: FLOPs of each branch's own at which they are compared, as a share of the dense run's; 0: the first evaluation; None:
        where the shorter ends.
      whole: a run from scratch is compared after it has spent the dense run's FLOPs as well, uncounted as those of a branch.
      per_step: runs are compared at equal steps and not at equal FLOPs.
      than: two more branches; the claim is of the difference between `better` and `worse` less that between these two.
      within: the claim is that the difference, either way, is smaller than this.
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
        """The branches compared: the second pair's difference is subtracted from the first's."""
        return [(self.better, self.worse), *([tuple(self.than)] if self.than else [])]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and the differences that seeds have.

    Attributes:
      claim: the statement.
      differences: by seed, `better` less `worse` in the metric; None where a run has not come that far.
      half_width: of the 95% t interval of their mean; None for fewer than two seeds.
    """

    claim: Claim
    differences: tuple[float | None, ...]
    half_width: float | None

    @property
    def known(self) -> list[float]:
        """The differences of the seeds that came that far."""
        return [d for d in self.differences if d is not None]

    @property
    def mean(self) -> float | None:
        """Over the seeds that came that far."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def standard_errors(self) -> float | None:
        """The mean in standard errors; positive where it is on the claim's side, or where that has no side."""
        if len(self.known) < 2 or not (deviation := statistics.stdev(self.known)):
            return None
        lower = self.claim.metric in LOWER_IS_BETTER
        sign = math.copysign(1.0, self.mean) if self.claim.within is not None else -1.0 if lower else 1.0
        return sign * self.mean * math.sqrt(len(self.known)) / deviation

    @property
    def word(self) -> str:
        """'holds' or 'does not hold' where the interval excludes zero (of a claim of no difference: lies inside `within`, or
        outside), else 'undecided'."""
        if self.half_width is None:
            return 'undecided'
        if self.claim.within is not None:
            if abs(self.mean) + self.half_width < self.claim.within:
                return 'holds'
            return 'does not hold' if abs(self.mean) - self.half_width > self.claim.within else 'undecided'
        if self.half_width >= abs(self.mean):
            return 'undecided'
        lower = self.claim.metric in LOWER_IS_BETTER
        return 'holds' if (self.mean < 0) == lower else 'does not hold'


def judge(claim: Claim, seeds: Sequence[Mapping[str, Run]]) -> Verdict:
    """Compares the two branches of every seed.

    Args:
      claim: the statement.
      seeds: of each, runs by branch.
    """
    differences = tuple(_difference(claim, runs) for runs in seeds)
    return Verdict(claim, differences, half_width([d for d in differences if d is not None]))


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
        values = [mean_before(curve, cost) for curve in curves]
    return None if None in values else values[0] - values[1]


def curve_of(run: Run, metric: str, axis: Axis) -> Curve:
    """(own cost, metric) of a run; the metric of validation, or 'SPLIT/NAME'."""
    split, slash, name = metric.partition('/')
    return run.curve(name, axis, split) if slash else run.curve(metric, axis)


def mean_before(curve: Curve, cost: float) -> float | None:
    """The mean of a curve over the last `WINDOW` before a cost; None where it does not reach it."""
    places = np.linspace((1 - WINDOW) * cost, cost, 5)
    if len(curve[0]) == 1:  # a metric of the last step alone
        return float(curve[1][0]) if math.isclose(curve[0][0], cost, rel_tol=0.02) else None
    values = [interpolate(curve, float(place)) for place in places]
    return None if None in values else statistics.fmean(values)


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table: a line a claim."""
    lines = [
        '| claim | metric | difference, 95% interval | seeds | verdict | paper |',
        '|---|---|---|---|---|---|',
        *('| ' + ' | '.join(row) + ' |' for row in rows(verdicts)),
    ]
    return '\n'.join([*lines, ''])


def write_csv(verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """All of them unrounded, a line a claim, with a column a seed."""
    seeds = max((len(v.differences) for v in verdicts), default=0)
    columns = ['mean', 'half_width', 'standard_errors', 'verdict', 'paper', *(f'seed_{i + 1}' for i in range(seeds))]
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['claim', 'compared', *columns])
        for v in verdicts:
            numbers = [v.mean, v.half_width, v.standard_errors]
            writer.writerow([v.claim.text, _compared(v.claim), *numbers, v.word, v.claim.paper, *v.differences])


def rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table's cells."""
    return [
        [
            v.claim.text,
            _compared(v.claim),
            _interval(v),
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


def _interval(v: Verdict) -> str:
    if v.mean is None:
        return '–'
    return f'{v.mean:+.4f}' + ('' if v.half_width is None else f' ± {v.half_width:.4f}')
