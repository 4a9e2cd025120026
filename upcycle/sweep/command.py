"""`upcycle sweep`: runs or prints the grid that the command line describes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import files, outputs
from upcycle.errors import UserError
from upcycle.sweep import conduct, grid, launchers
from upcycle.sweep.board import Board
from upcycle.sweep.launchers import Launcher
from upcycle.sweep.points import Status
from upcycle.sweep.programs import PRINT, compile_all
from upcycle.sweep.reports import write_comparison, write_means


def sweep(
    *,
    config: str | None,
    scale: str | None,
    gin_files: Sequence[str],
    axes: Sequence[str],
    bindings: Mapping[str, str],
    launcher_name: str,
    jobs: int,
    cluster: Mapping[str, Any],
    out: str | None,
    environment: Mapping[str, str],
    only: str | None = None,
) -> int:
    """Runs the unfinished points of a grid.

    Args:
      config: a file of `configs/`; None: the grid is `axes` over `gin_files`.
      scale: passed to the config; None: the config's default.
      gin_files: with a config, included before the gin files of its points.
      axes: the --grid options.
      bindings: bindings of every point.
      launcher_name: a name in `LAUNCHERS`, or 'print'.
      jobs: number of runs at once; programs are always compiled one by one.
      cluster: options of the launcher, if it takes any.
      out: the sweep's folder; None: runs/NAME. If it is in a bucket, it holds only the run folders; the other files are
        written to runs/NAME.
      environment: environment variables of the runs.
      only: a pattern of names, such as 'language_xl/*': run only these points and the points they start from, without a report.

    Returns:
      0 if every point is finished, 1 if one failed.

    Raises:
      UserError: a point is wrong; raised before anything is started.
    """
    if (config is None) == (not axes):
        raise UserError('name either an experiment with --config, or axes with --grid NAME=a,b,c, but not both.')
    if jobs < 1:
        raise UserError(f'--jobs={jobs} must be at least 1.')
    if scale is not None and config is None:
        raise UserError(f'--scale={scale} needs --config: a grid has no scales.')
    experiment = grid.load(config, scale) if config is not None else grid.from_command_line(gin_files, axes)
    if only is not None and experiment.get('compile'):
        raise UserError('--only selects runs, and the compiled scale has none: remove --only.')
    out = os.path.join('runs', experiment.name) if out is None else out
    if launcher_name != PRINT:
        outputs.check('--out', out, outputs.Kind.FOLDER, local=bool(experiment.get('compile')))
    if experiment.get('compile'):
        return compile_all(experiment, out, launcher_name, environment, cluster, gin_files, bindings)
    every = grid.resolve(experiment, out, gin_files if config is not None else (), bindings)
    points = every if only is None else grid.only(every, only)
    if launcher_name == PRINT:
        conduct.check(points, here=False)
        for point in points:
            print(point.command)
        return 0
    entries = conduct.check(points)
    # Only run folders may be in a bucket.
    out = os.path.join('runs', experiment.name) if files.is_remote(out) else out
    # Seeds of one setting share a compiled program.
    environment = {'JAX_COMPILATION_CACHE_DIR': os.path.abspath(os.path.join(out, 'programs')), **environment}
    with conduct.lock(out) as held:
        conduct.record(points, out, {'name': experiment.name, 'config': config, 'scale': scale})
        launcher = launchers.make(launcher_name, environment, held, jobs, cluster)
        if not _run(entries, out, launcher):
            return 1
        if len(points) < len(every):
            print(f'--only skipped {len(every) - len(points)} of {len(every)} runs: no report.')
            return 0
        return _conclude(experiment, entries, out, launcher)


def _run(entries: list[conduct.Entry], out: str, launcher: Launcher) -> bool:
    """Runs the unfinished points; returns whether all are finished now."""
    with Board(launcher.slots) as board:
        conduct.conduct(entries, out, launcher, board.show)
    for entry in entries:
        if entry.status is Status.FAILED:
            print(f'{entry.point.name} failed: {entry.reason} ({conduct.log_of(out, entry.point.name)})')
    if any(entry.status is not Status.FINISHED for entry in entries):
        print('repeat the command: it tries the unfinished runs again.')
        return False
    return True


def _conclude(experiment: ml_collections.ConfigDict, entries: list[conduct.Entry], out: str, launcher: Launcher) -> int:
    """Writes reports and means and chooses the best point of a finished grid; returns the exit status."""
    for report in experiment.get('reports', ()):
        write_comparison(report, {entry.point.name: entry.point.command for entry in entries}, out)
    if experiment.get('mean'):
        write_means(experiment.mean, entries, out)
    return _best(experiment, entries, out, launcher) if experiment.get('select') else 0


def _best(experiment: ml_collections.ConfigDict, entries: list[conduct.Entry], out: str, launcher: Launcher) -> int:
    """Prints the best point and evaluates it with the bindings of `test`; returns the exit status."""
    entry, value = conduct.best_of(entries, experiment.select)
    print(f'best by {experiment.select.metric}: {entry.point.name}, {value:.4f}')
    if not experiment.get('test'):
        return 0
    point = entry.point
    bindings = {**point.bindings, **{name: grid.text_of(v) for name, v in experiment.test.items()}}
    path = os.path.join(out, 'test.json')
    arguments = ['eval', f'--from={point.model_dir}', f'--out={path}']
    arguments += [f'--gin_file={file}' for file in point.gin_files]
    arguments += [f'--gin.{name}={value}' for name, value in bindings.items()]
    log = conduct.log_of(out, 'test')
    if code := conduct.run_to_end(launcher, arguments, log):
        print(f'its evaluation failed: {conduct.reason_of(log, code)} ({log})')
        return 1
    print(f'evaluated with {", ".join(f"{n}={v}" for n, v in experiment.test.items())}: {path}')
    return 0
