"""Calls functions in processes with several virtual CPU devices, which the process of the tests cannot have any more.

The processes stay: each layout of processes and devices is started once for all tests that one pytest worker runs on it.
"""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

# Seconds. A process that does not end by itself is killed then.
LONGEST_EXIT = 60
# Bytes of memory. A process that holds more lets go of its programs.
LARGEST = 3 << 29
_SPAWN = multiprocessing.get_context('spawn')


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with that many CPU devices."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


class Processes:
    """`count` processes of one JAX program (over gloo where there are several), each with `devices` CPU devices.

    A call fails as soon as one process fails, since the others may wait for it in a collective. All are killed then, and the next
    call starts new ones.
    """

    def __init__(self, count: int, devices: int):
        self._count, self._devices = count, devices
        self._running: list[tuple[Any, connection.Connection]] = []

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """Calls a function of a module in every process, at the same time, and returns what each process returned.

        Raises:
          AssertionError: with the traceback of the first process that raised or died.
        """
        try:
            if any(not process.is_alive() for process, _ in self._running):
                self._kill()
            if not self._running:
                self._start()
            for _, pipe in self._running:
                pipe.send((function, arguments, named))
            return self._answers()
        except BaseException:
            # Else the next call would be given the answers to this one.
            self._kill()
            raise

    def _answers(self) -> list[Any]:
        results: dict[connection.Connection, Any] = {}
        waiting = {pipe: process for process, pipe in self._running}
        while waiting:
            for pipe in connection.wait(list(waiting)):
                process = waiting.pop(pipe)
                try:
                    results[pipe], error = pipe.recv()
                except (EOFError, OSError):
                    process.join(LONGEST_EXIT)
                    error = f'a process with {self._devices} devices died with exit code {process.exitcode}'
                if error is not None:
                    raise AssertionError(error)
        return [results[pipe] for _, pipe in self._running]

    def close(self) -> None:
        """Ends the processes, so that they run what they registered for their exit."""
        for _, pipe in self._running:
            pipe.close()
        for process, _ in self._running:
            process.join(LONGEST_EXIT)
        self._kill()

    def _start(self) -> None:
        address = f'localhost:{free_port()}'
        for index in range(self._count):
            ours, theirs = _SPAWN.Pipe()
            hosts = (address, self._count, index)
            process = _SPAWN.Process(target=_serve, args=(theirs, self._devices, hosts), daemon=True)
            process.start()
            # Only the child may hold this end: its exit must close the pipe.
            theirs.close()
            self._running.append((process, ours))

    def _kill(self) -> None:
        for process, pipe in self._running:
            process.kill()
            process.join()
            pipe.close()
        self._running = []


_LAYOUTS: dict[tuple[int, int], Processes] = {}


def processes(count: int, devices: int) -> Processes:
    """The processes of that layout, which this pytest worker keeps until the end of its session."""
    return _LAYOUTS.setdefault((count, devices), Processes(count, devices))


def close() -> None:
    """Ends all processes."""
    for layout in _LAYOUTS.values():
        layout.close()


def on_devices(devices: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function returns in one process with that many devices."""
    return processes(1, devices).call(function, *arguments, **named)[0]


def _serve(pipe: connection.Connection, devices: int, hosts: tuple[str, int, int]) -> None:
    """A process: receives calls and sends what they return, and the traceback of what they raise."""
    os.environ |= environment(devices)
    import jax

    if hosts[1] > 1:
        jax.distributed.initialize(*hosts)
    from tests import programs

    programs.share()
    while True:
        try:
            function, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments, **named), None))
        except BaseException:  # reported to the caller
            pipe.send((None, traceback.format_exc()))
        gc.collect()
        programs.trim(LARGEST)


def start_together(commands: list[list[str]], devices: int) -> list[subprocess.Popen]:
    """Starts several `python ARGUMENTS`, each with that many devices."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments in commands
    ]
