"""Progress of a long operation on standard error."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

Item = TypeVar('Item')


class Progress:
    """Shows the progress of an operation: a bar on a terminal, plain lines elsewhere. Only process 0 shows anything.

    Args:
      name: of the operation, the beginning of each line.
      unit: of the count, such as 'step'.
      total: the last count; None: unknown.
      first: the count when the operation begins.
      period: minimum seconds between two lines; the last count is always shown.
    """

    def __init__(self, name: str, unit: str, total: float | None = None, *, first: float = 0, period: float = 1.0):
        self._name, self._unit, self._total, self._first, self._period = name, unit, total, first, period
        self._start = self._shown = time.monotonic()
        self._quiet = jax.process_index() > 0
        self._bar: Bar | None = None
        if sys.stderr.isatty() and not self._quiet:
            text = TextColumn('{task.description}', markup=False)
            self._bar = Bar(text, BarColumn(), console=Console(stderr=True), auto_refresh=False)
            self._task = self._bar.add_task(name, total=total, completed=first)

    def __enter__(self) -> 'Progress':
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, details: str = '') -> None:
        """Shows the count, its rate, and the time left."""
        now = time.monotonic()
        if self._quiet or (done != self._total and now - self._shown < self._period):
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        parts = [self._name, f'{self._unit} {done:.0f}', details, f'{rate:.2f} {self._unit}/s']
        if self._total is not None:
            parts[1] += f'/{self._total:.0f}'
            parts.append(f'{clock((self._total - done) / rate if rate > 0 else 0.0)} left')
        line = '  '.join(filter(None, parts))
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=done, description=line, refresh=True)


def counted(items: Iterable[Item], name: str) -> Iterator[Item]:
    """Yields the items and shows the number of batches so far."""
    with Progress(name, 'batch', period=10.0) as progress:
        for count, item in enumerate(items, 1):
            yield item
            progress.show(count)


@contextlib.contextmanager
def waiting(message: str, period: float = 10.0) -> Iterator[None]:
    """Names an operation without a count, such as a compilation, and prints its elapsed time every `period` seconds.

    Only process 0 prints anything.
    """
    if jax.process_index() > 0:
        yield
        return
    start, done = time.monotonic(), threading.Event()
    print(f'{message} ...', file=sys.stderr, flush=True)

    def tick() -> None:
        while not done.wait(period):
            print(f'{message}: {clock(time.monotonic() - start)}', file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def clock(seconds: float) -> str:
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
