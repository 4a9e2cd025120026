"""Carries a grid out: starts what is missing, in order, shows how far it is, and picks the best point at the end."""

import contextlib
import dataclasses
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.live import Live
from rich.table import Table

from upcycle import configuration, cost, tables
from upcycle.checkpoints import open_checkpoints
from upcycle.errors import MissingData, UserError, mistakes_of, refuse, writing_to
from upcycle.metrics import clock
from upcycle.report.compare import half_width
from upcycle.sweep.launchers import Job, Launcher
from upcycle.sweep.points import Point, Progress, Status, progress_of
from upcycle.train.run import Run

# How often the run folders are looked at, in seconds.
PERIOD = 1.0
COLUMNS = ('validation/loss', 'validation/accuracy')


@dataclasses.dataclass
class Entry:
    """A point and where it stands.

    Attributes:
      point: what to run.
      total_steps: at which it ends.
      start_step: at which it will begin, where that is known before it has.
      step_flops: of one of its steps.
      status: see `Status`.
      progress: by its log.
      overhead: seconds of it that were not spent on steps: starting, compiling, evaluating, saving; None before it has ended.
      reason: why it failed.
    """

    point: Point
    total_steps: int
    start_step: int
    step_flops: float
    status: Status = Status.WAITING
    progress: Progress = dataclasses.field(default_factory=Progress)
    overhead: float | None = None
    reason: str = ''

    def look(self) -> None:
        """Reads its log again."""
        self.progress = progress_of(self.point.records())

    @property
    def flops_left(self) -> float:
        """FLOPs until its end."""
        if self.status is Status.FINISHED:
            return 0.0
        return max(self.total_steps - max(self.progress.step, self.start_step), 0) * self.step_flops


def check(points: Sequence[Point], *, here: bool = True) -> list[Entry]:
    """Builds every point, so that what is wrong with one is known before any is started.

    Args:
      points: in an order in which each comes after those it needs.
      here: they will be run from here, so that their checkpoints are looked at and their data must be there.

    Raises:
      UserError: a point's configuration, folder or checkpoint does not fit; it names the point.
      UserErrors: several do not.
    """
    entries: dict[str, Entry] = {}
    elsewhere: set[str] = set()
    seen: dict[tuple[str, ...], int] = {}
    mistakes: list[str] = []
    for point in points:
        if not set(point.after) <= entries.keys() | elsewhere:
            continue  # what it comes after has a mistake
        try:
            run = configuration.as_it_began(configuration.load(point.gin_files, point.bindings))
            configuration.claim(run, configuration.resolved(), write=False)
            finished = point.finished(run.total_steps)
            start = 0 if finished or not here else _start(run, point, entries, seen)
        except UserError as error:
            if isinstance(error, MissingData) and not here:
                elsewhere.add(point.name)
                continue
            mistakes += [f'{point.name}: {mistake}' for mistake in mistakes_of(error)]
            continue
        flops = cost.step_flops(run.model, run.train_data.batch_spec())
        entry = Entry(point, run.total_steps, start, flops, Status.FINISHED if finished else Status.WAITING)
        entry.look()
        entries[point.name] = entry
    refuse(mistakes)
    return list(entries.values())


def _start(run: Run, point: Point, entries: Mapping[str, Entry], seen: dict[tuple[str, ...], int]) -> int:
    """The step at which a run begins; of several checkpoints, the largest."""
    path = run.initial_checkpoint_path
    if path is None:
        return 0
    if point.after:
        step = entries[point.after[0]].total_steps
    else:
        paths = (path,) if isinstance(path, str) else tuple(path)
        if paths not in seen:
            seen[paths] = open_checkpoints(path).step or 0
        step = seen[paths]
    return step if run.dense_step is None else run.dense_step


@contextlib.contextmanager
def lock(out: str) -> Iterator[int]:
    """Holds a sweep's folder; yields the descriptor that the lock is on.

    Raises:
      UserError: another sweep, or a run that one left behind, holds it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing_to(out, 'name another --out'))
        os.makedirs(out, exist_ok=True)
        file = stack.enter_context(open(os.path.join(out, 'sweep.lock'), 'w', encoding='utf-8'))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f'--out={out}: another sweep, or a run that it left behind, is at work there: wait for its end, or name '
                'another folder.'
            ) from None
        yield file.fileno()


def conduct(entries: list[Entry], out: str, launcher: Launcher, show: Callable[[list[Entry]], None]) -> None:
    """Runs every point that is not finished; returns when none can be started any more.

    Interrupted, it ends the runs that are going on; the next call goes on from their last checkpoints.

    Args:
      entries: from `check`; their states change.
      out: the sweep's folder.
      launcher: starts runs.
      show: called about every `PERIOD` seconds, and when a state has changed.
    """
    jobs: dict[str, Job] = {}
    by_name = {entry.point.name: entry for entry in entries}
    began: dict[str, tuple[float, float]] = {}

    def start_ready() -> None:
        ready = []
        for entry in entries:
            states = {by_name[name].status for name in entry.point.after}
            if entry.status is not Status.WAITING:
                continue
            if states & {Status.FAILED, Status.BLOCKED}:
                entry.status = Status.BLOCKED
            elif states <= {Status.FINISHED} and len(jobs) + len(ready) < launcher.slots:
                ready.append(entry)
        if not ready:
            return
        commands = [(entry.point.arguments, log_of(out, entry.point.name)) for entry in ready]
        for entry, job in zip(ready, launcher.start_all(commands), strict=True):
            jobs[entry.point.name] = job
            began[entry.point.name] = time.monotonic(), entry.progress.seconds
            entry.status = Status.RUNNING

    def look() -> None:
        for name, job in list(jobs.items()):
            entry, code = by_name[name], job.poll()
            entry.look()
            if code is None:
                continue
            del jobs[name]
            since, seconds = began[name]
            entry.overhead = time.monotonic() - since - (entry.progress.seconds - seconds)
            if code == 0 and entry.point.finished(entry.total_steps):
                entry.status = Status.FINISHED
            else:
                entry.status = Status.FAILED
                entry.reason = reason_of(log_of(out, name), code)

    try:
        start_ready()
        while jobs:
            show(entries)
            time.sleep(PERIOD)
            look()
            start_ready()
        show(entries)
    finally:
        for job in jobs.values():
            job.stop()


def run_to_end(launcher: Launcher, arguments: Sequence[str], log: str) -> int:
    """One command; its exit status."""
    job = launcher.start(arguments, log)
    try:
        while (code := job.poll()) is None:
            time.sleep(PERIOD)
        return code
    finally:
        job.stop()


def log_of(out: str, name: str) -> str:
    """The file of what a point printed, apart from its run folder, which a run may refuse to make."""
    return os.path.join(out, 'logs', f'{name}.txt')


def reason_of(log: str, code: int) -> str:
    """Why a command failed: its own sentence, or the last line it printed."""
    lines = []
    if os.path.exists(log):
        with open(log, encoding='utf-8', errors='replace') as file:
            lines = [line.strip() for line in file if line.strip()]
    own = [line for line in lines[-40:] if line.startswith('upcycle: ')]
    return (own or lines or [f'exit status {code}'])[-1].removeprefix('upcycle: ')


def seconds_left(entries: Sequence[Entry], slots: int = 1) -> float | None:
    """Of runs so many at once, by the FLOPs and seconds in the logs, and what runs took beside; None before there are any."""
    seconds = sum(entry.progress.seconds for entry in entries)
    flops = sum(entry.progress.flops for entry in entries)
    if not seconds or not flops:
        return None
    waiting = [entry for entry in entries if entry.status is Status.WAITING]
    running = [entry for entry in entries if entry.status is Status.RUNNING]
    beside = [entry.overhead for entry in entries if entry.overhead is not None and entry.status is Status.FINISHED]
    steps = sum(entry.flops_left for entry in waiting + running) * seconds / flops
    work = steps + (len(waiting) * sum(beside) / len(beside) if beside else 0.0)
    return work / max(min(slots, len(waiting) + len(running)), 1)


def best_of(entries: Sequence[Entry], select: Mapping[str, str]) -> tuple[Entry, float]:
    """The finished point with the best value of a metric.

    Raises:
      UserError: no finished point has logged it.
    """
    metric = select['metric']
    having = [
        entry
        for entry in entries
        if entry.status is Status.FINISHED
        and entry.point.name.startswith(select.get('among', ''))
        and metric in entry.progress.metrics
    ]
    if not having:
        raise UserError(f'no finished run has logged {metric}, by which the best is chosen.')
    choose = {'max': max, 'min': min}[select['best']]
    best = choose(having, key=lambda entry: entry.progress.metrics[metric])
    return best, best.progress.metrics[metric]


def means_of(entries: Sequence[Entry], prefix: str) -> dict[str, tuple[float, float | None]]:
    """(mean, half of its 95% interval) over the points, of each metric with such a name that all of them have logged last."""
    having = set.intersection(*({*entry.progress.metrics} for entry in entries))
    values = {name: [entry.progress.metrics[name] for entry in entries] for name in having if name.startswith(prefix)}
    return {name: (statistics.fmean(found), half_width(found)) for name, found in sorted(values.items())}


def table_of(entries: Sequence[Entry], slots: int = 1) -> Table:
    """The grid: a line a point. `slots` run at once."""
    counts = {status: sum(entry.status is status for entry in entries) for status in Status}
    title = ', '.join(f'{count} {status}' for status, count in counts.items() if count)
    left = seconds_left(entries, slots)
    if left and counts[Status.FINISHED] != len(entries):
        title += f'; {clock(left)} left'
    logged = {name for entry in entries for name in entry.progress.metrics}
    few_shot = sorted(name for name in logged if name.startswith('few_shot/') and name.endswith('shot'))
    columns = [*COLUMNS, *few_shot, *sorted(logged & {'tasks/average'})]
    table = tables.table('point', 'status', 'step', *columns, title=title, title_justify='left')
    for entry in entries:
        values = [entry.progress.metrics.get(name) for name in columns]
        table.add_row(
            entry.point.name,
            entry.status,
            f'{entry.progress.step}/{entry.total_steps}',
            *('' if value is None else f'{value:.4f}' for value in values),
        )
    return table


class Board:
    """Shows a grid: in place on a terminal; elsewhere a line for every change of a state, and one a minute.

    Args:
      slots: runs at once.
    """

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self._console = tables.console(200)
        self._live: Live | None = None
        self._entries: Sequence[Entry] = ()
        self._shown: dict[str, Status] = {}
        self._last = time.monotonic()

    def __enter__(self) -> 'Board':
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)
        elif self._entries:
            self._console.print(table_of(self._entries, self._slots))

    def show(self, entries: Sequence[Entry]) -> None:
        """Prints where the grid is."""
        self._entries = entries
        if self._live is not None:
            self._live.update(table_of(entries, self._slots), refresh=True)
            return
        for entry in entries:
            if entry.status is not self._shown.get(entry.point.name, Status.WAITING):
                self._shown[entry.point.name] = entry.status
                self._line(entry, entries)
        if time.monotonic() - self._last > 60:
            for entry in entries:
                if entry.status is Status.RUNNING:
                    self._line(entry, entries)

    def _line(self, entry: Entry, entries: Sequence[Entry]) -> None:
        self._last = time.monotonic()
        done = sum(e.status is Status.FINISHED for e in entries)
        left = seconds_left(entries, self._slots)
        values = [f'{name} {entry.progress.metrics[name]:.4f}' for name in COLUMNS if name in entry.progress.metrics]
        parts = [
            f'{entry.point.name}: {entry.status}',
            f'step {entry.progress.step}/{entry.total_steps}',
            *values,
            f'{done}/{len(entries)} finished',
            *([] if left is None else [f'{clock(left)} left']),
            *([entry.reason] if entry.reason else []),
        ]
        print('  '.join(parts), flush=True)


def record(points: Sequence[Point], out: str, facts: Mapping[str, Any]) -> None:
    """Writes `sweep.json`: what the grid is, for reports."""
    shown = [
        {
            'name': point.name,
            'gin_files': list(point.gin_files),
            'bindings': dict(point.bindings),
            'after': list(point.after),
            'settings': dict(point.settings),
            'command': point.command,
        }
        for point in points
    ]
    path = os.path.join(out, 'sweep.json')
    with open(path + '.new', 'w', encoding='utf-8') as file:
        json.dump({**facts, 'points': shown}, file, indent=1)
    os.replace(path + '.new', path)
