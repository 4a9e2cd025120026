"""Shows the progress of a grid."""

import re
import time
from collections.abc import Sequence

from rich.live import Live
from rich.table import Table

from upcycle import tables
from upcycle.progress import clock
from upcycle.sweep.conduct import Entry, seconds_left
from upcycle.sweep.points import Status

COLUMNS = ('validation/loss', 'validation/accuracy')
# Summary metrics of evaluators: shown as more columns if any run has logged them.
SUMMARIES = re.compile(r'few_shot/.*shot|tasks/average')


def table_of(entries: Sequence[Entry], slots: int = 1) -> Table:
    """Returns the grid as a table with one row per point; `slots` runs run at once."""
    counts = {status: sum(entry.status is status for entry in entries) for status in Status}
    title = ', '.join(f'{count} {status}' for status, count in counts.items() if count)
    left = seconds_left(entries, slots)
    if left and counts[Status.FINISHED] != len(entries):
        title += f'; {clock(left)} left'
    logged = {name for entry in entries for name in entry.progress.metrics}
    columns = [*COLUMNS, *sorted(name for name in logged if SUMMARIES.fullmatch(name))]
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
    """Shows a grid: in place on a terminal; elsewhere as a line per change of a status, and one per minute and run.

    Args:
      slots: number of runs at once.
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
        """Shows the current state."""
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
