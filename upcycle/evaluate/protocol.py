"""The interface of evaluators: plug-ins of the trainer and of `upcycle eval` that compute metrics of a model."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax

from upcycle import partitioning
from upcycle.data import DataSource
from upcycle.data.kept import Kept
from upcycle.models import Model, Params

Metrics = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its evaluation data, on the current mesh.

    Attributes:
      model: of any family.
      data: the evaluation data; None if the run has none.
      sharding: of batches.
      watch: wraps the batches of each pass, given the name of the pass, to show progress.
    """

    model: Model
    data: DataSource | None
    sharding: jax.sharding.NamedSharding
    watch: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, name: batches

    @functools.cached_property
    def _kept(self) -> Kept:
        return Kept(self.data)

    def batches(self, name: str) -> Iterator[dict[str, jax.Array]]:
        """Yields one pass over the evaluation data. Small data is read once for all passes."""
        yield from self.watch(partitioning.batches(self._kept, 0, self.sharding), name)


class Evaluator:
    """Base class of evaluators.

    Attributes:
      name: the `split` of its lines in `metrics.jsonl`.
      period: training steps between evaluations; None: only after the last step. Every evaluator runs after the last step.
      at_start: whether it also runs before the first step.
      of_checkpoints: whether `upcycle eval` runs it.
    """

    name: ClassVar[str]
    at_start: ClassVar[bool] = False
    of_checkpoints: ClassVar[bool] = True
    period: int | None

    def check(self, model: Model, data: DataSource | None) -> None:
        """Raises UserError if the evaluator cannot evaluate the model on the data."""

    def check_data(self, data: DataSource | None) -> None:
        """Raises UserError if the data does not exist. Reads no example."""

    def prepare(self, subject: Subject) -> Callable[[Params], Metrics]:
        """Returns the evaluation as a function of the parameters. Compiles programs and reads data once, here.

        Raises:
          UserError: the data cannot be read.
        """
        raise NotImplementedError
