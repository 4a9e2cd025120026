"""Timing side by side: the candidates take turns, so that a noisy machine is noisy for all of them."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def medians(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` turns, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        print(f'turn {turn} of {rounds}, {time.perf_counter() - begin:.0f} s', file=sys.stderr)
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def updating(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[], Any]:
    """One update a turn, each of the state that the last one gave: `step` gives up the memory of its argument, as in training.

    `step` returns the state and whatever else it measures.
    """
    held = [jax.tree.map(jnp.copy, state)]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held[0])
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(held[0]).compile()

    def run() -> Any:
        held[0], rest = compiled(held[0])
        return held[0], rest

    return run


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])
