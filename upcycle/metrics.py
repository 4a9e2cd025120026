"""What a run writes about itself: `metrics.jsonl`, TensorBoard events, and a progress line."""

import contextlib
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from upcycle import files

Batch = TypeVar('Batch')
# Seconds: a bucket takes whole objects only, so that each copy sends all that the run has logged.
COPY_PERIOD = 60.0


class MetricsLog:
    """Appends to `MODEL_DIR/metrics.jsonl`, one object a line, and to TensorBoard event files beside it.

    Args:
      model_dir: the run's folder.
      last_step: lines after this step are dropped: they came from a leg of the run that was cut off and is now repeated.
      only_training_at_it: of that step itself keep lines of training only: the rest is about to be written again.
    """

    def __init__(self, model_dir: str, last_step: int | None, *, only_training_at_it: bool = False):
        self._mirror = files.Mirror(model_dir)
        path = self._mirror.path / 'metrics.jsonl'
        earlier = [] if last_step is None else read_metrics(files.absolute(model_dir) / 'metrics.jsonl')
        kept = [line for line in earlier if line['step'] <= last_step]
        if only_training_at_it:
            kept = [line for line in kept if line['step'] < last_step or line['split'] == 'train']
        files.replace_text(path, ''.join(json.dumps(line) + '\n' for line in kept))
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as the run
        self._events: dict[str, EventFile] = {}
        self._copied = time.monotonic()

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """One line, on disk when this returns (of a bucket: within a minute); lists, such as the load of each expert, go into the
        line only."""
        line = {'step': step, 'split': split} | {name: plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()
        if split not in self._events:
            self._events[split] = EventFile(self._mirror.path / split)
        scalars = {name: value for name, value in line.items() if isinstance(value, int | float) and name != 'step'}
        self._events[split].write(step, scalars)
        if time.monotonic() - self._copied > COPY_PERIOD:
            self.copy()

    def copy(self) -> None:
        """Where the run's folder is in a bucket, sends there what has been written."""
        self._mirror.copy()
        self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes every file."""
        # The last that is entered is closed first, and all are, even where one cannot write what it still holds.
        with contextlib.ExitStack() as closing:
            closing.callback(self._mirror.close)
            for events in self._events.values():
                closing.callback(events.close)
            closing.callback(self._file.close)


class EventFile:
    """Scalars for TensorBoard, by its own library: TensorFlow's writers would cost every run seconds of imports.

    Args:
      folder: where a new event file is made.
    """

    def __init__(self, folder: pathlib.Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # The name that TensorBoard looks for; unique to this writer.
        name = f'events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}'
        self._records = RecordWriter(open(folder / name, 'wb'))  # noqa: SIM115  open as long as the run
        self._write(self._event(wall_time=now, file_version='brain.Event:2'))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event with all scalars of a step, on disk when this returns."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; [] where there is none. A last line that was cut off is left out."""
    file = files.absolute(path)
    if not file.exists():
        return []
    lines = []
    for text in file.read_text(encoding='utf-8').splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plain(value: Any) -> Any:
    """JSON-able; a float keeps its shortest exact form."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    array = np.asarray(value)
    return array.tolist() if array.ndim else array.item()


class Progress:
    """A progress line on standard error: step, loss, rate, time left. In place on a terminal, a line each elsewhere."""

    def __init__(self, name: str, start_step: int, total_steps: int, *, quiet: bool = False):
        self._quiet = quiet
        self._name, self._first, self._total = name, start_step, total_steps
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints where the run is."""
        if self._quiet:
            return
        seconds = time.monotonic() - self._start
        done = step - self._first
        rate = done / seconds if seconds > 0 else 0.0
        left = (self._total - step) / rate if rate > 0 else 0.0
        values = '  '.join(f'{name} {value:.4f}' for name, value in metrics.items())
        text = f'{self._name}  step {step}/{self._total}  {values}  {rate:.2f} steps/s  {clock(left)} left'
        print(
            f'\r{text:<110}' if self._terminal else text,
            end='' if self._terminal else '\n',
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leaves the line as it is."""
        if self._terminal:
            print(file=sys.stderr)


def warn(text: str) -> None:
    """A line on standard error, below the progress line that may stand there."""
    start = '\n' if sys.stderr.isatty() else ''
    print(f'{start}warning: {text}', file=sys.stderr, flush=True)


def counted(batches: Iterable[Batch], name: str) -> Iterator[Batch]:
    """The batches, and every ten seconds a line on standard error that says how many there have been."""
    start = last = time.monotonic()
    for count, batch in enumerate(batches, 1):
        yield batch
        if (now := time.monotonic()) - last > 10:
            last = now
            print(f'{name}: {count} batches, {count / (now - start):.2f} batches/s', file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
