"""The rules with which a user describes a foreign model."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from upcycle.errors import UserError, refuse
from upcycle.schema import Count, Whole, misfits

LAYER = '{layer}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoERule:
    """MLPs of one kind that become MoE layers, described by the paths of their parameters.

    Axes are letters, one per axis of an array: E experts, D the width that the router reads, F MLP width. Other letters are only
    for leaves without E. Kernels are (in, out), as in Flax.

    Attributes:
      path: path of an MLP, with `{layer}` for the layer number: 'MixerBlock_{layer}/channel_mixing'; '': the
        whole tree is an MLP.
      layers: numbers of the layers that become sparse; (), the default, if the path has no `{layer}`.
      leaves: axes of each leaf in the MoE layer, by its path within the MLP: {'Dense_0/kernel': 'EDF', 'Dense_0/bias': 'EF',
        ...}. E marks the position of the expert axis; the dense leaf has the same axes without E. A leaf without E is kept and
        shared by all experts.
      num_experts: number of experts E.
      experts: path within the MLP under which the experts' leaves go, by default 'experts': 'experts/Dense_0/kernel'; '': they
        keep their paths.
      router: path of the router kernel within the MLP, by default 'router/kernel'.
      router_axes: axes of the router kernel, 'DE' (the default) or 'ED'.
      router_width: width of the router's input; None, the default: D.
      zeros: axes of further leaves within the MLP that start at 0, such as {'router/bias': 'E'}; by default none.
      granularity: width of the dense MLP divided by that of an expert, for the operators 'granular' and 'partial'; by default 1.

    Raises:
      UserError: a field has another type, or the fields contradict each other.
    """

    path: str
    layers: Sequence[int | str] = ()
    leaves: Mapping[str, str]
    num_experts: Count
    experts: str = 'experts'
    router: str = 'router/kernel'
    router_axes: str = 'DE'
    router_width: Count | None = None
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    granularity: Count = 1

    def __post_init__(self):
        where = f'the rule for {self.path!r}: '
        object.__setattr__(self, 'layers', _listed(self.layers))
        for name in ('num_experts', 'router_width', 'granularity'):
            object.__setattr__(self, name, _as_int(getattr(self, name)))
        refuse(misfits(vars(self), MoERule, lambda name: f'{where}{name}'))
        refuse(self._invalid())

    def _invalid(self) -> Iterator[str]:
        """Yields the mistakes, one sentence each."""
        where = f'the rule for {self.path!r}'
        if (LAYER in self.path) != bool(self.layers):
            yield f'{where}: `layers` needs {LAYER} in the path, so give both or neither.'
        if len({*map(str, self.layers)}) < len(self.layers):
            yield f'{where}: layers = {self.layers!r} names a layer twice.'
        paths = {'path': self.path, 'experts': self.experts, 'router': self.router}
        paths |= {f'a key of {name}': path for name in ('leaves', 'zeros') for path in getattr(self, name)}
        for name, path in paths.items():
            may_be_empty = name in ('path', 'experts')
            if '' in path.split('/') and not (may_be_empty and path == ''):
                yield f'{where}: {name} = {path!r} must be the keys of a path joined with `/`, and no key is empty.'
        if not any('E' in axes for axes in self.leaves.values()):
            yield f'{where}: no leaf has an axis E: mark the expert axis of at least one leaf.'
        for leaf, axes in {**self.leaves, **self.zeros}.items():
            if not axes.isalpha() and axes:
                yield f'{where}: the axes {axes!r} of {leaf} must be letters, such as EDF.'
            elif len({*axes}) < len(axes):
                yield f'{where}: the axes {axes!r} of {leaf} repeat a letter.'
        for leaf, axes in self.leaves.items():
            if 'E' in axes and {*axes} - {*'EDF'}:
                yield f'{where}: the axes {axes!r} of {leaf} must be among E, D and F: unstack layers that share one leaf first.'
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

    Raises:
      UserError: a field has another type, or two rules match the same MLP.
    """

    moe: Sequence[MoERule]
    keep: Sequence[str] = ()
    drop: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dense_apply: Callable[[Any, Any], Any] | None = None
    sparse_apply: Callable[[Any, Any], Any] | None = None
    hidden_states: Callable[[Any, str, Any], Any] | None = None

    def __post_init__(self):
        object.__setattr__(self, 'keep', (self.keep,) if isinstance(self.keep, str) else _listed(self.keep))
        object.__setattr__(self, 'moe', (self.moe,) if isinstance(self.moe, MoERule) else _listed(self.moe))
        refuse(self._invalid())
        mlps = [mlp for rule in self.moe for mlp in rule.mlps]
        if not mlps:
            raise UserError('`moe` has no rules: add a rule for the MLPs that become sparse.')
        for i, mlp in enumerate(mlps):
            if clash := next((other for other in mlps[:i] + mlps[i + 1 :] if f'{other}/'.startswith(f'{mlp}/')), None):
                raise UserError(f'two rules of `moe` match {clash} (one for {mlp}): name each MLP once.')

    def _invalid(self) -> Iterator[str]:
        """Yields the fields of another type, one sentence each."""
        if not isinstance(self.moe, tuple) or not all(isinstance(rule, MoERule) for rule in self.moe):
            yield f'moe = {self.moe!r} must be a MoERule or a list of them.'
        yield from misfits({'keep': self.keep, 'drop': self.drop}, PathRules, str)
        for name in ('dense_apply', 'sparse_apply', 'hidden_states'):
            function = getattr(self, name)
            if function is not None and not callable(function):
                yield f'{name} = {function!r} must be a function, such as model.apply.'


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

    Raises:
      UserError: `init` is not a function, or `step` is not a whole number.
    """

    params: Any
    opt_state: Any = None
    init: Callable[[Any], Any] | None = None
    step: Whole | None = None

    def __post_init__(self):
        object.__setattr__(self, 'step', _as_int(self.step))
        refuse(misfits({'step': self.step}, State, str))
        if not callable(self.init):
            raise UserError(
                f'init = {self.init!r} must be a function from parameters to the initial state, such as tx.init.'
            )


def _as_int(value: Any) -> Any:
    """Converts an integer of NumPy or JAX to an int; returns other values unchanged."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _listed(values: Any) -> Any:
    """Converts any sequence or set to a tuple, and its integers to ints; returns other values unchanged."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        return values
    return tuple(map(_as_int, values))
