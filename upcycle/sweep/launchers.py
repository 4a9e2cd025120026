"""Where a sweep's runs are carried out: a registry by the name that `--where` takes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol


class Job(Protocol):
    """Something that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it goes on."""

    def stop(self) -> None:
        """Ends it, and waits until it has ended."""


class Launcher(Protocol):
    """Starts `upcycle` commands; `slots` of them may go on at once."""

    slots: int

    def start(self, arguments: Sequence[str], log: str) -> Job:
        """Starts `upcycle ARGUMENTS`, what it prints going to the end of the file `log`."""


class LocalJob:
    """A process on this machine."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def poll(self) -> int | None:
        """Its exit status, or None while it goes on."""
        return self._process.poll()

    def stop(self) -> None:
        """Terminates it, and waits."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


class Local:
    """This machine: one run after the other, or a few at once, each on its share of the cores.

    Args:
      environment: of the runs.
      keep_open: a file descriptor that the runs inherit, and with it the lock on it.
      slots: runs that may go on at once.
    """

    def __init__(self, environment: Mapping[str, str], keep_open: int, slots: int = 1):
        self._environment, self._keep_open, self.slots = dict(environment), keep_open, slots
        self._jobs: list[LocalJob | None] = [None] * slots

    def start(self, arguments: Sequence[str], log: str) -> LocalJob:
        """Starts `upcycle ARGUMENTS` in a process of its own."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        free = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        with open(log, 'a', encoding='utf-8') as file, self._on_cores_of(free):
            job = LocalJob(
                subprocess.Popen(
                    [sys.executable, '-m', 'upcycle', *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(self._keep_open,),
                )
            )
        self._jobs[free] = job
        return job

    @contextlib.contextmanager
    def _on_cores_of(self, slot: int) -> Iterator[None]:
        """What is started meanwhile keeps to a slot's share of the cores, where the system knows of such shares."""
        if self.slots == 1 or not hasattr(os, 'sched_setaffinity'):
            yield
            return
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slot % len(cores) :: self.slots])
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)


# Arguments as those of Local.
LAUNCHERS: dict[str, Callable[[Mapping[str, str], int, int], Launcher]] = {'local': Local}
