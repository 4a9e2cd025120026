"""Quality of an upcycled model before training, by capacity factor and combine weights: the paper's Figure 15."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from upcycle.evaluate import validation
from upcycle.models import Model, Params

# Batches of the evaluation split that are used.
BATCHES = 4


def quality_at_step_0(
    model: Model, params: Params, batches: Callable[[], Iterable[validation.Batch]], factors: Sequence[float]
) -> list[dict[str, Any]]:
    """Evaluates the parameters at several capacity factors, with raw and with normalised combine weights.

    Args:
      model: the sparse model.
      params: the result of the surgery.
      batches: returns a new pass over the evaluation split, of which the first `BATCHES` batches are used.
      factors: capacity factors.

    Returns:
      For each factor and kind of weights: `capacity_factor`, `normalized`, `loss`, `accuracy`, and
      `fraction_tokens_left_behind`, the mean over MoE layers.
    """
    # Some routers refuse normalised weights: a single expert would always have weight 1, and a shared expert weight 0.
    can_normalize = all(moe.can_normalize for moe in model.moe_layers().values())
    out = []
    for factor, normalized in itertools.product(factors, (False, True) if can_normalize else (False,)):
        variant = model.with_moe(eval_capacity_factor=float(factor), normalize_combine_weights=normalized)
        first = itertools.islice(batches(), BATCHES)
        metrics = validation.evaluate(validation.compiled(variant), params, first)
        out.append(
            {
                'capacity_factor': float(factor),
                'normalized': normalized,
                'loss': float(metrics['loss']),
                'accuracy': float(metrics['accuracy']),
                'fraction_tokens_left_behind': float(metrics['experts/fraction_tokens_left_behind']),
            }
        )
    return out
