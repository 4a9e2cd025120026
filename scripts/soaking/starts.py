"""Starts of a training run: commands, processes, and what the run is doing."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from upcycle.checkpoints import open_checkpoint
from upcycle.errors import PREEMPTED

ROOT = pathlib.Path(__file__).resolve().parents[2]
PERIODS = {'LOG_PERIOD': 1, 'CHECKPOINT_PERIOD': 4, 'EVAL_PERIOD': 6, 'EVAL_STEPS': 2, 'CHECKPOINT_KEEP': 2}
# By family: gin files of model and data, gin file of the MoE layers, and bindings that make the model and its data tiny.
FAMILIES = {
    'language': (
        ('models/t5_1_1_tiny.gin', 'tasks/stdlib_span_corruption.gin'),
        'moe/t5.gin',
        {'ACTIVATION_DTYPE': 'float32'},
        {'BATCH_SIZE': 4, 'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 9}"},
    ),
    'vision': (
        ('models/vit_mini.gin', 'tasks/mnist5k.gin'),
        'moe/vit.gin',
        {'EMBED_DIM': 16, 'MLP_DIM': 32, 'NUM_HEADS': 2, 'NUM_LAYERS': 2},
        {'BATCH_SIZE': 8, 'EVAL_BATCH_SIZE': 64},
    ),
    'llm': (
        ('models/llm_tiny.gin', 'tasks/stdlib_bytes.gin'),
        'moe/llm.gin',
        {'ACTIVATION_DTYPE': 'float32'},
        {'BATCH_SIZE': 4, 'SEQUENCE_LENGTH': 32},
    ),
}
POLL_SECONDS = 0.002
LINE_BYTES = 20_000  # more than two lines of the metrics
LONGEST_SECONDS = 1800  # of a start
FIRST_SECONDS = 3.0


class SoakError(Exception):
    """Something was lost, or a process ended with a wrong status."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A family, and the number of processes of its runs."""

    family: str
    processes: int

    @property
    def name(self) -> str:
        return f'{self.family}, {self.processes} process{"es" if self.processes > 1 else ""}'


class Leg:
    """One start of a run.

    Args:
      case: what to run.
      run: the run's folder.
      dense: the checkpoint to start from.
      steps: TRAIN_STEPS.
      name: name of the log files; None: that of the run.
    """

    def __init__(self, case: Case, run: pathlib.Path, dense: str, steps: int, name: str | None = None):
        self.run = run
        self.start_step = open_checkpoint(dense).step
        self._log = run.parent / f'{name or run.name}.log'
        self._earlier_metrics = _identity(run / 'metrics.jsonl')
        arguments = command(case.family, run, steps, dense)
        hosts: list[list[str]] = [[]]
        if case.processes > 1:
            address = f'--coordinator_address=localhost:{_free_port()}'
            hosts = [
                [address, f'--process_count={case.processes}', f'--process_index={i}'] for i in range(case.processes)
            ]
        self.began = time.monotonic()
        self.processes = []
        for i, host in enumerate(hosts):
            with open(f'{self._log}.{i}', 'wb') as log:
                streams = {'stdout': log, 'stderr': subprocess.STDOUT}
                self.processes.append(subprocess.Popen([*arguments, *host], **streams, cwd=ROOT, env=environment()))

    def output(self) -> str:
        """Returns the output of process 0."""
        return pathlib.Path(f'{self._log}.0').read_text(errors='replace')

    def codes(self) -> list[int | None]:
        """Returns the exit status of each process; None while it runs."""
        return [process.poll() for process in self.processes]

    def hit(self, number: int, victim: int) -> bool:
        """Sends a signal to one process and then acts as a launcher until all have ended; False if that process had ended."""
        alive = self.processes[victim].poll() is None
        self.processes[victim].send_signal(number)
        end = time.monotonic() + LONGEST_SECONDS
        while None in self.codes() and time.monotonic() < end:
            # A process that saves and stops also stops the others; if one dies, the launcher ends the others.
            if any(code not in (None, 0, PREEMPTED) for code in self.codes()):
                time.sleep(0.2)
                break
            time.sleep(0.01)
        self.end()
        return alive

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the processes (SIGSTOP), and continues them afterwards (SIGCONT)."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGCONT)

    def __enter__(self) -> 'Leg':
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kills all processes that still run."""
        for process in self.processes:
            process.kill()
            process.wait()

    def resumed_from(self) -> int | None:
        """Returns the step from which the run says that it resumed, or None."""
        match = re.search(r'resumes from step (\d+)', self.output())
        return int(match[1]) if match else None

    def logs(self) -> bool:
        """Returns whether this start has written metrics."""
        return _identity(self.run / 'metrics.jsonl') not in (None, self._earlier_metrics)

    def taken(self) -> int:
        """Returns the number of steps that this start has taken."""
        if not self.logs():
            return 0
        resumed_from = self.resumed_from()
        return last_line(self.run).get('step', 0) - (self.start_step if resumed_from is None else resumed_from)

    def phase(self) -> str:
        """Returns what the run is doing, judging by its files and output."""
        if not self.logs():
            return 'upcycling' if 'mesh ' in self.output() and not steps_of(self.run) else 'starting'
        if list((self.run / 'checkpoints').glob('*.orbax-checkpoint-tmp')):
            return 'saving'
        line = last_line(self.run)
        if not line or (line['split'] == 'train' and line['step'] % PERIODS['EVAL_PERIOD'] == 0):
            return 'evaluating'
        return 'training' if self.taken() else 'starting'


def command(family: str, run: pathlib.Path, steps: int, dense: str | None) -> list[str]:
    """Returns `upcycle train` of a tiny model from a dense or converted checkpoint; `dense=None` trains the dense model."""
    (model, task), moe, small, data = FAMILIES[family]
    bindings = {**small, **data, **PERIODS, 'WARMUP_STEPS': 100, 'MODEL_DIR': run, 'TRAIN_STEPS': steps}
    if dense is None:
        return _upcycle('train', (model, task, 'runs/pretrain.gin'), bindings)
    has_experts = any('/expert/' in leaf for leaf in open_checkpoint(dense).leaves())
    files = (model, moe, task, 'runs/continue_dense.gin' if has_experts else 'runs/upcycle.gin')
    more = {'NUM_EXPERTS': 4, 'INITIAL_CHECKPOINT_PATH': dense, 'GROUPS_MULTIPLE_OF': 2}
    return _upcycle('train', files, bindings | more)


def convert(family: str, dense: str, folder: pathlib.Path) -> str:
    """Runs `upcycle convert` on a dense run, once; returns the path of the sparse checkpoint."""
    (model, task), moe, small, _ = FAMILIES[family]
    target = folder / f'{family}_converted'
    if not target.is_dir():
        arguments = _upcycle('convert', (model, moe, task), {**small, 'NUM_EXPERTS': 4})
        arguments += [f'--from={dense}', f'--to={target}']
        subprocess.run(arguments, check=True, cwd=ROOT, env=environment())
    return str(target)


def _upcycle(name: str, files: Sequence[str], bindings: Mapping[str, Any]) -> list[str]:
    return [
        *(sys.executable, '-m', 'upcycle', name),
        *(f'--gin_file={file}' for file in files),
        *(f'--gin.{name}={value}' for name, value in bindings.items()),
    ]


def environment() -> dict[str, str]:
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=1'
    quick = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    return {**quick, **os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def steps_of(run: pathlib.Path) -> list[int]:
    """Returns the finished steps, oldest first."""
    folder = run / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _identity(file: pathlib.Path) -> int | None:
    """Returns a number that changes when a file is replaced; None if the file does not exist."""
    return file.stat().st_ino if file.exists() else None


def last_line(run: pathlib.Path) -> dict:
    """Returns the last whole line of the metrics, or {}. Called every few milliseconds, so it only reads the end of the file."""
    try:
        with open(run / 'metrics.jsonl', 'rb') as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LINE_BYTES))
            lines = file.read().rpartition(b'\n')[0].split(b'\n')
        return json.loads(lines[-1]) if lines[-1] else {}
    except FileNotFoundError:
        return {}


def moments(leg: Leg, aim: str, chance: random.Random, typical_seconds: float) -> Callable[[], bool]:
    """Returns a function that tells whether to send the signal now."""
    if aim == 'anywhere':
        at = leg.began + chance.uniform(0, typical_seconds)
        return lambda: time.monotonic() > at
    if aim == 'start':
        at = leg.began + chance.uniform(0, FIRST_SECONDS)
        return lambda: time.monotonic() > at
    if aim == 'upcycle':
        return lambda: leg.phase() == 'upcycling'
    after = chance.randrange(1, 8)
    wanted = {'step': None, 'second': None, 'save': 'saving', 'evaluation': 'evaluating'}[aim]
    return lambda: leg.taken() >= after and (wanted is None or leg.phase() == wanted)


def watch(leg: Leg, is_time: Callable[[], bool]) -> bool:
    """Waits until `is_time`; returns False if the run ended first."""
    end = time.monotonic() + LONGEST_SECONDS
    while not is_time():
        codes = leg.codes()
        if any(code is not None for code in codes):
            return False
        if time.monotonic() > end:
            raise SoakError(f'hangs: {leg.output()[-2000:]}')
        time.sleep(POLL_SECONDS)
    return True


def finish(leg: Leg) -> None:
    """Waits until a start ends by itself.

    Raises:
      SoakError: its exit status is not 0.
    """
    end = time.monotonic() + LONGEST_SECONDS
    while None in leg.codes() and not any(leg.codes()) and time.monotonic() < end:
        time.sleep(0.05)
    if any(code != 0 for code in leg.codes()):
        raise SoakError(f'ended with {leg.codes()}: {leg.output()[-3000:]}')


def damage(run: pathlib.Path, kind: str, chance: random.Random) -> None:
    """Damages the newest step, or adds an unfinished next step."""
    newest = run / 'checkpoints' / str(steps_of(run)[-1])
    if kind == 'half-written':
        shutil.copytree(newest / 'state', f'{newest}9.orbax-checkpoint-tmp/state')
        return
    files = sorted(path for path in newest.glob('*/**/*') if path.is_file() and path.stat().st_size)
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    if kind == 'deleted':
        file.unlink()
    elif kind == 'truncated':
        file.write_bytes(content[:at])
    else:
        content[at] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
