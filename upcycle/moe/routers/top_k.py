"""Top-K: every token takes its best experts (Switch: K = 1; V-MoE; flaxformer), with or without slots."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.moe.conventions import AdaptiveBalance, BalanceLoss, FillOrder, RouterType
from upcycle.moe.losses import auxiliary_loss_of, importance_load_loss, routing_metrics
from upcycle.moe.routers.base import Assigned, Assigning
from upcycle.moe.routing import (
    CHOSEN,
    Across,
    Choices,
    Routing,
    Tokens,
    combine_weights,
    decided,
    here,
    prepare,
    weighed,
)
from upcycle.schema import Count, Natural, Rate


@dataclasses.dataclass(frozen=True)
class TokenChoice(Assigning):
    """Routers with which tokens take experts, in training or at inference.

    Attributes:
      num_selected_experts: K, experts of a token [NUM_SELECTED_EXPERTS].
      fill_order: see `FillOrder` [FILL_ORDER].
    """

    num_selected_experts: Count = 2
    fill_order: FillOrder = FillOrder.TOKEN_MAJOR

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.num_selected_experts > self.num_experts:
            yield (
                f'NUM_SELECTED_EXPERTS = {self.num_selected_experts} must lie between 1 and NUM_EXPERTS = {self.num_experts}.'
            )
        if self.num_selected_experts == 1 and self.normalize_combine_weights:
            yield (
                'NORMALIZE_COMBINE_WEIGHTS with NUM_SELECTED_EXPERTS = 1 makes every weight 1, so the router gets no gradient: '
                'turn it off, or select at least 2 experts.'
            )

    def looks_ahead(self, prefix: str = '') -> Iterator[str]:
        if self.fill_order is FillOrder.PRIORITY:
            yield (
                f"{prefix}FILL_ORDER = 'priority' lets later tokens evict earlier ones, which leaks the future in a causal "
                "stack: use 'token_major'."
            )

    @property
    def active_experts(self) -> float:
        return self.num_selected_experts

    @property
    def can_normalize(self) -> bool:
        return super().can_normalize and self.num_selected_experts > 1


@dataclasses.dataclass(frozen=True)
class TopK(TokenChoice):
    """Every token takes its K most probable experts.

    Attributes:
      balance_loss: see `BalanceLoss` [BALANCE_LOSS].
      balance_bias_rate: experts are chosen by probability plus a bias, which each step raises (lowers) by this rate for experts
        with fewer (more) tokens than the mean; 0 for no bias (DeepSeek-V3: 0.001) [BALANCE_BIAS_RATE].
      adaptive_balance: multiplies each layer's balance loss by a weight that follows its dropped choices, see `AdaptiveBalance`;
        needs slots; None for a constant weight [ADAPTIVE_BALANCE].
      default_output_decay: an expert that does not take a token answers with the mean of its outputs, a running mean over steps
        with this decay, so that the router has a gradient for every expert; needs slots; None for no such answers
        [DEFAULT_OUTPUT_DECAY].
      gate_noise: adds normal noise of standard deviation gate_noise / E to the logits in training (V-MoE: 1) [GATE_NOISE].
    """

    not_ragged = None

    router: RouterType = dataclasses.field(default=RouterType.TOP_K, init=False)
    balance_loss: BalanceLoss = BalanceLoss.SWITCH
    balance_bias_rate: Natural = 0.0
    adaptive_balance: AdaptiveBalance | None = None
    default_output_decay: Rate | None = None
    gate_noise: Natural = 0.0

    def __post_init__(self):
        if isinstance(self.adaptive_balance, Mapping):
            # From a checkpoint's JSON, perhaps of a later version.
            names = schema.parameters(AdaptiveBalance).keys() & self.adaptive_balance.keys()
            balance = AdaptiveBalance(**{name: self.adaptive_balance[name] for name in names})
            object.__setattr__(self, 'adaptive_balance', balance)
        super().__post_init__()

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.logit_normalization is not None and self.gate_noise:
            yield ("GATE_NOISE has the logits' scale, which ROUTER_LOGIT_NORMALIZATION removes: set only one of them.")
        if self.adaptive_balance is not None and self.dropless:
            yield (
                "ADAPTIVE_BALANCE follows dropped choices, and DISPATCH = 'ragged' drops none: set it to None, or use 'gather'."
            )
        if self.default_output_decay is None:
            return
        if self.normalize_combine_weights or self.leaves_the_rest:
            yield (
                'DEFAULT_OUTPUT_DECAY gives all experts, chosen or not, their probabilities as weights, which sum to 1: turn '
                "NORMALIZE_COMBINE_WEIGHTS and SHARED_WEIGHTS = 'xft' off."
            )
        if self.dropless:
            yield (
                "DEFAULT_OUTPUT_DECAY averages experts' outputs, which DISPATCH = 'ragged' does not keep: use 'gather'."
            )

    def _choice_in_words(self) -> str:
        return f'Top-{self.num_selected_experts}, {self.fill_order}'

    @property
    def experts_of_a_token(self) -> int:
        return self.num_selected_experts

    @property
    def choices_in_capacity(self) -> int:
        return self.num_selected_experts

    @property
    def noise_stddev(self) -> float:
        return self.gate_noise / self.num_experts

    def slots(self, num_tokens: int, *, training: bool) -> int:
        """Returns K rows for each token if dropless; otherwise as `MoE.slots`."""
        if self.dropless:
            return num_tokens * self.num_selected_experts
        return super().slots(num_tokens, training=training)

    def state_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.balance_bias_rate:
            shapes['bias'] = (self.num_experts,)
        if self.adaptive_balance is not None:
            shapes['loss_weight'] = ()
        if self.default_output_decay is not None:
            shapes['default_output'] = (self.num_experts, width)
        return shapes

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        expert_GxSxK = self._choose(tokens.probs_GxSxE, bias_E)
        routing, kept_GxSxK = fill_slots(
            tokens.probs_GxSxE, expert_GxSxK, tokens.may_route_GxS, capacity, self.fill_order
        )
        wanted = across(tokens.may_route_GxS.sum()) * self.num_selected_experts
        dropped = 1.0 - across(kept_GxSxK.sum()) / jnp.maximum(wanted, 1)
        followed = {}
        if bias_E is not None:
            followed = {CHOSEN: _share_of_choices(expert_GxSxK, tokens.may_route_GxS, self.num_experts, across)}
        return Assigned(routing, auxiliary_loss_of(tokens, expert_GxSxK, self, across), dropped, followed)

    def balance_loss_of(
        self, logits_GxSxE: jax.Array, noisy_GxSxE: jax.Array | None, real_GxS: jax.Array
    ) -> jax.Array | None:
        if self.balance_loss is not BalanceLoss.IMPORTANCE_LOAD:
            return None
        return importance_load_loss(logits_GxSxE, noisy_GxSxE, real_GxS, self)

    def route_dropless(
        self, logits_GxSxE: jax.Array, real_GxS: jax.Array, bias_E: jax.Array | None = None
    ) -> tuple[Choices, dict[str, jax.Array]]:
        """Routes without slots: every token goes to all K experts that it chose; see `route`.

        Routing is token by token, so the compiler partitions it, and sums are over all groups.
        """
        tokens = prepare(logits_GxSxE, real_GxS, self)
        _, S, E = logits_GxSxE.shape
        chosen_GxSxK = self._choose(tokens.probs_GxSxE, bias_E)
        expert_GxSxK = jnp.where(tokens.may_route_GxS[..., None], chosen_GxSxK, E)
        weight_GxSxK = jnp.take_along_axis(tokens.probs_GxSxE, expert_GxSxK, axis=-1, mode='fill', fill_value=0)
        choices = combine_weights(Choices(expert_GxSxK, weight_GxSxK), S, self)
        used_E = jnp.zeros(E, jnp.int32).at[expert_GxSxK.reshape(-1)].add(1, mode='drop')
        metrics = routing_metrics(
            tokens,
            here,
            used_E=used_E,
            slots=used_E.sum(),
            covered=tokens.may_route_GxS.sum(),
            weight=choices.weight_GxSxK.sum(),
        )
        if bias_E is not None:
            metrics[CHOSEN] = metrics['load']
        return choices, metrics | {
            'auxiliary_loss': auxiliary_loss_of(tokens, chosen_GxSxK, self, here),
            'fraction_dropped': jnp.zeros(()),
        }

    def _choose(self, probs_GxSxE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
        """Returns the K experts of each token, (G, S, K)."""
        score_GxSxE = probs_GxSxE if bias_E is None else probs_GxSxE + jax.lax.stop_gradient(bias_E)
        return decided(jax.lax.top_k(score_GxSxE, self.num_selected_experts)[1])


def _share_of_choices(expert_GxSxK: jax.Array, may_route_GxS: jax.Array, num_experts: int, across: Across) -> jax.Array:
    """Returns each expert's share of all choices, dropped or not."""
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, num_experts)
    count_E = across(jnp.zeros(num_experts, jnp.int32).at[expert_GxSxK.reshape(-1)].add(1, mode='drop'))
    return count_E / jnp.maximum(count_E.sum(), 1)


def fill_slots(
    probs_GxSxE: jax.Array,
    expert_GxSxK: jax.Array,
    may_route_GxS: jax.Array,
    capacity: int,
    fill_order: FillOrder,
) -> tuple[Routing, jax.Array]:
    """Assigns slots to each token's chosen experts in `fill_order`, and drops choices of full experts.

    Returns:
      The routing, and bool (G, S, K), True for choices that have a slot.
    """
    G, S, E = probs_GxSxE.shape
    K = expert_GxSxK.shape[-1]
    # Tokens that may not be routed choose expert E, which does not exist, and so are not counted.
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, E)
    queue_GxSxK = expert_GxSxK
    if fill_order is FillOrder.PRIORITY:
        best_GxS = jnp.where(may_route_GxS, probs_GxSxE.max(axis=-1), -1.0)
        order_GxS = jnp.argsort(-best_GxS, axis=-1)
        queue_GxSxK = jnp.take_along_axis(expert_GxSxK, order_GxS[..., None], axis=1)
    if fill_order is FillOrder.TOKEN_MAJOR:
        queue_GxN = queue_GxSxK.reshape(G, S * K)
    else:
        queue_GxN = queue_GxSxK.swapaxes(1, 2).reshape(G, K * S)
    asked_GxNxE = jax.nn.one_hot(queue_GxN, E, dtype=jnp.int32)
    slot_GxN = jnp.sum(jnp.cumsum(asked_GxNxE, axis=1) * asked_GxNxE, axis=-1) - 1
    if fill_order is FillOrder.TOKEN_MAJOR:
        slot_GxSxK = slot_GxN.reshape(G, S, K)
    else:
        slot_GxSxK = slot_GxN.reshape(G, K, S).swapaxes(1, 2)
    if fill_order is FillOrder.PRIORITY:
        slot_GxSxK = jnp.take_along_axis(slot_GxSxK, jnp.argsort(order_GxS, axis=-1)[..., None], axis=1)
    kept_GxSxK = (expert_GxSxK < E) & (slot_GxSxK < capacity)

    def slots(expert_SxK, slot_SxK):
        token_SxK = jnp.broadcast_to(jnp.arange(S)[:, None], (S, K))
        # Out of bounds means dropped: a full expert, or expert E.
        return jnp.full((E, capacity), S).at[expert_SxK, slot_SxK].set(token_SxK, mode='drop')

    return weighed(decided(jax.vmap(slots)(expert_GxSxK, slot_GxSxK)), probs_GxSxE), kept_GxSxK
