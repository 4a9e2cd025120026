"""Runs a program of ours in a process with several virtual devices, which this one cannot have any more."""

import os
import socket
import subprocess
import sys


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with that many CPU devices."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def run(arguments: list[str], devices: int) -> str:
    """Runs `python ARGUMENTS` to its end and returns what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(devices), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def run_together(commands: list[list[str]], devices: int) -> None:
    """Runs several `python ARGUMENTS` at once, each with that many devices, to their end."""
    processes = start_together(commands, devices)
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), '\n'.join(outputs)
