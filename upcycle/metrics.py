"""The log of a run: `metrics.jsonl`, whose lines its metric writers get, too."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from upcycle import files, metric_writers
from upcycle.errors import UserError
from upcycle.log_lines import PADDING, lines_of, parse_line, what_is_wrong
from upcycle.warning import warn

# Seconds between copies to a bucket. Each copy sends the whole log, because objects in a bucket cannot be appended to. The period
# doubles, up to the longest, while the bucket does not accept copies.
COPY_PERIOD = 60.0
LONGEST_COPY_PERIOD = 960.0
# Lines that a resumed run removes from the log.
SET_ASIDE = 'metrics.set_aside.jsonl'


class MetricsLog:
    """Appends to `MODEL_DIR/metrics.jsonl`, one object a line, and passes each line to metric writers.

    No line is lost: earlier lines that are removed from the log are appended to `SET_ASIDE`, byte for byte.

    Args:
      model_dir: the run's folder.
      last_step: the step that the run resumes at: lines after it are removed, because the run repeats those steps. None: all
        lines are removed, because the run begins.
      writers: names of the metric writers.
      only_training_at_it: of the lines at `last_step`, keep only those of training; the others are written again.

    Raises:
      UserError: the log exists and is not a file, or a writer cannot be opened.
    """

    def __init__(
        self,
        model_dir: str,
        last_step: int | None,
        writers: Sequence[str] = metric_writers.TENSORBOARD,
        *,
        only_training_at_it: bool = False,
    ):
        def is_kept(record: Mapping[str, Any]) -> bool:
            if last_step is None or record['step'] > last_step:
                return False
            return not only_training_at_it or record['step'] < last_step or record['split'] == 'train'

        self._mirror = files.Mirror(model_dir)
        path = self._mirror.path / 'metrics.jsonl'
        earlier = files.absolute(model_dir) / 'metrics.jsonl'
        kept, others, damaged = [], [], []
        lines = _read(earlier)
        for number, line in enumerate(lines, 1):
            record = parse_line(line)
            is_whole = what_is_wrong(record) is None
            (kept if is_whole and is_kept(record) else others).append(line)
            # A kill can cut off the last line; other damage is not ours.
            if not is_whole and line.strip() and number < len(lines):
                damaged.append(number)
        self._set_aside(others, files.absolute(model_dir) / SET_ASIDE)
        if damaged:
            which = ', '.join(map(str, damaged[:10])) + ' and others' * (len(damaged) > 10)
            warn(
                f'{earlier}, line {which}: not a line of a metrics log (a JSON object with step and split). It was moved to '
                f'{SET_ASIDE}; all other lines are kept.'
            )
        if last_step is not None and not earlier.exists():
            warn(f'{earlier} is missing: the log begins after step {last_step}.')
        files.replace_text(path, ''.join(line.decode('utf-8-sig').strip(PADDING) + '\n' for line in kept))
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as the run
        place = metric_writers.Place(self._mirror.path, self._mirror.target)
        self._writers = [metric_writers.WRITERS[name](place) for name in writers]
        self._copied = time.monotonic()
        self._period = COPY_PERIOD

    def _set_aside(self, lines: Sequence[bytes], earlier: epath.Path) -> None:
        """Appends lines to `SET_ASIDE` and waits until they are on disk."""
        if not any(line.strip() for line in lines):
            return
        path = self._mirror.path / SET_ASIDE
        if files.is_remote(earlier) and earlier.exists():
            path.write_bytes(earlier.read_bytes())
        with open(path, 'ab') as file:
            file.writelines(line + b'\n' for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self._mirror.copy()

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Appends one line, which is on disk when this returns (in a bucket: within a minute).

        Lists, such as the load of each expert, are not passed to the metric writers.
        """
        line = {'step': step, 'split': split} | {name: plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line) + '\n')
        self._file.flush()
        scalars = {name: value for name, value in line.items() if isinstance(value, int | float) and name != 'step'}
        for writer in self._writers:
            writer.write(step, split, scalars)
        if time.monotonic() - self._copied > self._period:
            self.copy()

    def copy(self) -> None:
        """Sends the log to the bucket, if the run's folder is in one.

        Warns if the bucket does not accept it; the next copy tries again.
        """
        try:
            with files.asking_once():
                self._mirror.copy()
            self._period = COPY_PERIOD
        except Exception as error:
            refusal = files.refused_by_bucket(error, [str(self._mirror.target)])
            if refusal is None:
                raise
            self._period = min(2 * self._period, LONGEST_COPY_PERIOD)
            warn(f'the log stays in {self._mirror.path} and is sent later: {refusal}')
        self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes all files, and sends them to the bucket.

        Raises:
          Unavailable, UserError: the bucket does not accept them; they stay on this machine, see `files.Mirror`.
        """
        # The stack closes all of them, in reverse order, even if one cannot write its buffer.
        with contextlib.ExitStack() as closing:
            closing.callback(self._mirror.close)
            for writer in self._writers:
                closing.callback(writer.close)
            closing.callback(self._file.close)

    def __enter__(self) -> 'MetricsLog':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as refusal:
            if kind is None:
                raise
            # The error that ended the run decides the exit status.
            warn(str(refusal))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`, without cut-off and damaged ones; [] if the file does not exist.

    Raises:
      UserError: the path is not a file.
    """
    records = map(parse_line, _read(files.absolute(path)))
    return [record for record in records if what_is_wrong(record) is None]


def _read(file: epath.Path) -> list[bytes]:
    """Reads the raw lines of a log, including a last one that was cut off; [] if there is no log."""
    if not file.exists():
        return []
    if not file.is_file():
        raise UserError(f'{file} is not a file, but the log of a run is written there: move it away.')
    return lines_of(file.read_bytes().removesuffix(b'\n'))


def plain(value: Any) -> Any:
    """Converts a value to JSON types; a float keeps its shortest exact form."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]  # rows of different lengths do not form an array
    array = np.asarray(value)
    return array.tolist() if array.ndim else array.item()
