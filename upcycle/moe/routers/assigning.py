"""The base class of routers that assign tokens to slots of experts."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import jax

from upcycle.moe.conventions import CapacityRule, Dispatch, Scores
from upcycle.moe.dispatch import combine, dispatch
from upcycle.moe.losses import routing_metrics
from upcycle.moe.routers.base import Routed
from upcycle.moe.routing import Across, Routing, Tokens, combine_weights, covered_tokens, here, prepare
from upcycle.schema import Count, Positive


class Assigned(NamedTuple):
    """A router's assignment of tokens to slots.

    Attributes:
      routing: the token in each slot.
      auxiliary_loss: balance loss, a scalar.
      dropped: share of choices without a slot, a scalar.
      followed: further metrics, which only update `moe.state`.
    """

    routing: Routing
    auxiliary_loss: jax.Array
    dropped: jax.Array
    followed: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Assigning(Routed):
    """Routers that assign tokens to slots of experts, by scores, a softmax over experts.

    Attributes:
      train_capacity_factor: slots of an expert in training, as a multiple of an even share of the tokens
        [TRAIN_EXPERT_CAPACITY_FACTOR].
      eval_capacity_factor: slots of an expert at evaluation, as such a multiple [EVAL_EXPERT_CAPACITY_FACTOR].
      capacity_rule: see `CapacityRule` [CAPACITY_RULE].
      min_capacity: the floor of the flaxformer rule; flaxformer's `min_expert_capacity`.
      normalize_combine_weights: divide a token's weights by their sum [NORMALIZE_COMBINE_WEIGHTS].
      dispatch: see `Dispatch` [DISPATCH].
      logit_normalization: standardises a token's logits and multiplies them by this number before the softmax; None for no
        normalization (Skywork-MoE: 1) [ROUTER_LOGIT_NORMALIZATION].
    """

    assigns = True
    # Why the router refuses DISPATCH = 'ragged', for the message; None if it has `TopK.route_dropless`.
    not_ragged: ClassVar[str | None] = 'this router puts tokens into slots'

    train_capacity_factor: Positive = 2.0
    eval_capacity_factor: Positive = 2.0
    capacity_rule: CapacityRule = CapacityRule.FLAXFORMER
    min_capacity: Count = 4
    normalize_combine_weights: bool = False
    dispatch: Dispatch = Dispatch.GATHER
    logit_normalization: Positive | None = None

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.leaves_the_rest and self.normalize_combine_weights:
            yield (
                "SHARED_WEIGHTS = 'xft' leaves the shared experts what the routed ones do not take, and "
                'NORMALIZE_COMBINE_WEIGHTS gives the routed ones all: turn it off.'
            )
        if self.dispatch is Dispatch.RAGGED and self.not_ragged is not None:
            yield f"DISPATCH = 'ragged' is dropless Top-K, and {self.not_ragged}: use 'gather', or the router 'top_k'."

    def in_words(self) -> str:
        weights = 'normalised' if self.normalize_combine_weights else 'raw'
        if self.dropless:
            return f'{self.num_experts} experts, {self._choice_in_words()}, dropless, {weights} weights'
        return (
            f'{self.num_experts} experts, {self._choice_in_words()}, cf={self.train_capacity_factor:g} ({self.capacity_rule} '
            f'rule), groups of at most {self.group_size} tokens, {weights} weights, {self.dispatch} dispatch'
        )

    @property
    def meets_every_slot(self) -> bool:
        return self.dispatch is Dispatch.EINSUM

    @property
    def can_normalize(self) -> bool:
        return not self.leaves_the_rest

    @property
    def dropless(self) -> bool:
        return self.dispatch is Dispatch.RAGGED

    @property
    def score_function(self) -> Scores:
        """See `Scores`."""
        return Scores.SOFTMAX

    @property
    def scale_of_weights(self) -> float:
        """Factor of combine weights."""
        return 1.0

    @property
    def choices_in_capacity(self) -> int:
        """Factor of a token in V-MoE's capacity rule."""
        return 1

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        """Returns C, the number of slots of one expert for one group, at most S.

        Rules of flaxformer's `moe_layers.py` (without a factor of K) and of vmoe's `nn/routing.py`.
        """
        factor = self.train_capacity_factor if training else self.eval_capacity_factor
        if self.capacity_rule is CapacityRule.FLAXFORMER:
            slots = max(round(factor * tokens_per_group / self.num_experts), self.min_capacity)
        else:
            exact = factor * self.choices_in_capacity * tokens_per_group / self.num_experts
            # A product such as 1.1 * 40 is slightly above the integer, which must not cost a slot.
            slots = -(-round(exact * 1e6) // 1_000_000)
            slots = -(-slots // 4) * 4
        return min(slots, tokens_per_group)

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        """Puts tokens into slots; arguments as for `route`, except scores instead of logits."""
        raise NotImplementedError

    def route(
        self,
        logits_GxSxN: jax.Array,
        real_GxS: jax.Array,
        capacity: int,
        across: Across = here,
        bias_E: jax.Array | None = None,
    ) -> tuple[Routing, dict[str, jax.Array]]:
        tokens = prepare(logits_GxSxN, real_GxS, self)
        routing, auxiliary_loss, dropped, followed = self.assign(tokens, capacity, across, bias_E)
        S = logits_GxSxN.shape[1]
        routing = combine_weights(routing, S, self)
        used_GxExC = routing.token_GxExC < S
        metrics = routing_metrics(
            tokens,
            across,
            used_E=used_GxExC.sum(axis=(0, 2)),
            slots=used_GxExC.size,
            covered=covered_tokens(routing, S).sum(),
            weight=routing.weight_GxExC.sum(),
        )
        return routing, {**followed, **metrics, 'auxiliary_loss': auxiliary_loss, 'fraction_dropped': dropped}

    def to_slots(self, x_GxSxD: jax.Array, routing: Routing) -> jax.Array:
        return dispatch(x_GxSxD, routing, self.dispatch, self.experts_of_a_token)

    def from_slots(self, y_ExGxCxD: jax.Array, routing: Routing, num_tokens: int) -> jax.Array:
        return combine(y_ExGxCxD, routing, num_tokens, self.dispatch, self.experts_of_a_token)

    def probabilities(self, logits_BxLxE: jax.Array, real_BxL: jax.Array) -> jax.Array:
        """Returns each token's probabilities of all experts; 0 for a token that may not be routed."""
        tokens = prepare(logits_BxLxE, real_BxL, self)
        return tokens.probs_GxSxE * tokens.may_route_GxS[..., None]
