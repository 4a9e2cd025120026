"""What a model costs: floating-point operations by component, parameters, bytes. A multiply-add counts as 2 operations."""

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from upcycle.moe.config import MoEConfig, RouterType, capacity, num_groups

# A backward pass costs two forward ones: one for the inputs' gradient, one for the weights'.
TRAIN_OVER_FORWARD = 3.0


def matmul(rows: int, inner: int, columns: int) -> float:
    """FLOPs of (rows, inner) @ (inner, columns)."""
    return 2.0 * rows * inner * columns


def attention(batch: int, queries: int, keys: int, width: int, heads_width: int, *, project_keys: bool = True) -> float:
    """FLOPs of one attention layer: four projections, the scores and the weighted sum."""
    projections = 2 * matmul(batch * queries, width, heads_width)
    if project_keys:
        projections += 2 * matmul(batch * keys, width, heads_width)
    return projections + 2 * batch * matmul(queries, heads_width, keys)


def mlp(tokens: int, width: int, mlp_width: int, matrices: int) -> float:
    """FLOPs of an MLP of that many matrices (3 when gated) on that many tokens."""
    return matrices * matmul(tokens, width, mlp_width)


def moe(config: MoEConfig, tokens: int, width: int, mlp_width: int, matrices: int, *, training: bool) -> float:
    """FLOPs of one MoE layer: its router, its experts on every slot (full or not), and the weighting of their outputs."""
    groups = num_groups(tokens, config.group_size, config.groups_multiple_of)
    slots = groups * config.num_experts * capacity(config, tokens // groups, training=training)
    return matmul(tokens, width, config.num_experts) + mlp(slots, width, mlp_width, matrices) + 2.0 * slots * width


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def num_active_parameters(params: Any, moe_layers: dict[str, MoEConfig]) -> float:
    """Parameters that one token passes through: of the experts, K of E for Top-K, the capacity factor of E for Expert Choice."""
    active = 0.0
    for path, leaf in flatten_dict(params, sep='/').items():
        share = 1.0
        for layer, config in moe_layers.items():
            if path.startswith(f'{layer}/expert/'):
                top_k = config.router is RouterType.TOP_K
                per_token = config.num_selected_experts if top_k else config.train_capacity_factor
                share = min(per_token / config.num_experts, 1.0)
        active += share * math.prod(leaf.shape)
    return active


def num_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
