"""The CSVs of the runs, and their tables."""

from __future__ import annotations

import csv
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smollm2.schedule import BRANCHES, CHAT, CONTINUED, DENSE, RATES, START, UPCYCLED, Row, Run
from upcycle.report.sample import Sample
from upcycle.report.text import markdown_table

RUNS, CURVES = 'runs.csv', 'curves.csv'
KEY = ('part', 'branch', 'peak rate', 'seed')
TEXTS = ('code', 'reference', 'bible')
# Losses in nats a token: `loss` on the run's validation, then on whole texts.
COLUMNS = (
    *KEY, 'steps', 'TFLOP', 'loss at start', 'loss', *(f'{text} loss' for text in TEXTS), 'hours', 'peak GB', 'Python',
    'data', 'commit',
)  # fmt: skip
CURVE_COLUMNS = (*KEY, 'step', 'TFLOP', 'split', 'loss')
WORDS = {'code': 'held-out code', 'reference': "Python's reference", 'bible': 'Bible'}


def read(file: pathlib.Path) -> list[Row]:
    """Returns the rows of a CSV; none if it does not exist."""
    if not file.exists():
        return []
    with file.open(encoding='utf-8', newline='') as stream:
        return list(csv.DictReader(stream))


def append(file: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV, all or none, in place of those with their key."""
    keys = {key_of(row) for row in rows}
    write(file, columns, [*(row for row in read(file) if key_of(row) not in keys), *rows])


def write(file: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix('.new')
    with new.open('w', encoding='utf-8', newline='') as stream:
        writer = csv.DictWriter(stream, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(new, file)


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what identifies a run in a row."""
    return tuple(str(row[name]) for name in KEY)


def row_of(run: Run, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of a finished run.

    Args:
      run: the run.
      lines: of its metrics.jsonl.
      facts: the other columns.
    """
    losses = [line['loss'] for line in lines if line['split'] == 'validation']
    last = [line for line in lines if line['split'] == 'train'][-1]
    return {
        **dict(zip(KEY, run.key, strict=True)),
        'steps': run.steps,
        'TFLOP': f'{last["flops"] / 1e12:.6g}',
        'loss at start': f'{losses[0]:.5f}',
        'loss': f'{losses[-1]:.5f}',
        'hours': f'{last["seconds"] / 3600:.3f}',
        **facts,
    }


def curve_of(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the logged losses of a run."""
    return [
        {
            **dict(zip(KEY, run.key, strict=True)),
            'step': line['step'],
            'TFLOP': f'{line["flops"] / 1e12:.6g}',
            'split': line['split'],
            'loss': f'{line["loss"]:.5f}',
        }
        for line in lines
        if line['split'] in ('train', 'validation') and 'loss' in line
    ]


def table(rows: Sequence[Row]) -> str:
    """Returns Markdown tables of the rows that there are."""
    parts = [_rates(rows), _continued(rows), _chat(rows)]
    return '\n'.join(part for part in parts if part) or 'no run is finished\n'


def sample(rows: Sequence[Row], part: str, branch: str, column: str, rate: str | None = None) -> Sample:
    """Returns the values of a column in the runs of a branch, in the order of the seeds."""
    found = [row for row in rows if (row['part'], row['branch']) == (part, branch) and row[column]]
    found = [row for row in found if rate is None or row['peak rate'] == rate]
    found.sort(key=lambda row: int(row['seed'] or 0))
    return Sample(values=tuple(float(row[column]) for row in found))


def _rates(rows: Sequence[Row]) -> str:
    rates = sorted({row['peak rate'] for row in rows if row['part'] == RATES}, key=float)
    body = []
    for rate in rates:
        samples = [sample(rows, RATES, branch, 'loss', rate) for branch in BRANCHES]
        body.append([rate, *(f'{each.text(".4f")} ({len(each.known)})' for each in samples)])
    return markdown_table(['peak rate', *(f'{branch} (runs)' for branch in BRANCHES)], body) if body else ''


def _continued(rows: Sequence[Row]) -> str:
    """Perplexities, with the 95% interval of the mean over seeds; the last column is paired by seed."""
    body = []
    for text in TEXTS:
        column = f'{text} loss'
        start = sample(rows, START, DENSE, column)
        ends = {branch: sample(rows, CONTINUED, branch, column) for branch in BRANCHES}
        if any(each.known for each in ends.values()):
            shown = [_perplexity(each).text('.3f') for each in (start, *ends.values())]
            body.append([WORDS[text], *shown, _difference(rows, column).text('+.4f')])
    head = ['perplexity', 'before', *BRANCHES, 'loss of upcycled minus dense']
    return markdown_table(head, body) if body else ''


def _perplexity(values: Sample) -> Sample:
    return Sample(values=tuple(math.exp(value) for value in values.known))


def _difference(rows: Sequence[Row], column: str) -> Sample:
    by_seed = {
        branch: {
            row['seed']: float(row[column]) for row in rows if key_of(row)[:2] == (CONTINUED, branch) and row[column]
        }
        for branch in BRANCHES
    }
    both = sorted(by_seed[DENSE].keys() & by_seed[UPCYCLED].keys(), key=int)
    return Sample(values=tuple(by_seed[UPCYCLED][seed] - by_seed[DENSE][seed] for seed in both))


def _chat(rows: Sequence[Row]) -> str:
    body = [
        [row['branch'], row['steps'], f'{float(row["loss at start"]):.4f}', f'{float(row["loss"]):.4f}']
        for row in rows
        if row['part'] == CHAT
    ]
    return markdown_table(['conversations', 'steps', 'loss before', 'loss after'], body) if body else ''


def require_same_data(rows: Sequence[Row], digest: str, complain: Callable[[str], Exception]) -> None:
    """Raises what `complain` makes if rows are of other data."""
    others = {row['data'] for row in rows} - {digest}
    if others:
        raise complain(f'its rows are of other data, {min(others)}, than {digest}: that of another version of Python')
