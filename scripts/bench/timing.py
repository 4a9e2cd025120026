"""Times candidates side by side: they take turns, so that noise of the machine affects all of them."""

import atexit
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SERVE = '--serve'


def medians(candidates: Mapping[str, Callable[[], Any]], rounds: int, pause: float = 0.0) -> dict[str, float]:
    """Returns the median seconds of each candidate over `rounds` turns, after one uncounted turn, with pauses in between."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        print(f'turn {turn} of {rounds}, {time.perf_counter() - begin:.0f} s', file=sys.stderr)
        for name, run in candidates.items():
            time.sleep(pause)
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def updating(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Any]:
    """Returns a function that updates a state once a call, with donated memory as in training.

    Args:
      step: returns the new state, and anything else.
      state: the first state.
    """
    held = [jax.tree.map(jnp.copy, state)]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held[0])
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(held[0]).compile()

    def run() -> Any:
        held[0], rest = compiled(held[0])
        return held[0], rest

    return run


class Apart:
    """Candidates in a separate process, which runs this script with `--serve WHO`."""

    def __init__(self, who: str):
        command = [sys.executable, *sys.argv, SERVE, who]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._process.kill)

    def run(self, name: str) -> None:
        """Runs a candidate once and waits for it."""
        print(name, file=self._process.stdin, flush=True)
        if self._process.stdout.readline().strip() != name:
            raise RuntimeError(f'the process of {name} has ended')


def served() -> str | None:
    """Returns whose candidates this process serves; None for the main process."""
    return sys.argv[-1] if SERVE in sys.argv[:-1] else None


def serve(candidates: Mapping[str, Callable[[], Any]]) -> None:
    """Runs candidates whose names arrive on standard input, until it ends."""
    for line in sys.stdin:
        jax.block_until_ready(candidates[line.strip()]())
        print(line.strip(), flush=True)


def side_by_side(
    builders: Mapping[str, Callable[[str], Mapping[str, Callable[[], Any]]]],
    variants: Sequence[str],
    parts: Sequence[str],
    rounds: int,
    *,
    one_process: bool,
) -> list[list[str]]:
    """Returns rows of a table: theirs and ours in milliseconds, and their ratio.

    Args:
      builders: two, theirs first, that return the parts of a variant by name.
      variants: names of variants.
      parts: timed parts of each variant, a row each.
      rounds: number of turns.
      one_process: both in one process with one heap; otherwise each has its own.
    """

    def named(who: str) -> dict[str, Callable[[], Any]]:
        return {f'{v}: {part}': run for v in variants for part, run in builders[who](v).items()}

    if served() is not None:
        serve(named(served()))
        sys.exit()
    names = [f'{v}: {part}' for v in variants for part in parts]
    sides = {}
    for who in builders:
        run = None if one_process else Apart(who).run
        sides[who] = named(who) if one_process else {name: functools.partial(run, name) for name in names}
    # After its turn a process returns memory for a tenth of a second, which must not slow the other's turn.
    pause = 0.0 if one_process else 0.5
    seconds = medians({(who, name): sides[who][name] for name in names for who in builders}, rounds, pause)
    rows = []
    for v in variants:
        for part in parts:
            a, b = (1e3 * seconds[who, f'{v}: {part}'] for who in builders)
            rows.append([v, part, f'{a:.0f}', f'{b:.0f}', f'{a / b:.2f}'])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])
