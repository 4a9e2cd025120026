"""Loss, accuracy, bits per byte and routing metrics over a split, for the trainer and `upcycle eval`."""

import dataclasses
import functools
import math
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
# A data source's `target_bytes`.
CountBytes = Callable[[Batch], jax.Array | None]


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
        step = compiled(subject.model, getattr(subject.data, 'target_bytes', None))
        return lambda params: evaluate(step, params, subject.batches(self.name))


def eval_step(params: Params, batch: Batch, *, model: Model, target_bytes: CountBytes | None = None) -> Metrics:
    """Computes sums over one evaluation batch: `loss`, `z_loss`, `correct`, `weight`, and the MoE layers' metrics.

    For models that continue texts also `nll`, the negative log-likelihood of the targets in nats, and `bytes`, those of the
    targets' text, if `target_bytes` tells them.
    """
    sums, moe_loss, moe_metrics = model.forward(params, batch, None, training=False, num_microbatches=1)
    if model.prompts == 'continued':  # other losses may be smoothed
        sums = {**sums, 'nll': sums['loss'] - sums['z_loss']}
        if target_bytes is not None and (count := target_bytes(batch)) is not None:
            sums['bytes'] = count
    return {**sums, 'moe_loss': moe_loss, 'moe': moe_metrics}


def compiled(model: Model, target_bytes: CountBytes | None = None) -> Callable[[Params, Batch], Metrics]:
    """Compiles `eval_step` once for all evaluations of a run."""
    return jax.jit(functools.partial(eval_step, model=model, target_bytes=target_bytes))


def evaluate(step: Callable[[Params, Batch], Metrics], params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
    """Computes means over the batches, as numpy arrays.

    Args:
      step: from `compiled`.
      params: of the model.
      batches: on the current mesh; rows that pad the last batch have weight 0.

    Returns:
      `loss` and `cross_entropy_loss`, both without the auxiliary losses, so that sparse and dense models can be compared;
      `accuracy` (for classifiers: precision at 1), `targets`, and routing metrics, which are means over batches. For models that
      continue texts `perplexity`, exp of the mean over target tokens, and `bits_per_byte`, the negative log-likelihood of all
      targets in bits over the bytes of their text, if the data tell them.

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
    if 'nll' in total:
        means['perplexity'] = np.exp(np.float64(total['nll']) / max(total['weight'], 1e-9))
    if total.get('bytes'):
        means['bits_per_byte'] = np.float64(total['nll']) / (math.log(2) * total['bytes'])
    return means
