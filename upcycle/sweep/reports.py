"""The reports of an experiment: one page per comparison, and means over seeds."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import outputs
from upcycle.errors import UserError
from upcycle.report.runs import Role, Run, chain, load_run
from upcycle.sweep import conduct, grid


def report_experiment(*, config: str, scale: str | None, out: str | None) -> None:
    """`upcycle report --config`: writes an experiment's reports from all runs that have begun, finished or not.

    Args:
      config: a file of `configs/`.
      scale: the scale of the sweep; None: the config's default.
      out: the sweep's folder; None: runs/NAME.

    Raises:
      UserError: the experiment has no reports, or none of its runs has begun.
    """
    experiment = grid.load(config, scale)
    out = os.path.join('runs', experiment.name) if out is None else out
    if not experiment.get('reports'):
        raise UserError(f'--config={config} has no reports at this scale: choose another --scale.')
    outputs.check('--out', out, outputs.Kind.FOLDER, local=True)
    points = grid.resolve(experiment, out)
    begun = {point.name for point in points if point.records()}
    if not begun:
        raise UserError(
            f'--out={out} holds no run of the experiment: start it with `upcycle sweep`, or fix the folder.'
        )
    print(f'{len(begun)} of {len(points)} runs have begun.')
    for report in experiment.reports:
        groups = [
            {branch: names for branch, names in group.items() if begun.issuperset(names)} for group in report['groups']
        ]
        if groups := [group for group in groups if group]:
            write_comparison({**report, 'groups': groups}, {point.name: point.command for point in points}, out)


def write_comparison(report: Mapping[str, Any], commands: Mapping[str, str], out: str) -> None:
    """Writes and prints one comparison: its page, claims, the paper's numbers, and a table at several budgets.

    Args:
      report: one of an experiment's `reports`; see `grid`.
      commands: commands by the names of points.
      out: the sweep's folder.
    """
    from upcycle.report import budgets, claims, numbers
    from upcycle.report.compare import compare_seeds
    from upcycle.report.html import write_report
    from upcycle.report.plots.ends import Final, final_plot

    folder = pathlib.Path(out, 'report', report.get('name', ''))
    seeds = _runs_of(report, out)
    curves = report.get('curves')
    groups = [{name: run for name, run in runs.items() if curves is None or name in curves} for runs in seeds]
    finals = [
        final_plot(Final(**final), seeds, f'ends_{number + 1}') for number, final in enumerate(report.get('finals', ()))
    ]
    verdicts = [claims.judge(claims.Claim(**claim), seeds) for claim in report.get('claims', ())]
    texts, tables = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    if verdicts:
        texts['claims'] = claims.as_markdown(verdicts)
        claims.write_csv(verdicts, folder / 'claims.csv')
    if report.get('numbers'):
        paper = numbers.Numbers(**report['numbers'])
        ends = numbers.ends(paper, seeds)
        texts['numbers'] = numbers.as_markdown(paper, ends)
        tables["Compared with the paper's numbers"] = numbers.as_table(paper, ends)
        numbers.write_csv(ends, folder / 'numbers.csv')
    if base := report.get('base'):
        rows = budgets.at_budgets(compare_seeds(groups), base)
        texts['budgets'] = budgets.as_markdown(rows, base)
        finals += [budgets.as_plot(rows, base)] if rows else []
    first = {name: commands[name] for names in report['groups'][0].values() for name in names}
    notes = {'seeds': str(len(groups)), **first}
    page = write_report(groups, folder, report['title'], notes, verdicts, finals, tables)
    for name, text in texts.items():
        (folder / f'{name}.md').write_text(text, encoding='utf-8')
        print(text)
    print(f'report: {page}')


def _runs_of(report: Mapping[str, Any], out: str) -> list[dict[str, Run]]:
    """Returns the runs by branch, one mapping per seed. The points of a branch are chained in order."""
    roles = {branch: Role(role) for branch, role in report.get('roles', {}).items()}

    def run(branch: str, names: Sequence[str]) -> Run:
        role = roles.get(branch, Role.UPCYCLED)
        return chain([load_run(os.path.join(out, name), role, branch) for name in names])

    return [{branch: run(branch, names) for branch, names in group.items()} for group in report['groups']]


def write_means(prefix: str, entries: list[conduct.Entry], out: str) -> None:
    """Prints the means over all points, which are seeds of one run, and writes them to `means.json`."""
    samples = conduct.samples_of(entries, prefix)
    for name, sample in samples.items():
        print(f'{name}: {sample.text(".4f")}, mean of {len(entries)} runs')
    path = pathlib.Path(out, 'means.json')
    shown = {name: {'mean': sample.mean, 'half_width': sample.half_width} for name, sample in samples.items()}
    path.write_text(json.dumps(shown, indent=1), 'utf-8')
    print(f'means: {path}')
