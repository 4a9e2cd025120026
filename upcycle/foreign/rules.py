"""What a user says of a model that is not ours."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from upcycle.errors import UserError, refuse

LAYER = '{layer}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoERule:
    """MLPs of one kind that become MoE layers, by the paths of their parameters.

    Axes are letters, one for each axis of an array: E experts, D the width that a token has, F the width of the MLP, any other
    letter for any other axis. Kernels are (in, out), as Flax's are.

    Attributes:
      path: of an MLP, with `{layer}` for the number of its layer: 'MixerBlock_{layer}/channel_mixing'.
      layers: the numbers of the layers that become sparse; () where the path has no `{layer}`.
      leaves: the axes that each leaf of the MLP will have, by its path within the MLP: {'Dense_0/kernel': 'EDF',
        'Dense_0/bias': 'EF', ...}. E says where the expert axis goes; the dense leaf has the same axes without E. A leaf
        without E stays as it is, one for all experts.
      num_experts: E.
      experts: where the experts' leaves go, within the MLP: 'experts/Dense_0/kernel'; '': where they are.
      router: the router's kernel, within the MLP.
      router_axes: of the router's kernel, 'DE' or 'ED'.
      router_width: how wide the router's input is; None: D.
      zeros: further leaves within the MLP that start at 0, and their axes, such as {'router/bias': 'E'}.
      granularity: how many times wider the dense MLP is than an expert, for the operators 'granular' and 'partial'.
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
        """What is wrong, a sentence each."""
        where = f'the rule for {self.path!r}'
        if (LAYER in self.path) != bool(self.layers):
            yield f'{where}: `layers` numbers the layers of a path with {LAYER}, so give both or neither.'
        if len({*map(str, self.layers)}) < len(self.layers):
            yield f'{where}: layers = {self.layers!r} names a layer twice.'
        for name in ('num_experts', 'granularity'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                yield f'{where}: {name} = {value!r} must be a whole number, at least 1.'
        if not any('E' in axes for axes in self.leaves.values()):
            yield f'{where}: no leaf has an axis E, so nothing becomes experts.'
        for leaf, axes in {**self.leaves, **self.zeros}.items():
            if not axes.isalpha() and axes:
                yield f'{where}: the axes {axes!r} of {leaf} must be letters, such as EDF.'
            elif len({*axes}) < len(axes):
                yield f'{where}: the axes {axes!r} of {leaf} name an axis twice.'
        for leaf, axes in self.zeros.items():
            if {*axes} - {*'EDF'}:
                yield f'{where}: {leaf} starts at 0, so its axes, {axes!r}, must be of E, D and F.'
        if sorted(self.router_axes) != ['D', 'E']:
            yield f"{where}: router_axes = {self.router_axes!r} must be 'DE' or 'ED'."

    @property
    def mlps(self) -> tuple[str, ...]:
        """The paths of the MLPs."""
        return tuple(self.path.replace(LAYER, str(layer)) for layer in self.layers) or (self.path,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathRules:
    """What becomes of the parameters of a model that is not ours. Every leaf needs a rule, and every rule a leaf.

    Paths are the keys of a leaf joined with '/'. Patterns are those of `fnmatch`: `*` stands for any text, '/' included.

    Attributes:
      moe: the MLPs that become MoE layers.
      keep: patterns of leaves that stay as they are.
      drop: patterns of leaves that the sparse model lacks, with the reason. They come before `keep`.
      dense_apply: (parameters, batch) -> output of the dense model, an array or a tree of arrays, for the check at step 0.
      sparse_apply: the same of the sparse model.
      hidden_states: (dense parameters, path of an MLP, batch) -> what that MLP reads (tokens, D), for router_init='hidden'.
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
            raise UserError('`moe` has no rule, so nothing becomes sparse: name the MLPs.')
        for i, mlp in enumerate(mlps):
            if clash := next((other for other in mlps[:i] + mlps[i + 1 :] if f'{other}/'.startswith(f'{mlp}/')), None):
                raise UserError(f'two rules of `moe` speak of {clash} (the other of {mlp}): name each MLP once.')


@dataclasses.dataclass(frozen=True)
class State:
    """Parameters with the state of an optimizer that is not ours, such as optax's.

    Attributes:
      params: of the model.
      opt_state: any pytree. A leaf whose path holds that of a parameter is that parameter's; other whole numbers count steps; all
        else, such as hyperparameters, stays. None: there is none.
      init: parameters -> the optimizer's first state, such as optax's `tx.init`. It says what state the sparse model needs, and
        what the state of routers, and fresh state, starts as.
      step: training steps taken: the clock where `opt_state` lacks one; and for the receipt. None: not known.
    """

    params: Any
    opt_state: Any = None
    init: Callable[[Any], Any] | None = None
    step: int | None = None

    def __post_init__(self):
        if not callable(self.init):
            raise UserError(
                f'init = {self.init!r} must be a function from parameters to the first state, such as tx.init.'
            )
