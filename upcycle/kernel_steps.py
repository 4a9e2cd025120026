"""Evaluates the scalar part of a Pallas kernel for all steps of its grid at once: block indices, and the products that run.

A value is an array over the steps (or one number for all of them), or None if it depends on data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Value = Any  # np.ndarray | None


def _divide(x: Value, y: Value) -> Value:
    """Divides as XLA does: integers towards zero."""
    if not np.issubdtype(np.result_type(x, y), np.integer):
        return x / y
    return (np.sign(x) * np.sign(y) * (np.abs(x) // np.maximum(np.abs(y), 1))).astype(np.result_type(x))


def _select(which: Value, *cases: Value) -> Value:
    return np.choose(np.asarray(which, np.int64), cases)


_OPERATIONS: dict[str, Callable[..., Value]] = {
    'add': np.add, 'sub': np.subtract, 'mul': np.multiply, 'max': np.maximum, 'min': np.minimum, 'eq': np.equal,
    'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal, 'gt': np.greater, 'ge': np.greater_equal,
    'and': np.bitwise_and, 'or': np.bitwise_or, 'xor': np.bitwise_xor, 'not': np.invert, 'neg': np.negative,
    'sign': np.sign, 'abs': np.abs, 'div': _divide, 'rem': np.fmod, 'select_n': _select,
    'clamp': lambda low, x, high: np.clip(x, low, high), 'shift_left': np.left_shift,
    'shift_right_arithmetic': np.right_shift, 'stop_gradient': lambda x: x, 'copy': lambda x: x,
}  # fmt: skip


class NotCountedError(Exception):
    """The cost of a kernel does not follow from its grid; the message says why."""


class Steps:
    """The steps of a grid, in the order in which they run, and the FLOPs of the products counted so far.

    Attributes:
      ids: program ids by axis, int32 (axes, steps).
      flops: of all steps; a multiply-add counts as 2.
    """

    def __init__(self, grid: Sequence[int], vmapped: Sequence[int] = ()):
        self.ids = np.indices(grid, np.int32).reshape(len(grid), math.prod(grid))
        self.flops = 0.0
        # A kernel does not see the axes that `vmap` added to its grid.
        self._axes = [axis for axis in range(len(grid)) if axis not in vmapped]
        self._grid = grid

    def indices(self, index_map: ClosedJaxpr, scalars: Sequence[Value]) -> list[Value]:
        """Evaluates an index map; `scalars` are the arrays that the kernel prefetches."""
        everywhere = np.ones(self.ids.shape[1], bool)
        return self._run(index_map.jaxpr, index_map.consts, [*self.ids, *scalars], everywhere)

    def count(self, body: Jaxpr, scalars: Sequence[Value]) -> None:
        """Counts the products of a kernel's body in the steps that reach them. Of branches that depend on data, the largest.

        Raises:
          NotCountedError: a loop ends when data say so, or the kernel copies blocks itself.
        """
        unknown = [None] * (len(body.invars) - len(scalars))
        self._run(body, (), [*scalars, *unknown], np.ones(self.ids.shape[1], bool))

    def _run(self, jaxpr: Jaxpr, consts: Sequence[Value], values: Sequence[Value], where: np.ndarray) -> list[Value]:
        """Evaluates a jaxpr in the steps `where`; values elsewhere have no meaning."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

        def read(atom: Any) -> Value:
            return np.asarray(atom.val) if isinstance(atom, Literal) else env.get(atom)

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars], where)
            env.update(zip(eqn.outvars, results, strict=False))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Value], where: np.ndarray) -> Sequence[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name == 'program_id':
            return [self.ids[self._axes[params['axis']]]]
        if name == 'num_programs':
            return [np.int32(self._grid[self._axes[params['axis']]])]
        if name == 'dot_general':
            self.flops += where.sum() * dot_flops(eqn)
        if name == 'get':
            return [_load(eqn, values)]
        if name == 'cond':
            return self._cond(params['branches'], values, where)
        if name == 'scan':
            return self._scan(params, values, where)
        if name == 'while':
            return self._while(params, values, where)
        if name == 'dma_start':
            raise NotCountedError('it copies blocks itself')
        if name == 'convert_element_type' and values[0] is not None:
            return [np.asarray(values[0]).astype(params['new_dtype'])]
        if name in _OPERATIONS and all(
            value is not None and not atom.aval.shape for value, atom in _pairs(eqn, values)
        ):
            with np.errstate(all='ignore'):  # steps that do not get here may divide by 0
                return [_OPERATIONS[name](*values)]
        inner = [each for each in params.values() if isinstance(each, Jaxpr | ClosedJaxpr)]
        if len(inner) != 1:
            return [None] * len(eqn.outvars)
        jaxpr, consts = opened(inner[0])
        # Such as `run_scoped`, whose body gets buffers, too.
        values = values[-len(jaxpr.invars) :] if jaxpr.invars else []
        return self._run(jaxpr, consts, [*values, *[None] * (len(jaxpr.invars) - len(values))], where)

    def _cond(self, branches: Sequence[ClosedJaxpr], values: list[Value], where: np.ndarray) -> Sequence[Value]:
        which, *rest = values
        before, most = self.flops, self.flops
        outs: list[Value] = [None] * len(branches[0].jaxpr.outvars)
        for number, branch in enumerate(branches):
            here = where if which is None else where & (np.clip(which, 0, len(branches) - 1) == number)
            if not here.any():
                continue
            results = self._run(branch.jaxpr, branch.consts, rest, here)
            if here.all():
                outs = results
            if which is None:
                most, self.flops = max(most, self.flops), before
        self.flops = most if which is None else self.flops
        return outs

    def _scan(self, params: dict[str, Any], values: list[Value], where: np.ndarray) -> Sequence[Value]:
        constants, carries = scan_inputs(params, len(values))
        fixed, carry = values[:constants], values[constants : constants + carries]
        jaxpr, consts = opened(params['jaxpr'])
        xs = [None] * (len(jaxpr.invars) - constants - carries)
        for _ in range(params['length']):
            carry = self._run(jaxpr, consts, [*fixed, *carry, *xs], where)[:carries]
        return [*carry, *[None] * (len(jaxpr.outvars) - carries)]

    def _while(self, params: dict[str, Any], values: list[Value], where: np.ndarray) -> Sequence[Value]:
        first, second = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
        carry = values[second:]
        (test, test_consts), (body, body_consts) = opened(params['cond_jaxpr']), opened(params['body_jaxpr'])
        while True:
            (again,) = self._run(test, test_consts, [*values[:first], *carry], where)
            if again is None:
                raise NotCountedError('a loop in it ends when data say so')
            where = where & again
            if not where.any():
                return [None] * len(carry)
            carry = self._run(body, body_consts, [*values[first:second], *carry], where)


def scan_inputs(params: dict[str, Any], inputs: int) -> tuple[int, int]:
    """Returns how many of the inputs of a `scan` are constants and how many are carried, by its parameters."""
    if 'num_consts' in params:
        return params['num_consts'], params['num_carry']
    # From JAX 0.12 a tree of three parts says so.
    constants, carries, _ = params['ft_in'].update(range(inputs)).unpack()
    return len(list(constants)), len(list(carries))


def opened(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a jaxpr and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def dot_flops(eqn: Any) -> float:
    """Counts the FLOPs of a `dot_general`."""
    (contracted, _), _ = eqn.params['dimension_numbers']
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _pairs(eqn: Any, values: list[Value]) -> zip:
    return zip(values, eqn.invars, strict=True)


def _load(eqn: Any, values: list[Value]) -> Value:
    """Reads a number of a prefetched array."""
    if values[0] is None or eqn.outvars[0].aval.shape:
        return None
    places = eqn.params['tree'].unflatten(values[1:])
    if len(places) != 1 or any(place is None for place in places[0].indices):
        return None
    # Steps that do not load may hold any index.
    sizes = np.shape(values[0])
    where = (np.clip(place, 0, size - 1) for place, size in zip(places[0].indices, sizes, strict=True))
    return values[0][tuple(where)]
