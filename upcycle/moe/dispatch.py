"""Dispatch: tokens to slots and back. Two implementations of the same two functions; `einsum` is the reference.

Slots are laid out expert first, (E, G, C, D), as the experts and the network want them, so that nothing is transposed on the way.
"""

import jax
import jax.numpy as jnp

from upcycle.moe.config import Dispatch
from upcycle.moe.router import Routing


def masks(routing: Routing, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """One-hot form of a routing, flaxformer's `RouterMask`: dispatch mask (bool) and combine array, both (G, S, E, C)."""
    mask_GxSxExC = routing.token_GxExC[:, None] == jnp.arange(num_tokens)[None, :, None, None]
    return mask_GxSxExC, mask_GxSxExC * routing.weight_GxExC[:, None]


def dispatch(x_GxSxD: jax.Array, routing: Routing, how: Dispatch) -> jax.Array:
    """Puts every slot's token into its slot: (G, S, D) -> (E, G, C, D); empty slots hold zeros."""
    G, S, D = x_GxSxD.shape
    if how is Dispatch.GATHER:
        return x_GxSxD.reshape(G * S, D).at[_rows(routing, S)].get(mode='fill', fill_value=0)
    mask_GxSxExC, _ = masks(routing, S)
    return jnp.einsum('gsd,gsec->egcd', x_GxSxD, mask_GxSxExC.astype(x_GxSxD.dtype))


def combine(y_ExGxCxD: jax.Array, routing: Routing, num_tokens: int, how: Dispatch) -> jax.Array:
    """Weighted sum of each token's slots, accumulated in float32: (E, G, C, D) -> (G, S, D)."""
    _, G, _, D = y_ExGxCxD.shape
    if how is Dispatch.GATHER:
        weighted_ExGxCxD = y_ExGxCxD.astype(jnp.float32) * routing.weight_GxExC.swapaxes(0, 1)[..., None]
        zeros = jnp.zeros((G * num_tokens, D), jnp.float32)
        y_GxSxD = zeros.at[_rows(routing, num_tokens)].add(weighted_ExGxCxD, mode='drop').reshape(G, num_tokens, D)
    else:
        _, combine_GxSxExC = masks(routing, num_tokens)
        y_GxSxD = jnp.einsum('egcd,gsec->gsd', y_ExGxCxD.astype(jnp.float32), combine_GxSxExC)
    return y_GxSxD.astype(y_ExGxCxD.dtype)


def _rows(routing: Routing, num_tokens: int) -> jax.Array:
    """The row of (G * S) tokens in each slot, (E, G, C); one past the last row where the slot is empty."""
    G = routing.token_GxExC.shape[0]
    first_Gx1x1 = num_tokens * jnp.arange(G)[:, None, None]
    row_GxExC = jnp.where(routing.token_GxExC < num_tokens, first_Gx1x1 + routing.token_GxExC, G * num_tokens)
    return row_GxExC.swapaxes(0, 1)
