"""Quality of an upcycled model before any training, against capacity factor and combine weights: the paper's Figure 15."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from upcycle.evaluate import validation
from upcycle.models import Model, Params

# Batches of the evaluation split that are looked at.
BATCHES = 4


def quality_at_step_0(
    model: Model, params: Params, batches: Callable[[], Iterable[validation.Batch]], factors: Sequence[float]
) -> list[dict[str, Any]]:
    """Evaluates the parameters as they are under other capacities, with raw and with normalised combine weights.

    Args:
      model: the sparse model.
      params: as surgery left them.
      batches: starts the evaluation split anew; its first `BATCHES` batches are used.
      factors: capacity factors.

    Returns:
      For each factor and each kind of weights: `capacity_factor`, `normalized`, `loss`, `accuracy`, and
      `fraction_tokens_left_behind`, the mean over MoE layers.
    """
    # A single expert with normalised weights has weight 1: that is no router, and no configuration of ours; nor is a shared
    # expert to which normalised weights leave nothing.
    single = not all(moe.can_normalize for moe in model.moe_layers().values())
    out = []
    for factor, normalized in itertools.product(factors, (False,) if single else (False, True)):
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
