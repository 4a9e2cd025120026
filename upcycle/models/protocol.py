"""The protocol of a model family: all that the trainer, the surgery, the evaluators and the commands know of a model.

Axis letters are those of `upcycle.moe`. `models.registry` lists the families.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import flax.linen as nn
    import jax

    from upcycle.moe.routers.base import MoE

Params = Mapping[str, Any]
BatchSpec = Mapping[str, tuple[tuple[int, ...], Any]]


class Model(Protocol):
    """One family's model: sizes, loss, and where its MoE layers are. It must be hashable: shapes are cached by model.

    Members of the class, which describe the family:
      family: its name in the registry, in gin files (moe/FAMILY.gin) and in checkpoints.
      title: its name in messages.
      telltale: a parameter that models of this family have, and of no other.
      head: paths of the parameters that belong to the training task and not to the model. Fine-tuning may initialise them anew.
      lacking: paths of parameters that a checkpoint may lack.
      grids: last segments of the names of learned positions (1, L, D) on a square grid, which surgery may interpolate.
      facts: fields of the configuration that change the function and not the shapes of the parameters. In capitals they are
        macros of gin/.
      inputs: features of a batch that say how large it is, for messages.
      blocks: names of the modules that are numbered by layer, without the number.
      components: names of the modules within a layer that `upcycle inspect` adds up.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    telltale: ClassVar[str]
    head: ClassVar[tuple[str, ...]]
    lacking: ClassVar[tuple[str, ...]]
    grids: ClassVar[tuple[str, ...]]
    facts: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]]
    blocks: ClassVar[tuple[str, ...]]
    components: ClassVar[tuple[str, ...]]

    config: Any
    """Sizes, and how the stack is compiled: a dataclass."""

    @classmethod
    def from_leaves(cls, path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> 'Model':
        """The dense model that a checkpoint holds, or was upcycled from.

        Args:
          path: of the checkpoint, for messages.
          shapes: of its parameters, by their names without `params/`. The width of an MoE layer is read from an expert.
          facts: fields of the configuration that shapes do not tell.

        Raises:
          UserError: no model of this family has such shapes.
          KeyError, IndexError, ValueError, ZeroDivisionError: a parameter is missing, or has another shape; the first argument
            names it.
        """

    @classmethod
    def facts_in(cls, path: str, names: Iterable[str]) -> dict[str, Any]:
        """What the names of a checkpoint's parameters, without `params/`, say of the model, by the fields of its configuration.

        Raises:
          UserError: no model of this family has such names.
        """

    @classmethod
    def files_that_fit(cls, facts: Mapping[str, Any]) -> str:
        """The gin file whose model has these facts, where one is known; else an empty string."""

    @classmethod
    def sizes(cls, names: Collection[str], problems: Sequence[str]) -> tuple[str, ...]:
        """Fields of the configuration that the shapes of a checkpoint's leaves tell.

        Args:
          names: of the leaves.
          problems: sentences about the leaves that do not fit a model.
        """

    def smallest_batch(self) -> BatchSpec:
        """A batch that the model takes, to see the shapes of its parameters: its tokens fill GROUPS_MULTIPLE_OF groups."""

    def with_dtype(self, dtype: str) -> 'Model':
        """The same model with activations of another type."""

    def module(self, num_microbatches: int = 1) -> 'nn.Module':
        """The Flax module, its routing groups those of a batch cut into that many parts."""

    def init(self, rng: 'jax.Array', batch_spec: BatchSpec) -> Params:
        """Fresh parameters, boxed with their logical axis names (`flax.linen.LogicallyPartitioned`)."""

    def forward(
        self,
        params: Params,
        batch: Mapping[str, 'jax.Array'],
        rng: 'jax.Array | None',
        *,
        training: bool,
        num_microbatches: int,
    ) -> 'tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]':
        """Sums over targets (`loss`, `z_loss`, `correct`, `weight`), the MoE layers' auxiliary loss, and their metrics."""

    def logits(self, params: Params, batch: Mapping[str, Any]) -> 'jax.Array':
        """Logits in float32 at evaluation: no dropout, and the capacity factor of evaluation. Traceable by `jax.jit`.

        Args:
          params: of this model, nested dicts of arrays.
          batch: arrays of NumPy or JAX by feature: those of `inputs`, and others that the family's own docstring names. Further
            features are not read.

        Returns:
          The shape is the family's.

        Raises:
          UserError: a feature is missing or has another shape than the model reads.
        """

    def loss_normalizer(self, batch: Mapping[str, 'jax.Array']) -> 'jax.Array':
        """What the summed loss of the whole batch is divided by."""

    def forward_flops(self, batch_spec: BatchSpec, *, training: bool) -> dict[str, float]:
        """Floating-point operations of one forward pass over a batch, by component, a multiply-add counted as 2."""

    def dense(self) -> 'Model':
        """The same model with every MoE layer a dense MLP again."""

    def with_moe(self, **changes: Any) -> 'Model':
        """The same model with these fields of all MoE layers changed, where their router has them."""

    def saved(self, description: Mapping[str, Any]) -> 'Model':
        """The model that a checkpoint's metadata describes, the JSON of `describe`, with this one's losses."""

    def moe_layers(self) -> 'dict[str, MoE]':
        """The MoE layers by the path of their parameters ('encoder/layers_1/mlp'); empty for a dense model."""

    def num_tokens(self, batch_spec: BatchSpec) -> int:
        """Tokens of a batch, padding included: inputs and targets, or patches of images."""

    def moe_tokens(self, batch_spec: BatchSpec) -> dict[str, int]:
        """How many tokens of a batch each MoE layer routes, by the same paths."""

    def moe_module(self, path: str) -> 'nn.Module':
        """One MoE layer on its own."""

    def real_tokens(self, batch: Mapping[str, 'jax.Array'], paths: tuple[str, ...]) -> 'dict[str, jax.Array]':
        """For each path of an MLP or MoE layer, which of the tokens that it reads are real: bool (B, L)."""

    def token_kinds(self, batch: Mapping[str, 'jax.Array']) -> 'dict[str, tuple[jax.Array, int]]':
        """What tells the tokens of each MoE layer apart, by its path: (int32 kinds (B, L), how many kinds there are)."""

    def check_data(self, data: Any) -> None:
        """Refuses data that the model cannot read, such as a larger vocabulary."""

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, for checkpoints."""
