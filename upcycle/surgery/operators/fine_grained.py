"""Operators that make experts narrower than the dense MLP."""

import dataclasses
import enum
from collections.abc import Sequence

import jax

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import Leaf, Leaves, Operator, check_fraction, key_for
from upcycle.surgery.operators.dense import reinitialise


class GranularScale(enum.StrEnum):
    """How weights are scaled to compensate for cutting the MLP into G shards."""

    OUTPUT = 'output'  # output matrix times G: equals the dense MLP if combine weights sum to 1
    NVIDIA = 'nvidia'  # a factor of at least G, spread evenly over all matrices, as in the paper
    NONE = 'none'


@dataclasses.dataclass(frozen=True)
class Granular(Operator):
    """Fine-grained upcycling (He et al. 2024, arXiv 2410.07524, sections 3.2 to 3.4; Megatron-LM's `upcycling_utils.py`).

    The MLP is cut along F into G shards, and E / G copies of each become the E experts: expert v * G + g is shard g of the
    virtual group v. With virtual groups, all G experts of a group share a router column, so Top-T with T a multiple of G selects
    whole copies of the MLP.

    If a token's combine weights sum to s, its shards compute s / G of the MLP. s is 1 with normalised weights (the paper's
    topK-then-softmax), and T / E while a raw softmax is uniform. The scale c = G / s corrects this. `nvidia` multiplies each of
    the n consecutive matrices (and the hidden bias) by the n-th root of c: a cube root for gated MLPs, a square root for plain
    ones. Activations such as GELU are not homogeneous, so this preserves the function only roughly. `output` multiplies only the
    output matrix, by G, and preserves the function exactly if s = 1.

    Attributes:
      shards: G [EXPERT_GRANULARITY].
      scale: see `GranularScale` [GRANULAR_SCALE].
      virtual_groups: the shards of a copy share a router column [GRANULAR_VIRTUAL_GROUPS].
      normalized: combine weights sum to 1 [NORMALIZE_COMBINE_WEIGHTS].
      num_selected_experts: T of Top-K; for Expert Choice, the capacity factor [NUM_SELECTED_EXPERTS].
    """

    name = 'granular'
    keeps_shape = False

    shards: int = 2
    scale: GranularScale = GranularScale.OUTPUT
    virtual_groups: bool = True
    normalized: bool = True
    num_selected_experts: int = 2

    def __post_init__(self):
        object.__setattr__(self, 'scale', one_of(GranularScale, self.scale, 'GRANULAR_SCALE'))
        if not isinstance(self.shards, int) or self.shards < 2:
            raise UserError(
                f'EXPERT_GRANULARITY = {self.shards!r} must be an integer of at least 2 for EXPERT_OPERATOR = {self.name!r}: '
                'raise it, or use another operator.'
            )

    def check(self, num_experts: int, num_mlps: int) -> None:
        if num_experts % self.shards:
            raise UserError(
                f'NUM_EXPERTS = {num_experts} is not a multiple of EXPERT_GRANULARITY = {self.shards}: change one of them, so '
                'that every copy of the MLP has all shards.'
            )

    def source_shape(self, leaf: Leaf) -> tuple[int, ...]:
        shape = list(leaf.shape)
        if leaf.width_axis is not None:
            shape[leaf.width_axis] *= self.shards
        return tuple(shape)

    def router_columns(self, num_experts: int) -> tuple[int, ...]:
        return tuple(e // self.shards if self.virtual_groups else e for e in range(num_experts))

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        axis = mlp[name].width_axis
        if axis is not None:
            width = mlp[name].shape[axis]
            w = jax.lax.dynamic_slice_in_dim(w, (index % self.shards) * width, width, axis)
        return w * self._factor(name, mlp)

    def _factor(self, name: str, mlp: Leaves) -> float:
        if self.scale is GranularScale.NONE:
            return 1.0
        if self.scale is GranularScale.OUTPUT:
            return float(self.shards) if mlp[name].is_output else 1.0
        c = self.shards if self.normalized else mlp[name].num_experts * self.shards / self.num_selected_experts
        if mlp[name].width_axis is None:
            # Every selected expert adds the whole output bias.
            return c / self.shards
        return c ** (1 / sum(leaf.is_kernel for leaf in mlp.values()))


@dataclasses.dataclass(frozen=True)
class Partial(Granular):
    """Partly reinitialised fine-grained experts, as in Qwen1.5-MoE (report of March 2024; arXiv 2410.07524, section 3.8).

    The MLP is replicated, the neurons of each replica are shuffled and cut into G shards, and a part of each expert's neurons is
    reinitialised. Qwen did not publish the distribution; here it is that of `Drop`. With ratio 0 the result is `Granular` with
    the neurons in another order.

    Attributes:
      ratio: fraction of an expert's neurons that are reinitialised; one half in later accounts of Qwen's method [PARTIAL_RATIO].
    """

    name = 'partial'

    ratio: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_fraction('PARTIAL_RATIO', self.ratio)

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        axis = mlp[name].width_axis
        if axis is not None:
            replica_key = jax.random.fold_in(key_for(key, 'shuffle'), index // self.shards)
            w = w.take(jax.random.permutation(replica_key, w.shape[axis]), axis)
        shard = super().make(name, [w], mlp, index, key)
        return reinitialise(name, shard, mlp[name], self.ratio, jax.random.fold_in(key, index), shared=True)
