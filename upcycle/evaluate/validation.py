"""Loss, accuracy and routing metrics over a split, for the trainer and `upcycle eval`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from upcycle.errors import UserError
from upcycle.evaluate.protocol import Evaluator, Subject
from upcycle.models import Model, Params
from upcycle.models.losses import summarize
from upcycle.schema import Count

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Validation(Evaluator):
    """Means over the whole evaluation split, or over EVAL_STEPS batches of it.

    Attributes:
      period: training steps between evaluations [EVAL_PERIOD].
    """

    period: Count | None = None
    name: ClassVar[str] = 'validation'
    at_start: ClassVar[bool] = True

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, Any]]:
        """See `evaluate`."""
        step = compiled(subject.model)
        return lambda params: evaluate(step, params, subject.batches(self.name))


def eval_step(params: Params, batch: Batch, *, model: Model) -> Metrics:
    """Computes sums over one evaluation batch: `loss`, `z_loss`, `correct`, `weight`, and the MoE layers' metrics."""
    sums, moe_loss, moe_metrics = model.forward(params, batch, None, training=False, num_microbatches=1)
    return {**sums, 'moe_loss': moe_loss, 'moe': moe_metrics}


def compiled(model: Model) -> Callable[[Params, Batch], Metrics]:
    """Compiles `eval_step` once for all evaluations of a run."""
    return jax.jit(functools.partial(eval_step, model=model))


def evaluate(step: Callable[[Params, Batch], Metrics], params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
    """Computes means over the batches, as numpy arrays.

    Args:
      step: from `compiled`.
      params: of the model.
      batches: on the current mesh; rows that pad the last batch have weight 0.

    Returns:
      `loss` and `cross_entropy_loss`, both without the auxiliary losses, so that sparse and dense models can be compared;
      `accuracy` (for classifiers: precision at 1), `targets`, and routing metrics, which are means over batches.

    Raises:
      UserError: there are no batches.
    """
    total, count = None, 0
    for batch in batches:
        sums = jax.device_get(step(params, batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        count += 1
    if total is None:
        raise UserError('EVAL_DATASET has no batches: its split is empty, or EVAL_STEPS is 0.')
    total['moe'] = {name: value / count for name, value in total['moe'].items()}
    total['moe_loss'] = total['moe_loss'] / count
    means = {name: np.asarray(value) for name, value in summarize(total, total['weight']).items()}
    means['loss'] = means['cross_entropy_loss']
    return means
