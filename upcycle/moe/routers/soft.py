"""Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from upcycle.errors import UserError
from upcycle.moe.conventions import RoutePadding, RouterType
from upcycle.moe.groups import num_groups
from upcycle.moe.losses import entropy, mean_over
from upcycle.moe.routers.base import Routed
from upcycle.moe.routing import Across, Mixing, here
from upcycle.schema import Count


@dataclasses.dataclass(frozen=True)
class Soft(Routed):
    """Slots are means over the tokens of a group, tokens means over its slots: nothing is dropped, never causal.

    Attributes:
      slots_per_expert: slots of an expert in a group [SLOTS_PER_EXPERT].
    """

    cosine = True

    router: RouterType = dataclasses.field(default=RouterType.SOFT, init=False)
    slots_per_expert: Count = 1

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.leaves_the_rest:
            yield (
                "SHARED_WEIGHTS = 'xft' gives shared experts the rest of a token's weight, and the router 'soft' leaves none: "
                "use 'one'."
            )

    def looks_ahead(self, prefix: str = '') -> Iterator[str]:
        yield (
            f"{prefix}ROUTER = 'soft' mixes every token with later ones, which leaks the future in a causal stack: use 'top_k'."
        )

    def _choice_in_words(self) -> str:
        return f'Soft MoE, {self.slots_per_expert} slots an expert'

    @property
    def num_logits(self) -> int:
        return self.num_experts * self.slots_per_expert

    @property
    def meets_every_slot(self) -> bool:
        return True

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        return self.slots_per_expert

    def check_examples(self, num_tokens: int, length: int, way_out: str) -> None:
        """Raises UserError if groups hold parts of several examples, since a slot is a mean over its group."""
        size = num_tokens // num_groups(num_tokens, self.group_size, self.groups_multiple_of)
        if length % size:
            raise UserError(
                f"the router 'soft' would mix examples: its groups have {size} tokens, an example has {length}. Set {way_out}."
            )

    def route(
        self,
        logits_GxSxN: jax.Array,
        real_GxS: jax.Array,
        capacity: int,
        across: Across = here,
        bias_E: jax.Array | None = None,
    ) -> tuple[Mixing, dict[str, jax.Array]]:
        """Computes the shares of tokens in slots and of slots in tokens (section 2.1); see `Routed.route`.

        Padding is in no slot and gets nothing, unless it is routed.
        """
        logits_GxSxN = logits_GxSxN.astype(jnp.float32)
        if self.route_padding is RoutePadding.ROUTE:
            real_GxS = jnp.ones_like(real_GxS)
        real_GxSx1 = real_GxS[..., None]
        # The smallest number instead of -inf, so that a group of padding only has no nan.
        dispatch_GxSxN = jax.nn.softmax(jnp.where(real_GxSx1, logits_GxSxN, jnp.finfo(jnp.float32).min), axis=1)
        combine_GxSxN = jax.nn.softmax(logits_GxSxN, axis=-1) * real_GxSx1
        share_GxSxE = combine_GxSxN.reshape(*combine_GxSxN.shape[:2], self.num_experts, -1).sum(axis=-1)
        sum_E = across(share_GxSxE.sum(axis=(0, 1)))
        load_E = sum_E / jnp.maximum(sum_E.sum(), 1e-9)
        zero = jnp.zeros(())
        metrics = {
            'fraction_tokens_left_behind': zero,
            'router_confidence': jnp.ones(()),
            'expert_usage': jnp.ones(()),
            'router_entropy': mean_over(entropy(share_GxSxE), real_GxS, across),
            'load': load_E,
            'load_cv': jnp.std(load_E) * self.num_experts,
        }
        z_GxS = jnp.square(jax.nn.logsumexp(logits_GxSxN, axis=-1))
        return Mixing(dispatch_GxSxN, combine_GxSxN), jax.lax.stop_gradient(metrics) | {
            'router_z_loss': mean_over(z_GxS, real_GxS, across),
            'auxiliary_loss': zero,
            'fraction_dropped': zero,
        }

    def to_slots(self, x_GxSxD: jax.Array, routing: Mixing) -> jax.Array:
        G, _, D = x_GxSxD.shape
        x_GxNxD = jnp.einsum('gsd,gsn->gnd', x_GxSxD.astype(jnp.float32), routing.dispatch_GxSxN).astype(x_GxSxD.dtype)
        return x_GxNxD.reshape(G, self.num_experts, -1, D).swapaxes(0, 1)

    def from_slots(self, y_ExGxCxD: jax.Array, routing: Mixing, num_tokens: int) -> jax.Array:
        E, G, C, D = y_ExGxCxD.shape
        y_GxNxD = y_ExGxCxD.swapaxes(0, 1).reshape(G, E * C, D).astype(jnp.float32)
        return jnp.einsum('gnd,gsn->gsd', y_GxNxD, routing.combine_GxSxN).astype(y_ExGxCxD.dtype)
