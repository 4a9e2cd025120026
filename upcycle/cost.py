"""Costs of a model: floating-point operations by component, parameters, bytes, core-days.

A multiply-add counts as 2 operations. Only matrix products and the weighting of experts' outputs are counted: no norms, softmax
or activations.
"""

import collections
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict

from upcycle.chips import CHIPS
from upcycle.moe.groups import num_groups
from upcycle.moe.routers.base import MoE

if TYPE_CHECKING:
    from upcycle.models import BatchSpec, Model

# A backward pass costs two forward ones: one for the inputs' gradient, one for the weights'.
TRAIN_OVER_FORWARD = 3.0


def matmul(rows: int, inner: int, columns: int) -> float:
    """Returns the FLOPs of (rows, inner) @ (inner, columns)."""
    return 2.0 * rows * inner * columns


def attention(batch: int, queries: int, keys: int, width: int, heads_width: int) -> float:
    """Returns the FLOPs of one attention layer: four projections, the scores and the weighted sum."""
    projections = 2 * matmul(batch * (queries + keys), width, heads_width)
    return projections + 2 * batch * matmul(queries, heads_width, keys)


def mlp(tokens: int, width: int, mlp_width: int, matrices: int) -> float:
    """Returns the FLOPs of an MLP with that many matrices (3 if gated)."""
    return matrices * matmul(tokens, width, mlp_width)


def moe(config: MoE, tokens: int, width: int, mlp_width: int, matrices: int, *, training: bool) -> dict[str, float]:
    """Returns the FLOPs of one MoE layer by component. Experts multiply all slots, full or not.

    Args:
      config: of the layer.
      tokens: of the batch.
      width: D.
      mlp_width: F of a dense MLP.
      matrices: of an MLP.
      training: selects the capacity factor.
    """
    if not config.routes:
        return {'experts': mlp(tokens, width, config.expert_width(mlp_width), matrices)}
    rows = config.slots(tokens, training=training)
    parts = routing(config, tokens, width, training=training)
    parts['experts'] = mlp(rows, width, config.expert_width(mlp_width), matrices)
    if config.num_shared_experts:
        parts['shared_experts'] = mlp(tokens, width, config.shared_width(mlp_width), matrices)
        if config.shared_gate:
            parts['shared_experts'] += matmul(tokens, width, 1)
    if config.meets_every_slot:
        groups = num_groups(tokens, config.group_size, config.groups_multiple_of)
        # Dispatch and combine multiply every token with every slot of its group.
        parts['combine'] = 2 * matmul(tokens, width, rows // groups)
    return parts


def routing(config: MoE, tokens: int, width: int, *, training: bool) -> dict[str, float]:
    """Returns the FLOPs of a router and of weighing experts' outputs; arguments as for `moe`."""
    return {
        'router': matmul(tokens, width, config.num_logits),
        'combine': 2.0 * config.slots(tokens, training=training) * width,
    }


def mlps(
    layers: Iterable[MoE | None], tokens: int, width: int, mlp_width: int, matrices: int, *, training: bool
) -> dict[str, float]:
    """Returns the FLOPs of all MLPs of a stack by component. A layer is its MoE, None if dense; other arguments as for `moe`."""
    total: collections.Counter[str] = collections.Counter()
    for layer in layers:
        if layer is None:
            total['mlp'] += mlp(tokens, width, mlp_width, matrices)
        else:
            total.update(moe(layer, tokens, width, mlp_width, matrices, training=training))
    return dict(total)


def forward_flops(model: 'Model', batch_spec: 'BatchSpec', *, training: bool) -> float:
    """Returns the FLOPs of one forward pass over a batch."""
    return sum(model.forward_flops(batch_spec, training=training).values())


def step_flops(model: 'Model', batch_spec: 'BatchSpec') -> float:
    """Returns the FLOPs of one training step, forward and backward. Rematerialised work is not counted, as usual."""
    return TRAIN_OVER_FORWARD * forward_flops(model, batch_spec, training=True)


# Peak of a TPU v4 core, FLOP/s in bfloat16, and the share of it that estimates assume. The paper counts in days of such cores.
TPU_V4_CORE = CHIPS['v4'].flops / CHIPS['v4'].cores
UTILIZATION = 0.4


def core_days(flops: float, core_flops_per_second: float, utilization: float) -> float:
    """Returns the core-days of that many FLOPs at a share (`utilization`) of a core's peak."""
    return flops / (core_flops_per_second * utilization) / 86400


def num_parameters(params: Any) -> int:
    """Counts the numbers in a tree of arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def num_active_parameters(params: Any, moe_layers: dict[str, MoE]) -> float:
    """Counts the parameters that one token uses: of E experts K for Top-K, cf for Expert Choice, all for Soft MoE."""
    active = 0.0
    for path, leaf in flatten_dict(params, sep='/').items():
        share = 1.0
        for layer, config in moe_layers.items():
            if path.startswith(f'{layer}/expert/'):
                share = min(config.active_experts / config.num_experts, 1.0)
        active += share * math.prod(leaf.shape)
    return active


def num_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or abstract arrays, in memory or in an uncompressed checkpoint."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on one device of a tree of (abstract) arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
