"""The protocol of a model family. Trainer, surgery, evaluators and commands use only its members.

Axis letters are those of `upcycle.moe`. `models.registry` lists the families.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import flax.linen as nn
    import jax
    import numpy as np

    from upcycle.models.generation import Cache, Generated
    from upcycle.moe.routers.base import MoE

Params = Mapping[str, Any]
BatchSpec = Mapping[str, tuple[tuple[int, ...], Any]]


class Model(Protocol):
    """A model of one family: sizes, loss and MoE layers. Hashable, since shapes are cached by model.

    Members of the class, which describe the family:
      family: its name in the registry, in gin files (moe/FAMILY.gin) and in checkpoints.
      title: its name in messages.
      telltale: a parameter that only models of this family have.
      head: paths of the parameters that belong to the training task. Fine-tuning may reinitialise them.
      lacking: paths of parameters that a checkpoint may lack.
      grids: last segments of the names of learned positions (1, L, D) on a square grid, which surgery may interpolate.
      facts: fields of the configuration that change the function but not the shapes of parameters. In capitals they are macros
        of gin/.
      told: other optional fields of the configuration that a checkpoint's leaves tell.
      moe_fields: fields of the configuration that hold a `MoE`; 'x' has its layers in the field 'x_layers', or has all layers.
      settings: gin file with the settings that a checkpoint does not tell, such as the optimizer.
      inputs: features of a batch that tell its size, for messages.
      blocks: names of the modules that are numbered by layer, without the number.
      components: names of the modules within a layer that `upcycle inspect` sums up.
      unit: what a batch is counted in, for figures of speed: 'token' or 'image'.
      prompts: how `generate` reads a prompt: 'continued'; 'answered', which ends it with the end token; None if the family does
        not generate text and is not `Generative`.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    telltale: ClassVar[str]
    head: ClassVar[tuple[str, ...]]
    lacking: ClassVar[tuple[str, ...]]
    grids: ClassVar[tuple[str, ...]]
    facts: ClassVar[tuple[str, ...]]
    told: ClassVar[tuple[str, ...]]
    moe_fields: ClassVar[tuple[str, ...]]
    settings: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    blocks: ClassVar[tuple[str, ...]]
    components: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    prompts: ClassVar[str | None]

    config: Any
    """Sizes and program form, a dataclass."""

    @classmethod
    def from_leaves(cls, path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> 'Model':
        """Returns the dense model of a checkpoint, or the one that it was upcycled from.

        Args:
          path: of the checkpoint, for messages.
          shapes: of its parameters, by their names without `params/`. An MoE layer's width is that of an expert.
          facts: fields of the configuration that shapes do not tell.

        Raises:
          UserError: no model of this family has such shapes or facts.
          KeyError, IndexError, ValueError, ZeroDivisionError: a parameter is missing or has another shape; the first argument
            names it.
        """

    @classmethod
    def facts_in(cls, path: str, names: Iterable[str]) -> dict[str, Any]:
        """Returns the facts that the names of a checkpoint's parameters, without `params/`, tell.

        Raises:
          UserError: no model of this family has such names.
        """

    @classmethod
    def files_that_fit(cls, facts: Mapping[str, Any]) -> str:
        """Returns the gin file of the model with these facts; '' if unknown."""

    @classmethod
    def sizes(cls, names: Collection[str], problems: Sequence[str]) -> tuple[str, ...]:
        """Returns the fields of the configuration that the shapes of a checkpoint's leaves tell.

        Args:
          names: of the leaves.
          problems: sentences about the leaves that do not fit a model.
        """

    def smallest_batch(self) -> BatchSpec:
        """Returns the spec of a batch that fills GROUPS_MULTIPLE_OF groups, enough to find the shapes of parameters."""

    def with_dtype(self, dtype: str) -> 'Model':
        """Returns the same model with activations of another type."""

    def module(self, num_microbatches: int = 1) -> 'nn.Module':
        """Returns the Flax module for microbatches; routing groups are those of the whole batch."""

    def init(self, rng: 'jax.Array', batch_spec: BatchSpec) -> Params:
        """Initialises parameters, boxed with their logical axis names (`flax.linen.LogicallyPartitioned`)."""

    def forward(
        self,
        params: Params,
        batch: Mapping[str, 'jax.Array'],
        rng: 'jax.Array | None',
        *,
        training: bool,
        num_microbatches: int,
    ) -> 'tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]':
        """Returns sums over targets (`loss`, `z_loss`, `correct`, `weight`), the MoE layers' auxiliary loss and their metrics."""

    def logits(self, params: Params, batch: Mapping[str, Any]) -> 'jax.Array':
        """Computes logits in float32 at evaluation: without dropout, with the evaluation capacity factor. Traceable by `jax.jit`.

        Args:
          params: of this model, nested dicts of arrays.
          batch: NumPy or JAX arrays by feature: those of `inputs`, and others that the family documents. Further features are
            ignored.

        Returns:
          Logits, whose shape the family documents.

        Raises:
          UserError: a feature is missing or has the wrong shape.
        """

    def generate(
        self,
        params: Params,
        tokens: Any,
        mask: Any = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_ids: Iterable[int] = (),
        key: 'jax.Array | int' = 0,
    ) -> 'Generated':
        """Continues prompts, or answers them, with a key/value cache. Compiled; traceable by `jax.jit`.

        Args:
          params: of this model, nested dicts of arrays.
          tokens: prompts, whole numbers (B, L).
          mask: (B, L), False at padding, on either side; None without padding.
          max_new_tokens: the most tokens to generate, end token included.
          temperature: divides the logits; 0 chooses the most probable token.
          top_k: draws among this many most probable tokens; 0 for all.
          top_p: draws among the fewest most probable tokens whose probabilities sum to at least this; 1 for all.
          eos_ids: tokens that end a text.
          key: random key of `jax.random`, or a seed.

        Returns:
          The new tokens (B, max_new_tokens), their number in each row, and their log-probability.

        Raises:
          UserError: the family does not generate text, or an argument is wrong.
        """

    def sample_inputs(self) -> 'dict[str, np.ndarray] | None':
        """Returns a few seeded inputs of `logits`, to compare a model with its source; None if the family has none."""

    def loss_normalizer(self, batch: Mapping[str, 'jax.Array']) -> 'jax.Array':
        """Returns the divisor of the summed loss of the whole batch."""

    def forward_flops(self, batch_spec: BatchSpec, *, training: bool) -> dict[str, float]:
        """Returns the FLOPs of one forward pass over a batch by component; a multiply-add counts as 2."""

    def dense(self) -> 'Model':
        """Returns the same model with dense MLPs instead of MoE layers."""

    def with_moe(self, **changes: Any) -> 'Model':
        """Returns the same model with these fields of all MoE layers changed, if their router has them."""

    def saved(self, description: Mapping[str, Any]) -> 'Model':
        """Returns the model of a checkpoint's metadata (from `describe`), with the losses of this one."""

    def moe_layers(self) -> 'dict[str, MoE]':
        """Returns the MoE layers by the paths of their parameters ('encoder/layers_1/mlp'); empty for a dense model.

        Paths of attention experts end in 'attention', see `moe.groups.is_attention`.
        """

    def num_tokens(self, batch_spec: BatchSpec) -> int:
        """Counts the tokens of a batch, padding included: inputs and targets, or patches of images."""

    def num_units(self, batch_spec: BatchSpec) -> int:
        """Counts the units of a batch, padding included; see `unit`."""

    def moe_tokens(self, batch_spec: BatchSpec) -> dict[str, int]:
        """Counts the tokens of a batch that each MoE layer routes, by the paths of `moe_layers`."""

    def moe_module(self, path: str) -> 'nn.Module':
        """Returns the module of one MoE layer, called as `MoELayer`; of attention experts their router only."""

    def real_tokens(self, batch: Mapping[str, 'jax.Array'], paths: tuple[str, ...]) -> 'dict[str, jax.Array]':
        """Returns for each path of an MLP or MoE layer which of its tokens are real, bool (B, L)."""

    def token_kinds(self, batch: Mapping[str, 'jax.Array']) -> 'dict[str, tuple[jax.Array, int]]':
        """Returns the kinds of the tokens of each MoE layer by its path: (int32 (B, L), number of kinds)."""

    def check_data(self, data: Any) -> None:
        """Raises UserError for data that do not fit the model, such as a larger vocabulary."""

    def describe(self) -> dict[str, Any]:
        """Returns the configuration as JSON, for checkpoints."""


class Generative(Model, Protocol):
    """A model of a family whose `prompts` is not None."""

    def prefill(
        self, params: Params, tokens: 'jax.Array', mask: 'jax.Array', max_new_tokens: int
    ) -> 'tuple[jax.Array, Cache]':
        """Reads prompts (B, L), padded in front; returns the token (B,) that `decode` reads first, and its cache."""

    def decode(self, params: Params, tokens: 'jax.Array', cache: 'Cache') -> 'tuple[jax.Array, Cache]':
        """Returns the logits (B, V) after the tokens (B, 1), and the cache with these."""


class Continuing(Generative, Protocol):
    """A model of a family whose `prompts` is 'continued'."""

    def teacher_forced(self, params: Params, tokens: 'jax.Array', mask: 'jax.Array') -> 'jax.Array':
        """Returns the logits after each token of texts (B, L), padded on either side, float32 (B, L, V).

        They are those of `decode`: no expert drops a token, whatever its capacity, so that a row does not depend on others.
        """
