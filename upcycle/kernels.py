"""Memory traffic and FLOPs of the Pallas kernels in a traced program.

A compiled program calls a kernel without saying what it reads, writes or multiplies, unless its author estimated that. Here both
follow from the kernel's grid: a block is read, or written, whenever its index differs from that of the step before, and a product
counts in the steps that reach it. Kernels are recognised in the compiled program by the types of their operands and results, so
that what counts is how often the program calls them, after rematerialisation and in loops.

Indices may depend on arrays: the mask of splash attention, which is constant, and the sizes of the groups of a grouped product.
A uniform load is assumed: equal groups, none of them aligned with tiles, of as many rows as `at_uniform_load` says.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from upcycle.kernel_steps import NotCountedError, Steps, Value, opened, scan_inputs

# Types of operands and results, as in compiled text: 'bf16[8,128]'.
Signature = tuple[tuple[str, ...], tuple[str, ...]]

# Jitted grouped products of JAX: their vector of integers is the sizes of the groups into which the rows of the last matrix fall,
# all of them if `at_uniform_load` does not say how many.
GROUPED = ('gmm', 'tgmm')
# A larger array is an activation, which depends on data.
LARGEST = 2**20
_UNIFORM = 'rows_at_uniform_load_'
_CALLS = (
    'jit',
    'pjit',
    'closed_call',
    'core_call',
    'remat2',
    'checkpoint',
    'custom_jvp_call',
    'custom_vjp_call',
    'shard_map',
)
_SAME = ('copy', 'copy_p', 'name', 'optimization_barrier', 'pvary', 'reshard', 'sharding_constraint', 'stop_gradient')


def at_uniform_load(sizes_E: jax.Array, rows: int) -> jax.Array:
    """Returns sizes of groups unchanged; notes in the traced program how many rows they hold together at a uniform load."""
    return checkpoint_name(sizes_E, f'{_UNIFORM}{rows}')


@dataclasses.dataclass(frozen=True)
class Cost:
    """One call of a kernel.

    Attributes:
      name: of the kernel.
      flops: of its matrix products, in the blocks that are not skipped.
      bytes: read and written in memory.
    """

    name: str
    flops: float
    bytes: float


class Kernels:
    """The kernels of a traced program, by signature; costs are computed on demand."""

    def __init__(self, program: ClosedJaxpr):
        self._calls: dict[Signature, list[tuple[JaxprEqn, _Frame, int]]] = collections.defaultdict(list)
        frame = _Frame(program.jaxpr, program.consts, lambda number: None)
        for eqn, where, times in _pallas_calls(frame, 1):
            self._calls[_signature(eqn)].append((eqn, where, times))
        self._costs: dict[Signature, Cost | str] = {}

    def signatures(self) -> list[Signature]:
        """Returns the signatures in the order of the program."""
        return [*self._calls]

    def cost(self, signature: Signature) -> Cost | None:
        """Returns the cost of a kernel, the mean of those with the same signature; None if no such kernel was traced.

        Raises:
          NotCountedError: it does not follow from the grid.
        """
        if signature not in self._calls:
            return None
        if signature not in self._costs:
            try:
                self._costs[signature] = _mean(self._calls[signature])
            except NotCountedError as error:
                self._costs[signature] = str(error)
        cost = self._costs[signature]
        if isinstance(cost, str):
            raise NotCountedError(cost)
        return cost


def _mean(calls: Sequence[tuple[JaxprEqn, '_Frame', int]]) -> Cost:
    total = sum(times for _, _, times in calls)
    costs = [(_cost(eqn, frame), times / total) for eqn, frame, times in calls]
    return Cost(
        costs[0][0].name,
        sum(share * cost.flops for cost, share in costs),
        sum(share * cost.bytes for cost, share in costs),
    )


def _cost(eqn: JaxprEqn, frame: '_Frame') -> Cost:
    """Counts one call."""
    mapping = eqn.params['grid_mapping']
    dynamic = sum(not isinstance(size, int) for size in mapping.grid)
    known = [frame.value(atom) for atom in eqn.invars[: dynamic + mapping.num_index_operands]]
    sizes, scalars = iter(known[:dynamic]), known[dynamic:]
    if any(size is None for size in known[:dynamic]):
        raise NotCountedError('the size of its grid depends on data')
    grid = [size if isinstance(size, int) else int(next(sizes)) for size in mapping.grid]
    steps = Steps(grid, mapping.vmapped_dims)
    traffic = sum(_size(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars[dynamic:][: len(scalars)])
    for block in mapping.block_mappings:
        space = str(block.transformed_block_aval.memory_space).lower()
        if space in ('any', 'hbm'):
            raise NotCountedError('it copies blocks itself')
        traffic += _block_bytes(block, steps.indices(block.index_map_jaxpr, scalars), steps.ids.shape[1])
    steps.count(eqn.params['jaxpr'], scalars)
    return Cost(_name(eqn, frame), float(steps.flops), float(traffic))


def _block_bytes(block: Any, indices: Sequence[Value], steps: int) -> float:
    """Returns the bytes of all blocks that are moved. An index that depends on data changes in every step."""
    if len(indices) != len(block.block_shape):
        raise NotCountedError('the sizes of its blocks vary')
    changes, elements = np.zeros(steps, bool), np.ones(steps)
    changes[:1] = True
    for size, dimension, index in zip(block.array_aval.shape, block.block_shape, indices, strict=True):
        extent = getattr(dimension, 'block_size', dimension if isinstance(dimension, int) else 1)
        if index is None:
            changes[:] = True
            elements *= min(extent, size)
            continue
        index = np.broadcast_to(index, (steps,)).astype(np.int64)
        changes[1:] |= index[1:] != index[:-1]
        first = index if type(dimension).__name__ == 'Element' else index * extent
        elements *= np.clip(size - first, 0, extent)
    return elements[changes].sum() * _size((), block.array_aval.dtype)


def _name(eqn: JaxprEqn, frame: '_Frame') -> str:
    return eqn.params.get('name') or frame.name or eqn.params['jaxpr'].debug_info.func_name


def _pallas_calls(frame: '_Frame', times: int) -> Iterator[tuple[JaxprEqn, '_Frame', int]]:
    for eqn in frame.jaxpr.eqns:
        if eqn.primitive.name == 'pallas_call':
            yield eqn, frame, times
        else:
            length = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            for inner in frame.inner(eqn):
                yield from _pallas_calls(inner, times * length)


class _Frame:
    """One evaluation of a jaxpr: finds the values in it that do not depend on data, on demand."""

    def __init__(self, jaxpr: Jaxpr, consts: Sequence[Any], outer: Callable[[int], Value], name: str = ''):
        self.jaxpr, self.name = jaxpr, name
        self._outer = outer
        self._numbers = {var: number for number, var in enumerate(jaxpr.invars)}
        self._producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        self._inner: dict[int, list[_Frame]] = {}

    def value(self, atom: Any) -> Value:
        """Returns the value of a variable or literal; None if it depends on data."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val)
        if atom not in self._values:
            small = math.prod(getattr(atom.aval, 'shape', ())) <= LARGEST
            if not small:
                found = None
            elif atom in self._numbers:
                found = self._outer(self._numbers[atom])
            else:
                eqn = self._producers[atom]
                found = self._result(eqn, eqn.outvars.index(atom))
            self._values[atom] = found
        return self._values[atom]

    def inner(self, eqn: JaxprEqn) -> list['_Frame']:
        """Returns the evaluations of the jaxprs that an equation calls."""
        if id(eqn) not in self._inner:
            self._inner[id(eqn)] = [
                _Frame(*opened(jaxpr), self._arguments(eqn, name, opened(jaxpr)[0]), self._name_of(eqn))
                for name, jaxpr in _jaxprs(eqn.params)
            ]
        return self._inner[id(eqn)]

    def _name_of(self, eqn: JaxprEqn) -> str:
        name = eqn.params.get('name', '')
        return name if eqn.primitive.name in ('jit', 'pjit') and isinstance(name, str) else self.name

    def _arguments(self, eqn: JaxprEqn, which: str, jaxpr: Jaxpr) -> Callable[[int], Value]:
        """Returns the function from the number of an argument of an inner jaxpr to its value."""
        params, primitive = eqn.params, eqn.primitive.name
        if primitive == 'scan':
            return lambda number: self._scanned(eqn, jaxpr, number)
        if primitive == 'while':
            first, fixed = (
                (0, params['cond_nconsts'])
                if which == 'cond_jaxpr'
                else (params['cond_nconsts'], params['body_nconsts'])
            )
            return lambda number: self.value(eqn.invars[first + number]) if number < fixed else None
        skipped = len(eqn.invars) - len(jaxpr.invars)  # such as the index of `cond`

        def argument(number: int) -> Value:
            if number + skipped < 0:
                return None
            value = self.value(eqn.invars[number + skipped])
            if value is None and params.get('name') in GROUPED:
                return _all_rows(jaxpr, jaxpr.invars[number].aval)
            if value is None or primitive != 'shard_map':
                return value
            # The part of the first device.
            return np.asarray(value)[tuple(slice(0, size) for size in jaxpr.invars[number].aval.shape)]

        return argument

    def _scanned(self, eqn: JaxprEqn, jaxpr: Jaxpr, number: int) -> Value:
        """Returns what is the same in all iterations."""
        constants, carries = scan_inputs(eqn.params, len(eqn.invars))
        if constants <= number < constants + carries and jaxpr.outvars[number - constants] is not jaxpr.invars[number]:
            return None
        value = self.value(eqn.invars[number])
        if value is None or number < constants + carries:
            return value
        value = np.asarray(value)
        return value[0] if len(value) and (value == value[:1]).all() else None

    def _result(self, eqn: JaxprEqn, number: int) -> Value:
        """Evaluates one result of an equation."""
        primitive = eqn.primitive.name
        if primitive == 'axis_index':
            return np.int32(0)
        if primitive == 'name' and eqn.params['name'].startswith(_UNIFORM):
            return _equal_groups(eqn.outvars[0].aval, int(eqn.params['name'].removeprefix(_UNIFORM)))
        if primitive in _SAME:
            return self.value(eqn.invars[number])
        shape = eqn.outvars[number].aval.shape
        if primitive in _CALLS:
            inner = self.inner(eqn)[0]
            out = inner.jaxpr.outvars[number]
            return inner.value(out) if out.aval.shape == shape else None
        values = [self.value(atom) for atom in eqn.invars]
        if all(value is not None for value in values):
            return _evaluated(self.jaxpr, eqn, values)[number]
        if primitive == 'scan' and number >= scan_inputs(eqn.params, len(eqn.invars))[1]:
            inner = self.inner(eqn)[0]
            value = inner.value(inner.jaxpr.outvars[number])
            return None if value is None else np.broadcast_to(value, shape)
        return None


def _evaluated(jaxpr: Jaxpr, eqn: JaxprEqn, values: Sequence[Value]) -> Sequence[Value]:
    """Evaluates an equation of a jaxpr."""
    known = {atom: value for atom, value in zip(eqn.invars, values, strict=True) if not isinstance(atom, Literal)}
    one = jaxpr.replace(constvars=[], invars=[*known], outvars=eqn.outvars, eqns=[eqn])
    try:
        return jaxpr_as_fun(ClosedJaxpr(one, ()))(*known.values())
    except Exception:  # a collective, or a kernel: no value without its devices
        return [None] * len(eqn.outvars)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[tuple[str, Jaxpr | ClosedJaxpr]]:
    for name, value in params.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, Jaxpr | ClosedJaxpr):
                yield name, each


def _all_rows(jaxpr: Jaxpr, aval: Any) -> Value:
    """Returns equal sizes of groups for an argument of a grouped product; None for its other arguments."""
    matrices = [var.aval.shape for var in jaxpr.invars if getattr(var.aval, 'ndim', 0) == 2]
    if getattr(aval, 'ndim', None) != 1 or not np.issubdtype(aval.dtype, np.integer) or not matrices:
        return None
    return _equal_groups(aval, matrices[-1][0])


def _equal_groups(sizes: Any, rows: int) -> np.ndarray:
    """Returns equal sizes of groups, the first of which has a row more, so that groups do not end where tiles end."""
    found = np.full(sizes.shape, rows // sizes.shape[0], sizes.dtype)
    found[0] += rows - found.sum()
    if found[-1] > 1:
        found[0], found[-1] = found[0] + 1, found[-1] - 1
    return found


def _signature(eqn: JaxprEqn) -> Signature:
    return tuple(_text(atom.aval) for atom in eqn.invars), tuple(_text(atom.aval) for atom in eqn.outvars)


def _text(aval: Any) -> str:
    """Writes a type as HLO does. Kernels get booleans as int32."""
    kind = str(aval.dtype)
    for name, short in (('bfloat', 'bf'), ('float', 'f'), ('uint', 'u'), ('int', 's')):
        kind = kind.replace(name, short) if kind.startswith(name) else kind
    kind = 's32' if kind == 'bool' else kind.replace('_', '')
    return f'{kind}[{",".join(map(str, aval.shape))}]'


def _size(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * (4 if np.dtype(dtype) == np.bool_ else np.dtype(dtype).itemsize)
