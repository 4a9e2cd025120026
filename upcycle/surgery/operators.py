"""Ways to make experts out of one dense MLP, and to start a router. Pure functions in registries by name.

An expert operator takes the leaves of one MLP and returns the same leaves with a leading expert axis:
`(group, num_experts, key) -> group`. A *leafwise* operator treats every leaf on its own, so that the caller may hand over one
at a time and never holds more.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from upcycle.errors import UserError

Group = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Operator:
    """An expert operator and what the executor must know of it."""

    make: Callable[[Group, int, jax.Array], dict[str, jax.Array]]
    leafwise: bool


def copy(group: Group, num_experts: int, key: jax.Array) -> dict[str, jax.Array]:
    """W_e = W for every expert: Sparse Upcycling (Komatsuzaki et al. 2023, section 2)."""
    del key
    return {name: jnp.broadcast_to(leaf[None], (num_experts, *leaf.shape)) for name, leaf in group.items()}


EXPERT_OPERATORS: dict[str, Operator] = {'copy': Operator(copy, leafwise=True)}


def normal(shape: tuple[int, ...], stddev: float, key: jax.Array) -> jax.Array:
    """Router weights ~ N(0, stddev^2), float32 (the paper: 0.02)."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


ROUTER_INITS: dict[str, Callable[[tuple[int, ...], float, jax.Array], jax.Array]] = {'normal': normal}


def look_up(registry: Mapping[str, object], name: str, binding: str):
    """The registered entry, or a UserError that names the binding and what there is."""
    if name not in registry:
        raise UserError(f'{binding} = {name!r} is not one of {", ".join(registry)}.')
    return registry[name]
