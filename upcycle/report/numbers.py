"""Final values of runs next to the paper's numbers."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from upcycle.report import text
from upcycle.report.claims import curve_of
from upcycle.report.runs import Axis, Run
from upcycle.report.sample import Sample


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A table of the paper.

    Attributes:
      metrics: names of validation metrics, or 'SPLIT/NAME'; each is a fraction, shown in per cent.
      rows: (branch, the paper's value of each metric in per cent).
    """

    metrics: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class End(Sample):
    """One cell: the final value of a metric in per cent, of each seed that has it.

    Attributes:
      branch, metric: row and column.
      paper: the paper's value, in per cent.
    """

    branch: str
    metric: str
    paper: float


def ends(numbers: Numbers, seeds: Sequence[Mapping[str, Run]]) -> list[End]:
    """Returns the final evaluations of the runs, row by row and metric by metric."""
    cells = []
    for branch, papers in numbers.rows:
        for metric, paper in zip(numbers.metrics, papers, strict=True):
            curves = [curve_of(runs[branch], metric, Axis.STEPS)[1] for runs in seeds if branch in runs]
            values = tuple(100.0 * float(y[-1]) for y in curves if len(y))
            cells.append(End(branch=branch, metric=metric, values=values, paper=paper))
    return cells


def as_table(numbers: Numbers, cells: Sequence[End]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the table as text; one row per branch."""
    head = ['branch', *(column for metric in numbers.metrics for column in (f'{metric}, %', 'paper'))]
    body = [
        [branch, *(t for end in cells if end.branch == branch for t in (end.text('.2f'), f'{end.paper:.2f}'))]
        for branch, _ in numbers.rows
    ]
    return head, body


def as_markdown(numbers: Numbers, cells: Sequence[End]) -> str:
    """Formats the table, with a sentence above it."""
    intro = 'Last evaluations, mean over seeds and 95% interval; the paper has other data and models of another size.'
    return f'{intro}\n\n{text.markdown_table(*as_table(numbers, cells))}'


def write_csv(cells: Sequence[End], path: pathlib.Path) -> None:
    """Writes all values unrounded, one line per seed."""
    rows = [
        [end.branch, end.metric, seed, value, end.paper] for end in cells for seed, value in enumerate(end.values, 1)
    ]
    text.write_csv(path, ['branch', 'metric', 'seed', 'percent', 'paper_percent'], rows)
