"""Enums and settings of MoE layers, as named in gin files."""

import dataclasses
import enum

from upcycle import schema
from upcycle.errors import refuse
from upcycle.schema import Natural, Rate


class RouterType(enum.StrEnum):
    """Routing algorithm."""

    EXPERT_CHOICE = 'expert_choice'  # every expert takes its best tokens of the whole group (Zhou et al. 2022)
    TOP_K = 'top_k'  # every token takes its best K experts (Switch: K = 1)
    SOFT = 'soft'  # Soft MoE: slots are means over tokens, tokens means over slots; never causal
    MERGED = 'merged'  # no routing: one MLP, a learned mean of the experts (XFT), on the way to a dense model
    DENSE = 'dense'  # all experts in training; Top-K or a probability threshold at inference (DS-MoE)


class FillOrder(enum.StrEnum):
    """Order in which Top-K choices claim the slots of an expert."""

    TOKEN_MAJOR = 'token_major'  # token by token: causal, since no token can evict an earlier one
    CHOICE_MAJOR = 'choice_major'  # first choices before second ones: flaxformer; not causal when slots run out
    PRIORITY = 'priority'  # as choice_major, with tokens sorted by their best probability (Batch Prioritised Routing)


class CapacityRule(enum.StrEnum):
    """Rule that turns a capacity factor into a number of slots."""

    FLAXFORMER = 'flaxformer'  # max(round(cf * S / E), 4)
    VMOE = 'vmoe'  # ceil(cf * S / E), times K for Top-K, rounded up to a multiple of 4


class RoutePadding(enum.StrEnum):
    """Treatment of padding tokens by the router."""

    SKIP = 'skip'  # padding takes no slot, has no weight and is not counted in metrics
    ROUTE = 'route'  # padding is routed like other tokens: flaxformer's default
    DOWN_WEIGHT = 'down_weight'  # flaxformer's `ignore_padding_tokens`: probability 0, but counted in losses


class BalanceLoss(enum.StrEnum):
    """Loss that balances the tokens of Top-K among experts."""

    SWITCH = 'switch'  # Switch, eq. 4-6: flaxformer's
    IMPORTANCE_LOAD = 'importance_load'  # V-MoE's importance loss, plus its load loss with GATE_NOISE
    MUTUAL_INFORMATION = 'mutual_information'  # DS-MoE's: low entropy for each token, high entropy of the mean


class Scores(enum.StrEnum):
    """A token's scores of experts, which choose and weigh them."""

    SOFTMAX = 'softmax'  # probabilities
    SIGMOID = 'sigmoid'  # each expert's by itself; losses see them divided by their sum (DeepSeek-V3)


class GroupScore(enum.StrEnum):
    """Score of a group of experts."""

    MAX = 'max'  # of its best expert (DeepSeek-V2)
    TOP_2 = 'top_2'  # the sum of its best two experts (DeepSeek-V3)


class SharedWeights(enum.StrEnum):
    """Weights of shared and routed experts."""

    ONE = 'one'  # shared experts have weight 1 (DeepSeekMoE)
    XFT = 'xft'  # a token's routed weights sum to its largest probability, and shared experts get the rest of 1


class Dispatch(enum.StrEnum):
    """Implementation of dispatch and combine."""

    GATHER = 'gather'  # by index: linear in the tokens
    EINSUM = 'einsum'  # by one-hot masks (G, S, E, C): the reference
    RAGGED = 'ragged'  # dropless Top-K: rows sorted by expert, no capacity


class Exchange(enum.StrEnum):
    """How the tokens of dropless layers meet experts on other devices, in training. Evaluation takes the ring."""

    RING = 'ring'  # each token visits all shards of experts: exact
    ALL_TO_ALL = 'all_to_all'  # choices travel in buffers, one for each pair of devices; what does not fit is dropped
    RAGGED_ALL_TO_ALL = 'ragged_all_to_all'  # only choices travel, into one buffer a device; imitated on CPUs


@dataclasses.dataclass(frozen=True)
class AdaptiveBalance:
    """Skywork-MoE's adaptive weight of each layer's balance loss (Wei et al. 2024, arXiv 2406.06563, section 3.2).

    a <- decay * a + (1 - decay) * min(rate * d, largest), where d is the share of dropped choices and a starts at 0.

    Attributes:
      rate: xi, the factor of the share of dropped choices.
      largest: a_max, the upper bound of what the weight moves towards.
      decay: beta, of the running mean.
    """

    rate: Natural = 0.2
    largest: Natural = 0.01
    decay: Rate = 0.99

    def __post_init__(self):
        refuse(schema.misfits(vars(self), type(self), lambda field: f'ADAPTIVE_BALANCE_{field.upper()}'))
