"""Last values of runs next to the paper's numbers."""

import csv
import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from upcycle.report.claims import curve_of
from upcycle.report.compare import half_width
from upcycle.report.runs import Axis, Run


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A table of the paper.

    Attributes:
      metrics: of validation, or 'SPLIT/NAME'; each a share of one, shown in per cent.
      rows: of each branch, the paper's value of each metric, in per cent.
    """

    metrics: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


@dataclasses.dataclass(frozen=True)
class End:
    """One cell: a metric of a branch at its end.

    Attributes:
      branch, metric: which.
      values: in per cent, of the seeds that have it.
      half_width: of the 95% interval of their mean; None for fewer than two.
      paper: in per cent.
    """

    branch: str
    metric: str
    values: tuple[float, ...]
    half_width: float | None
    paper: float

    @property
    def text(self) -> str:
        """Ours, as shown."""
        if not self.values:
            return '–'
        return f'{statistics.fmean(self.values):.2f}' + (
            f' ± {self.half_width:.2f}' if self.half_width is not None else ''
        )


def ends(numbers: Numbers, seeds: Sequence[Mapping[str, Run]]) -> list[End]:
    """The last evaluations of runs, row by row and metric by metric."""
    found = []
    for branch, papers in numbers.rows:
        for metric, paper in zip(numbers.metrics, papers, strict=True):
            curves = [curve_of(runs[branch], metric, Axis.STEPS)[1] for runs in seeds if branch in runs]
            values = tuple(100.0 * float(y[-1]) for y in curves if len(y))
            found.append(End(branch, metric, values, half_width(values), paper))
    return found


def as_table(numbers: Numbers, found: Sequence[End]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as text: a line a branch."""
    head = ['branch', *(column for metric in numbers.metrics for column in (f'{metric}, %', 'paper'))]
    body = [
        [branch, *(text for end in found if end.branch == branch for text in (end.text, f'{end.paper:.2f}'))]
        for branch, _ in numbers.rows
    ]
    return head, body


def as_markdown(numbers: Numbers, found: Sequence[End]) -> str:
    """The table, with a sentence above it."""
    head, body = as_table(numbers, found)
    lines = [head, ['---'] * len(head), *body]
    intro = 'Last evaluations, mean over seeds and 95% interval; the paper has other data and models of another size.'
    return '\n'.join([intro, '', *('| ' + ' | '.join(line) + ' |' for line in lines), ''])


def write_csv(found: Sequence[End], path: pathlib.Path) -> None:
    """All of them unrounded, a line a seed."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['branch', 'metric', 'seed', 'percent', 'paper_percent'])
        for end in found:
            for seed, value in enumerate(end.values, 1):
                writer.writerow([end.branch, end.metric, seed, value, end.paper])
