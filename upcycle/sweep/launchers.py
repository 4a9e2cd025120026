"""Where a sweep's runs are carried out: a registry by the name that `--where` takes."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
    """This machine, one run after the other.

    Args:
      environment: of the runs.
      keep_open: a file descriptor that the runs inherit, and with it the lock on it.
    """

    slots = 1

    def __init__(self, environment: Mapping[str, str], keep_open: int):
        self._environment, self._keep_open = dict(environment), keep_open

    def start(self, arguments: Sequence[str], log: str) -> LocalJob:
        """Starts `upcycle ARGUMENTS` in a process of its own."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, 'a', encoding='utf-8') as file:
            return LocalJob(
                subprocess.Popen(
                    [sys.executable, '-m', 'upcycle', *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(self._keep_open,),
                )
            )


LAUNCHERS: dict[str, Callable[[Mapping[str, str], int], Launcher]] = {'local': Local}
