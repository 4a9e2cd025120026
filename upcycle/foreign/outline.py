"""From rules and a parameter tree to the names, shapes and axes that a plan is made of."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upcycle.errors import DifferentLeaves, UserError
from upcycle.foreign.rules import MoERule, PathRules
from upcycle.surgery.operators import Start
from upcycle.surgery.plan import EXPERT, MIXING, PARAMS, ROUTER, ROUTER_STATE, SHARED, Surgery
from upcycle.surgery.router_init import INHERITED

# What the letters of a rule are called on the mesh and by operators.
LOGICAL = {'E': 'expert', 'D': 'embed', 'F': 'mlp'}
_RESERVED = {EXPERT, ROUTER, SHARED, ROUTER_STATE, MIXING}


@dataclasses.dataclass(frozen=True)
class Named:
    """A leaf under a name of ours, or what is to become one.

    Attributes:
      name: theirs.
      leaf: its shape and dtype, experts in front.
      axes: logical axes of that shape; () for a leaf of which none is known.
      order: of our axes, their position in the user's array: theirs = ours.transpose(order); () where they are the same.
      dense: of experts and what they are made of, our name of the dense leaf.
    """

    name: str
    leaf: jax.ShapeDtypeStruct
    axes: tuple[str | None, ...] = ()
    order: tuple[int, ...] = ()
    dense: str = ''

    def in_theirs(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """Something of each of our axes, in the order of the user's array."""
        return tuple(axes[axis] for axis in self.order) if self.order else tuple(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the user's array."""
        return self.in_theirs(self.leaf.shape)


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a plan is made of.

    Attributes:
      sources: the leaves that there are, by names of ours.
      targets: the leaves to make, likewise.
      dropped: the leaves that are left out, by their own names, with reasons.
      mlps: the paths of the MLPs by names of ours ('params/...').
    """

    sources: dict[str, Named]
    targets: dict[str, Named]
    dropped: dict[str, str]
    mlps: dict[str, str]

    def theirs(self, name: str) -> str:
        """The user's name of a leaf or of an MLP; `x@i` is that of the dense model i of several."""
        base = without_index(name)
        named = self.targets.get(base) or self.sources.get(base)
        return (self.mlps.get(base, base) if named is None else named.name) + name.removeprefix(base)


def without_index(name: str) -> str:
    """A name of ours without the `@i` that it has in several dense models."""
    return re.sub(r'@\d+$', '', name)


def ours(name: str) -> str:
    """A path in which no key means anything to a plan."""
    return '/'.join(f"'{key}'" if key in _RESERVED or '@' in key else key for key in name.split('/'))


def named(name: str, leaf: Any, order: tuple[int, ...] = (), axes: tuple[str | None, ...] = ()) -> Named:
    """A leaf as the user has it; see `Named`."""
    shape = tuple(leaf.shape[order.index(axis)] for axis in range(len(order))) if order else tuple(leaf.shape)
    return Named(name, jax.ShapeDtypeStruct(shape, leaf.dtype), axes, order)


def join(*parts: str) -> str:
    """A path of paths, of which some may be empty."""
    return '/'.join(part for part in parts if part)


def refuse_all(heading: str, mistakes: Iterable[str]) -> None:
    """Raises UserError where there are mistakes."""
    found = tuple(dict.fromkeys(mistakes))
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise DifferentLeaves(heading, found)


def outline_of(leaves: Mapping[str, Any], rules: PathRules, surgery: Surgery) -> Outline:
    """Finds what every leaf is.

    Args:
      leaves: of the tree to start from, by their paths: arrays or their shapes.
      rules: of the model.
      surgery: with an operator.

    Raises:
      UserError: a leaf has no rule, a rule has no leaf, or a shape is not what its axes say.
    """
    found = Outline({}, {}, {}, {})
    mistakes: list[str] = []
    ruled: set[str] = set()
    for rule in rules.moe:
        for mlp in rule.mlps:
            found.mlps[f'{PARAMS}{ours(mlp)}'] = mlp
            layer = _Layer(rule, mlp, leaves, from_moe=surgery.operator.starts_from is Start.MOE)
            layer.add_to(found, inherits=surgery.router_init in INHERITED)
            mistakes += layer.mistakes
            ruled |= layer.ruled
    mistakes += _others(found, {name: leaf for name, leaf in leaves.items() if name not in ruled}, rules)
    names = [target.name for target in found.targets.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    mistakes += [f'{name} would be made twice: change `experts`, `router` or `zeros`.' for name in twice]
    refuse_all('The rules do not fit the parameters', mistakes)
    return found


def _others(found: Outline, rest: Mapping[str, Any], rules: PathRules) -> list[str]:
    """Adds the leaves of no MoE layer; what is wrong with them, a sentence each."""
    mistakes = []
    for pattern in (*rules.drop, *rules.keep):
        if not fnmatch.filter(rest, pattern):
            mistakes.append(
                f'the pattern {pattern!r} matches no leaf outside of `moe`{_nearest(pattern, rest)}: remove it or fix it.'
            )
    for name in rest:
        mlp = next((mlp for mlp in found.mlps.values() if name.startswith(f'{mlp}/')), None)
        reason = next((reason for pattern, reason in rules.drop.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if mlp is not None:
            mistakes.append(f'{name} lies in an MLP that becomes sparse and has no rule: add it to `leaves` of {mlp}.')
        elif reason is not None:
            found.dropped[name] = reason
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in rules.keep):
            kept = f'{PARAMS}{ours(name)}'
            found.sources[kept] = found.targets[kept] = named(name, rest[name])
        else:
            mistakes.append(f'{name} has no rule: add it to `moe`, `keep` or `drop`.')
    return mistakes


class _Layer:
    """One MLP that becomes an MoE layer."""

    def __init__(self, rule: MoERule, mlp: str, leaves: Mapping[str, Any], *, from_moe: bool):
        self._rule, self._mlp, self._leaves, self._from_moe = rule, mlp, leaves, from_moe
        self._sizes: dict[str, tuple[int, str]] = {}
        self.mistakes: list[str] = []
        self.ruled: set[str] = set()

    def add_to(self, found: Outline, *, inherits: bool) -> None:
        """Adds its leaves; `inherits`: the router is made of the router that there is."""
        rule, above = self._rule, f'{PARAMS}{ours(self._mlp)}'
        for name, axes in rule.leaves.items():
            is_expert = 'E' in axes
            there = join(self._mlp, rule.experts if self._from_moe and is_expert else '', name)
            if (leaf := self._source(there, axes if self._from_moe else axes.replace('E', ''))) is None:
                continue
            dense = f'{above}/{ours(name)}'
            expert = f'{above}/{EXPERT}/{ours(name)}'
            order = _order(axes)
            source = named(there, leaf, order if self._from_moe else ())
            found.sources[expert if self._from_moe and is_expert else dense] = source
            if not is_expert:
                found.targets[dense] = source
                continue
            made = jax.ShapeDtypeStruct((rule.num_experts, *self._widths(axes, leaf)), leaf.dtype)
            names = tuple(LOGICAL.get(axis) for axis in ('E', *axes.replace('E', '')))
            found.targets[expert] = Named(join(self._mlp, rule.experts, name), made, names, order, dense)
        if not self.mistakes:
            self._add_router(found, above, inherits)

    def _add_router(self, found: Outline, above: str, inherits: bool) -> None:
        rule = self._rule
        width = rule.router_width or self._sizes.get('D', (None, ''))[0]
        if width is None:
            self.mistakes.append(f'no leaf of {self._mlp} has an axis D: say `router_width`.')
            return
        name = f'{above}/{ROUTER}/{ours(rule.router)}'
        there = join(self._mlp, rule.router)
        order = () if rule.router_axes == 'DE' else (1, 0)
        kernel = jax.ShapeDtypeStruct((width, rule.num_experts), jnp.float32)
        found.targets[name] = Named(there, kernel, ('embed', None), order)
        if self._from_moe and rule.zeros:
            self.mistakes.append(
                f'{self._mlp} has experts, and `zeros` would set what its router has learnt back: remove it.'
            )
        reads = self._from_moe and (there in self._leaves or inherits)
        if reads and (leaf := self._source(there, rule.router_axes)) is not None:
            found.sources[name] = named(there, leaf, order)
        sizes = {'E': rule.num_experts, 'D': width, 'F': self._sizes.get('F', (0, ''))[0] // rule.granularity}
        for zero, axes in rule.zeros.items():
            shape = tuple(sizes[axis] for axis in axes)
            names = tuple(LOGICAL[axis] for axis in axes)
            target = Named(join(self._mlp, zero), jax.ShapeDtypeStruct(shape, jnp.float32), names)
            found.targets[f'{above}/{ROUTER_STATE}/{ours(zero)}'] = target

    def _source(self, name: str, axes: str) -> Any | None:
        """A leaf that there must be, of these axes; None: something is wrong with it."""
        leaf = self._leaves.get(name)
        self.ruled.add(name)
        if leaf is None:
            hint = _nearest(name, self._leaves)
            self.mistakes.append(
                f'{name} is not in the tree, and the rule for {self._rule.path!r} names it{hint}: fix the rule.'
            )
            return None
        if leaf.ndim != len(axes):
            self.mistakes.append(
                f'{name} {tuple(leaf.shape)} has {leaf.ndim} axes, and its rule names {axes or "none"}: fix the rule.'
            )
            return None
        for axis, size in zip(axes, leaf.shape, strict=True):
            known, where = self._sizes.setdefault(axis, (size, name))
            if axis in LOGICAL and known != size:
                self.mistakes.append(
                    f'{name} {tuple(leaf.shape)} has {axis} = {size}, and {where} has {known}: fix the axes of the rule.'
                )
                return None
        return leaf

    def _widths(self, axes: str, leaf: Any) -> list[int]:
        """The sizes of one expert's axes."""
        stored = axes if self._from_moe else axes.replace('E', '')
        sizes = dict(zip(stored, leaf.shape, strict=True))
        granularity = 1 if self._from_moe else self._rule.granularity
        if sizes.get('F', 0) % granularity:
            self.mistakes.append(
                f'granularity = {granularity} does not divide F = {sizes["F"]} of {self._mlp}: change it.'
            )
        return [sizes[axis] // (granularity if axis == 'F' else 1) for axis in axes if axis != 'E']


def _order(axes: str) -> tuple[int, ...]:
    """See `Named.order`, of an array of these axes, which are E and others in their order for us."""
    first = ('E', *axes.replace('E', '')) if 'E' in axes else tuple(axes)
    order = tuple(first.index(axis) for axis in axes)
    return () if order == tuple(range(len(order))) else order


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), 1)
    return f' (is it {found[0]}?)' if found else ''
