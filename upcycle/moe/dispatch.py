"""Dispatch and combine: tokens to slots and back, in two implementations, of which `einsum` is the reference.

Slots are laid out expert first, (E, G, C, D), as experts and all-to-alls need them, so that nothing is transposed.
"""

import functools

import jax
import jax.numpy as jnp

from upcycle.moe.conventions import Dispatch
from upcycle.moe.routing import Routing


def masks(routing: Routing, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns a routing as flaxformer's `RouterMask`: dispatch mask (bool) and combine array, both (G, S, E, C)."""
    mask_GxSxExC = routing.token_GxExC[:, None] == jnp.arange(num_tokens)[None, :, None, None]
    return mask_GxSxExC, mask_GxSxExC * routing.weight_GxExC[:, None]


def dispatch(x_GxSxD: jax.Array, routing: Routing, how: Dispatch, longest: int) -> jax.Array:
    """Fills slots with their tokens.

    Args:
      x_GxSxD: tokens.
      routing: of these tokens.
      how: `gather` or `einsum`.
      longest: the most slots of one token.

    Returns:
      (E, G, C, D); empty slots hold zeros.
    """
    G, S, D = x_GxSxD.shape
    if how is Dispatch.GATHER:
        row_ExGxC = _rows(routing, S)
        return _take(x_GxSxD.reshape(G * S, D), row_ExGxC.reshape(-1), G * S, longest).reshape(*row_ExGxC.shape, D)
    mask_GxSxExC, _ = masks(routing, S)
    return jnp.einsum('gsd,gsec->egcd', x_GxSxD, mask_GxSxExC.astype(x_GxSxD.dtype))


def combine(y_ExGxCxD: jax.Array, routing: Routing, num_tokens: int, how: Dispatch, longest: int) -> jax.Array:
    """Sums each token's slots, weighted, in float32: (E, G, C, D) -> (G, S, D)."""
    _, G, _, D = y_ExGxCxD.shape
    if how is Dispatch.GATHER:
        weight_R = routing.weight_GxExC.swapaxes(0, 1).reshape(-1)
        row_R = _rows(routing, num_tokens).reshape(-1)
        y_TxD = _add(y_ExGxCxD.reshape(-1, D), weight_R, row_R, G * num_tokens, longest)
        return y_TxD.reshape(G, num_tokens, D)
    _, combine_GxSxExC = masks(routing, num_tokens)
    y_GxSxD = jnp.einsum('egcd,gsec->gsd', y_ExGxCxD.astype(jnp.float32), combine_GxSxExC)
    return y_GxSxD.astype(y_ExGxCxD.dtype)


def _rows(routing: Routing, num_tokens: int) -> jax.Array:
    """Returns each slot's row among (G * S) tokens, (E, G, C); one past the last row for empty slots."""
    G = routing.token_GxExC.shape[0]
    first_Gx1x1 = num_tokens * jnp.arange(G)[:, None, None]
    row_GxExC = jnp.where(routing.token_GxExC < num_tokens, first_Gx1x1 + routing.token_GxExC, G * num_tokens)
    return row_GxExC.swapaxes(0, 1)


# `_take` and `_add` are each other's transpose. Autodiff would transpose a gather to a scatter-add in the activations' type.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take(x_TxD: jax.Array, row_R: jax.Array, num_rows: int, longest: int) -> jax.Array:
    """Takes rows of x; zeros for the row past the last."""
    del num_rows, longest
    return x_TxD.at[row_R].get(mode='fill', fill_value=0)


def _take_forward(x_TxD, row_R, num_rows, longest):
    return _take(x_TxD, row_R, num_rows, longest), row_R


def _take_backward(num_rows, longest, row_R, dy_RxD):
    return _sum_of_slots(dy_RxD, jnp.ones(row_R.shape, jnp.float32), row_R, num_rows, longest), None


_take.defvjp(_take_forward, _take_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add(y_RxD: jax.Array, weight_R: jax.Array, row_R: jax.Array, num_rows: int, longest: int) -> jax.Array:
    """Sums the weighted slots of each of `num_rows` rows, (T, D)."""
    return _sum_of_slots(y_RxD, weight_R, row_R, num_rows, longest)


def _add_forward(y_RxD, weight_R, row_R, num_rows, longest):
    return _add(y_RxD, weight_R, row_R, num_rows, longest), (y_RxD, weight_R, row_R)


def _add_backward(num_rows, longest, kept, dout_TxD):
    y_RxD, weight_R, row_R = kept
    dout_RxD = dout_TxD.at[row_R].get(mode='fill', fill_value=0).astype(jnp.float32)
    dy_RxD = (weight_R[:, None] * dout_RxD).astype(y_RxD.dtype)
    return dy_RxD, (y_RxD.astype(jnp.float32) * dout_RxD).sum(axis=-1), None


_add.defvjp(_add_forward, _add_backward)


def _sum_of_slots(y_RxD: jax.Array, weight_R: jax.Array, row_R: jax.Array, num_rows: int, longest: int) -> jax.Array:
    return jax.lax.platform_dependent(
        y_RxD,
        weight_R,
        row_R,
        # A TPU adds scattered rows one after the other.
        tpu=functools.partial(sum_in_blocks, num_rows=num_rows, longest=longest),
        default=functools.partial(sum_scattered, num_rows=num_rows),
    )


def sum_scattered(y_RxD: jax.Array, weight_R: jax.Array, row_R: jax.Array, *, num_rows: int) -> jax.Array:
    """Sums weighted slots by row, (T, D), with a scatter-add in float32."""
    zeros_TxD = jnp.zeros((num_rows, y_RxD.shape[-1]), jnp.float32)
    return zeros_TxD.at[row_R].add(y_RxD.astype(jnp.float32) * weight_R[:, None], mode='drop').astype(y_RxD.dtype)


def sum_in_blocks(
    y_RxD: jax.Array, weight_R: jax.Array, row_R: jax.Array, *, num_rows: int, longest: int, block: int = 128
) -> jax.Array:
    """As `sum_scattered` without scatters: sorts slots by row and sums blocks with a one-hot product, linear in the slots.

    A block sums the runs of equal rows that start in its `block` slots. It also reads the next `longest` slots, where a run may
    end.
    """
    R, D = y_RxD.shape
    padding = -R % block
    row_R = jnp.pad(row_R, (0, padding), constant_values=num_rows)
    position_R = jnp.arange(R + padding, dtype=row_R.dtype)
    row_R, order_R = jax.lax.sort_key_val(row_R, position_R, is_stable=False)
    starts_R = row_R != jnp.pad(row_R[:-1], (1, 0), constant_values=-1)
    run_R = jnp.cumsum(starts_R.astype(jnp.int32))

    def windows(x_R: jax.Array, fill: int) -> jax.Array:
        """Returns every block's entries and the next `longest`, (R / block, block + longest)."""
        position = block * jnp.arange((R + padding) // block)[:, None] + jnp.arange(block + longest)
        return x_R.at[position].get(mode='fill', fill_value=fill)

    # Out of bounds reads zeros.
    slot_NxW = windows(order_R, R)
    z_NxWxD = y_RxD.at[slot_NxW].get(mode='fill', fill_value=0).astype(jnp.float32)
    z_NxWxD *= weight_R.at[slot_NxW].get(mode='fill', fill_value=0)[..., None]
    run_NxW = windows(run_R, -1)
    place_NxW = run_NxW - run_NxW[:, :1]
    mine_NxPxW = place_NxW[:, None] == jnp.arange(block)[:, None]
    sums_NxPxD = jnp.einsum(
        'npw,nwd->npd',
        mine_NxPxW.astype(y_RxD.dtype),
        z_NxWxD.astype(y_RxD.dtype),
        preferred_element_type=jnp.float32,
        precision='highest',
    ).astype(y_RxD.dtype)
    # `searchsorted` would sort twice more, which costs the TPU compiler minutes in a deep model.
    nowhere = R + padding
    first_T = jnp.full(num_rows, nowhere).at[jnp.where(starts_R, row_R, num_rows)].set(position_R, mode='drop')
    covered_T = first_T < nowhere
    place_T = first_T // block * block + place_NxW[:, :block].reshape(-1).at[first_T].get(mode='fill', fill_value=0)
    return jnp.where(covered_T[:, None], sums_NxPxD.reshape(-1, D).at[place_T].get(mode='fill', fill_value=0), 0)
