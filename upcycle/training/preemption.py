"""Being asked to stop: SIGTERM, which is how schedulers and clouds announce that a machine will be taken away."""

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
      first: the step that the run starts or goes on from.

    Yields:
      A function of the step just taken, to be called after every step: whether to save and stop now. Of several processes
      one that is asked is enough: JAX's preemption service finds a step that none of them has passed, and all stop there.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        # JAX stops all processes one step after the largest step that any of them has reported, or at step 1 where none has
        # reported one yet. A resumed run therefore reports the steps up to `first`, too.
        before = any(reached(step) for step in range(1, first + 1))
        yield lambda step: reached(step) or before
        return
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's.
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
