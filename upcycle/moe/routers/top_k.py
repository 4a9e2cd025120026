"""Top-K: every token takes its best experts (Switch: K = 1; V-MoE; flaxformer), with or without slots."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.moe.conventions import AdaptiveBalance, BalanceLoss, Exchange, FillOrder, GroupScore, RouterType, Scores
from upcycle.moe.losses import auxiliary_loss_of, importance_load_loss, routing_metrics
from upcycle.moe.routers.assigning import Assigned, Assigning
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
from upcycle.schema import Count, Natural, Positive, Rate


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

    @property
    def weights_are_constant(self) -> bool:
        return self.num_selected_experts == 1 and self.normalize_combine_weights


@dataclasses.dataclass(frozen=True)
class TopK(TokenChoice):
    """Every token takes the K experts with the best scores.

    Attributes:
      router_bias: the router's linear layer has a bias (GPT-OSS) [ROUTER_BIAS].
      scores: see `Scores` [ROUTER_SCORES].
      correction_bias: experts are chosen by score plus a stored bias, which has no gradient and does not count in weights
        (DeepSeek-V3); it only changes with a `balance_bias_rate` [CORRECTION_BIAS].
      score_groups: experts are divided into this many groups of neighbours, and a token chooses among those of its best groups; 1
        for no groups [SCORE_GROUPS].
      selected_groups: number of those best groups [SELECTED_SCORE_GROUPS].
      group_score: see `GroupScore` [GROUP_SCORE].
      weight_scale: multiplies combine weights, normalised or not (DeepSeek's `routed_scaling_factor`) [ROUTED_WEIGHT_SCALE].
      balance_loss: see `BalanceLoss` [BALANCE_LOSS].
      balance_bias_rate: experts are chosen by score plus a bias, which each step raises (lowers) by this rate for experts
        with fewer (more) tokens than the mean; 0 for no bias (DeepSeek-V3: 0.001) [BALANCE_BIAS_RATE].
      adaptive_balance: multiplies each layer's balance loss by a weight that follows its dropped choices, see `AdaptiveBalance`;
        needs slots; None for a constant weight [ADAPTIVE_BALANCE].
      default_output_decay: an expert that does not take a token answers with the mean of its outputs, a running mean over steps
        with this decay, so that the router has a gradient for every expert; needs slots; None for no such answers
        [DEFAULT_OUTPUT_DECAY].
      gate_noise: adds normal noise of standard deviation gate_noise / E to the logits in training (V-MoE: 1) [GATE_NOISE].
      exchange: see `Exchange` [EXPERT_EXCHANGE].
      exchange_capacity_factor: rows of a device's buffer in an exchange, as a multiple of an even share of the choices
        [EXCHANGE_CAPACITY_FACTOR].
    """

    not_ragged = None

    router: RouterType = dataclasses.field(default=RouterType.TOP_K, init=False)
    router_bias: bool = False
    scores: Scores = Scores.SOFTMAX
    correction_bias: bool = False
    score_groups: Count = 1
    selected_groups: Count | None = None
    group_score: GroupScore = GroupScore.TOP_2
    weight_scale: Positive = 1.0
    balance_loss: BalanceLoss = BalanceLoss.SWITCH
    balance_bias_rate: Natural = 0.0
    adaptive_balance: AdaptiveBalance | None = None
    default_output_decay: Rate | None = None
    gate_noise: Natural = 0.0
    exchange: Exchange = Exchange.RING
    exchange_capacity_factor: Positive = 2.0

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
        if self.exchange is not Exchange.RING and not self.dropless:
            yield (
                f"EXPERT_EXCHANGE = '{self.exchange}' is for DISPATCH = 'ragged': slots, as of '{self.dispatch}', always travel "
                'by all-to-alls. Unset it.'
            )
        yield from self._invalid_groups()
        if self.balance_loss is BalanceLoss.IMPORTANCE_LOAD and (
            self.scores is Scores.SIGMOID or self.score_groups > 1 or self.correction_bias
        ):
            yield (
                "BALANCE_LOSS = 'importance_load' computes the load of the largest logits, which ROUTER_SCORES = 'sigmoid', "
                "SCORE_GROUPS and CORRECTION_BIAS do not choose by: use 'switch', or unset them."
            )
        if self.leaves_the_rest and self.weight_scale != 1:
            yield (
                "SHARED_WEIGHTS = 'xft' makes a token's weights sum to 1, which ROUTED_WEIGHT_SCALE = "
                f'{self.weight_scale:g} changes: set only one of them.'
            )
        if self.default_output_decay is None:
            return
        if self.normalize_combine_weights or self.leaves_the_rest:
            yield (
                'DEFAULT_OUTPUT_DECAY gives all experts, chosen or not, their probabilities as weights, which sum to 1: turn '
                "NORMALIZE_COMBINE_WEIGHTS and SHARED_WEIGHTS = 'xft' off."
            )
        if self.scores is Scores.SIGMOID or self.weight_scale != 1:
            yield (
                'DEFAULT_OUTPUT_DECAY gives all experts their probabilities as weights: unset ROUTER_SCORES and '
                'ROUTED_WEIGHT_SCALE.'
            )
        if self.dropless:
            yield (
                "DEFAULT_OUTPUT_DECAY averages experts' outputs, which DISPATCH = 'ragged' does not keep: use 'gather'."
            )

    def _invalid_groups(self) -> Iterator[str]:
        groups, selected, size = self.score_groups, self.selected_groups, self.num_experts // self.score_groups
        if self.num_experts % groups:
            yield f'SCORE_GROUPS = {groups} does not divide NUM_EXPERTS = {self.num_experts}: change one of them.'
        elif selected is None and groups > 1:
            yield f'SCORE_GROUPS = {groups} needs the number of groups that a token chooses from: set SELECTED_SCORE_GROUPS.'
        elif selected is not None and selected > groups:
            yield f'SELECTED_SCORE_GROUPS = {selected} must lie between 1 and SCORE_GROUPS = {groups}.'
        elif selected is not None and selected * size < self.num_selected_experts:
            yield (
                f'SELECTED_SCORE_GROUPS = {selected} groups hold {selected * size} experts, fewer than NUM_SELECTED_EXPERTS = '
                f'{self.num_selected_experts}: change one of them.'
            )
        elif groups > 1 and size < 2 and self.group_score is GroupScore.TOP_2:
            yield f"SCORE_GROUPS = {groups} are groups of one expert, which have no best two: set GROUP_SCORE = 'max'."

    def _choice_in_words(self) -> str:
        order = '' if self.dropless else f', {self.fill_order}'
        return f'Top-{self.num_selected_experts}{order}'

    @property
    def logits_have_bias(self) -> bool:
        return self.router_bias

    @property
    def score_function(self) -> Scores:
        return self.scores

    @property
    def scale_of_weights(self) -> float:
        return self.weight_scale

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
        if self.balance_bias_rate or self.correction_bias:
            shapes['bias'] = (self.num_experts,)
        if self.adaptive_balance is not None:
            shapes['loss_weight'] = ()
        if self.default_output_decay is not None:
            shapes['default_output'] = (self.num_experts, width)
        return shapes

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        expert_GxSxK = self._choose(tokens.scores_GxSxE, bias_E)
        routing, kept_GxSxK = fill_slots(
            tokens.scores_GxSxE, expert_GxSxK, tokens.may_route_GxS, capacity, self.fill_order
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
        chosen_GxSxK = self._choose(tokens.scores_GxSxE, bias_E)
        expert_GxSxK = jnp.where(tokens.may_route_GxS[..., None], chosen_GxSxK, E)
        weight_GxSxK = jnp.take_along_axis(tokens.scores_GxSxE, expert_GxSxK, axis=-1, mode='fill', fill_value=0)
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

    def _choose(self, score_GxSxE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
        """Returns the K experts of each token, (G, S, K)."""
        if bias_E is not None:
            score_GxSxE = score_GxSxE + jax.lax.stop_gradient(bias_E)
        if self.selected_groups not in (None, self.score_groups):
            score_GxSxE = jnp.where(self._in_best_groups(score_GxSxE), score_GxSxE, -jnp.inf)
        return decided(jax.lax.top_k(score_GxSxE, self.num_selected_experts)[1])

    def _in_best_groups(self, score_GxSxE: jax.Array) -> jax.Array:
        """Returns bool (G, S, E), True for experts of a token's best groups; N groups of neighbours.

        As `DeepseekV3TopkRouter` and `DeepseekV2TopkRouter` of transformers.
        """
        group_GxSxNxM = score_GxSxE.reshape(*score_GxSxE.shape[:2], self.score_groups, -1)
        best = 1 if self.group_score is GroupScore.MAX else 2
        of_group_GxSxN = jax.lax.top_k(group_GxSxNxM, best)[0].sum(axis=-1)
        selected_GxSxM = jax.lax.top_k(of_group_GxSxN, self.selected_groups)[1]
        is_in_GxSxN = jax.nn.one_hot(selected_GxSxM, self.score_groups, dtype=bool).any(axis=-2)
        return jnp.repeat(is_in_GxSxN, group_GxSxNxM.shape[-1], axis=-1)


def _share_of_choices(expert_GxSxK: jax.Array, may_route_GxS: jax.Array, num_experts: int, across: Across) -> jax.Array:
    """Returns each expert's share of all choices, dropped or not."""
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, num_experts)
    count_E = across(jnp.zeros(num_experts, jnp.int32).at[expert_GxSxK.reshape(-1)].add(1, mode='drop'))
    return count_E / jnp.maximum(count_E.sum(), 1)


def fill_slots(
    scores_GxSxE: jax.Array,
    expert_GxSxK: jax.Array,
    may_route_GxS: jax.Array,
    capacity: int,
    fill_order: FillOrder,
) -> tuple[Routing, jax.Array]:
    """Assigns slots to each token's chosen experts in `fill_order`, and drops choices of full experts.

    Returns:
      The routing, and bool (G, S, K), True for choices that have a slot.
    """
    G, S, E = scores_GxSxE.shape
    K = expert_GxSxK.shape[-1]
    # Tokens that may not be routed choose expert E, which does not exist, and so are not counted.
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, E)
    queue_GxSxK = expert_GxSxK
    if fill_order is FillOrder.PRIORITY:
        best_GxS = jnp.where(may_route_GxS, scores_GxSxE.max(axis=-1), -1.0)
        order_GxS = jnp.argsort(-best_GxS, axis=-1)
        queue_GxSxK = jnp.take_along_axis(expert_GxSxK, order_GxS[..., None], axis=1)
    by_choice = (lambda x: x) if fill_order is FillOrder.TOKEN_MAJOR else (lambda x: x.swapaxes(1, 2))
    queue = by_choice(queue_GxSxK)
    asked_GxNxE = jax.nn.one_hot(queue.reshape(G, S * K), E, dtype=jnp.int32)
    slot_GxN = jnp.sum(jnp.cumsum(asked_GxNxE, axis=1) * asked_GxNxE, axis=-1) - 1
    slot_GxSxK = by_choice(slot_GxN.reshape(queue.shape))
    if fill_order is FillOrder.PRIORITY:
        slot_GxSxK = jnp.take_along_axis(slot_GxSxK, jnp.argsort(order_GxS, axis=-1)[..., None], axis=1)
    kept_GxSxK = (expert_GxSxK < E) & (slot_GxSxK < capacity)

    def slots(expert_SxK, slot_SxK):
        token_SxK = jnp.broadcast_to(jnp.arange(S)[:, None], (S, K))
        # Out of bounds means dropped: a full expert, or expert E.
        return jnp.full((E, capacity), S).at[expert_SxK, slot_SxK].set(token_SxK, mode='drop')

    return weighed(decided(jax.vmap(slots)(expert_GxSxK, slot_GxSxK)), scores_GxSxE), kept_GxSxK
