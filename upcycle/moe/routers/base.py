"""Base classes of routers. A router is a dataclass of settings with the methods that an MoE layer calls."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax

from upcycle import schema
from upcycle.errors import UserError, refuse
from upcycle.moe.conventions import RoutePadding, RouterType, SharedWeights
from upcycle.moe.groups import num_groups
from upcycle.moe.routing import Across, Mixing, Routing, here
from upcycle.schema import Count, FloatType, Natural, Rate, Whole

# Fields whose macros have other names.
_MACROS = {
    'train_capacity_factor': 'TRAIN_EXPERT_CAPACITY_FACTOR',
    'eval_capacity_factor': 'EVAL_EXPERT_CAPACITY_FACTOR',
    'exchange': 'EXPERT_EXCHANGE',
    'granularity': 'EXPERT_GRANULARITY',
    'logit_normalization': 'ROUTER_LOGIT_NORMALIZATION',
    'merged_shared_weight': 'AVERAGE_SHARED_WEIGHT',
    'scores': 'ROUTER_SCORES',
    'selected_groups': 'SELECTED_SCORE_GROUPS',
    'weight_scale': 'ROUTED_WEIGHT_SCALE',
}


def macro_of_field(field: str) -> str:
    """Returns the macro of a field, without the prefix of a stack."""
    return _MACROS.get(field, field.upper())


@dataclasses.dataclass(frozen=True)
class MoE:
    """The MoE layers of one stack. Gin macros in brackets.

    Attributes:
      num_experts: E, experts in every MoE layer [NUM_EXPERTS].
      router: the name of the class [ROUTER].
      group_size: the most tokens in a group, which compete for the same slots; for dropless layers see
        `groups.microbatch_groups` [GROUP_SIZE].
      groups_multiple_of: the number of groups in a batch is a multiple of this [GROUPS_MULTIPLE_OF], which must be a multiple of
        the mesh's data x expert shards. It is not read from the mesh, so that the mesh does not change results.
      granularity: width of a dense MLP over that of an expert [EXPERT_GRANULARITY].
      expert_mlp_dim: F of an expert; None for that of a dense MLP divided by the granularity [EXPERT_MLP_DIM].
      num_shared_experts: experts that every token goes to in addition to routed ones; one MLP of their joint width
        [NUM_SHARED_EXPERTS].
      shared_mlp_dim: F of that MLP; None for the sum of its experts' widths [SHARED_MLP_DIM].
      shared_gate: multiply the output of the shared experts by sigmoid(x . g), with a learned vector g (Qwen2-MoE)
        [SHARED_GATE].
      causal: whether the layer is in an autoregressive stack, where routers may not look at later tokens.
      num_microbatches: set by the trainer, so that groups are those of the whole batch.
    """

    # Whether tokens go to some of the experts only, so that statistics of an expert's tokens are meaningful.
    assigns: ClassVar[bool] = False
    # Whether there is a router; otherwise every token passes through one MLP.
    routes: ClassVar[bool] = True
    # Fixed values of fields that the class lacks.
    implied: ClassVar[Mapping[str, Any]] = {}
    # Fields that the class lacks but gin files may set, for the run that trained the experts.
    of_the_run_before: ClassVar[frozenset[str]] = frozenset()

    num_experts: Count
    router: RouterType = dataclasses.field(init=False)
    group_size: Count = 4096
    groups_multiple_of: Count = 1
    granularity: Count = 1
    expert_mlp_dim: Count | None = None
    num_shared_experts: Whole = 0
    shared_mlp_dim: Count | None = None
    shared_gate: bool = False
    causal: bool = False
    num_microbatches: Count = 1

    def __post_init__(self):
        schema.validate(self, _MACROS)
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        """Yields a sentence for each contradiction between fields."""
        if self.expert_mlp_dim is not None and self.granularity > 1:
            yield (
                f'EXPERT_MLP_DIM = {self.expert_mlp_dim} and EXPERT_GRANULARITY = {self.granularity} both set the width of an '
                'expert: set only one of them.'
            )
        if not self.num_shared_experts:
            for field, value in (('shared_mlp_dim', self.shared_mlp_dim), ('shared_gate', self.shared_gate)):
                if value:
                    yield f'{macro_of_field(field)} = {value} needs a shared expert: set NUM_SHARED_EXPERTS.'
        if self.causal:
            yield from self.looks_ahead()

    def looks_ahead(self, prefix: str = '') -> Iterator[str]:
        """Yields a sentence for each reason why the layer may not be in a causal stack: its routing depends on later tokens.

        Args:
          prefix: of the macros of its stack.
        """
        return iter(())

    def in_words(self) -> str:
        """Describes the layer in a line."""
        return f'{self.num_experts} experts, {self._choice_in_words()}, groups of at most {self.group_size} tokens'

    def _choice_in_words(self) -> str:
        raise NotImplementedError

    @property
    def experts_of_a_token(self) -> int:
        """The most experts that can take one token."""
        return self.num_experts

    @property
    def active_experts(self) -> float:
        """Average number of experts of a token; for the router 'dense' at inference."""
        return self.num_experts

    @property
    def num_logits(self) -> int:
        """Number of router logits of one token."""
        return self.num_experts

    @property
    def meets_every_slot(self) -> bool:
        """Whether dispatch and combine multiply every token with every slot of its group."""
        return False

    @property
    def can_normalize(self) -> bool:
        """Whether the router has a gradient when combine weights are divided by their sum."""
        return True

    @property
    def weights_are_constant(self) -> bool:
        """Whether combine weights do not depend on the logits, so that the loss of the task has no gradient for the router."""
        return False

    def when(self, *, training: bool) -> 'MoE':
        """Returns the router of training or inference; they differ only for 'dense'."""
        return self

    def expert_width(self, mlp_dim: int) -> int:
        """Returns F of one expert, given that of a dense MLP.

        Raises:
          UserError: it is not a whole number.
        """
        if self.expert_mlp_dim is not None:
            return self.expert_mlp_dim
        if mlp_dim % self.granularity:
            raise UserError(
                f'EXPERT_GRANULARITY = {self.granularity} does not divide MLP_DIM = {mlp_dim}: change one of them.'
            )
        return mlp_dim // self.granularity

    def shared_width(self, mlp_dim: int) -> int:
        """Returns F of the MLP that is all shared experts, given that of a dense MLP; 0 without shared experts."""
        if self.shared_mlp_dim is not None:
            return self.shared_mlp_dim
        return self.num_shared_experts * self.expert_width(mlp_dim)

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        """Returns C, the number of slots of one expert for one group."""
        raise NotImplementedError

    def slots(self, num_tokens: int, *, training: bool) -> int:
        """Returns the number of rows that the experts of one layer multiply: E x C in every group."""
        groups = num_groups(num_tokens, self.group_size, self.groups_multiple_of)
        return groups * self.num_experts * self.capacity(num_tokens // groups, training=training)

    def state_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a layer's `moe.state`, for tokens of that width; {} for most."""
        return {}

    def check_examples(self, num_tokens: int, length: int, way_out: str) -> None:
        """Raises UserError if the output for one example would depend on others of its batch.

        Args:
          num_tokens: of a batch.
          length: of an example, in tokens.
          way_out: binding with which groups are whole examples.
        """


@dataclasses.dataclass(frozen=True)
class Routed(MoE):
    """Layers with a router.

    Attributes:
      route_padding: see `RoutePadding` [ROUTE_PADDING].
      network_dtype: type of activations in all-to-alls; None for the activations' own [NETWORK_DTYPE].
      jitter_noise: multiplies the router's input by uniform(1 - jitter, 1 + jitter) in training [JITTER_NOISE].
      router_init_stddev: standard deviation of the router's initialisation [ROUTER_INIT_STDDEV].
      shared_weights: see `SharedWeights` [SHARED_WEIGHTS].
    """

    # Whether logits are scaled cosines of the token and the router's columns, instead of products.
    cosine: ClassVar[bool] = False

    route_padding: RoutePadding = RoutePadding.SKIP
    network_dtype: FloatType | None = None
    jitter_noise: Rate = 0.0
    router_init_stddev: Natural = 0.02
    shared_weights: SharedWeights = SharedWeights.ONE

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.leaves_the_rest and not self.num_shared_experts:
            yield "SHARED_WEIGHTS = 'xft' needs a shared expert: set NUM_SHARED_EXPERTS."
        if self.leaves_the_rest and self.shared_gate:
            yield "SHARED_WEIGHTS = 'xft' and SHARED_GATE both weigh the shared experts: set only one of them."

    @property
    def leaves_the_rest(self) -> bool:
        """Whether shared experts get what the routed ones' weights leave of 1."""
        return self.shared_weights is SharedWeights.XFT

    @property
    def logits_have_bias(self) -> bool:
        """Whether the linear router has a bias."""
        return False

    @property
    def dropless(self) -> bool:
        """Whether tokens reach their experts without slots."""
        return False

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise that is added to logits in training."""
        return 0.0

    def balance_loss_of(
        self, logits_GxSxE: jax.Array, noisy_GxSxE: jax.Array | None, real_GxS: jax.Array
    ) -> jax.Array | None:
        """Returns a balance loss that needs logits with and without noise and replaces that of `route`; None for most.

        Args:
          logits_GxSxE: without noise.
          noisy_GxSxE: with noise; None if no noise was added.
          real_GxS: bool, False at padding.
        """
        return None

    def route(
        self,
        logits_GxSxN: jax.Array,
        real_GxS: jax.Array,
        capacity: int,
        across: Across = here,
        bias_E: jax.Array | None = None,
    ) -> tuple[Routing | Mixing, dict[str, jax.Array]]:
        """Routes tokens: pure, of static shape, in float32, and local to a group.

        Args:
          logits_GxSxN: router logits: N = E, or E * C for Soft MoE.
          real_GxS: bool, False at padding.
          capacity: C.
          across: sums an array over the devices that hold the other groups; only losses and metrics need it.
          bias_E: added to scores for Top-K's choice only, not for its weights; None for no bias.

        Returns:
          The routing, and the layer's metrics (scalars, and `load` of shape (E,)), under flaxformer's names where it has them.
        """
        raise NotImplementedError

    def to_slots(self, x_GxSxD: jax.Array, routing: Any) -> jax.Array:
        """Fills the slots of a routing with tokens, (E, G, C, D); empty slots hold zeros."""
        raise NotImplementedError

    def from_slots(self, y_ExGxCxD: jax.Array, routing: Any, num_tokens: int) -> jax.Array:
        """Sums each token's slots, weighted, in float32: (E, G, C, D) to (G, S, D) with S = `num_tokens`."""
        raise NotImplementedError
