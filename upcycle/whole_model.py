"""Compares the logits of a converted model with those of its dense source, if both fit into a little memory."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from upcycle.checkpoints import Reader
from upcycle.models import Model
from upcycle.streamed import Unread
from upcycle.surgery.make import Hidden
from upcycle.surgery.operators import Start
from upcycle.surgery.place import execute
from upcycle.surgery.plan import PARAMS, Plan
from upcycle.training.source_model import SourceModel

_LARGEST = 32 << 20  # parameters of both models together


def compare_logits(
    model: Model, plan: Plan, reader: Reader, leaves: Mapping[str, Any], hidden: Hidden | None = None
) -> dict[str, float] | None:
    """Makes the model in memory, in float32, and compares it with its source on the family's sample of inputs.

    Args:
      model: the sparse model.
      plan: of the surgery.
      reader: of one dense checkpoint.
      leaves: of the sparse model, with shardings.
      hidden: see `surgery.make.Maker`.

    Returns:
      The largest difference of logits and the largest logit of the source; None if the models are large, the family has no
      sample, or the operator starts from something else than one dense checkpoint.
    """
    inputs = model.sample_inputs()
    operator = plan.spec.operator
    rows = tuple(row for row in plan.rows if row.target.startswith(PARAMS))
    size = 2 * sum(math.prod(row.shape) for row in rows)
    if inputs is None or operator is None or operator.starts_from is not Start.DENSE or size > _LARGEST:
        return None
    shardings = {row.target: leaves[row.target].sharding for row in rows}
    states = None if hidden is None else lambda target, mlp: hidden(mlp)
    flat = execute(dataclasses.replace(plan, rows=rows), reader.read, shardings, new={}, hidden=states)
    source = SourceModel(model, plan, reader, leaves)
    params = jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, Unread) else leaf, source.params(flat))
    sparse = np.asarray(_logits(model, unflatten_dict(flat, sep='/')['params'], inputs))
    dense = np.asarray(_logits(source.model, params, inputs))
    return {'max_abs_difference': float(np.abs(sparse - dense).max()), 'max_abs': float(np.abs(dense).max())}


def _logits(model: Model, params: Any, inputs: Mapping[str, np.ndarray]) -> jax.Array:
    return jax.jit(model.with_dtype('float32').logits)(params, inputs)
