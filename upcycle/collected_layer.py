"""The comparison of an MoE layer with its dense MLP during a conversion."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from upcycle.checkpoints.direct import aligned_empty
from upcycle.models import Model
from upcycle.moe.conventions import Dispatch
from upcycle.moe.routers.top_k import TopK
from upcycle.surgery.make import Maker
from upcycle.surgery.plan import Action, Row, within_mlp
from upcycle.surgery.receipt import check_layer, compile_check

CHECKED_BYTES = 2 << 30  # larger MoE layers are only checked at the first load
CHECKED_TOKENS = 256
CHECKED_WITHOUT_CAPACITY = 8  # tokens, where they do not compete for slots


class CollectedLayer:
    """Collects one MoE layer while its experts are made, and compares it with its dense MLP.

    If all experts are equal and none can be full, as many are compared as a token takes, so that memory does not hold the others.

    Args:
      model: the sparse model.
      mlp: name of the MLP, 'params/...'.
      rows: the plan's rows of the MLP.
      alike: whether its experts are all equal, so that one is kept.
    """

    def __init__(self, model: Model, mlp: str, rows: list[Row], *, alike: bool):
        self.path = mlp.removeprefix('params/')
        moe = model.moe_layers()[self.path]
        self._alike = alike
        self._is_few = alike and isinstance(moe, TopK) and moe.dispatch is Dispatch.RAGGED and moe.score_groups == 1
        self._num_experts = moe.num_selected_experts if self._is_few else moe.num_experts
        self._model = model.with_moe(num_experts=self._num_experts) if self._is_few else model
        self._tokens = CHECKED_WITHOUT_CAPACITY if self._is_few else CHECKED_TOKENS
        self._experts = [row for row in rows if row.action is Action.EXPERTS]
        self._others = [row for row in rows if row.action is not Action.EXPERTS]
        self._stacks = {} if alike else {row.target: aligned_empty(row.shape, row.dtype) for row in self._experts}
        self._dense: dict[str, np.ndarray] = {}

    def keep(self, row: Row, index: int, value: np.ndarray) -> np.ndarray:
        """Stores an expert's leaf and returns the stored one."""
        if self._alike:
            self._stacks[row.target] = value
            return value
        self._stacks[row.target][index] = value
        return self._stacks[row.target][index]

    def is_whole(self, row: Row, dense: np.ndarray) -> bool:
        """Adds the dense leaf of a row whose experts are complete; returns whether all rows are."""
        self._dense[row.target] = dense
        return len(self._dense) == len(self._experts)

    def compile(self) -> None:
        """Compiles the comparison of equal experts."""
        dense, inside = {}, {}
        for row in self._experts:
            _, *shape = row.shape
            dense[within_mlp(row.target)] = jax.ShapeDtypeStruct(shape, jnp.float32)
            inside[self._name(row)] = jax.ShapeDtypeStruct((self._num_experts, *shape), jnp.float32)
        for row in self._others:
            name = self._name(row)
            shape = (*row.shape[:-1], self._num_experts) if self._is_cut(name) else row.shape
            inside[name] = jax.ShapeDtypeStruct(shape, row.dtype)
        compile_check(self._model, self.path, dense, inside, self._tokens)

    def result(self, maker: Maker, memory: dict[str, jax.Array]) -> dict[str, float]:
        """Computes the numbers of `surgery.receipt.LayerCheck`.

        Args:
          maker: makes the leaves that are not of experts.
          memory: arrays of the last check of equal experts, which this one uses again: the system needs longer for new pages than
            the check for its numbers.
        """
        inside = {self._name(row): jax.device_put(maker.leaf(row)) for row in self._others}
        inside |= {name: value[..., : self._num_experts] for name, value in inside.items() if self._is_cut(name)}
        dense: dict[str, jax.Array] = {}
        while self._experts:
            row = self._experts.pop()
            source, made = self._dense.pop(row.target), self._stacks.pop(row.target)
            name, within = self._name(row), within_mlp(row.target)
            if self._alike:
                dense[within] = _in_float32(memory, within, source, source.shape)
                one = dense[within] if made is source else made
                inside[name] = _in_float32(memory, name, one, (self._num_experts, *made.shape))
            else:  # not jax.numpy.asarray, which copies
                dense[within], inside[name] = jax.device_put(source), jax.device_put(made)
        return dataclasses.asdict(check_layer(self._model, self.path, dense, inside, self._tokens))

    def _is_cut(self, name: str) -> bool:
        """Whether a leaf has an entry for each expert on its last axis, of which the first ones are compared."""
        return self._is_few and name.startswith('router')

    def _name(self, row: Row) -> str:
        return row.target.removeprefix(f'params/{self.path}/')


def _in_float32(
    memory: dict[str, jax.Array], name: str, leaf: jax.Array | np.ndarray, shape: tuple[int, ...]
) -> jax.Array:
    """Overwrites an entry of `memory` with a leaf, repeated along a new first axis if the shape has one more."""
    old = memory.pop(name, None)
    if old is None or old.shape != shape:
        old = jnp.empty(shape, jnp.float32)
    memory[name] = _filled(old, leaf)
    return memory[name]


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _filled(memory: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.broadcast_to(leaf.astype(memory.dtype), memory.shape)
