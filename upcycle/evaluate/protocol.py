"""What the trainer and `upcycle eval` know of an evaluator: a plug-in that looks at a model and returns numbers."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax

from upcycle import partitioning
from upcycle.data import DataSource
from upcycle.data.kept import Kept
from upcycle.models import Model, Params

Metrics = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, on the mesh in use.

    Attributes:
      model: of any family.
      data: the evaluation data; None: there is none.
      sharding: of batches.
      watch: sees the batches of each pass, with the name of the pass.
    """

    model: Model
    data: DataSource | None
    sharding: jax.sharding.NamedSharding
    watch: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, name: batches

    @functools.cached_property
    def _kept(self) -> Kept:
        return Kept(self.data)

    def batches(self, name: str) -> Iterator[dict[str, jax.Array]]:
        """One pass over the evaluation data; small data is read once for all passes."""
        yield from self.watch(partitioning.batches(self._kept, 0, self.sharding), name)


class Evaluator(Protocol):
    """One kind of evaluation.

    Attributes:
      name: under which its numbers are logged (`split` of a line of `metrics.jsonl`).
      period: steps between evaluations in training; None: after the last step only. All are due after the last step.
      at_start: whether it is due before the first step too.
      of_checkpoints: whether `upcycle eval` runs it.
    """

    name: str
    at_start: bool
    of_checkpoints: bool

    @property
    def period(self) -> int | None:
        """See above."""
        ...

    def check(self, model: Model, data: DataSource | None) -> None:
        """Raises UserError where this cannot be measured of the model on the data."""
        ...

    def check_data(self, data: DataSource | None) -> None:
        """Raises UserError where the data that is measured on is not there. No example is read."""
        ...

    def prepare(self, subject: Subject) -> Callable[[Params], Metrics]:
        """The evaluation as a function of the parameters. What takes long is done here once: programs are compiled, data is read.

        Raises:
          UserError: the data cannot be read.
        """
        ...
