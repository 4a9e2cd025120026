"""The numbers of a comparison: as tables of text, on the console, and in a CSV file."""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from upcycle import tables
from upcycle.log_lines import PER_DEVICE, is_number, rate_of_units
from upcycle.report import text
from upcycle.report.compare import Paired, Report, Row, mean_rows, paired, warnings_of
from upcycle.report.headlines import headlines
from upcycle.report.runs import Axis, Run
from upcycle.report.sample import Sample
from upcycle.report.text import cost_text, extra_text, metric_text

# The head and the rows, as text.
Table = tuple[list[str], list[list[str]]]


def print_table(reports: Sequence[Report], console: rich.console.Console | None = None) -> None:
    """Prints warnings, tables and headlines; several reports are the seeds of one comparison."""
    console = console or tables.console(120)
    for warning in warnings_of(reports):
        console.print(f'Warning: {warning}', style='yellow')
    for name, (head, body) in tables_of(reports).items():
        table = rich.table.Table(title=name, title_justify='left', box=rich.box.SIMPLE_HEAD)
        for i, column in enumerate(head):
            table.add_column(column, justify='right' if i else 'left', overflow='fold')
        for row in body:
            table.add_row(*row)
        console.print(table)
    for line in headlines(reports):
        console.print(f'- {line}', highlight=False)


def tables_of(reports: Sequence[Report]) -> dict[str, Table]:
    """Returns the tables by title."""
    budget = reports[0].budget.get(Axis.FLOPS)
    mean = f', mean over {len(reports)} seeds' if len(reports) > 1 else ''
    at = f'; at equal FLOPs (*): {extra_text(budget, reports[0].sunk[Axis.FLOPS])}' if budget is not None else ''
    costs = ['+ steps', '+ FLOPs', '% sunk', '+ core-days', '+ time']
    head = ['branch', 'step', *costs, 'loss', 'accuracy', 'loss*', 'accuracy*']
    body = [_cells(row) for row in mean_rows(reports)]
    result = {f'Branches{mean}{at}': (head, body)}
    differences = paired(reports)
    if differences:
        seeds = [f'seed {i}' for i in range(1, len(reports) + 1)] if len(reports) > 1 else []
        head = ['branch', 'at equal', 'budget', 'metric', *seeds, 'difference']
        result['Branch minus dense continuation'] = head, [_difference(reports, p) for p in differences]
    first = ' (first seed)' if len(reports) > 1 else ''
    if times := [row for run in reports[0].runs if (row := _times(run))]:
        head = ['branch', 'time', 'steps', 'waiting for data', 'evaluations', 'checkpoints']
        result[f'Where the time went{first}'] = head, times
    if speeds := [row for run in reports[0].runs if (row := _speed(run))]:
        head = ['branch', 'steps a second', 'a second and device', 'MFU', 'devices busy']
        result[f'Speed, medians of the log{first}'] = head, speeds
    return result


def _cells(row: Row) -> list[str]:
    return [
        row.branch,
        cost_text(row.final_step, Axis.STEPS),
        cost_text(row.extra_steps, Axis.STEPS),
        cost_text(row.extra_flops, Axis.FLOPS),
        '–' if row.extra_flops_share is None else f'{row.extra_flops_share:.1%}',
        '–' if row.extra_core_days is None else f'{row.extra_core_days:.3g}',
        cost_text(row.extra_seconds, Axis.SECONDS),
        metric_text(row.loss, 'loss'),
        metric_text(row.accuracy, 'accuracy'),
        metric_text(row.loss_at_budget, 'loss'),
        metric_text(row.accuracy_at_budget, 'accuracy'),
    ]


def _times(run: Run) -> list[str] | None:
    """Returns the time in a run's loop and how it was spent; None if that was not logged."""
    last = next((record for record in reversed(run.records) if 'data_seconds' in record), None)
    if last is None:
        return None
    parts = [
        last['seconds'] - last['data_seconds'],
        *(last[f'{name}_seconds'] for name in ('data', 'evaluation', 'checkpoint')),
    ]
    total = sum(parts)
    return [run.name, cost_text(total, Axis.SECONDS), *(f'{part / total:.1%}' if total else '–' for part in parts)]


def _speed(run: Run) -> list[str] | None:
    """Returns the medians of a run's logged rates and shares of time; None if it has not logged units."""
    lines = run.split('train')
    name = next(filter(None, map(rate_of_units, lines)), None)
    if name is None:
        return None

    def median(key: str, style: str) -> str:
        values = [line[key] for line in lines if is_number(line.get(key))]
        return format(statistics.median(values), style) if values else '–'

    units = f'{median(name, ",.4g")} {name.removesuffix(PER_DEVICE)}'
    return [run.name, median('steps_per_second', '.3g'), units, median('mfu', '.1%'), median('device_busy', '.1%')]


def _difference(reports: Sequence[Report], p: Paired) -> list[str]:
    word, *style = {'loss': ('loss', '+.4f', 1.0), 'accuracy': ('accuracy, points', '+.2f', 100.0)}[p.metric]
    budget = cost_text(next(r.budget[p.axis] for r in reports if p.axis in r.budget), p.axis)
    seeds = [Sample(values=(value,)).text(*style) for value in p.values] if len(reports) > 1 else []
    return [p.branch, p.axis.word, budget, word, *seeds, p.text(*style)]


def write_csv(reports: Sequence[Report], path: pathlib.Path) -> None:
    """Writes all numbers unrounded, one line per seed and branch."""
    names = [field.name for field in dataclasses.fields(Row)]
    gaps = [(axis, metric) for axis in Axis for metric in ('loss', 'accuracy')]
    lines = []
    for seed, report in enumerate(reports, 1):
        for row in report.rows:
            values = {name: getattr(row, name) for name in names} | {'role': row.role.value}
            differences = [report.difference(row.branch, a, m) for a, m in gaps]
            lines.append([seed, *values.values(), report.budget.get(Axis.FLOPS), *differences])
    extra = [f'{m}_difference_at_equal_{a.word.lower()}' for a, m in gaps]
    text.write_csv(path, ['seed', *names, 'budget_flops', *extra], lines)
