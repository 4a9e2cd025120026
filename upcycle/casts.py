"""Casts leaves of checkpoints and checks the result. No other module casts them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle.errors import UserError
from upcycle.warning import warn

Array = TypeVar('Array', np.ndarray, jax.Array)


def cast(name: str, value: Array, dtype: Any) -> Array:
    """Casts a leaf, or a part of one, and warns if all numbers underflow to 0. Rounding is not reported.

    Args:
      name: of the leaf, for messages.
      value: any shape; NaN and infinity are kept. Each process checks only its own part of a global array, and warns or raises
        alone.
      dtype: of the result.

    Raises:
      UserError: a finite number overflows, or an integer type cannot hold a number exactly.
    """
    old, new = jnp.dtype(value.dtype), jnp.dtype(dtype)
    if old == new:
        return value
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        # Each process checks its part without waiting for the others, one of which may have failed.
        if parts := [np.asarray(shard.data) for shard in value.addressable_shards if shard.replica_id == 0]:
            own = np.stack(parts)
            cast(name if own.size == value.size else f'{name} (the part of process {jax.process_index()})', own, dtype)
        return value.astype(new)
    (old_lowest, old_highest, old_least), (lowest, highest, least) = _limits(old), _limits(new)
    xp = jnp if isinstance(value, jax.Array) else np
    with np.errstate(over='ignore', invalid='ignore', under='ignore'):
        made = value.astype(new)
    whole = jnp.issubdtype(new, jnp.integer)
    if (old_lowest < lowest or old_highest > highest or (whole and old_least < 1)) and (
        count := _lost(xp, value, made, whole, lowest, highest)
    ):
        wide = value.astype(np.float64 if xp is np else np.float32)
        largest = float(xp.abs(xp.where(xp.isfinite(wide), wide, 0)).max())
        if value.size == 1:
            problem = f'{name} is {value.reshape(())}, which {new.name} cannot hold'
        else:
            problem = f'{name} holds {count} of {value.size} numbers that {new.name} cannot hold (the largest is {largest:.6g})'
        raise UserError(f'{problem}: {_way_out(name, new, largest)}.')
    if least > old_least and not whole and not bool(made.any()) and bool(value.any()):
        largest = float(xp.abs(value).max())
        warn(f'all numbers of {name} are too small for {new.name} (the largest is {largest:.3g}) and become 0.')
    return made


def require_finite_state(leaves: dict[str, Any], consequence: str) -> None:
    """Checks a state on the devices.

    Args:
      leaves: jax or numpy arrays by name.
      consequence: beginning of the message, such as 'step 7 is not saved'.

    Raises:
      UserError: a leaf holds NaN or infinity.
    """
    floating = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # A single program, because concurrent programs with collectives can deadlock on CPU devices.
    finite = jax.device_get(_are_finite(floating))
    if broken := [name for name, is_finite in finite.items() if not is_finite]:
        dtype = jnp.dtype(floating[broken[0]].dtype)
        more = f' (and {len(broken) - 1} more leaves)' if len(broken) > 1 else ''
        way_out = 'lower BASE_LEARNING_RATE'
        if dtype.itemsize < 4:
            way_out = f"bind the optimizer's momentum_dtype to a wider type than {dtype.name}, or {way_out}"
        raise UserError(
            f'{consequence}: {broken[0]}{more} holds numbers that are NaN, infinite or too large for {dtype.name}. Start '
            f'another run from the newest step, and {way_out}.'
        )


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def _lost(xp: Any, value: Any, made: Any, whole: bool, lowest: float, highest: float) -> int:
    """Counts the numbers that the new type cannot hold."""
    if whole:  # steps and clocks, which are replicated
        value = np.asarray(value)
        return int(np.count_nonzero(~((value >= lowest) & (value <= highest) & (value == np.trunc(value)))))
    finite = xp.isfinite(made)
    return 0 if bool(finite.all()) else int(xp.count_nonzero(~finite & xp.isfinite(value)))


def _limits(dtype: np.dtype) -> tuple[float, float, float]:
    """Returns the smallest and the largest number of a type, and its smallest positive number."""
    if dtype.kind == 'b':
        return 0, 1, 1
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return int(info.min), int(info.max), 1
    info = jnp.finfo(dtype)
    return float(info.min), float(info.max), float(info.smallest_subnormal)


def _way_out(name: str, dtype: np.dtype, largest: float) -> str:
    if jnp.issubdtype(dtype, jnp.integer):
        return 'leave the optimizer state out'
    if not name.startswith('params/'):
        return "bind the optimizer's momentum_dtype = 'float32', or start with OPTIMIZER_STATE = 'fresh'"
    wider = [f'--dtype={other}' for other in ('bfloat16', 'float32') if largest <= _limits(jnp.dtype(other))[1]]
    return f'use {" or ".join(wider)}' if wider else 'no type for weights can hold it'
