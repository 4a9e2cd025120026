"""A profile of some of a run's steps, for TensorBoard or xprof: what the devices and the host did, and when."""

import contextlib
import re
from typing import Any

import jax

from upcycle import files
from upcycle.errors import UserError
from upcycle.metrics import warn


def parse(text: str) -> range:
    """Steps 'FIRST:LAST', both included and counted as the log counts them.

    Raises:
      UserError: it is nothing of the kind.
    """
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'--profile_steps={text} must be the first and last step, such as 10:15.')
    return range(int(match[1]), int(match[2]) + 1)


class Profile:
    """Traces these steps, those that this leg of the run takes. Every process writes its own.

    Args:
      steps: to trace; an empty range: none.
      folder: where the trace goes.
    """

    def __init__(self, steps: range, folder: str):
        self._steps, self._folder = steps, folder
        self._mirror: files.Mirror | None = None
        self._running = self._done = False
        self._annotation = contextlib.ExitStack()

    def before(self, step: int) -> None:
        """A step is about to be taken."""
        if step in self._steps and not self._done:
            if not self._running:
                # JAX's profiler knows no buckets.
                self._mirror = files.Mirror(self._folder)
                jax.profiler.start_trace(str(self._mirror.path))
                self._running = True
            self._annotation.enter_context(jax.profiler.StepTraceAnnotation('train', step_num=step))

    def after(self, step: int, results: Any) -> None:
        """It was handed to the devices, and will give these results."""
        self._annotation.close()
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced; once, also where steps are taken again. A bucket that does not take it is no reason to stop."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._done = False, True
            try:
                self._mirror.close()
            except UserError as refusal:
                warn(str(refusal))
