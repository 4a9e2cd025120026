"""What an MoE layer can be told, and the one place where nonsense is refused."""

import dataclasses
import enum
import math
import re
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
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        """What is wrong, a sentence each."""
        for binding, value in (
            ('NUM_EXPERTS', self.num_experts),
            ('GROUP_SIZE', self.group_size),
            ('GROUPS_MULTIPLE_OF', self.groups_multiple_of),
            ('EXPERT_GRANULARITY', self.granularity),
            ('SLOTS_PER_EXPERT', self.slots_per_expert),
        ):
            if not isinstance(value, int) or value < 1:
                yield f'{binding} = {value!r} must be a whole number of at least 1.'
        for binding, value in (
            ('TRAIN_EXPERT_CAPACITY_FACTOR', self.train_capacity_factor),
            ('EVAL_EXPERT_CAPACITY_FACTOR', self.eval_capacity_factor),
        ):
            if not value > 0:
                yield f'{binding} = {value!r} gives the experts no room: set it above 0 (2.0 in the paper).'
        if not isinstance(self.num_shared_experts, int) or self.num_shared_experts < 0:
            yield f'NUM_SHARED_EXPERTS = {self.num_shared_experts!r} must be a number of experts, 0 or more.'
        if self.shared_weights is SharedWeights.XFT and not self.num_shared_experts:
            yield "SHARED_WEIGHTS = 'xft' needs a shared expert: set NUM_SHARED_EXPERTS."
        if self.shared_weights is SharedWeights.XFT and self.normalize_combine_weights:
            yield (
                "SHARED_WEIGHTS = 'xft' leaves the shared experts what the routed ones do not take, and "
                'NORMALIZE_COMBINE_WEIGHTS gives the routed ones all: turn it off.'
            )
        if not 0 <= self.jitter_noise < 1:
            yield f'JITTER_NOISE = {self.jitter_noise!r} must lie in [0, 1).'
        if not self.gate_noise >= 0:
            yield f'GATE_NOISE = {self.gate_noise!r} must be at least 0.'
        if not self.balance_bias_rate >= 0:
            yield f'BALANCE_BIAS_RATE = {self.balance_bias_rate!r} must be at least 0.'
        if self.logit_normalization is not None and not self.logit_normalization > 0:
            yield f'ROUTER_LOGIT_NORMALIZATION = {self.logit_normalization!r} must be above 0, or None.'
        if self.network_dtype not in (None, 'float32', 'bfloat16', 'float16'):
            yield f'NETWORK_DTYPE = {self.network_dtype!r} is not None, float32, bfloat16 or float16.'
        if self.causal:
            yield from looks_ahead(self)
        if self.router in (RouterType.SOFT, RouterType.MERGED) and self.logit_normalization is not None:
            yield (
                f"ROUTER_LOGIT_NORMALIZATION is of logits over experts, and the router '{self.router}' has none: set it to "
                'None.'
            )
        if self.router is RouterType.MERGED:
            if self.dispatch is Dispatch.RAGGED:
                yield ("DISPATCH = 'ragged' is dropless Top-K, and the router 'merged' routes nothing: use 'gather'.")
            if self.granularity > 1:
                yield (
                    f'EXPERT_GRANULARITY = {self.granularity} makes experts that are parts of an MLP, whose mean is none: the '
                    "router 'merged' needs whole ones."
                )
            if not 0 <= self.merged_shared_weight <= 1:
                yield f'AVERAGE_SHARED_WEIGHT = {self.merged_shared_weight!r} must lie in [0, 1].'
            return
        if self.router is RouterType.SOFT:
            if self.dispatch is Dispatch.RAGGED:
                yield "DISPATCH = 'ragged' is dropless Top-K, and the router 'soft' has slots: use 'gather'."
            if self.shared_weights is SharedWeights.XFT:
                yield (
                    "SHARED_WEIGHTS = 'xft' shares out what a router leaves, and the router 'soft' leaves nothing: use 'one'."
                )
            return
        if self.router is RouterType.EXPERT_CHOICE:
            if self.gate_noise:
                yield (
                    'GATE_NOISE balances Top-K, and Expert Choice is balanced by construction: set it to 0, or use the router '
                    "'top_k'."
                )
            if self.dispatch is Dispatch.RAGGED:
                yield (
                    "DISPATCH = 'ragged' is dropless Top-K, and Expert Choice has a fixed number of slots: use 'gather', or "
                    "the router 'top_k'."
                )
            return
        if not 1 <= self.num_selected_experts <= self.num_experts:
            yield (
                f'NUM_SELECTED_EXPERTS = {self.num_selected_experts!r} must lie between 1 and NUM_EXPERTS = '
                f'{self.num_experts}.'
            )
        if self.num_selected_experts == 1 and self.normalize_combine_weights:
            yield (
                'NORMALIZE_COMBINE_WEIGHTS with NUM_SELECTED_EXPERTS = 1 makes every weight 1, so that the router gets no '
                'gradient: turn it off, or select at least 2 experts.'
            )
        if self.router is RouterType.DENSE:
            for binding, value in (
                ('BALANCE_BIAS_RATE', self.balance_bias_rate),
                ('ADAPTIVE_BALANCE', self.adaptive_balance),
                ('DEFAULT_OUTPUT_DECAY', self.default_output_decay),
            ):
                if value:
                    yield (
                        f"{binding} follows what Top-K chooses in training, where the router 'dense' trains every expert: "
                        'unset it.'
                    )
        if self.logit_normalization is not None and self.gate_noise:
            yield (
                "GATE_NOISE has the logits' own scale, which ROUTER_LOGIT_NORMALIZATION takes away: set one of them only."
            )
        if self.router is RouterType.DENSE and self.dispatch is Dispatch.RAGGED:
            yield ("DISPATCH = 'ragged' is dropless Top-K, and the router 'dense' trains every expert: use 'gather'.")
        if self.inference_threshold is not None and not 0 < self.inference_threshold < 1:
            yield f'INFERENCE_THRESHOLD = {self.inference_threshold!r} must lie between 0 and 1, or be None.'
        if self.default_output_decay is not None:
            yield from self._invalid_default_output()
        if self.adaptive_balance is not None and self.dispatch is Dispatch.RAGGED:
            yield (
                "ADAPTIVE_BALANCE follows what is dropped, and DISPATCH = 'ragged' drops nothing: set it to None, or use "
                "'gather'."
            )

    def _invalid_default_output(self) -> Iterator[str]:
        if not 0 <= self.default_output_decay < 1:
            yield f'DEFAULT_OUTPUT_DECAY = {self.default_output_decay!r} must lie in [0, 1), or be None.'
        if self.normalize_combine_weights or self.shared_weights is SharedWeights.XFT:
            yield (
                'DEFAULT_OUTPUT_DECAY lets experts that are not chosen answer with their own probabilities, which is all of the '
                "weight: turn NORMALIZE_COMBINE_WEIGHTS and SHARED_WEIGHTS = 'xft' off."
            )
        if self.dispatch is Dispatch.RAGGED:
            yield (
                "DEFAULT_OUTPUT_DECAY averages experts' outputs, which DISPATCH = 'ragged' does not keep: use 'gather'."
            )


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


def check_mixing(config: MoEConfig, num_tokens: int, length: int, way_out: str) -> None:
    """Refuses Soft MoE whose groups hold parts of several examples: a slot is a mean over all tokens of its group, so that an
    output would depend on the other examples of the batch.

    Args:
      config: of the layer.
      num_tokens: of a batch.
      length: of an example, in tokens.
      way_out: the binding that makes groups of whole examples.

    Raises:
      UserError: they do.
    """
    if config.router is not RouterType.SOFT:
        return
    size = num_tokens // num_groups(num_tokens, config.group_size, config.groups_multiple_of)
    if length % size:
        raise UserError(
            f"the router 'soft' would mix different examples: its groups are of {size} tokens, an example has {length}. Set "
            f'{way_out}.'
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


def sparse_layers(spec: str | Sequence[int], num_layers: int, binding: str) -> tuple[int, ...]:
    """Indices of the layers that are MoE layers.

    Args:
      spec: 'every_other' (1, 3, 5, ...: the paper's choice for language, flaxformer's MIXED layout with half of the layers
        sparse), 'last_half' (the paper's choice for vision), 'last_N' (the last N), 'none', or the indices themselves, 0-based.
      num_layers: of the stack.
      binding: the gin macro that holds `spec`, for the message.

    Raises:
      UserError: an unknown word, an index out of range, or one given twice.
    """
    if isinstance(spec, str):
        named = {
            'every_other': tuple(range(1, num_layers, 2)),
            'last_half': tuple(range(num_layers))[num_layers - num_layers // 2 :],
            'none': (),
        }
        if last := re.fullmatch(r'last_(\d+)', spec):
            count = int(last[1])
            if not 1 <= count <= num_layers:
                raise UserError(f'{binding} = {spec!r}, but the stack has {num_layers} layers.')
            return tuple(range(num_layers - count, num_layers))
        if spec not in named:
            raise UserError(
                f'{binding} = {spec!r} is not one of {", ".join(named)}, last_N or a list of layer indices.'
            )
        return named[spec]
    layers = tuple(spec)
    for layer in layers:
        if not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise UserError(
                f'{binding} names layer {layer!r}, but the stack has {num_layers} layers: indices go from 0 to {num_layers - 1}.'
            )
    if len(set(layers)) != len(layers):
        raise UserError(f'{binding} = {layers!r} names a layer twice.')
    return tuple(sorted(layers))


def num_groups(num_tokens: int, group_size: int, multiple_of: int = 1) -> int:
    """G: the smallest divisor of `num_tokens` that is >= num_tokens / group_size and a multiple of `multiple_of`.

    Follows flaxformer's `_num_groups`, with the multiple a binding instead of the mesh.

    Raises:
      UserError: no such divisor exists.
    """
    if num_tokens % multiple_of:
        raise UserError(
            f'GROUPS_MULTIPLE_OF = {multiple_of} does not divide the {num_tokens} tokens of a batch (BATCH_SIZE x sequence '
            'length): change one of them.'
        )
    per_multiple = num_tokens // multiple_of
    at_least = -(-num_tokens // (group_size * multiple_of))
    small = [n for n in range(1, math.isqrt(per_multiple) + 1) if per_multiple % n == 0]
    return multiple_of * min(n for n in (*small, *(per_multiple // n for n in small)) if n >= at_least)


def microbatch_groups(config: MoEConfig, num_tokens: int) -> int:
    """Groups in a microbatch of that many tokens: those of the whole batch, cut at group boundaries.

    Raises:
      UserError: a group would be cut in two.
    """
    microbatches = config.num_microbatches
    whole = num_groups(num_tokens * microbatches, config.group_size, config.groups_multiple_of)
    if whole % microbatches:
        raise UserError(
            f'NUM_MICROBATCHES = {microbatches} would cut a routing group in two, since the batch has {whole} groups of '
            f'{num_tokens * microbatches // whole} tokens: set GROUPS_MULTIPLE_OF to a multiple of {microbatches}.'
        )
    return whole // microbatches


def check_groups(groups: int, shards: int) -> None:
    """Raises UserError unless the groups of a (micro)batch can be dealt out whole to the devices that share it."""
    if groups % shards:
        raise UserError(
            f'the {groups} routing groups of a batch cannot be dealt out to the {shards} devices of the data and expert axes '
            f'of MESH_SHAPE: set GROUPS_MULTIPLE_OF to a multiple of {shards} (which changes the groups, and so the maths), '
            'or use fewer devices there.'
        )


def capacity(config: MoEConfig, tokens_per_group: int, *, training: bool) -> int:
    """C: slots of one expert for one group, at most S.

    The two originals' rules: flaxformer `moe_layers.py` (K is not multiplied in) and vmoe `nn/routing.py`.
    """
    if config.when(training=training).router is RouterType.DENSE:
        return tokens_per_group
    if config.router is RouterType.SOFT:
        return config.slots_per_expert
    factor = config.train_capacity_factor if training else config.eval_capacity_factor
    if config.capacity_rule is CapacityRule.FLAXFORMER:
        slots = max(round(factor * tokens_per_group / config.num_experts), config.min_capacity)
    else:
        choices = config.num_selected_experts if config.router is RouterType.TOP_K else 1
        exact = factor * choices * tokens_per_group / config.num_experts
        # A product such as 1.1 * 40 lands a hair above the integer: do not let that cost a slot.
        slots = -(-round(exact * 1e6) // 1_000_000)
        slots = -(-slots // 4) * 4
    return min(slots, tokens_per_group)
