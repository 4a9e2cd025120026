"""Enums and settings of MoE layers that gin files name."""

import dataclasses
import enum

from upcycle import schema
from upcycle.errors import refuse
from upcycle.schema import Natural, Rate


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
    CHOICE_MAJOR = (
        'choice_major'  # every first choice, then every second one (a later token's first one may evict it): flaxformer
    )
    PRIORITY = 'priority'  # as choice_major, tokens sorted by their best probability (Batch Prioritised Routing)


class CapacityRule(enum.StrEnum):
    """How a capacity factor becomes a number of slots; the two originals differ."""

    FLAXFORMER = 'flaxformer'  # max(round(cf * S / E), 4)
    VMOE = 'vmoe'  # ceil(cf * S / E), times K for Top-K, up to a multiple of 4


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


class Dispatch(enum.StrEnum):
    """How tokens reach their experts."""

    GATHER = 'gather'  # by index: linear in the tokens
    EINSUM = 'einsum'  # by one-hot masks of (G, S, E, C): the reference
    RAGGED = 'ragged'  # dropless Top-K: rows sorted by expert, no capacity


@dataclasses.dataclass(frozen=True)
class AdaptiveBalance:
    """Skywork-MoE's weight of the balance loss, a layer at a time (Wei et al. 2024, arXiv 2406.06563, section 3.2).

    a <- decay * a + (1 - decay) * min(rate * d, largest), where d is the share of choices that found no slot; a starts at 0.

    Attributes:
      rate: xi, by which the share of dropped choices is multiplied.
      largest: a_max, the most that the weight moves towards.
      decay: beta, of the running mean.
    """

    rate: Natural = 0.2
    largest: Natural = 0.01
    decay: Rate = 0.99

    def __post_init__(self):
        refuse(schema.misfits(vars(self), type(self), lambda field: f'ADAPTIVE_BALANCE_{field.upper()}'))
