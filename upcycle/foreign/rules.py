"""The rules with which a user describes a foreign model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from upcycle.errors import UserError, refuse

LAYER = '{layer}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoERule:
    """MLPs of one kind that become MoE layers, described by the paths of their parameters.

    Axes are letters, one per axis of an array: E experts, D token width, F MLP width, other letters for other axes. Kernels are
    (in, out), as in Flax.

    Attributes:
      path: path of an MLP, with `{layer}` for the layer number: 'MixerBlock_{layer}/channel_mixing'.
      layers: numbers of the layers that become sparse; () if the path has no `{layer}`.
      leaves: axes of each leaf in the MoE layer, by its path within the MLP: {'Dense_0/kernel': 'EDF', 'Dense_0/bias': 'EF',
        ...}. E marks the position of the expert axis; the dense leaf has the same axes without E. A leaf without E is kept and
        shared by all experts.
      num_experts: number of experts E.
      experts: path within the MLP under which the experts' leaves go: 'experts/Dense_0/kernel'; '': they keep their paths.
      router: path of the router kernel within the MLP.
      router_axes: axes of the router kernel, 'DE' or 'ED'.
      router_width: width of the router's input; None: D.
      zeros: axes of further leaves within the MLP that start at 0, such as {'router/bias': 'E'}.
      granularity: width of the dense MLP divided by that of an expert, for the operators 'granular' and 'partial'.
    """

    path: str
    layers: Sequence[int | str] = ()
    leaves: Mapping[str, str]
    num_experts: int
    experts: str = 'experts'
    router: str = 'router/kernel'
    router_axes: str = 'DE'
    router_width: int | None = None
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    granularity: int = 1

    def __post_init__(self):
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        """Yields the mistakes, one sentence each."""
        where = f'the rule for {self.path!r}'
        if (LAYER in self.path) != bool(self.layers):
            yield f'{where}: `layers` needs {LAYER} in the path, so give both or neither.'
        if len({*map(str, self.layers)}) < len(self.layers):
            yield f'{where}: layers = {self.layers!r} names a layer twice.'
        for name in ('num_experts', 'granularity'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                yield f'{where}: {name} = {value!r} must be an integer of at least 1.'
        if not any('E' in axes for axes in self.leaves.values()):
            yield f'{where}: no leaf has an axis E: mark the expert axis of at least one leaf.'
        for leaf, axes in {**self.leaves, **self.zeros}.items():
            if not axes.isalpha() and axes:
                yield f'{where}: the axes {axes!r} of {leaf} must be letters, such as EDF.'
            elif len({*axes}) < len(axes):
                yield f'{where}: the axes {axes!r} of {leaf} repeat a letter.'
        for leaf, axes in self.zeros.items():
            if {*axes} - {*'EDF'}:
                yield f'{where}: the axes {axes!r} of {leaf} in `zeros` must be among E, D and F.'
        if sorted(self.router_axes) != ['D', 'E']:
            yield f"{where}: router_axes = {self.router_axes!r} must be 'DE' or 'ED'."

    @property
    def mlps(self) -> tuple[str, ...]:
        """The paths of the MLPs."""
        return tuple(self.path.replace(LAYER, str(layer)) for layer in self.layers) or (self.path,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathRules:
    """Rules for the parameters of a foreign model. Every leaf needs a rule, and every rule must match a leaf.

    Paths are the keys of a leaf joined with '/'. Patterns are `fnmatch` patterns: `*` matches any text, '/' included.

    Attributes:
      moe: MLPs that become MoE layers.
      keep: patterns of leaves that are kept.
      drop: reasons by pattern of leaves that the sparse model lacks; takes precedence over `keep`.
      dense_apply: (parameters, batch) -> output of the dense model, an array or a tree of arrays, for the check at step 0.
      sparse_apply: the same for the sparse model.
      hidden_states: (dense parameters, path of an MLP, batch) -> inputs of that MLP (tokens, D), for router_init='hidden'.
    """

    moe: Sequence[MoERule]
    keep: Sequence[str] = ()
    drop: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dense_apply: Callable[[Any, Any], Any] | None = None
    sparse_apply: Callable[[Any, Any], Any] | None = None
    hidden_states: Callable[[Any, str, Any], Any] | None = None

    def __post_init__(self):
        if isinstance(self.keep, str):
            object.__setattr__(self, 'keep', (self.keep,))
        if isinstance(self.moe, MoERule):
            object.__setattr__(self, 'moe', (self.moe,))
        mlps = [mlp for rule in self.moe for mlp in rule.mlps]
        if not mlps:
            raise UserError('`moe` has no rules: add a rule for the MLPs that become sparse.')
        for i, mlp in enumerate(mlps):
            if clash := next((other for other in mlps[:i] + mlps[i + 1 :] if f'{other}/'.startswith(f'{mlp}/')), None):
                raise UserError(f'two rules of `moe` match {clash} (one for {mlp}): name each MLP once.')


@dataclasses.dataclass(frozen=True)
class State:
    """Parameters with the state of a foreign optimizer, such as an optax one.

    Attributes:
      params: parameters of the model.
      opt_state: any pytree. A leaf whose path contains that of a parameter belongs to it; other integer scalars count steps; all
        other leaves, such as hyperparameters, are kept. None if there is no optimizer state.
      init: parameters -> initial optimizer state, such as optax's `tx.init`. It defines the state of the sparse model, and the
        initial values of fresh state and of routers' state.
      step: training steps taken, for the receipt and as the clock if `opt_state` has none; None: unknown.
    """

    params: Any
    opt_state: Any = None
    init: Callable[[Any], Any] | None = None
    step: int | None = None

    def __post_init__(self):
        if not callable(self.init):
            raise UserError(
                f'init = {self.init!r} must be a function from parameters to the initial state, such as tx.init.'
            )
