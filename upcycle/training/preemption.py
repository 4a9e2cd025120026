"""Stop requests by SIGTERM, the signal of schedulers and clouds before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch(first: int) -> Iterator[Callable[[int], bool]]:
    """Listens for a request to stop.

    Args:
      first: the step that the run starts or resumes at.

    Yields:
      A function of the step just taken, to be called after every step: whether to save and stop now. A request to one of several
      processes stops all of them at the same step, which JAX's preemption service chooses.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        # JAX stops every process at (largest step id that any has reported) + 1. Ids start at 0 and may not be skipped, so a
        # resumed run first reports 1 to `first`.
        before = any(reached(step) for step in range(1, first + 1))
        yield lambda step: reached(step) or before
        return
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can handle signals.
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
