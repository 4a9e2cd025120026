"""Applies rules to a parameter tree: names, shapes and axes for a plan."""

import collections
import dataclasses
import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upcycle.errors import DifferentLeaves, UserError
from upcycle.foreign.rules import MoERule, PathRules
from upcycle.surgery.operators import Leaf, Operator, Start
from upcycle.surgery.plan import EXPERT, MIXING, PARAMS, ROUTER, ROUTER_STATE, SHARED, Surgery
from upcycle.surgery.router_init import INHERITED

# Logical axis names, for the mesh and for operators, of the letters in a rule.
LOGICAL = {'E': 'expert', 'D': 'embed', 'F': 'mlp'}
_RESERVED = {EXPERT, ROUTER, SHARED, ROUTER_STATE, MIXING}


@dataclasses.dataclass(frozen=True)
class Named:
    """A source or target leaf.

    Attributes:
      name: the user's name.
      leaf: its shape and dtype, experts first.
      axes: logical axes of that shape; () if unknown.
      order: transposition from our axes to the user's: theirs = ours.transpose(order); () if they are the same.
      dense: for a leaf of experts, our name of the dense leaf.
    """

    name: str
    leaf: jax.ShapeDtypeStruct
    axes: tuple[str | None, ...] = ()
    order: tuple[int, ...] = ()
    dense: str = ''

    def in_theirs(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """Reorders per-axis values from our axes to the user's."""
        return tuple(axes[axis] for axis in self.order) if self.order else tuple(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the user's array."""
        return self.in_theirs(self.leaf.shape)


@dataclasses.dataclass(frozen=True)
class Outline:
    """The input of a plan.

    Attributes:
      sources: source leaves, by our names.
      targets: target leaves, by our names.
      dropped: reasons for dropped leaves, by the user's names.
      mlps: the user's paths of the MLPs, by our paths ('params/...').
    """

    sources: dict[str, Named]
    targets: dict[str, Named]
    dropped: dict[str, str]
    mlps: dict[str, str]

    def theirs(self, name: str) -> str:
        """Converts our name of a leaf or MLP to the user's; `x@i` belongs to dense model i of several."""
        base = without_index(name)
        named = self.targets.get(base) or self.sources.get(base)
        return (self.mlps.get(base, base) if named is None else named.name) + name.removeprefix(base)


def without_index(name: str) -> str:
    """Removes the suffix `@i` of dense model i from a name."""
    return re.sub(r'@\d+$', '', name)


def ours(name: str) -> str:
    """Quotes the keys of a path that have a meaning in plans."""
    return '/'.join(f"'{key}'" if key in _RESERVED or '@' in key else key for key in name.split('/'))


def named(name: str, leaf: Any, order: tuple[int, ...] = (), axes: tuple[str | None, ...] = ()) -> Named:
    """Makes a `Named` from the user's leaf."""
    shape = tuple(leaf.shape[order.index(axis)] for axis in range(len(order))) if order else tuple(leaf.shape)
    return Named(name, jax.ShapeDtypeStruct(shape, leaf.dtype), axes, order)


def join(*parts: str) -> str:
    """Joins paths, some of which may be empty."""
    return '/'.join(part for part in parts if part)


def refuse_all(heading: str, mistakes: Iterable[str]) -> None:
    """Raises all mistakes at once; returns if there are none."""
    unique = tuple(dict.fromkeys(mistakes))
    if len(unique) == 1:
        raise UserError(unique[0])
    if unique:
        raise DifferentLeaves(heading, unique)


def outline_of(leaves: Mapping[str, Any], rules: PathRules, surgery: Surgery) -> Outline:
    """Applies the rules to every leaf.

    Args:
      leaves: arrays, or their shapes, of the source tree by path.
      rules: the rules of the model.
      surgery: the specification, with an operator.

    Raises:
      UserError: a leaf has no rule, a rule matches no leaf, or a shape contradicts its axes.
    """
    outline = Outline({}, {}, {}, {})
    mistakes: list[str] = []
    ruled: set[str] = set()
    for rule in rules.moe:
        mistakes += _granularity(rule, surgery.operator)
        for mlp in rule.mlps:
            outline.mlps[f'{PARAMS}{ours(mlp)}'] = mlp
            layer = _Layer(rule, mlp, leaves, from_moe=surgery.operator.starts_from is Start.MOE)
            layer.add_to(outline, inherits=surgery.router_init in INHERITED)
            mistakes += layer.mistakes
            ruled |= layer.ruled
    mistakes += _add_others(outline, {name: leaf for name, leaf in leaves.items() if name not in ruled}, rules)
    mistakes += _clashes([target.name for target in outline.targets.values()])
    refuse_all('The rules do not fit the parameters', mistakes)
    return outline


def _clashes(names: Sequence[str]) -> list[str]:
    """Returns a sentence for each path that two leaves have, or that is a leaf and contains another."""
    count = collections.Counter(names)
    way_out = 'change `experts`, `router` or `zeros`.'
    mistakes = [f'{name} would be made twice: {way_out}' for name in count if count[name] > 1]
    for name in count:
        for above in itertools.accumulate(name.split('/')[:-1], '{}/{}'.format):
            if above in count:
                mistakes.append(f'{above} would be both a leaf and the parent of {name}: {way_out}')
    return sorted(mistakes)


def _add_others(outline: Outline, rest: Mapping[str, Any], rules: PathRules) -> list[str]:
    """Adds the leaves outside MoE layers. Returns the mistakes, one sentence each."""
    mistakes = []
    for pattern in (*rules.drop, *rules.keep):
        # Every leaf may belong to an MLP.
        if not fnmatch.filter(rest, pattern) and (rest or pattern != '*'):
            mistakes.append(
                f'the pattern {pattern!r} matches no leaf outside `moe`{_nearest(pattern, rest)}: remove it or fix it.'
            )
    for name in rest:
        mlp = next((mlp for mlp in outline.mlps.values() if name.startswith(f'{mlp}/')), None)
        reason = next((reason for pattern, reason in rules.drop.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if mlp is not None:
            mistakes.append(
                f'{name} belongs to an MLP that becomes sparse and has no rule: add it to `leaves` of {mlp}.'
            )
        elif reason is not None:
            outline.dropped[name] = reason
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in rules.keep):
            our_name = f'{PARAMS}{ours(name)}'
            outline.sources[our_name] = outline.targets[our_name] = named(name, rest[name])
        else:
            mistakes.append(f'{name} has no rule: add it to `moe`, `keep` or `drop`.')
    return mistakes


def _granularity(rule: MoERule, operator: Operator) -> list[str]:
    """Returns a sentence if the operator makes experts of another width than the rule."""
    if operator.starts_from is Start.MOE:
        return []
    shards = operator.source_shape(Leaf((rule.num_experts, 1), ('expert', 'mlp')))[-1]
    if shards == rule.granularity:
        return []
    return [
        f'the operator {operator.name!r} divides the width of an MLP by {shards}, and the rule for {rule.path!r} by '
        f'{rule.granularity}: set MoERule(granularity={shards}), or use another operator.'
    ]


class _Layer:
    """One MLP that becomes an MoE layer."""

    def __init__(self, rule: MoERule, mlp: str, leaves: Mapping[str, Any], *, from_moe: bool):
        self._rule, self._mlp, self._leaves, self._from_moe = rule, mlp, leaves, from_moe
        self._sizes: dict[str, tuple[int, str]] = {}
        self.mistakes: list[str] = []
        self.ruled: set[str] = set()

    def add_to(self, outline: Outline, *, inherits: bool) -> None:
        """Adds the leaves of the layer. If `inherits`, the router is made from the existing router."""
        rule, above = self._rule, f'{PARAMS}{ours(self._mlp)}'
        for name, axes in rule.leaves.items():
            is_expert = 'E' in axes
            path = join(self._mlp, rule.experts if self._from_moe and is_expert else '', name)
            if (leaf := self._source(path, axes if self._from_moe else axes.replace('E', ''))) is None:
                continue
            dense = f'{above}/{ours(name)}'
            expert = f'{above}/{EXPERT}/{ours(name)}'
            order = _order(axes)
            source = named(path, leaf, order if self._from_moe else ())
            outline.sources[expert if self._from_moe and is_expert else dense] = source
            if not is_expert:
                outline.targets[dense] = source
                continue
            made = jax.ShapeDtypeStruct((rule.num_experts, *self._widths(axes, leaf)), leaf.dtype)
            names = tuple(LOGICAL.get(axis) for axis in ('E', *axes.replace('E', '')))
            outline.targets[expert] = Named(join(self._mlp, rule.experts, name), made, names, order, dense)
        if not self.mistakes:
            self._add_router(outline, above, inherits)

    def _add_router(self, outline: Outline, above: str, inherits: bool) -> None:
        rule = self._rule
        width = rule.router_width or self._sizes.get('D', (None, ''))[0]
        if width is None:
            self.mistakes.append(f'no leaf of {self._mlp} has an axis D: set `router_width`.')
            return
        name = f'{above}/{ROUTER}/{ours(rule.router)}'
        path = join(self._mlp, rule.router)
        order = () if rule.router_axes == 'DE' else (1, 0)
        kernel = jax.ShapeDtypeStruct((width, rule.num_experts), jnp.float32)
        outline.targets[name] = Named(path, kernel, ('embed', None), order)
        if self._from_moe and rule.zeros:
            self.mistakes.append(
                f'{self._mlp} has experts, and `zeros` would reset leaves of its trained router: remove `zeros`.'
            )
        reads = self._from_moe and (path in self._leaves or inherits)
        if reads and (leaf := self._source(path, rule.router_axes)) is not None:
            outline.sources[name] = named(path, leaf, order)
        sizes = {'E': rule.num_experts, 'D': width, 'F': self._sizes.get('F', (0, ''))[0] // rule.granularity}
        for zero, axes in rule.zeros.items():
            shape = tuple(sizes[axis] for axis in axes)
            names = tuple(LOGICAL[axis] for axis in axes)
            target = Named(join(self._mlp, zero), jax.ShapeDtypeStruct(shape, jnp.float32), names)
            outline.targets[f'{above}/{ROUTER_STATE}/{ours(zero)}'] = target

    def _source(self, name: str, axes: str) -> Any | None:
        """Returns the leaf after checking its axes, or None and records a mistake."""
        leaf = self._leaves.get(name)
        self.ruled.add(name)
        if leaf is None:
            hint = _nearest(name, self._leaves)
            self.mistakes.append(
                f'{name} is not in the tree, but the rule for {self._rule.path!r} names it{hint}: fix the rule.'
            )
            return None
        if leaf.ndim != len(axes):
            self.mistakes.append(
                f'{name} {tuple(leaf.shape)} has {leaf.ndim} axes, but its rule names {axes or "none"}: fix the rule.'
            )
            return None
        for axis, size in zip(axes, leaf.shape, strict=True):
            known, other = self._sizes.setdefault(axis, (size, name))
            if axis in LOGICAL and known != size:
                self.mistakes.append(
                    f'{name} {tuple(leaf.shape)} has {axis} = {size}, but {other} has {known}: fix the axes of the rule.'
                )
                return None
        return leaf

    def _widths(self, axes: str, leaf: Any) -> list[int]:
        """The axis sizes of one expert's leaf."""
        stored = axes if self._from_moe else axes.replace('E', '')
        sizes = dict(zip(stored, leaf.shape, strict=True))
        granularity = 1 if self._from_moe else self._rule.granularity
        if sizes.get('F', 0) % granularity:
            self.mistakes.append(
                f'granularity = {granularity} does not divide F = {sizes["F"]} of {self._mlp}: change it.'
            )
        return [sizes[axis] // (granularity if axis == 'F' else 1) for axis in axes if axis != 'E']


def _order(axes: str) -> tuple[int, ...]:
    """Returns `Named.order` for the user's axes; ours are the same with E first."""
    our_axes = ('E', *axes.replace('E', '')) if 'E' in axes else tuple(axes)
    order = tuple(our_axes.index(axis) for axis in axes)
    return () if order == tuple(range(len(order))) else order


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f' (did you mean {close[0]}?)' if close else ''
