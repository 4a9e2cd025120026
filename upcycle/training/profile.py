"""A profile of some of a run's steps for TensorBoard or xprof."""

import contextlib
import re
from typing import Any

import jax

from upcycle import files
from upcycle.errors import UserError
from upcycle.warning import warn


def parse(text: str) -> range:
    """Parses steps 'FIRST:LAST', both included, numbered as in the log.

    Raises:
      UserError: the text has another form.
    """
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'--profile_steps={text} must be the first and last step, such as 10:15.')
    return range(int(match[1]), int(match[2]) + 1)


class Profile:
    """Traces steps of a run. Every process writes its own trace.

    Args:
      steps: the steps to trace; may be empty.
      folder: the folder for the trace.
    """

    def __init__(self, steps: range, folder: str):
        self._steps, self._folder = steps, folder
        self._mirror: files.Mirror | None = None
        self._running = self._done = False
        self._annotation = contextlib.ExitStack()

    def before(self, step: int) -> None:
        """To be called before every step."""
        if step in self._steps and not self._done:
            if not self._running:
                # JAX's profiler cannot write to buckets.
                self._mirror = files.Mirror(self._folder)
                jax.profiler.start_trace(str(self._mirror.path))
                self._running = True
            self._annotation.enter_context(jax.profiler.StepTraceAnnotation('train', step_num=step))

    def after(self, step: int, results: Any) -> None:
        """To be called after every step was dispatched, with its results."""
        self._annotation.close()
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace, once, even if steps are repeated. Only warns if a bucket does not accept it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._done = False, True
            try:
                self._mirror.close()
            except UserError as refusal:
                warn(str(refusal))
