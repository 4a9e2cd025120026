"""What an MoE layer can be told, and the one place where nonsense is refused."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence

from upcycle.errors import UserError, one_of, refuse
from upcycle.schema import Count, Natural


class RouterType(enum.StrEnum):
    """Who chooses."""

    EXPERT_CHOICE = 'expert_choice'  # every expert takes its best tokens (Zhou et al. 2022); sees the whole group
    TOP_K = 'top_k'  # every token takes its best K experts (Switch: K = 1)
    SOFT = 'soft'  # nobody: every slot is a mean over tokens, every token a mean over slots (Soft MoE); never causal
    MERGED = 'merged'  # nobody: the layer is one MLP, a learned mean of its experts (XFT), on the way to a dense model
    DENSE = 'dense'  # in training everybody takes everybody; at inference Top-K, or who is above a threshold (DS-MoE)


class FillOrder(enum.StrEnum):
    """In what order Top-K choices claim the slots of an expert."""

    TOKEN_MAJOR = 'token_major'  # token by token: no token can evict an earlier one, so it is causal
    CHOICE_MAJOR = 'choice_major'  # every first choice, then every second one: flaxformer and V-MoE
    PRIORITY = 'priority'  # as choice_major, tokens sorted by their best probability (Batch Prioritised Routing)


class CapacityRule(enum.StrEnum):
    """How a capacity factor becomes a number of slots; the two originals differ."""

    FLAXFORMER = 'flaxformer'  # max(round(cf * S / E), 4)
    VMOE = 'vmoe'  # ceil(cf * [K *] S / E), up to a multiple of 4


class RoutePadding(enum.StrEnum):
    """What the router does with padding tokens."""

    SKIP = 'skip'  # padding takes no slot and no weight, and no metric counts it
    ROUTE = 'route'  # padding is a token like any other: flaxformer's default
    DOWN_WEIGHT = 'down_weight'  # flaxformer's `ignore_padding_tokens`: probability 0, still counted in its losses


class BalanceLoss(enum.StrEnum):
    """What keeps Top-K from sending all tokens to a few experts."""

    SWITCH = 'switch'  # Switch, eq. 4-6: flaxformer's
    IMPORTANCE_LOAD = 'importance_load'  # V-MoE's importance loss, and with GATE_NOISE its load loss
    MUTUAL_INFORMATION = 'mutual_information'  # DS-MoE's: sure about each token, even over all of them


class SharedWeights(enum.StrEnum):
    """How the shared experts and the routed ones add up."""

    ONE = 'one'  # the shared experts are added with weight 1 (DeepSeekMoE)
    XFT = 'xft'  # a token's routed weights add up to its largest probability, the shared experts get the rest of 1


@dataclasses.dataclass(frozen=True)
class AdaptiveBalance:
    """Skywork-MoE's weight of the balance loss, a layer at a time (Wei et al. 2024, arXiv 2406.06563, section 3.2).

    a <- decay * a + (1 - decay) * min(rate * d, largest), where d is the share of choices that found no slot; a starts at 0.

    Attributes:
      rate: xi, by which the share of dropped choices is multiplied.
      largest: a_max, the most that the weight moves towards.
      decay: beta, of the running mean.
    """

    rate: float = 0.2
    largest: float = 0.01
    decay: float = 0.99

    def __post_init__(self):
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        for binding, value in (('RATE', self.rate), ('LARGEST', self.largest)):
            if not value >= 0:
                yield f'ADAPTIVE_BALANCE_{binding} = {value!r} must be at least 0.'
        if not 0 <= self.decay < 1:
            yield f'ADAPTIVE_BALANCE_DECAY = {self.decay!r} must lie in [0, 1).'


class Dispatch(enum.StrEnum):
    """How tokens reach their experts."""

    GATHER = 'gather'  # by index: linear in the tokens
    EINSUM = 'einsum'  # by one-hot masks of (G, S, E, C): the reference
    RAGGED = 'ragged'  # dropless Top-K: rows sorted by expert, no capacity


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One stack's MoE layers. Gin macros in brackets.

    Attributes:
      num_experts: E, experts in every MoE layer [NUM_EXPERTS].
      router: see `RouterType`.
      train_capacity_factor: slots of an expert in training, as a multiple of an even share of the tokens
        [TRAIN_EXPERT_CAPACITY_FACTOR].
      eval_capacity_factor: slots of an expert at evaluation, likewise [EVAL_EXPERT_CAPACITY_FACTOR].
      num_selected_experts: K, experts that a token takes, for Top-K only [NUM_SELECTED_EXPERTS].
      group_size: the most tokens in a group, which compete for the same slots [GROUP_SIZE].
      groups_multiple_of: the number of groups in a batch is a multiple of this [GROUPS_MULTIPLE_OF]: of data x expert shards of
        the mesh. Neither is read from the mesh, so that a mesh never changes the maths.
      capacity_rule: see `CapacityRule` [CAPACITY_RULE].
      normalize_combine_weights: divide a token's weights by their sum [NORMALIZE_COMBINE_WEIGHTS].
      granularity: a dense MLP is so many times wider than an expert [EXPERT_GRANULARITY].
      num_shared_experts: experts that every token goes to, besides those that it is routed to; one MLP of their joint width
        [NUM_SHARED_EXPERTS].
      shared_weights: see `SharedWeights` [SHARED_WEIGHTS].
      fill_order: see `FillOrder`; for Top-K only [FILL_ORDER].
      route_padding: see `RoutePadding` [ROUTE_PADDING].
      dispatch: see `Dispatch` [DISPATCH].
      network_dtype: type in which activations cross the network between expert shards; None: that of the activations
        [NETWORK_DTYPE].
      jitter_noise: the router's input is multiplied by uniform(1 - jitter, 1 + jitter) in training [JITTER_NOISE].
      balance_loss: see `BalanceLoss`; for Top-K only [BALANCE_LOSS].
      balance_bias_rate: for Top-K only: experts are chosen by their probability plus a bias, which rises or falls by this much a
        step where an expert has fewer or more tokens than the mean; 0: none (DeepSeek-V3: 0.001) [BALANCE_BIAS_RATE].
      adaptive_balance: for Top-K with slots: the balance loss of a layer is multiplied by a weight that follows what it drops;
        None: it is not [ADAPTIVE_BALANCE].
      default_output_decay: for Top-K with slots: an expert that does not take a token answers with the mean of its outputs, which
        is averaged over steps with this decay, so that the router has a gradient for every expert; None: it does not answer
        [DEFAULT_OUTPUT_DECAY].
      slots_per_expert: slots of an expert in a group, of the router 'soft' [SLOTS_PER_EXPERT].
      merged_shared_weight: of the router 'merged', the share of shared experts in the mean [AVERAGE_SHARED_WEIGHT].
      inference_threshold: of the router 'dense': at inference experts of a higher probability take a token; None: Top-K does
        [INFERENCE_THRESHOLD].
      logit_normalization: a token's logits are centred, divided by their deviation and multiplied by this, before the softmax;
        None: not (Skywork-MoE: 1) [ROUTER_LOGIT_NORMALIZATION].
      gate_noise: normal noise of this standard deviation over E is added to the logits in training, for Top-K only (V-MoE: 1)
        [GATE_NOISE].
      router_init_stddev: standard deviation of the router's initialisation [ROUTER_INIT_STDDEV].
      min_capacity: the floor of the flaxformer rule; flaxformer's `min_expert_capacity`.
      causal: the layer sits in an auto-regressive stack, where no router may look at later tokens.
      num_microbatches: the trainer sets it, so that groups are those of the whole batch.
    """

    num_experts: int
    router: RouterType = RouterType.EXPERT_CHOICE
    train_capacity_factor: float = 2.0
    eval_capacity_factor: float = 2.0
    num_selected_experts: int = 2
    group_size: int = 4096
    groups_multiple_of: int = 1
    capacity_rule: CapacityRule = CapacityRule.FLAXFORMER
    normalize_combine_weights: bool = False
    granularity: int = 1
    num_shared_experts: int = 0
    shared_weights: SharedWeights = SharedWeights.ONE
    fill_order: FillOrder = FillOrder.TOKEN_MAJOR
    route_padding: RoutePadding = RoutePadding.SKIP
    dispatch: Dispatch = Dispatch.GATHER
    network_dtype: str | None = None
    jitter_noise: float = 0.0
    balance_loss: BalanceLoss = BalanceLoss.SWITCH
    balance_bias_rate: float = 0.0
    adaptive_balance: AdaptiveBalance | None = None
    default_output_decay: float | None = None
    slots_per_expert: int = 1
    merged_shared_weight: float = 0.75
    inference_threshold: float | None = None
    logit_normalization: float | None = None
    gate_noise: float = 0.0
    router_init_stddev: Natural = 0.02
    min_capacity: Count = 4
    causal: bool = False
    num_microbatches: int = 1

    @property
    def experts_of_a_token(self) -> int:
        """The most experts that can take one token."""
        return self.num_selected_experts if self.router is RouterType.TOP_K else self.num_experts

    def when(self, *, training: bool) -> 'MoEConfig':
        """What holds in training or at inference, where the two differ."""
        if self.router is not RouterType.DENSE:
            return self
        if training:
            return dataclasses.replace(self, inference_threshold=None)
        return self if self.inference_threshold is not None else dataclasses.replace(self, router=RouterType.TOP_K)

    def expert_width(self, mlp_dim: int) -> int:
        """F of one expert, where that of a dense MLP is `mlp_dim`."""
        if mlp_dim % self.granularity:
            raise UserError(
                f'EXPERT_GRANULARITY = {self.granularity} does not divide MLP_DIM = {mlp_dim}: change one of them.'
            )
        return mlp_dim // self.granularity

    def __post_init__(self):
        for field, kind, binding in (
            ('router', RouterType, 'router'),
            ('fill_order', FillOrder, 'FILL_ORDER'),
            ('capacity_rule', CapacityRule, 'CAPACITY_RULE'),
            ('route_padding', RoutePadding, 'ROUTE_PADDING'),
            ('shared_weights', SharedWeights, 'SHARED_WEIGHTS'),
            ('dispatch', Dispatch, 'DISPATCH'),
            ('balance_loss', BalanceLoss, 'BALANCE_LOSS'),
        ):
            object.__setattr__(self, field, one_of(kind, getattr(self, field), binding))
        if isinstance(self.adaptive_balance, Mapping):
            # As a checkpoint's JSON tells it.
            object.__setattr__(self, 'adaptive_balance', AdaptiveBalance(**self.adaptive_balance))
        refuse(invalid(self))


def invalid(config: MoEConfig) -> Iterator[str]:
    """What is wrong with a configuration, a sentence each."""
    yield from _of_every_router(config)
    if config.causal:
        yield from looks_ahead(config)
    by_router = {
        RouterType.MERGED: _of_merged,
        RouterType.SOFT: _of_soft,
        RouterType.EXPERT_CHOICE: _of_expert_choice,
    }
    yield from by_router.get(config.router, _of_choices)(config)


def _of_every_router(config: MoEConfig) -> Iterator[str]:
    for binding, value in (
        ('NUM_EXPERTS', config.num_experts),
        ('GROUP_SIZE', config.group_size),
        ('GROUPS_MULTIPLE_OF', config.groups_multiple_of),
        ('EXPERT_GRANULARITY', config.granularity),
        ('SLOTS_PER_EXPERT', config.slots_per_expert),
    ):
        if not isinstance(value, int) or value < 1:
            yield f'{binding} = {value!r} must be a whole number of at least 1.'
    for binding, value in (
        ('TRAIN_EXPERT_CAPACITY_FACTOR', config.train_capacity_factor),
        ('EVAL_EXPERT_CAPACITY_FACTOR', config.eval_capacity_factor),
    ):
        if not value > 0:
            yield f'{binding} = {value!r} gives the experts no room: set it above 0 (2.0 in the paper).'
    if not isinstance(config.num_shared_experts, int) or config.num_shared_experts < 0:
        yield f'NUM_SHARED_EXPERTS = {config.num_shared_experts!r} must be a number of experts, 0 or more.'
    if config.shared_weights is SharedWeights.XFT and not config.num_shared_experts:
        yield "SHARED_WEIGHTS = 'xft' needs a shared expert: set NUM_SHARED_EXPERTS."
    if config.shared_weights is SharedWeights.XFT and config.normalize_combine_weights:
        yield (
            "SHARED_WEIGHTS = 'xft' leaves the shared experts what the routed ones do not take, and "
            'NORMALIZE_COMBINE_WEIGHTS gives the routed ones all: turn it off.'
        )
    if not 0 <= config.jitter_noise < 1:
        yield f'JITTER_NOISE = {config.jitter_noise!r} must lie in [0, 1).'
    if not config.gate_noise >= 0:
        yield f'GATE_NOISE = {config.gate_noise!r} must be at least 0.'
    if not config.balance_bias_rate >= 0:
        yield f'BALANCE_BIAS_RATE = {config.balance_bias_rate!r} must be at least 0.'
    if config.logit_normalization is not None and not config.logit_normalization > 0:
        yield f'ROUTER_LOGIT_NORMALIZATION = {config.logit_normalization!r} must be above 0, or None.'
    if config.network_dtype not in (None, 'float32', 'bfloat16', 'float16'):
        yield f'NETWORK_DTYPE = {config.network_dtype!r} is not None, float32, bfloat16 or float16.'
    if config.router in (RouterType.SOFT, RouterType.MERGED) and config.logit_normalization is not None:
        yield (
            f"ROUTER_LOGIT_NORMALIZATION is of logits over experts, and the router '{config.router}' has none: set it to "
            'None.'
        )


def _of_merged(config: MoEConfig) -> Iterator[str]:
    if config.dispatch is Dispatch.RAGGED:
        yield ("DISPATCH = 'ragged' is dropless Top-K, and the router 'merged' routes nothing: use 'gather'.")
    if config.granularity > 1:
        yield (
            f'EXPERT_GRANULARITY = {config.granularity} makes experts that are parts of an MLP, whose mean is none: the '
            "router 'merged' needs whole ones."
        )
    if not 0 <= config.merged_shared_weight <= 1:
        yield f'AVERAGE_SHARED_WEIGHT = {config.merged_shared_weight!r} must lie in [0, 1].'


def _of_soft(config: MoEConfig) -> Iterator[str]:
    if config.dispatch is Dispatch.RAGGED:
        yield "DISPATCH = 'ragged' is dropless Top-K, and the router 'soft' has slots: use 'gather'."
    if config.shared_weights is SharedWeights.XFT:
        yield (
            "SHARED_WEIGHTS = 'xft' shares out what a router leaves, and the router 'soft' leaves nothing: use 'one'."
        )


def _of_expert_choice(config: MoEConfig) -> Iterator[str]:
    if config.gate_noise:
        yield (
            'GATE_NOISE balances Top-K, and Expert Choice is balanced by construction: set it to 0, or use the router '
            "'top_k'."
        )
    if config.dispatch is Dispatch.RAGGED:
        yield (
            "DISPATCH = 'ragged' is dropless Top-K, and Expert Choice has a fixed number of slots: use 'gather', or "
            "the router 'top_k'."
        )


def _of_choices(config: MoEConfig) -> Iterator[str]:
    """Of the routers by which a token takes its experts."""
    if not 1 <= config.num_selected_experts <= config.num_experts:
        yield (
            f'NUM_SELECTED_EXPERTS = {config.num_selected_experts!r} must lie between 1 and NUM_EXPERTS = '
            f'{config.num_experts}.'
        )
    if config.num_selected_experts == 1 and config.normalize_combine_weights:
        yield (
            'NORMALIZE_COMBINE_WEIGHTS with NUM_SELECTED_EXPERTS = 1 makes every weight 1, so that the router gets no '
            'gradient: turn it off, or select at least 2 experts.'
        )
    if config.router is RouterType.DENSE:
        for binding, value in (
            ('BALANCE_BIAS_RATE', config.balance_bias_rate),
            ('ADAPTIVE_BALANCE', config.adaptive_balance),
            ('DEFAULT_OUTPUT_DECAY', config.default_output_decay),
        ):
            if value:
                yield (
                    f"{binding} follows what Top-K chooses in training, where the router 'dense' trains every expert: "
                    'unset it.'
                )
    if config.logit_normalization is not None and config.gate_noise:
        yield (
            "GATE_NOISE has the logits' own scale, which ROUTER_LOGIT_NORMALIZATION takes away: set one of them only."
        )
    if config.router is RouterType.DENSE and config.dispatch is Dispatch.RAGGED:
        yield ("DISPATCH = 'ragged' is dropless Top-K, and the router 'dense' trains every expert: use 'gather'.")
    if config.inference_threshold is not None and not 0 < config.inference_threshold < 1:
        yield f'INFERENCE_THRESHOLD = {config.inference_threshold!r} must lie between 0 and 1, or be None.'
    if config.default_output_decay is not None:
        yield from _of_default_output(config)
    if config.adaptive_balance is not None and config.dispatch is Dispatch.RAGGED:
        yield (
            "ADAPTIVE_BALANCE follows what is dropped, and DISPATCH = 'ragged' drops nothing: set it to None, or use "
            "'gather'."
        )


def _of_default_output(config: MoEConfig) -> Iterator[str]:
    if not 0 <= config.default_output_decay < 1:
        yield f'DEFAULT_OUTPUT_DECAY = {config.default_output_decay!r} must lie in [0, 1), or be None.'
    if config.normalize_combine_weights or config.shared_weights is SharedWeights.XFT:
        yield (
            'DEFAULT_OUTPUT_DECAY lets experts that are not chosen answer with their own probabilities, which is all of the '
            "weight: turn NORMALIZE_COMBINE_WEIGHTS and SHARED_WEIGHTS = 'xft' off."
        )
    if config.dispatch is Dispatch.RAGGED:
        yield ("DEFAULT_OUTPUT_DECAY averages experts' outputs, which DISPATCH = 'ragged' does not keep: use 'gather'.")


def looks_ahead(config: MoEConfig, prefix: str = '') -> Iterator[str]:
    """Why a layer may not be in a causal stack, a sentence each: its routing would depend on later tokens.

    Args:
      config: of the layer.
      prefix: of the macros of its stack.
    """
    if config.router is RouterType.SOFT:
        yield (
            f"{prefix}ROUTER = 'soft' mixes every token with later ones, which leaks the future in a causal stack: use 'top_k'."
        )
    if config.router is RouterType.EXPERT_CHOICE:
        yield (
            f"{prefix}ROUTER = 'expert_choice' lets an expert compare a token with later ones, which leaks the future in a "
            "causal stack: use 'top_k'."
        )
    if config.router in (RouterType.TOP_K, RouterType.DENSE) and config.fill_order is FillOrder.PRIORITY:
        yield (
            f"{prefix}FILL_ORDER = 'priority' lets later tokens push earlier ones out of a causal stack's buffers: use "
            "'token_major'."
        )


def check_readers(layers: Sequence[MoEConfig]) -> Iterator[str]:
    """What is set for a kind of router that no layer of a model has, a sentence each."""
    routers = {layer.router for layer in layers}
    for binding, is_set, readers in (
        ('BALANCE_BIAS_RATE', any(c.balance_bias_rate for c in layers), {RouterType.TOP_K}),
        ('ADAPTIVE_BALANCE', any(c.adaptive_balance is not None for c in layers), {RouterType.TOP_K}),
        ('DEFAULT_OUTPUT_DECAY', any(c.default_output_decay is not None for c in layers), {RouterType.TOP_K}),
        (
            "BALANCE_LOSS = 'mutual_information'",
            any(c.balance_loss is BalanceLoss.MUTUAL_INFORMATION for c in layers),
            {RouterType.TOP_K, RouterType.DENSE},
        ),
        ('INFERENCE_THRESHOLD', any(c.inference_threshold is not None for c in layers), {RouterType.DENSE}),
    ):
        if is_set and not routers & readers:
            wanted = ' or '.join(f"'{router}'" for router in sorted(readers))
            have = ', '.join(sorted(routers))
            yield (
                f'{binding} is read by the router {wanted} only, and the MoE layers have {have}: leave it out, or change the '
                'router.'
            )
