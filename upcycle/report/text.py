"""Costs, metrics and tables as text."""

import csv
import pathlib
from collections.abc import Iterable, Sequence

from upcycle.report.runs import Axis


def unit(axis: Axis, largest: float) -> tuple[float, str]:
    """Returns the size and name of a readable unit for values up to `largest`."""
    units = {
        Axis.FLOPS: [(10.0**p, f'{s}FLOPs') for p, s in ((21, 'Z'), (18, 'E'), (15, 'P'), (12, 'T'), (9, 'G'))],
        Axis.SECONDS: [(86400.0, 'days'), (3600.0, 'hours'), (60.0, 'min')],
        Axis.STEPS: [],
    }[axis]
    return next((u for u in units if abs(largest) >= 2 * u[0]), (1.0, axis.word))


def extra_text(flops: float, sunk: float) -> str:
    """Formats extra FLOPs and their share of the sunk FLOPs."""
    share = f' ({flops / sunk:.1%} of the sunk cost)' if sunk else ''
    return f'+{cost_text(flops, Axis.FLOPS)}{share}'


def cost_text(value: float | None, axis: Axis) -> str:
    """Formats a cost in a readable unit."""
    if not value:
        return '–' if value is None else '0'
    size, name = unit(axis, value)
    return f'{value:,.0f}' if axis is Axis.STEPS else f'{value / size:,.3g} {name}'


def metric_text(value: float | None, metric: str) -> str:
    """Formats a loss with four digits, any other metric in per cent."""
    return '–' if value is None else f'{value:.4f}' if metric == 'loss' else f'{value:.2%}'


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table."""
    lines = ['| ' + ' | '.join(cells) + ' |' for cells in (head, *rows)]
    lines.insert(1, '|---' * len(head) + '|')
    return '\n'.join([*lines, ''])


def write_csv(path: pathlib.Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file; None is an empty cell."""
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([head, *rows])
