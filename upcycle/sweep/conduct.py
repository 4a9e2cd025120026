"""Runs a grid: starts the unfinished points in order, and picks the best one at the end."""

import contextlib
import dataclasses
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from upcycle import configuration, cost, run_config
from upcycle.checkpoints import open_checkpoints
from upcycle.errors import MissingData, UserError, mistakes_of, refuse, writing_to
from upcycle.report.sample import Sample
from upcycle.sweep.launchers import Job, Launcher
from upcycle.sweep.points import Point, Progress, Status, progress_of
from upcycle.training.run import Run

# Seconds between reads of the run folders.
PERIOD = 1.0


@dataclasses.dataclass
class Entry:
    """A point and its state.

    Attributes:
      point: the run.
      total_steps: its last step.
      start_step: its first step, if known before the run starts; else 0.
      step_flops: FLOPs of one step.
      status: see `Status`.
      progress: its progress, as logged.
      job: its job, while that runs.
      began: `time.monotonic()` at the start of the job, less the seconds of steps that were logged before.
      overhead: seconds spent on starting, compiling, evaluating and saving; None until the run has ended.
      reason: why it failed; empty if it did not.
    """

    point: Point
    total_steps: int
    start_step: int
    step_flops: float
    status: Status = Status.WAITING
    progress: Progress = dataclasses.field(default_factory=Progress)
    job: Job | None = None
    began: float = 0.0
    overhead: float | None = None
    reason: str = ''

    def look(self) -> None:
        """Reads the log again."""
        self.progress = progress_of(self.point.records())

    @property
    def flops_left(self) -> float:
        """FLOPs that remain."""
        if self.status is Status.FINISHED:
            return 0.0
        return max(self.total_steps - max(self.progress.step, self.start_step), 0) * self.step_flops


def check(points: Sequence[Point], *, here: bool = True) -> list[Entry]:
    """Builds every point, so that all mistakes are found before any point is started.

    Args:
      points: sorted so that each comes after the points it needs.
      here: whether they will run on this machine: then their checkpoints are read, and their data must exist.

    Raises:
      UserError: the configuration, folder or checkpoint of a point is wrong; the message names the point.
      UserErrors: several points are wrong.
    """
    entries: dict[str, Entry] = {}
    elsewhere: set[str] = set()
    seen: dict[tuple[str, ...], int] = {}
    mistakes: list[str] = []
    for point in points:
        if not set(point.after) <= entries.keys() | elsewhere:
            continue  # a point that it needs has a mistake
        try:
            entries[point.name] = _entry(point, entries, seen, here=here)
        except UserError as error:
            if isinstance(error, MissingData) and not here:
                elsewhere.add(point.name)
            else:
                mistakes += [f'{point.name}: {mistake}' for mistake in mistakes_of(error)]
    refuse(mistakes)
    return list(entries.values())


def _entry(point: Point, entries: Mapping[str, Entry], seen: dict[tuple[str, ...], int], *, here: bool) -> Entry:
    """Builds a point; see `check`. `seen` caches the steps of checkpoints by their paths."""
    run = run_config.as_it_began(configuration.load(point.gin_files, point.bindings))
    run_config.claim(run, configuration.resolved(), write=False)
    finished = point.finished(run.total_steps)
    start = 0 if finished or not here else _start(run, point, entries, seen)
    flops = cost.step_flops(run.model, run.train_data.batch_spec())
    entry = Entry(point, run.total_steps, start, flops, Status.FINISHED if finished else Status.WAITING)
    entry.look()
    return entry


def _start(run: Run, point: Point, entries: Mapping[str, Entry], seen: dict[tuple[str, ...], int]) -> int:
    """Returns the first step of a run: the largest step of its checkpoints."""
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
    """Locks a sweep's folder; yields the file descriptor that holds the lock.

    Raises:
      UserError: another sweep, or a run that it started, holds the lock.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing_to(out, 'name another --out'))
        os.makedirs(out, exist_ok=True)
        file = stack.enter_context(open(os.path.join(out, 'sweep.lock'), 'w', encoding='utf-8'))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f'--out={out} is in use by another sweep, or by a run that it started: wait until it ends, or name another '
                'folder.'
            ) from None
        yield file.fileno()


def conduct(entries: list[Entry], out: str, launcher: Launcher, show: Callable[[list[Entry]], None]) -> None:
    """Runs all unfinished points; returns when no more can be started.

    An interruption stops the runs in progress; the next call continues from their last checkpoints.

    Args:
      entries: from `check`; updated in place.
      out: the sweep's folder.
      launcher: starts the runs.
      show: called about every `PERIOD` seconds and after every change of a status.
    """
    try:
        _start_ready(entries, out, launcher)
        while any(entry.job for entry in entries):
            show(entries)
            time.sleep(PERIOD)
            for entry in entries:
                if entry.job is not None:
                    _follow(entry, entry.job, out)
            _start_ready(entries, out, launcher)
        show(entries)
    finally:
        for entry in entries:
            if entry.job is not None:
                entry.job.stop()


def _start_ready(entries: list[Entry], out: str, launcher: Launcher) -> None:
    """Starts waiting points whose predecessors are finished, as far as the launcher has free slots."""
    by_name = {entry.point.name: entry for entry in entries}
    free = launcher.slots - sum(entry.job is not None for entry in entries)
    ready = []
    for entry in entries:
        if entry.status is not Status.WAITING:
            continue
        states = {by_name[name].status for name in entry.point.after}
        if states & {Status.FAILED, Status.BLOCKED}:
            entry.status = Status.BLOCKED
        elif states <= {Status.FINISHED} and len(ready) < free:
            ready.append(entry)
    if not ready:
        return
    commands = [(entry.point.arguments, log_of(out, entry.point.name)) for entry in ready]
    for entry, job in zip(ready, launcher.start_all(commands), strict=True):
        entry.job, entry.status = job, Status.RUNNING
        entry.began = time.monotonic() - entry.progress.seconds


def _follow(entry: Entry, job: Job, out: str) -> None:
    """Reads the log of a running point again, and removes its job if that has ended."""
    code = job.poll()
    entry.look()
    if code is None:
        return
    entry.job, entry.overhead = None, time.monotonic() - entry.began - entry.progress.seconds
    if code == 0 and entry.point.finished(entry.total_steps):
        entry.status = Status.FINISHED
    else:
        entry.status = Status.FAILED
        entry.reason = reason_of(log_of(out, entry.point.name), code)


def run_to_end(launcher: Launcher, arguments: Sequence[str], log: str) -> int:
    """Runs one command; returns its exit status."""
    job = launcher.start(arguments, log)
    try:
        while (code := job.poll()) is None:
            time.sleep(PERIOD)
        return code
    finally:
        job.stop()


def log_of(out: str, name: str) -> str:
    """Returns the file for the output of a point, outside its run folder: the run may fail before it makes that folder."""
    return os.path.join(out, 'logs', f'{name}.txt')


def reason_of(log: str, code: int) -> str:
    """Returns why a command failed: its error message, or else the last line it printed."""
    lines = []
    if os.path.exists(log):
        with open(log, encoding='utf-8', errors='replace') as file:
            lines = [line.strip() for line in file if line.strip()]
    own = [line for line in lines[-40:] if line.startswith('upcycle: ')]
    return (own or lines or [f'exit status {code}'])[-1].removeprefix('upcycle: ')


def seconds_left(entries: Sequence[Entry], slots: int = 1) -> float | None:
    """Estimates the seconds until a grid ends; None before any run has logged.

    Assumes the FLOPs per second logged so far, and for each waiting run the mean overhead of the finished ones.

    Args:
      entries: all points of the grid.
      slots: number of runs at once.
    """
    seconds = sum(entry.progress.seconds for entry in entries)
    flops = sum(entry.progress.flops for entry in entries)
    if not seconds or not flops:
        return None
    waiting = [entry for entry in entries if entry.status is Status.WAITING]
    running = [entry for entry in entries if entry.status is Status.RUNNING]
    overheads = [entry.overhead for entry in entries if entry.overhead is not None and entry.status is Status.FINISHED]
    steps = sum(entry.flops_left for entry in waiting + running) * seconds / flops
    work = steps + (len(waiting) * statistics.fmean(overheads) if overheads else 0.0)
    return work / max(min(slots, len(waiting) + len(running)), 1)


def best_of(entries: Sequence[Entry], select: Mapping[str, str]) -> tuple[Entry, float]:
    """Returns the finished point with the best value of a metric, and that value.

    Raises:
      UserError: no finished point has logged it.
    """
    metric = select['metric']
    candidates = [
        entry
        for entry in entries
        if entry.status is Status.FINISHED
        and entry.point.name.startswith(select.get('among', ''))
        and metric in entry.progress.metrics
    ]
    if not candidates:
        raise UserError(
            f'no finished run has logged {metric}, which `select` needs: fix the name of the metric, or log it.'
        )
    choose = {'max': max, 'min': min}[select['best']]
    best = choose(candidates, key=lambda entry: entry.progress.metrics[metric])
    return best, best.progress.metrics[metric]


def samples_of(entries: Sequence[Entry], prefix: str) -> dict[str, Sample]:
    """Returns the values of each metric with this prefix that all points have logged."""
    common = set.intersection(*({*entry.progress.metrics} for entry in entries))
    names = sorted(name for name in common if name.startswith(prefix))
    return {name: Sample(values=tuple(entry.progress.metrics[name] for entry in entries)) for name in names}


def record(points: Sequence[Point], out: str, facts: Mapping[str, Any]) -> None:
    """Writes `sweep.json`: the grid, for reports."""
    shown = [{**dataclasses.asdict(point), 'command': point.command} for point in points]
    path = os.path.join(out, 'sweep.json')
    with open(path + '.new', 'w', encoding='utf-8') as file:
        json.dump({**facts, 'points': shown}, file, indent=1)
    os.replace(path + '.new', path)
