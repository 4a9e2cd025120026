"""Dispatch: tokens to slots and back. Two implementations of the same two functions; `einsum` is the reference."""

import jax
import jax.numpy as jnp

from upcycle.moe.config import Dispatch
from upcycle.moe.router import Routing


def masks(routing: Routing, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """One-hot form of a routing, flaxformer's `RouterMask`: dispatch mask (bool) and combine array, both (G, S, E, C)."""
    mask_GxSxExC = routing.token_GxExC[:, None] == jnp.arange(num_tokens)[None, :, None, None]
    return mask_GxSxExC, mask_GxSxExC * routing.weight_GxExC[:, None]


def dispatch(x_GxSxD: jax.Array, routing: Routing, how: Dispatch) -> jax.Array:
    """Puts every slot's token into its slot: (G, S, D) -> (G, E, C, D); empty slots hold zeros."""
    if how is Dispatch.GATHER:
        return jax.vmap(lambda x, token: x.at[token].get(mode='fill', fill_value=0))(x_GxSxD, routing.token_GxExC)
    mask_GxSxExC, _ = masks(routing, x_GxSxD.shape[1])
    return jnp.einsum('gsd,gsec->gecd', x_GxSxD, mask_GxSxExC.astype(x_GxSxD.dtype))


def combine(y_GxExCxD: jax.Array, routing: Routing, num_tokens: int, how: Dispatch) -> jax.Array:
    """Weighted sum of each token's slots, accumulated in float32: (G, E, C, D) -> (G, S, D)."""
    if how is Dispatch.GATHER:
        weighted_GxExCxD = y_GxExCxD.astype(jnp.float32) * routing.weight_GxExC[..., None]

        def scatter(y_ExCxD, token_ExC):
            return jnp.zeros((num_tokens, y_ExCxD.shape[-1]), jnp.float32).at[token_ExC].add(y_ExCxD, mode='drop')

        y_GxSxD = jax.vmap(scatter)(weighted_GxExCxD, routing.token_GxExC)
    else:
        _, combine_GxSxExC = masks(routing, num_tokens)
        y_GxSxD = jnp.einsum('gecd,gsec->gsd', y_GxExCxD.astype(jnp.float32), combine_GxSxExC)
    return y_GxSxD.astype(y_GxExCxD.dtype)
