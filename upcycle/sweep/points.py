"""One run of a grid: its command, and its progress as read from its run folder."""

import dataclasses
import enum
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import files
from upcycle.checkpoints.orbax_item import is_finished
from upcycle.metrics import read_metrics


class Status(enum.StrEnum):
    """The state of a point."""

    WAITING = 'waiting'
    RUNNING = 'running'
    FINISHED = 'finished'
    FAILED = 'failed'
    BLOCKED = 'blocked'  # needs a point that failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One training run of an experiment.

    Attributes:
      name: unique in its grid; also the name of its folder.
      gin_files: the --gin_file options of `upcycle train`.
      bindings: the --gin.NAME=VALUE options, including MODEL_DIR and TRAIN_STEPS.
      after: names of the points that must be finished first, such as the dense run.
      settings: coordinates in the grid, for tables and axes.
    """

    name: str
    gin_files: tuple[str, ...]
    bindings: Mapping[str, str]
    after: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model_dir(self) -> str:
        """The run folder."""
        return self.bindings['MODEL_DIR']

    @property
    def arguments(self) -> list[str]:
        """Arguments of the console script."""
        files = [f'--gin_file={file}' for file in self.gin_files]
        return ['train', *files, *(f'--gin.{name}={value}' for name, value in self.bindings.items())]

    @property
    def command(self) -> str:
        """The `upcycle train` command, quoted for a shell."""
        return shlex.join(['upcycle', *self.arguments])

    def records(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`; empty if the run has not begun."""
        return read_metrics(os.path.join(self.model_dir, 'metrics.jsonl'))

    def finished(self, total_steps: int) -> bool:
        """Returns whether the last checkpoint exists; it is written after everything else."""
        folder = files.absolute(self.model_dir) / 'checkpoints' / str(total_steps)
        return folder.is_dir() and is_finished(folder)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, as logged.

    Attributes:
      step: step of the last line.
      start_step: step at which the run began.
      seconds, flops: spent on training steps.
      metrics: the last value of every number, by 'split/name'; without the split 'train'.
    """

    step: int = 0
    start_step: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def progress_of(records: Sequence[Mapping[str, Any]]) -> Progress:
    """Summarizes the lines of a run's log."""
    if not records:
        return Progress()
    metrics = {
        f'{record["split"]}/{name}': value
        for record in records
        if record['split'] != 'train'
        for name, value in record.items()
        if isinstance(value, int | float) and name != 'step'
    }
    last = records[-1]
    return Progress(last['step'], *(last.get(name, 0) for name in ('start_step', 'seconds', 'flops')), metrics)
