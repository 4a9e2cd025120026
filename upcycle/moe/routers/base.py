"""What the routers share. A router is a dataclass: its fields are what a user sets, its methods what an MoE layer does."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from upcycle import schema
from upcycle.errors import UserError, refuse
from upcycle.moe.conventions import CapacityRule, Dispatch, RoutePadding, RouterType, SharedWeights
from upcycle.moe.groups import num_groups
from upcycle.moe.losses import routing_metrics
from upcycle.moe.routing import Across, Routing, Tokens, covered_tokens, here, leave_the_rest, normalize, prepare
from upcycle.schema import Count, FloatType, Natural, Positive, Rate, Whole

# Fields whose macro has another name than theirs.
_MACROS = {
    'train_capacity_factor': 'TRAIN_EXPERT_CAPACITY_FACTOR',
    'eval_capacity_factor': 'EVAL_EXPERT_CAPACITY_FACTOR',
    'granularity': 'EXPERT_GRANULARITY',
    'logit_normalization': 'ROUTER_LOGIT_NORMALIZATION',
    'merged_shared_weight': 'AVERAGE_SHARED_WEIGHT',
}


def macro_of_field(field: str) -> str:
    """The macro of a field, without the prefix of a stack."""
    return _MACROS.get(field, field.upper())


class Assigned(NamedTuple):
    """What a router decides of the tokens of a layer.

    Attributes:
      routing: who is in which slot.
      auxiliary_loss: the balance loss, a scalar.
      dropped: the share of choices that found no slot, a scalar.
      followed: further metrics, which only the leaves of `moe.state` follow.
    """

    routing: Routing
    auxiliary_loss: jax.Array
    dropped: jax.Array
    followed: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MoE:
    """The MoE layers of one stack. Gin macros in brackets.

    Attributes:
      num_experts: E, experts in every MoE layer [NUM_EXPERTS].
      router: the name of the class [ROUTER].
      group_size: the most tokens in a group, which compete for the same slots [GROUP_SIZE].
      groups_multiple_of: the number of groups in a batch is a multiple of this [GROUPS_MULTIPLE_OF]: of data x expert shards of
        the mesh. Neither is read from the mesh, so that a mesh never changes the maths.
      granularity: a dense MLP is so many times wider than an expert [EXPERT_GRANULARITY].
      num_shared_experts: experts that every token goes to, besides those that it is routed to; one MLP of their joint width
        [NUM_SHARED_EXPERTS].
      causal: the layer sits in an auto-regressive stack, where no router may look at later tokens.
      num_microbatches: the trainer sets it, so that groups are those of the whole batch.
    """

    # Tokens go to some of the experts, so that statistics of an expert's tokens mean something.
    assigns: ClassVar[bool] = False
    # False: every token passes through one MLP.
    routes: ClassVar[bool] = True
    # Values of fields that the class lacks, because it has no other.
    implied: ClassVar[Mapping[str, Any]] = {}
    # Fields that it lacks and that gin files may set all the same, for the run that trained the experts.
    of_the_run_before: ClassVar[frozenset[str]] = frozenset()

    num_experts: Count
    router: RouterType = dataclasses.field(init=False)
    group_size: Count = 4096
    groups_multiple_of: Count = 1
    granularity: Count = 1
    num_shared_experts: Whole = 0
    causal: bool = False
    num_microbatches: Count = 1

    def __post_init__(self):
        schema.validate(self, _MACROS)
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        """What is wrong with the fields together, a sentence each."""
        if self.causal:
            yield from self.looks_ahead()

    def looks_ahead(self, prefix: str = '') -> Iterator[str]:
        """Why the layer may not be in a causal stack, a sentence each: its routing would depend on later tokens.

        Args:
          prefix: of the macros of its stack.
        """
        return iter(())

    def in_words(self) -> str:
        """The layer in a line."""
        return f'{self.num_experts} experts, {self._choice_in_words()}, groups of at most {self.group_size} tokens'

    def _choice_in_words(self) -> str:
        raise NotImplementedError

    @property
    def experts_of_a_token(self) -> int:
        """The most experts that can take one token."""
        return self.num_experts

    @property
    def active_experts(self) -> float:
        """Experts that a token passes through, on average; of the router 'dense' at inference."""
        return self.num_experts

    @property
    def num_logits(self) -> int:
        """Router logits of one token."""
        return self.num_experts

    @property
    def meets_every_slot(self) -> bool:
        """Dispatch and combine multiply every token with every slot of its group."""
        return False

    @property
    def can_normalize(self) -> bool:
        """Combine weights can be divided by their sum, and the router still has a gradient."""
        return True

    def when(self, *, training: bool) -> 'MoE':
        """The router in training or at inference; only 'dense' has another one at inference."""
        return self

    def expert_width(self, mlp_dim: int) -> int:
        """F of one expert, where that of a dense MLP is `mlp_dim`.

        Raises:
          UserError: it is no whole number.
        """
        if mlp_dim % self.granularity:
            raise UserError(
                f'EXPERT_GRANULARITY = {self.granularity} does not divide MLP_DIM = {mlp_dim}: change one of them.'
            )
        return mlp_dim // self.granularity

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        """C: slots of one expert for one group."""
        raise NotImplementedError

    def slots(self, num_tokens: int, *, training: bool) -> int:
        """Rows that the experts of one layer multiply, for that many tokens: E x C in every group."""
        groups = num_groups(num_tokens, self.group_size, self.groups_multiple_of)
        return groups * self.num_experts * self.capacity(num_tokens // groups, training=training)

    def state_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The leaves of `moe.state` that a layer has, for tokens of that width; {} for most."""
        return {}

    def check_examples(self, num_tokens: int, length: int, way_out: str) -> None:
        """Raises UserError where the output for one example would depend on another one of its batch.

        Args:
          num_tokens: of a batch.
          length: of an example, in tokens.
          way_out: the binding that makes groups of whole examples.
        """


@dataclasses.dataclass(frozen=True)
class Routed(MoE):
    """Layers with a router.

    Attributes:
      route_padding: see `RoutePadding` [ROUTE_PADDING].
      network_dtype: type in which activations cross the network between expert shards; None: that of the activations
        [NETWORK_DTYPE].
      jitter_noise: the router's input is multiplied by uniform(1 - jitter, 1 + jitter) in training [JITTER_NOISE].
      router_init_stddev: standard deviation of the router's initialisation [ROUTER_INIT_STDDEV].
      shared_weights: see `SharedWeights` [SHARED_WEIGHTS].
    """

    # Logits are scaled cosines of the token and the router's columns, and not their products.
    cosine: ClassVar[bool] = False

    route_padding: RoutePadding = RoutePadding.SKIP
    network_dtype: FloatType | None = None
    jitter_noise: Rate = 0.0
    router_init_stddev: Natural = 0.02
    shared_weights: SharedWeights = SharedWeights.ONE

    @property
    def leaves_the_rest(self) -> bool:
        """Shared experts get what the weights of the routed ones leave of 1."""
        return self.shared_weights is SharedWeights.XFT

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.leaves_the_rest and not self.num_shared_experts:
            yield "SHARED_WEIGHTS = 'xft' needs a shared expert: set NUM_SHARED_EXPERTS."


@dataclasses.dataclass(frozen=True)
class Assigning(Routed):
    """Routers that put tokens into slots of experts, by a softmax over experts.

    Attributes:
      train_capacity_factor: slots of an expert in training, as a multiple of an even share of the tokens
        [TRAIN_EXPERT_CAPACITY_FACTOR].
      eval_capacity_factor: slots of an expert at evaluation, likewise [EVAL_EXPERT_CAPACITY_FACTOR].
      capacity_rule: see `CapacityRule` [CAPACITY_RULE].
      min_capacity: the floor of the flaxformer rule; flaxformer's `min_expert_capacity`.
      normalize_combine_weights: divide a token's weights by their sum [NORMALIZE_COMBINE_WEIGHTS].
      dispatch: see `Dispatch` [DISPATCH].
      logit_normalization: a token's logits are centred, divided by their deviation and multiplied by this, before the softmax;
        None: not (Skywork-MoE: 1) [ROUTER_LOGIT_NORMALIZATION].
    """

    assigns = True
    # Why the router cannot have DISPATCH = 'ragged', for the message; None: it can, and has `TopK.route_dropless`.
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
        """Tokens reach their experts without slots."""
        return self.dispatch is Dispatch.RAGGED

    @property
    def choices_in_capacity(self) -> int:
        """The factor by which V-MoE's capacity rule counts a token."""
        return 1

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise that is added to logits in training."""
        return 0.0

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        """C: slots of one expert for one group, at most S.

        The two originals' rules: flaxformer `moe_layers.py` (K is not multiplied in) and vmoe `nn/routing.py`.
        """
        factor = self.train_capacity_factor if training else self.eval_capacity_factor
        if self.capacity_rule is CapacityRule.FLAXFORMER:
            slots = max(round(factor * tokens_per_group / self.num_experts), self.min_capacity)
        else:
            exact = factor * self.choices_in_capacity * tokens_per_group / self.num_experts
            # A product such as 1.1 * 40 lands a hair above the integer: do not let that cost a slot.
            slots = -(-round(exact * 1e6) // 1_000_000)
            slots = -(-slots // 4) * 4
        return min(slots, tokens_per_group)

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        """Puts tokens into slots. Arguments as `route`'s, with the probabilities instead of the logits."""
        raise NotImplementedError

    def balance_loss_of(
        self, logits_GxSxE: jax.Array, noisy_GxSxE: jax.Array | None, real_GxS: jax.Array
    ) -> jax.Array | None:
        """A balance loss that needs logits with and without noise, in place of that of `assign`; None: there is none.

        Args:
          logits_GxSxE: without noise.
          noisy_GxSxE: with noise; None: no noise was added.
          real_GxS: bool, False at padding.
        """
        return None

    def route(
        self,
        logits_GxSxE: jax.Array,
        real_GxS: jax.Array,
        capacity: int,
        across: Across = here,
        bias_E: jax.Array | None = None,
    ) -> tuple[Routing, dict[str, jax.Array]]:
        """Assigns tokens to slots: pure, of static shape, in float32, and local to a group.

        Args:
          logits_GxSxE: router logits, float32.
          real_GxS: bool, False at padding.
          capacity: C.
          across: sums an array over the devices that hold the other groups; only losses and metrics need it.
          bias_E: of Top-K's choice, not of its weights; None: none.

        Returns:
          The routing, and the metrics of one layer (scalars, and `load` of shape (E,)); names are flaxformer's where it has them.
        """
        tokens = prepare(logits_GxSxE, real_GxS, self)
        routing, auxiliary_loss, dropped, followed = self.assign(tokens, capacity, across, bias_E)
        S = logits_GxSxE.shape[1]
        if self.normalize_combine_weights:
            routing = normalize(routing, num_tokens=S)
        if self.leaves_the_rest:
            routing = leave_the_rest(routing, num_tokens=S)
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

    def probabilities(self, logits_BxLxE: jax.Array, real_BxL: jax.Array) -> jax.Array:
        """Each token's probabilities of all experts, 0 where it may not route."""
        tokens = prepare(logits_BxLxE, real_BxL, self)
        return tokens.probs_GxSxE * tokens.may_route_GxS[..., None]
