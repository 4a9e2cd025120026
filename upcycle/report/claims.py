"""The paper's statements, checked: is one branch better than another, seed by seed, at equal cost?"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.report.compare import half_width, interpolate
from upcycle.report.runs import Axis, Curve, Run

# A single evaluation moves by more than branches differ, so the last part before the comparison's cost counts.
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
      whole: a run from nothing spends the dense run's FLOPs first, uncounted, as a branch has.
    """

    text: str
    better: str
    worse: str
    paper: str = ''
    metric: str = 'loss'
    at: float | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and what the seeds say.

    Attributes:
      claim: the statement.
      differences: by seed, `better` less `worse` in the metric; None where a run has not got there.
      half_width: of the 95% t interval of their mean; None for fewer than two seeds.
    """

    claim: Claim
    differences: tuple[float | None, ...]
    half_width: float | None

    @property
    def known(self) -> list[float]:
        """The differences of the seeds that got there."""
        return [d for d in self.differences if d is not None]

    @property
    def mean(self) -> float | None:
        """Over the seeds that got there."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def standard_errors(self) -> float | None:
        """How many of them the mean is away from zero; positive where it is on the claim's side."""
        if len(self.known) < 2 or not (deviation := statistics.stdev(self.known)):
            return None
        sign = -1.0 if self.claim.metric in LOWER_IS_BETTER else 1.0
        return sign * self.mean * math.sqrt(len(self.known)) / deviation

    @property
    def word(self) -> str:
        """'holds' or 'does not hold' where the interval excludes zero, else 'undecided'."""
        if self.half_width is None or self.half_width >= abs(self.mean):
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
    if claim.better not in runs or claim.worse not in runs:
        return None
    pair = [runs[name] for name in (claim.better, claim.worse)]
    curves = [curve_of(run, claim.metric, Axis.FLOPS) for run in pair]
    if not all(len(x) for x, _ in curves):
        return None
    sunk = next((run.start[Axis.FLOPS] for run in pair if run.start[Axis.FLOPS]), math.nan)
    if claim.whole:
        curves = [(x + run.start[Axis.FLOPS] - sunk, y) for run, (x, y) in zip(pair, curves, strict=True)]
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
    if len(curve[0]) == 1:  # a metric of the end alone
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


def rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table's cells."""
    return [
        [
            v.claim.text,
            f'{v.claim.metric}, {v.claim.better} less {v.claim.worse}',
            _interval(v),
            str(len(v.known)),
            v.word + ('' if v.standard_errors is None else f' ({v.standard_errors:+.1f} standard errors)'),
            v.claim.paper or '–',
        ]
        for v in verdicts
    ]


def _interval(v: Verdict) -> str:
    if v.mean is None:
        return '–'
    return f'{v.mean:+.4f}' + ('' if v.half_width is None else f' ± {v.half_width:.4f}')
