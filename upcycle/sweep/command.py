"""`upcycle sweep`: from the command line's options to a grid that is carried out or printed."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import files, outputs
from upcycle.errors import UserError
from upcycle.sweep import conduct, grid, launchers
from upcycle.sweep.launchers import Launcher
from upcycle.sweep.points import Status
from upcycle.sweep.programs import PRINT, compile_all


def sweep(
    *,
    config: str | None,
    scale: str | None,
    gin_files: Sequence[str],
    axes: Sequence[str],
    bindings: Mapping[str, str],
    where: str,
    jobs: int,
    cluster: Mapping[str, Any],
    out: str | None,
    environment: Mapping[str, str],
    only: str | None = None,
) -> int:
    """Carries out what is missing of a grid.

    Args:
      config: a file of `configs/`; None: the grid is `axes` over `gin_files`.
      scale: handed to the config; None: its own default.
      gin_files: with a config, put before those of its points.
      axes: of `--grid`.
      bindings: of every point.
      where: a name in `LAUNCHERS`, or 'print'.
      jobs: runs at once; programs are compiled one after the other.
      cluster: options of a launcher that takes some.
      out: the sweep's folder; None: runs/NAME. In a bucket there are the runs alone, and the rest in runs/NAME.
      environment: of the runs.
      only: a pattern of names, such as 'language_xl/*': these points and what they start from, and no report.

    Returns:
      0 when every point is finished, 1 when one failed.

    Raises:
      UserError: before anything is started, where a point does not fit.
    """
    if (config is None) == (not axes):
        raise UserError('name either an experiment with --config or axes with --grid NAME=a,b,c, and not both.')
    if jobs < 1:
        raise UserError(f'--jobs={jobs} must be at least 1.')
    if scale is not None and config is None:
        raise UserError(f"--scale={scale} is an experiment's: it goes with --config.")
    what = grid.load(config, scale) if config is not None else grid.from_command_line(gin_files, axes)
    if only is not None and what.get('compile'):
        raise UserError('--only chooses runs, and the compiled scale has programs: leave it out.')
    out = os.path.join('runs', what.name) if out is None else out
    if where != PRINT:
        outputs.check('--out', out, outputs.Kind.FOLDER, local=bool(what.get('compile')))
    if what.get('compile'):
        return compile_all(what, out, where, environment, cluster, gin_files, bindings)
    every = grid.resolve(what, out, gin_files if config is not None else (), bindings)
    points = every if only is None else grid.only(every, only)
    if where == PRINT:
        conduct.check(points, here=False)
        for point in points:
            print(point.command)
        return 0
    entries = conduct.check(points)
    # What a sweep writes about itself stays here; its runs may lie in a bucket.
    out = os.path.join('runs', what.name) if files.is_remote(out) else out
    # Seeds of one setting are one program.
    environment = {'JAX_COMPILATION_CACHE_DIR': os.path.abspath(os.path.join(out, 'programs')), **environment}
    with conduct.lock(out) as held:
        conduct.record(points, out, {'name': what.name, 'config': config, 'scale': scale})
        launcher = launchers.make(where, environment, held, jobs, cluster)
        with conduct.Board(launcher.slots) as board:
            conduct.conduct(entries, out, launcher, board.show)
        failed = [entry for entry in entries if entry.status is not Status.FINISHED]
        for entry in failed:
            if entry.status is Status.FAILED:
                print(f'{entry.point.name} failed: {entry.reason} ({conduct.log_of(out, entry.point.name)})')
        if failed:
            print('the same command tries again what is not finished.')
            return 1
        if len(points) < len(every):
            print(f'--only left out {len(every) - len(points)} of {len(every)} runs: no report.')
            return 0
        for report in what.get('reports', ()):
            _report(report, {entry.point.name: entry.point.command for entry in entries}, out)
        if what.get('mean'):
            _means(what.mean, entries, out)
        return _best(what, entries, out, launcher) if what.get('select') else 0


def report_experiment(*, config: str, scale: str | None, out: str | None) -> None:
    """`upcycle report --config`: writes an experiment's reports from the runs that there are, finished or not.

    Args:
      config: a file of `configs/`.
      scale: as the sweep's.
      out: the sweep's folder; None: runs/NAME.

    Raises:
      UserError: the experiment has no reports, or not a run of it has begun.
    """
    what = grid.load(config, scale)
    out = os.path.join('runs', what.name) if out is None else out
    if not what.get('reports'):
        raise UserError(f'--config={config}: this experiment has no report at this scale.')
    outputs.check('--out', out, outputs.Kind.FOLDER, local=True)
    points = grid.resolve(what, out)
    begun = {point.name for point in points if point.records()}
    if not begun:
        raise UserError(f'--out={out}: no run of the experiment has begun there; `upcycle sweep` begins them.')
    print(f'{len(begun)} of {len(points)} runs have begun.')
    for report in what.reports:
        groups = [
            {branch: names for branch, names in group.items() if begun.issuperset(names)} for group in report['groups']
        ]
        if groups := [group for group in groups if group]:
            _report({**report, 'groups': groups}, {point.name: point.command for point in points}, out)


def _report(report: Mapping[str, Any], commands: Mapping[str, str], out: str) -> None:
    """A comparison that the experiment is for: its page, its claims, and a table at several budgets."""
    from upcycle.report import budgets, claims, numbers, plots
    from upcycle.report.html import compare_seeds, write_report
    from upcycle.report.runs import Role, chain, load_run

    folder = pathlib.Path(out, 'report', report.get('name', ''))
    roles = {branch: Role(role) for branch, role in report.get('roles', {}).items()}
    seeds = [
        {
            branch: chain(
                [load_run(os.path.join(out, name), roles.get(branch, Role.UPCYCLED), branch) for name in names]
            )
            for branch, names in group.items()
        }
        for group in report['groups']
    ]
    curves = report.get('curves')
    groups = [{name: run for name, run in runs.items() if curves is None or name in curves} for runs in seeds]
    first = {name: commands[name] for names in report['groups'][0].values() for name in names}
    verdicts = [claims.judge(claims.Claim(**claim), seeds) for claim in report.get('claims', ())]
    finals = [
        plots.final_plot(plots.Final(**final), seeds, f'ends_{number + 1}')
        for number, final in enumerate(report.get('finals', ()))
    ]
    notes = {'seeds': str(len(groups)), **first}
    tables, beside = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    if verdicts:
        tables['claims'] = claims.as_markdown(verdicts)
        claims.write_csv(verdicts, folder / 'claims.csv')
    if report.get('numbers'):
        table = numbers.Numbers(**report['numbers'])
        found = numbers.ends(table, seeds)
        tables['numbers'] = numbers.as_markdown(table, found)
        beside["Beside the paper's numbers"] = numbers.as_table(table, found)
        numbers.write_csv(found, folder / 'numbers.csv')
    if base := report.get('base'):
        rows = budgets.at_budgets(compare_seeds(groups), base)
        tables['budgets'] = budgets.as_markdown(rows, base)
        finals += [budgets.as_plot(rows, base)] if rows else []
    page = write_report(groups, folder, report['title'], notes, verdicts, finals, beside)
    for name, table in tables.items():
        (folder / f'{name}.md').write_text(table, encoding='utf-8')
        print(table)
    print(f'report: {page}')


def _means(prefix: str, entries: list[conduct.Entry], out: str) -> None:
    """Prints and keeps the means over all points, which are seeds of one run."""
    means = conduct.means_of(entries, prefix)
    for name, (mean, half) in means.items():
        print(f'{name}: {mean:.4f}{"" if half is None else f" ± {half:.4f}"}, mean of {len(entries)} runs')
    path = os.path.join(out, 'means.json')
    with open(path, 'w', encoding='utf-8') as file:
        json.dump({name: {'mean': mean, 'half_width': half} for name, (mean, half) in means.items()}, file, indent=1)
    print(f'means: {path}')


def _best(what: ml_collections.ConfigDict, entries: list[conduct.Entry], out: str, launcher: Launcher) -> int:
    """Names the best point, and evaluates it on what did not choose it."""
    entry, value = conduct.best_of(entries, what.select)
    print(f'best by {what.select.metric}: {entry.point.name}, {value:.4f}')
    if not what.get('test'):
        return 0
    point = entry.point
    bindings = {**point.bindings, **{name: grid.text_of(v) for name, v in what.test.items()}}
    path = os.path.join(out, 'test.json')
    arguments = ['eval', f'--from={point.model_dir}', f'--out={path}']
    arguments += [f'--gin_file={file}' for file in point.gin_files]
    arguments += [f'--gin.{name}={value}' for name, value in bindings.items()]
    log = conduct.log_of(out, 'test')
    if code := conduct.run_to_end(launcher, arguments, log):
        print(f'its evaluation failed: {conduct.reason_of(log, code)} ({log})')
        return 1
    print(f'evaluated with {", ".join(f"{n}={v}" for n, v in what.test.items())}: {path}')
    return 0
