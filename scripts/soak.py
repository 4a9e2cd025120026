"""Kills a training run again and again until it is done, and compares what is left with a run that nobody touched.

  python scripts/soak.py --kills 100 --out soak.json        # shared among language and vision, one and two processes

A run upcycles a tiny dense model, or loads what `upcycle convert` made from it, and trains. SIGKILL or SIGTERM hits it at a
moment that the seed draws: anywhere, in its first three seconds, after a second start in its folder, or when it is seen to
upcycle, to save or to evaluate. Between two starts the newest step may be damaged. What is asserted: every start resumes
from the newest step that is whole; a second start in the folder of a run is refused and changes nothing; SIGTERM while it trains
loses no step; in the end metrics (but times and rates) and every leaf of the state are those of the run that nobody touched, bit
for bit. Two processes are joined over loopback, as a launcher starts them. CPU; about 10 s a start.
"""

import argparse
import collections
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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['UPCYCLE_TRACEBACK'] = '1'

from upcycle.checkpoints import open_checkpoint
from upcycle.errors import PREEMPTED
from upcycle.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
PERIODS = {'LOG_PERIOD': 1, 'CHECKPOINT_PERIOD': 4, 'EVAL_PERIOD': 6, 'EVAL_STEPS': 2, 'CHECKPOINT_KEEP': 2}
# Of each family: model and data, MoE layers, and what makes the model and its data tiny.
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
}
DENSE_STEPS = 2
AIMS = ('anywhere', 'start', 'second', 'step', 'save', 'evaluation')
DAMAGE = ('truncated', 'deleted', 'flipped', 'half-written')
SHARE_DAMAGED = 0.3
SHARE_UPCYCLING = 0.5  # of the first kills of a run
POLL_SECONDS = 0.002
LINE_BYTES = 20_000  # more than two lines of the metrics
LONGEST_SECONDS = 1800  # of a start
# From the first sign of it to the kill, at most.
SURGERY_SECONDS, SAVE_SECONDS = 1.5, 0.02
FIRST_SECONDS = 3.0
MOST_STARTS = 1000


class SoakError(Exception):
    """Something was lost, or a process ended in a way that it must not."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run: a family, in so many processes."""

    family: str
    processes: int

    @property
    def name(self) -> str:
        return f'{self.family}, {self.processes} process{"es" if self.processes > 1 else ""}'


@dataclasses.dataclass
class Account:
    """What was done to a case, and what it cost.

    Attributes:
      signals, phases: kills, by signal and by what the run was doing.
      second_starts: second starts in the folder of a run, which were refused.
      damages: by kind.
      runs: those that reached their end, all of them the same as the undisturbed one.
      starts: of processes, or pairs of them.
      steps: of the runs.
      repeated: steps that were taken again, in all; most: after one kill; most_after_damage: after one whose step was damaged.
    """

    signals: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    phases: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    damages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    second_starts: int = 0
    runs: int = 0
    starts: int = 0
    steps: int = 0
    repeated: int = 0
    most: int = 0
    most_after_damage: int = 0

    @property
    def kills(self) -> int:
        return self.signals.total()


class Leg:
    """One start of a run, until it ends.

    Args:
      case: what is run.
      run: the run's folder.
      dense: the checkpoint that it starts from.
      steps: TRAIN_STEPS.
      name: of the logs; None: the run's.
    """

    def __init__(self, case: Case, run: pathlib.Path, dense: str, steps: int, name: str | None = None):
        self.run = run
        self.start_step = open_checkpoint(dense).step
        self._log = run.parent / f'{name or run.name}.log'
        self._earlier_metrics = _identity(run / 'metrics.jsonl')
        arguments = command(case.family, run, steps, dense)
        hosts: list[list[str]] = [[]]
        if case.processes > 1:
            where = f'--coordinator_address=localhost:{_free_port()}'
            hosts = [
                [where, f'--process_count={case.processes}', f'--process_index={i}'] for i in range(case.processes)
            ]
        self.began = time.monotonic()
        self.processes = []
        for i, host in enumerate(hosts):
            with open(f'{self._log}.{i}', 'wb') as log:
                self.processes.append(
                    subprocess.Popen(
                        [*arguments, *host], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment()
                    )
                )

    def said(self) -> str:
        """What process 0 has printed."""
        return pathlib.Path(f'{self._log}.0').read_text(errors='replace')

    def codes(self) -> list[int | None]:
        """The exit status of each process; None: it runs."""
        return [process.poll() for process in self.processes]

    def hit(self, number: int, victim: int) -> bool:
        """Sends a signal to one process, and does what a launcher does then, until all have ended; False: that one had ended."""
        alive = self.processes[victim].poll() is None
        self.processes[victim].send_signal(number)
        end = time.monotonic() + LONGEST_SECONDS
        while None in self.codes() and time.monotonic() < end:
            # One that saves and stops takes the others with it; one that dies does not, and its launcher ends them.
            if any(code not in (None, 0, PREEMPTED) for code in self.codes()):
                time.sleep(0.2)
                break
            time.sleep(0.01)
        self.end()
        return alive

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stops its processes (SIGSTOP), which take up their work again afterwards."""
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
        """Ends what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()

    def went_on_from(self) -> int | None:
        """The step that it says to have gone on from."""
        found = re.search(r'goes on from step (\d+)', self.said())
        return int(found[1]) if found else None

    def logs(self) -> bool:
        """Whether it has begun, or gone on with, its metrics."""
        return _identity(self.run / 'metrics.jsonl') not in (None, self._earlier_metrics)

    def taken(self) -> int:
        """Steps that it has taken so far."""
        if not self.logs():
            return 0
        went_on_from = self.went_on_from()
        return _last_line(self.run).get('step', 0) - (self.start_step if went_on_from is None else went_on_from)

    def phase(self) -> str:
        """What the run is doing, by its files and what it says."""
        if not self.logs():
            return 'upcycling' if 'mesh ' in self.said() and not _steps(self.run) else 'starting'
        if list((self.run / 'checkpoints').glob('*.orbax-checkpoint-tmp')):
            return 'saving'
        line = _last_line(self.run)
        if not line or (line['split'] == 'train' and line['step'] % PERIODS['EVAL_PERIOD'] == 0):
            return 'evaluating'
        return 'training' if self.taken() else 'starting'


def command(family: str, run: pathlib.Path, steps: int, dense: str | None) -> list[str]:
    """`upcycle train` of a tiny model; without `dense`, which may be converted already, the dense model itself."""
    (model, task), moe, small, data = FAMILIES[family]
    if dense is None:
        files = [model, task, 'runs/pretrain.gin']
    else:
        has_experts = any('/expert/' in leaf for leaf in open_checkpoint(dense).leaves())
        files = [model, moe, task, 'runs/continue_dense.gin' if has_experts else 'runs/upcycle.gin']
    more = {} if dense is None else {'NUM_EXPERTS': 4, 'INITIAL_CHECKPOINT_PATH': dense, 'GROUPS_MULTIPLE_OF': 2}
    bindings = {**small, **data, **PERIODS, **more, 'WARMUP_STEPS': 100, 'MODEL_DIR': run, 'TRAIN_STEPS': steps}
    return [
        *(sys.executable, '-m', 'upcycle', 'train'),
        *(f'--gin_file={file}' for file in files),
        *(f'--gin.{name}={value}' for name, value in bindings.items()),
    ]


def convert(family: str, dense: str, folder: pathlib.Path) -> str:
    """The path of the sparse checkpoint that `upcycle convert` makes from a dense run's."""
    (model, task), moe, small, _ = FAMILIES[family]
    target = folder / f'{family}_converted'
    if not target.is_dir():
        bindings = {**small, 'NUM_EXPERTS': 4}
        subprocess.run(
            [
                *(sys.executable, '-m', 'upcycle', 'convert', f'--from={dense}', f'--to={target}'),
                *(f'--gin_file={file}' for file in (model, moe, task)),
                *(f'--gin.{name}={value}' for name, value in bindings.items()),
            ],
            check=True,
            cwd=ROOT,
            env=_environment(),
        )
    return str(target)


def refuse_second(leg: Leg, case: Case, dense: str, total: int, account: Account) -> None:
    """Starts the same run once more in its folder, and raises SoakError unless that is refused.

    The first run stands still until the second one waits for a sign of its life, or the first would be done too soon.
    """
    with Leg(case, leg.run, dense, total, name=f'{leg.run.name}_second') as second:
        end = time.monotonic() + LONGEST_SECONDS
        with leg.standing_still():
            while None in second.codes() and 'may be in use' not in second.said() and time.monotonic() < end:
                time.sleep(0.05)
        while None in second.codes() and time.monotonic() < end:
            time.sleep(0.05)
        if any(code is not None for code in leg.codes()):
            return
        if set(second.codes()) != {2} or 'is in use' not in second.said():
            raise SoakError(f'a second start in {leg.run} ended with {second.codes()}: {second.said()[-3000:]}')
        account.second_starts += 1


def _environment() -> dict[str, str]:
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=1'
    quick = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    return {**quick, **os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def _steps(run: pathlib.Path) -> list[int]:
    """The finished steps, oldest first."""
    folder = run / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _identity(file: pathlib.Path) -> int | None:
    """Changes when a file is replaced; None: there is none."""
    return file.stat().st_ino if file.exists() else None


def _last_line(run: pathlib.Path) -> dict:
    """The last whole line of the metrics; {} where there is none. It is asked for every millisecond, so only the end is read."""
    try:
        with open(run / 'metrics.jsonl', 'rb') as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LINE_BYTES))
            lines = file.read().rpartition(b'\n')[0].split(b'\n')
        return json.loads(lines[-1]) if lines[-1] else {}
    except FileNotFoundError:
        return {}


def damage(run: pathlib.Path, kind: str, chance: random.Random) -> None:
    """Damages the newest step, or leaves the beginning of a next one."""
    newest = run / 'checkpoints' / str(_steps(run)[-1])
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


def moments(leg: Leg, aim: str, chance: random.Random, typical_seconds: float) -> Callable[[], bool]:
    """Whether the moment to hit has come; asked again and again."""
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
    """Waits for the moment; False: the run ended before it came."""
    end = time.monotonic() + LONGEST_SECONDS
    while not is_time():
        codes = leg.codes()
        if any(code is not None for code in codes):
            return False
        if time.monotonic() > end:
            raise SoakError(f'hangs: {leg.said()[-2000:]}')
        time.sleep(POLL_SECONDS)
    return True


def finish(leg: Leg) -> None:
    """Lets a leg end by itself.

    Raises:
      SoakError: it does not end well.
    """
    end = time.monotonic() + LONGEST_SECONDS
    while None in leg.codes() and not any(leg.codes()) and time.monotonic() < end:
        time.sleep(0.05)
    if any(code != 0 for code in leg.codes()):
        raise SoakError(f'ended with {leg.codes()}: {leg.said()[-3000:]}')


def soak(
    case: Case,
    kills: int,
    steps: int,
    seed: int,
    folder: pathlib.Path,
    dense: str | None = None,
    *,
    converted: bool = True,
) -> Account:
    """Kills runs of a case so many times, and lets each reach its end.

    Args:
      case: what is run.
      kills: at least so many; the run in which the last happens goes on to its end undisturbed.
      steps: of each run, beyond the dense model's.
      seed: of the moments, signals and damages.
      folder: for runs and logs.
      dense: run folder of the dense model; None: it is trained.
      converted: let every second run load a checkpoint that `upcycle convert` made from the dense model.

    Raises:
      SoakError: something was lost.
    """
    account, chance = Account(), random.Random(f'{seed} {case.name}')
    if dense is None:
        dense = str(folder / f'{case.family}_dense')
        if not os.path.isdir(dense):
            subprocess.run(
                command(case.family, pathlib.Path(dense), DENSE_STEPS, None), check=True, cwd=ROOT, env=_environment()
            )
    total = open_checkpoint(dense).step + steps
    starts = {dense: folder / f'{case.family}_{case.processes}_whole'}
    if converted:
        starts[convert(case.family, dense, folder)] = folder / f'{case.family}_{case.processes}_whole_converted'
    typical_seconds = 0.0
    for start, whole in starts.items():
        with Leg(case, whole, start, total) as leg:
            finish(leg)
            # The first start has compiled, so that others are quicker.
            typical_seconds = time.monotonic() - leg.began
    while account.kills < kills:
        run = folder / f'{case.family}_{case.processes}_{account.runs}'
        start, whole = list(starts.items())[account.runs % len(starts)]
        disturb(case, run, start, total, kills, account, chance, typical_seconds)
        require_same(run, whole)
        account.runs += 1
        account.steps += steps
        shutil.rmtree(run)
    return account


def disturb(
    case: Case,
    run: pathlib.Path,
    dense: str,
    total: int,
    kills: int,
    account: Account,
    chance: random.Random,
    typical_seconds: float,
) -> None:
    """One run, killed until it is done or all `kills` have been."""
    expected: int | None = None
    reached, damaged = 0, False
    for number in range(MOST_STARTS):
        account.starts += 1
        # The beginning of a run is where it upcycles.
        aim = 'upcycle' if number == 0 and chance.random() < SHARE_UPCYCLING else chance.choice(AIMS)
        sent = chance.choice((signal.SIGKILL, signal.SIGTERM)) if account.kills < kills else None
        with Leg(case, run, dense, total) as leg:
            if sent is None or not watch(leg, moments(leg, aim, chance, typical_seconds)):
                finish(leg)
            else:
                if aim == 'second':
                    refuse_second(leg, case, dense, total, account)
                time.sleep(chance.uniform(0, SURGERY_SECONDS if aim == 'upcycle' else SAVE_SECONDS))
                phase = leg.phase()
                if leg.hit(sent, chance.randrange(case.processes)):
                    account.signals[sent.name] += 1
                    # What was killed stands still.
                    account.phases[leg.phase() if sent is signal.SIGKILL else phase] += 1
        went_on_from = leg.went_on_from()
        check_end(leg, sent)
        if leg.logs():
            if went_on_from != expected:
                raise SoakError(
                    f'{run} went on from {went_on_from}, and {expected} was the newest whole step: {leg.said()}'
                )
            again = max(0, reached - (leg.start_step if expected is None else expected))
            account.repeated += again
            account.most = max(account.most, 0 if damaged else again)
            account.most_after_damage = max(account.most_after_damage, again if damaged else 0)
            reached, damaged = _last_line(run).get('step', 0), False
        if not any(leg.codes()):
            return
        saved = _steps(run)
        if not damaged:
            expected = saved[-1] if saved else None
            if len(saved) > 1 and chance.random() < SHARE_DAMAGED:
                kind = chance.choice(DAMAGE)
                damage(run, kind, chance)
                account.damages[kind] += 1
                if kind != 'half-written':
                    damaged, expected = True, saved[-2]
    raise SoakError(f'{run} does not come to its end')


def check_end(leg: Leg, sent: int | None) -> None:
    """Raises SoakError unless the processes ended as they must, and a run that was told to stop has saved its last step."""
    codes = set(leg.codes())
    if codes == {PREEMPTED}:
        if _steps(leg.run)[-1:] != [_last_line(leg.run)['step']]:
            raise SoakError(f'{leg.run} was told to stop and saved {_steps(leg.run)}: {leg.said()}')
    elif codes != {0} and sent != signal.SIGKILL and not (sent == signal.SIGTERM and -signal.SIGTERM in codes):
        raise SoakError(f'{leg.run} ended with {leg.codes()}: {leg.said()[-3000:]}')


def require_same(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Raises SoakError unless two runs have the same metrics, but times and rates, and the same state, bit for bit."""

    def lines(path: pathlib.Path) -> Iterator[dict]:
        for line in read_metrics(str(path / 'metrics.jsonl')):
            yield {name: value for name, value in line.items() if 'second' not in name}

    for ours, theirs in zip(lines(run), lines(whole), strict=True):
        if ours != theirs:
            differ = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
            raise SoakError(f'{run}: at step {ours["step"]} {sorted(differ)} are not those of the undisturbed run')
    ours, theirs = open_checkpoint(run), open_checkpoint(whole)
    if ours.leaves() != theirs.leaves():
        raise SoakError(f'{run} ends in other leaves than the undisturbed run')
    for name in ours.leaves():
        if ours.read(name).tobytes() != theirs.read(name).tobytes():
            raise SoakError(f'{run}: {name} is not that of the undisturbed run')


def table(accounts: dict[str, Account]) -> str:
    """Markdown, a line for each case."""
    head = 'run|kills|SIGKILL|SIGTERM|starting|upcycling|saving|evaluating|second starts|damaged steps|'
    head += 'runs|steps|steps repeated|most after a kill'
    rows = [head, '|'.join(['---'] * (head.count('|') + 1))]
    for name, account in accounts.items():
        shown = (
            *(name, account.kills, account.signals['SIGKILL'], account.signals['SIGTERM']),
            *(account.phases[phase] for phase in ('starting', 'upcycling', 'saving', 'evaluating')),
            *(
                account.second_starts,
                account.damages.total(),
                account.runs,
                account.steps,
                account.repeated,
                account.most,
            ),
        )
        rows.append('|'.join(map(str, shown)))
    return '\n'.join(f'| {row.replace("|", " | ")} |' for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks every case and says what it found; 1: something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100, help='in all, shared equally among the cases (%(default)s)')
    parser.add_argument('--families', default=','.join(FAMILIES), help='with commas between (%(default)s)')
    parser.add_argument('--processes', default='1,2', help='of a run, with commas between (%(default)s)')
    parser.add_argument('--steps', type=int, default=60, help='of each run (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of moments, signals and damages (%(default)s)')
    parser.add_argument('--out', type=pathlib.Path, help='write the figures there, as JSON')
    options = parser.parse_args(arguments)
    cases = [
        Case(family, int(count)) for family in options.families.split(',') for count in options.processes.split(',')
    ]
    accounts: dict[str, Account] = {}
    failures: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='soak_') as folder:
        os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(folder, 'cache'))
        for i, case in enumerate(cases):
            kills = options.kills // len(cases) + (i < options.kills % len(cases))
            try:
                accounts[case.name] = soak(case, kills, options.steps, options.seed, pathlib.Path(folder))
            except SoakError as failure:
                failures.append(f'{case.name}: {failure}')
                print(failures[-1], file=sys.stderr)
            else:
                print(table({case.name: accounts[case.name]}).splitlines()[-1], file=sys.stderr, flush=True)
    result = {
        'kills': sum(account.kills for account in accounts.values()),
        'damaged_steps': sum(account.damages.total() for account in accounts.values()),
        'failures': failures,
        'seed': options.seed,
        'seconds': round(time.monotonic() - began),
        'cases': {name: vars(account) for name, account in accounts.items()},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + '\n')
    print(table(accounts))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
