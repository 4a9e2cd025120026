"""Kills training runs repeatedly until they finish, and compares the results with those of undisturbed runs.

  python scripts/soak.py --kills 100 --out soak.json        # shared among all families, one and two processes

A run upcycles a tiny dense model, or loads the output of `upcycle convert`, and trains. It gets SIGKILL or SIGTERM at a moment
drawn from the seed: anywhere, in the first three seconds, after a second start in its folder, or while it upcycles, saves or
evaluates. Between two starts the newest step may be damaged. The script asserts: every start resumes from the newest whole step;
a second start in the folder of a run is refused and changes nothing; SIGTERM during training loses no step; at the end, metrics
(except times and rates) and every leaf of the state equal those of the undisturbed run, bit for bit. Two processes are joined
over loopback, as a launcher would do. Runs on CPU; about 10 s per start.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['UPCYCLE_TRACEBACK'] = '1'
sys.path.insert(0, os.path.dirname(__file__))

from soaking.starts import (
    FAMILIES,
    LONGEST_SECONDS,
    PERIODS,  # noqa: F401  (read by a test)
    ROOT,
    Case,
    Leg,
    SoakError,
    command,
    convert,
    damage,
    environment,
    finish,
    last_line,
    moments,
    steps_of,
    watch,
)

from upcycle.checkpoints import open_checkpoint
from upcycle.errors import PREEMPTED
from upcycle.log_lines import depends_on_speed
from upcycle.metrics import read_metrics

DENSE_STEPS = 2
AIMS = ('anywhere', 'start', 'second', 'step', 'save', 'evaluation')
DAMAGE = ('truncated', 'deleted', 'flipped', 'half-written')
SHARE_DAMAGED = 0.3
SHARE_UPCYCLING = 0.5  # of the first kills of the runs
# Longest delay between the first sign of upcycling, or of another phase, and the kill.
SURGERY_SECONDS, SAVE_SECONDS = 1.5, 0.02
MOST_STARTS = 1000


@dataclasses.dataclass
class Account:
    """The kills of a case, and their cost.

    Attributes:
      signals, phases: numbers of kills by signal, and by the phase of the run.
      damages: numbers of damaged steps, by kind of damage.
      second_starts: number of second starts in the folder of a run; all were refused.
      runs: number of finished runs; all were equal to the undisturbed run.
      starts: number of starts.
      steps: number of training steps of the finished runs.
      repeated, most, most_after_damage: number of repeated steps in total, the largest number after one kill, and the largest
        number after a kill followed by damage.
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


def refuse_second(leg: Leg, case: Case, dense: str, total: int, account: Account) -> None:
    """Starts the same run a second time in its folder; raises SoakError unless that start is refused.

    The first run is stopped until the second one waits for its lock to change; otherwise the first could finish too soon.
    """
    with Leg(case, leg.run, dense, total, name=f'{leg.run.name}_second') as second:
        end = time.monotonic() + LONGEST_SECONDS
        with leg.paused():
            while None in second.codes() and 'may be in use' not in second.output() and time.monotonic() < end:
                time.sleep(0.05)
        while None in second.codes() and time.monotonic() < end:
            time.sleep(0.05)
        if any(code is not None for code in leg.codes()):
            return
        if set(second.codes()) != {2} or 'is in use' not in second.output():
            raise SoakError(f'a second start in {leg.run} ended with {second.codes()}: {second.output()[-3000:]}')
        account.second_starts += 1


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
    """Kills runs of a case, and lets each run finish.

    Args:
      case: what to run.
      kills: smallest number of kills; after the last kill, that run finishes undisturbed.
      steps: steps of each run after those of the dense model.
      seed: seed of moments, signals and damage.
      folder: folder for runs and logs.
      dense: run folder of the dense model; None: train it.
      converted: let every second run load a checkpoint that `upcycle convert` made from the dense model.

    Raises:
      SoakError: something was lost.
    """
    account, chance = Account(), random.Random(f'{seed} {case.name}')
    if dense is None:
        dense = str(folder / f'{case.family}_dense')
        if not os.path.isdir(dense):
            subprocess.run(
                command(case.family, pathlib.Path(dense), DENSE_STEPS, None), check=True, cwd=ROOT, env=environment()
            )
    total = open_checkpoint(dense).step + steps
    starts = {dense: folder / f'{case.family}_{case.processes}_whole'}
    if converted:
        starts[convert(case.family, dense, folder)] = folder / f'{case.family}_{case.processes}_whole_converted'
    typical_seconds = 0.0
    for start, whole in starts.items():
        with Leg(case, whole, start, total) as leg:
            finish(leg)
            # Later starts are faster, because the first one fills the compilation cache.
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
    """Runs one run, and kills it until it is finished or all `kills` are used up."""
    expected: int | None = None
    reached, damaged = 0, False
    for number in range(MOST_STARTS):
        account.starts += 1
        # A run upcycles at its first start.
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
                    # After SIGKILL the phase cannot change any more.
                    account.phases[leg.phase() if sent is signal.SIGKILL else phase] += 1
        resumed_from = leg.resumed_from()
        check_end(leg, sent)
        if leg.logs():
            if resumed_from != expected:
                raise SoakError(
                    f'{run} resumed from {resumed_from}, but {expected} was the newest whole step: {leg.output()}'
                )
            again = max(0, reached - (leg.start_step if expected is None else expected))
            account.repeated += again
            account.most = max(account.most, 0 if damaged else again)
            account.most_after_damage = max(account.most_after_damage, again if damaged else 0)
            reached, damaged = last_line(run).get('step', 0), False
        if not any(leg.codes()):
            return
        saved = steps_of(run)
        if not damaged:
            expected = saved[-1] if saved else None
            if len(saved) > 1 and chance.random() < SHARE_DAMAGED:
                kind = chance.choice(DAMAGE)
                damage(run, kind, chance)
                account.damages[kind] += 1
                if kind != 'half-written':
                    damaged, expected = True, saved[-2]
    raise SoakError(f'{run} does not finish')


def check_end(leg: Leg, sent: int | None) -> None:
    """Raises SoakError unless the exit statuses are right, and a preempted run has saved its last step."""
    codes = set(leg.codes())
    if codes == {PREEMPTED}:
        if steps_of(leg.run)[-1:] != [last_line(leg.run)['step']]:
            raise SoakError(f'{leg.run} was preempted and saved {steps_of(leg.run)}: {leg.output()}')
    elif codes != {0} and sent != signal.SIGKILL and not (sent == signal.SIGTERM and -signal.SIGTERM in codes):
        raise SoakError(f'{leg.run} ended with {leg.codes()}: {leg.output()[-3000:]}')


def require_same(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Raises SoakError unless two runs have the same metrics (except times and rates) and the same state, bit for bit."""

    def lines(path: pathlib.Path) -> Iterator[dict]:
        for line in read_metrics(str(path / 'metrics.jsonl')):
            yield {name: value for name, value in line.items() if not depends_on_speed(name)}

    for ours, theirs in zip(lines(run), lines(whole), strict=True):
        if ours != theirs:
            differ = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
            raise SoakError(f'{run}: at step {ours["step"]} {sorted(differ)} differ from the undisturbed run')
    ours, theirs = open_checkpoint(run), open_checkpoint(whole)
    if ours.leaves() != theirs.leaves():
        raise SoakError(f'{run} ends with other leaves than the undisturbed run')
    for name in ours.leaves():
        if ours.read(name).tobytes() != theirs.read(name).tobytes():
            raise SoakError(f'{run}: {name} differs from the undisturbed run')


def table(accounts: dict[str, Account]) -> str:
    """Returns a Markdown table with one row per case."""
    head = 'run|kills|SIGKILL|SIGTERM|starting|upcycling|saving|evaluating|second starts|damaged steps|'
    head += 'runs|steps|steps repeated|most after a kill'
    rows = [head, '|'.join(['---'] * (head.count('|') + 1))]
    for name, account in accounts.items():
        shown = (
            *(name, account.kills, account.signals['SIGKILL'], account.signals['SIGTERM']),
            *(account.phases[phase] for phase in ('starting', 'upcycling', 'saving', 'evaluating')),
            *(account.second_starts, account.damages.total(), account.runs),
            *(account.steps, account.repeated, account.most),
        )
        rows.append('|'.join(map(str, shown)))
    return '\n'.join(f'| {row.replace("|", " | ")} |' for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks every case and prints the table; returns 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--kills', type=int, default=100, help='in total, divided equally among the cases (%(default)s)'
    )
    parser.add_argument('--families', default=','.join(FAMILIES), help='comma-separated (%(default)s)')
    parser.add_argument('--processes', default='1,2', help='processes of a run, comma-separated (%(default)s)')
    parser.add_argument('--steps', type=int, default=60, help='steps of each run (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of moments, signals and damage (%(default)s)')
    parser.add_argument('--out', type=pathlib.Path, help='JSON file for the figures')
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
