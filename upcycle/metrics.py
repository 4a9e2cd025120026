"""What a run writes about itself: `metrics.jsonl`, TensorBoard events, and a progress line."""

import json
import os
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
        from upcycle.data import tensorflow_quiet

        self._mirror = files.Mirror(model_dir)
        path = self._mirror.path / 'metrics.jsonl'
        earlier = [] if last_step is None else read_metrics(files.absolute(model_dir) / 'metrics.jsonl')
        kept = [line for line in earlier if line['step'] <= last_step]
        if only_training_at_it:
            kept = [line for line in kept if line['step'] < last_step or line['split'] == 'train']
        files.replace_text(path, ''.join(json.dumps(line) + '\n' for line in kept))
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as the run
        self._tf = tensorflow_quiet.tensorflow()
        self._writers: dict[str, Any] = {}
        self._copied = time.monotonic()

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """One line, on disk when this returns (of a bucket: within a minute); lists, such as the load of each expert, go into the
        line only."""
        line = {'step': step, 'split': split} | {name: plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()
        if split not in self._writers:
            self._writers[split] = self._tf.summary.create_file_writer(str(self._mirror.path / split))
        with self._writers[split].as_default(step=step):
            for name, value in line.items():
                if isinstance(value, int | float) and name != 'step':
                    self._tf.summary.scalar(name, value)
        if time.monotonic() - self._copied > COPY_PERIOD:
            self.copy()

    def copy(self) -> None:
        """Where the run's folder is in a bucket, sends there what has been written."""
        for writer in self._writers.values():
            writer.flush()
        self._mirror.copy()
        self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes every file."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()
        self._mirror.close()


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
