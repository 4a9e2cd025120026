"""Random damage to user input, which must never cause a traceback, a hang or a silent success.

  python scripts/fuzz.py --what configurations --cases 10000
  python scripts/fuzz.py --what checkpoints --cases 10000      # with UPCYCLE_FIXTURES also checkpoints that T5X wrote
  python scripts/fuzz.py --replay fuzz_checkpoints.jsonl       # the cases that failed, again

Seed and number determine a case. Configurations are checked as every command checks them, and those that pass are laid out
abstractly, as `upcycle plan` does; checkpoints are opened, identified and read whole. A case may end with a `UserError`, the same
result as without the damage, or another valid configuration or checkpoint. All other cases are written to a file, one per line,
and the exit status is 1. After an interrupt the script prints the table of the cases so far.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['UPCYCLE_TRACEBACK'] = '1'

import jax
from fuzzing.case import (
    ANOTHER,
    BLIND,
    FAILURES,
    HANG,
    LOST,
    REFUSED,
    SAME,
    STATUS,
    TRACEBACK,
    Case,
    LostError,
    StatusError,
)
from fuzzing.checkpoints import Checkpoints
from fuzzing.configurations import Configurations
from fuzzing.inputs import Inputs
from fuzzing.processes import Processes

from upcycle.errors import UserError

SECONDS = 60  # of processor time, after which a case counts as a hang
PATIENCE = 600  # seconds, after which a case counts as a hang even on a busy machine
GIGABYTES = 8  # of address space that a case may use in addition to that of the program
MAKERS = {'configurations': Configurations, 'checkpoints': Checkpoints, 'inputs': Inputs, 'processes': Processes}


class Hang(BaseException):
    """A case took too long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases and prints their outcomes; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', choices=MAKERS, default='configurations')
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--first', type=int, default=0, metavar='N', help='number of the first case (%(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--replay', metavar='FILE', help='run only the cases of this file')
    parser.add_argument('--out', metavar='FILE', help='file for failed cases (fuzz_WHAT.jsonl)')
    options = parser.parse_args(arguments)
    keys = [(options.what, options.seed, n) for n in range(options.first, options.first + options.cases)]
    if options.replay:
        lines = pathlib.Path(options.replay).read_text('utf-8').splitlines()
        keys = [(case['what'], case['seed'], case['number']) for case in map(json.loads, lines)]
    with tempfile.TemporaryDirectory() as folder:
        failures = _carry_out(keys, pathlib.Path(folder), show_each=options.replay is not None)
    if failures:
        out = options.out or f'fuzz_{options.what}.jsonl'
        pathlib.Path(out).write_text(''.join(json.dumps(failure) + '\n' for failure in failures), 'utf-8')
        print(f'{len(failures)} failed: {out}')
    return 1 if failures else 0


def _carry_out(keys: Sequence[tuple[str, int, int]], folder: pathlib.Path, *, show_each: bool) -> list[dict[str, Any]]:
    """Runs the cases, given by generator, seed and number; returns the failed ones."""
    makers: dict[str, Callable[[random.Random], Case]] = {}
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    start, slowest, done = time.monotonic(), 0.0, 0
    for what, seed, number in keys:
        if what not in makers:
            makers[what] = MAKERS[what](folder)
            start = time.monotonic()
        began = time.monotonic()
        try:
            case = makers[what](random.Random(f'{seed}/{what}/{number}'))
            outcome, detail = _outcome(case)
        except KeyboardInterrupt:
            break
        slowest = max(slowest, time.monotonic() - began)
        table[case.kind][outcome] += 1
        if outcome in FAILURES:
            failures.append(
                {'what': what, 'seed': seed, 'number': number, 'kind': case.kind, 'outcome': outcome}
                | {'description': case.description, 'detail': detail}
            )
        if show_each or outcome in FAILURES:
            print(f'{what} {seed}/{number}: {outcome}\n  {case.description}\n  {detail}', flush=True)
        done += 1
        if done % 500 == 0:
            jax.clear_caches()
            print(f'{done} cases in {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)
    _print_table(table)
    print(f'{done} cases in {time.monotonic() - start:.0f} s, the slowest {slowest:.1f} s')
    return failures


def _outcome(case: Case) -> tuple[str, str]:
    def too_long(*_: Any) -> None:
        raise Hang

    old = {number: signal.signal(number, too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    output = io.StringIO()
    try:
        with _bounded_memory(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return case.run(), ''
    except UserError as error:
        sentences = str(error).strip()
        return (REFUSED, sentences) if sentences else (TRACEBACK, 'an empty sentence')
    except Hang:
        return HANG, traceback.format_exc(limit=-4)
    except LostError as error:
        return LOST, str(error)
    except StatusError as error:
        return STATUS, str(error)
    except Exception:
        return TRACEBACK, traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limits the address space, so that a false size in a header cannot exhaust the machine's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (GIGABYTES << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _print_table(table: Mapping[str, Mapping[str, int]]) -> None:
    outcomes = (REFUSED, SAME, ANOTHER, BLIND, *FAILURES)
    used = [outcome for outcome in outcomes if any(outcome in row for row in table.values()) or outcome in FAILURES]
    rows = [['damage', *used, 'cases']]
    rows += [[kind, *(str(row[o]) for o in used), str(sum(row.values()))] for kind, row in sorted(table.items())]
    total = sum(map(collections.Counter, table.values()), collections.Counter())
    rows.append(['all', *(str(total[o]) for o in used), str(sum(total.values()))])
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
        if row is rows[0]:
            print('|---' * len(row) + '|')


if __name__ == '__main__':
    sys.exit(main())
