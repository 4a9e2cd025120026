"""Runs a function whose parameters do not fit into memory: reads each parameter when it is needed, and frees it after use."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding, Sharding

from upcycle import partitioning


@dataclasses.dataclass(frozen=True)
class Unread:
    """A parameter that is read each time it is needed.

    Attributes:
      shape, dtype: of the array.
      read: returns the array, on its devices.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], jax.Array]


def streamed(function: Callable[..., Mapping[str, Any]], params: Any, *arguments: Any) -> Iterator[tuple[str, Any]]:
    """Computes a function piece by piece, and yields each result as soon as it is known.

    The jaxpr of the function is cut such that the unread parameters of a piece have at most the bytes of the largest parameter.
    Equal pieces, such as those of similar layers, are compiled once. A piece ends before the parameters of the next are read.

    Args:
      function: maps `params` and the other arguments to results by name; pure and traceable.
      params: arrays, or `Unread`.
      *arguments: arrays.

    Yields:
      The name and the value of each result, in the order of computation.
    """
    values, structure = jax.tree.flatten((params, *arguments))
    abstract = tuple(jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype)) for value in values)
    cut = cut_into_pieces(function, structure, abstract, tuple(isinstance(value, Unread) for value in values))
    known = dict(zip([*cut.program.constvars, *cut.program.invars], [*cut.constants, *values], strict=True))
    unread = {variable: known.pop(variable) for variable in cut.program.invars if isinstance(known[variable], Unread)}
    del values
    wanted = dict(cut.results)
    last_piece = {variable: number for number, piece in enumerate(cut.pieces) for variable in _inputs(piece)}
    for number, piece in enumerate(cut.pieces):
        later = {variable for variable, last in last_piece.items() if last > number}
        made = dict.fromkeys(variable for equation in piece for variable in equation.outvars)
        inputs = [variable for variable in _inputs(piece) if variable not in made]
        outs = [variable for variable in made if variable in later | _still(wanted)]
        # There is no other reference to what was read, so it is freed after the call.
        given = [unread[variable].read() if variable in unread else known[variable] for variable in inputs]
        known |= zip(outs, _run(piece, inputs, outs, given, cut.compiled), strict=True)
        del given
        for name, (shape, atoms) in list(wanted.items()):
            if all(atom in known for atom in atoms if _is_variable(atom)):
                del wanted[name]
                yield name, shape.unflatten([known[atom] if _is_variable(atom) else atom.val for atom in atoms])
        known = {variable: value for variable, value in known.items() if variable in later | _still(wanted)}
    assert not wanted, wanted


@dataclasses.dataclass(frozen=True)
class Cut:
    """A traced function, cut into pieces.

    Attributes:
      program: the jaxpr.
      constants: of the jaxpr.
      pieces: the equations on which a result depends.
      results: structure and atoms of each result by name.
      compiled: cache of compiled pieces.
    """

    program: Any
    constants: Sequence[Any]
    pieces: Sequence[Sequence[Any]]
    results: Mapping[str, tuple[Any, list[Any]]]
    compiled: dict[Any, jax.stages.Compiled] = dataclasses.field(default_factory=dict)


def cut_into_pieces(
    function: Callable[..., Mapping[str, Any]],
    structure: Any,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    unread: tuple[bool, ...],
) -> Cut:
    """Traces a function and cuts it.

    Args:
      function: see `streamed`.
      structure: tree structure of the arguments.
      inputs: the leaves of the arguments.
      unread: whether each leaf is `Unread`.
    """
    closed, shapes = jax.make_jaxpr(lambda flat: function(*structure.unflatten(flat)), return_shape=True)(list(inputs))
    program = closed.jaxpr
    results: dict[str, tuple[Any, list[Any]]] = {}
    outputs = iter(program.outvars)
    for name, result in sorted(shapes.items()):  # as JAX flattens a dictionary
        leaves, shape = jax.tree.flatten(result)
        results[name] = shape, [next(outputs) for _ in leaves]
    sizes = {
        variable: leaf.size * leaf.dtype.itemsize
        for variable, leaf, is_unread in zip(program.invars, inputs, unread, strict=True)
        if is_unread
    }
    return Cut(program, closed.consts, _pieces(_needed(program), sizes), results)


def _still(wanted: Mapping[str, tuple[Any, list[Any]]]) -> set[Any]:
    """Returns the variables of results that are not computed yet."""
    return {atom for _, atoms in wanted.values() for atom in atoms if _is_variable(atom)}


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _inputs(piece: Sequence[Any]) -> list[Any]:
    """Returns the distinct variables that equations read, including those that one of them computes."""
    return list(dict.fromkeys(v for equation in piece for v in equation.invars if _is_variable(v)))


def _needed(program: Any) -> list[Any]:
    """Returns the equations on which a result depends."""
    wanted = {variable for variable in program.outvars if _is_variable(variable)}
    equations = []
    for equation in reversed(program.eqns):
        if wanted.intersection(equation.outvars):
            equations.append(equation)
            wanted.update(_inputs([equation]))
    return equations[::-1]


def _pieces(equations: Sequence[Any], sizes: Mapping[Any, int]) -> list[list[Any]]:
    """Cuts equations such that no piece needs more unread bytes than the largest parameter, unless a single equation does."""
    limit = max((sizes[variable] for variable in _inputs(equations) if variable in sizes), default=0)
    pieces: list[list[Any]] = [[]]
    held: set[Any] = set()
    for equation in equations:
        more = {variable for variable in _inputs([equation]) if variable in sizes}
        if pieces[-1] and more - held and sum(sizes[variable] for variable in held | more) > limit:
            pieces.append([])
            held = set()
        pieces[-1].append(equation)
        held |= more
    return pieces


def _run(
    piece: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    operands: Sequence[Any],
    compiled: dict[Any, jax.stages.Compiled],
) -> list[jax.Array]:
    """Runs a piece; returns the values of `outputs` when they are ready."""

    def program(*operands: jax.Array) -> list[jax.Array]:
        values = dict(zip(inputs, operands, strict=True))
        for equation in piece:
            given = [values[atom] if _is_variable(atom) else atom.val for atom in equation.invars]
            made = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            values |= zip(equation.outvars, made if equation.primitive.multiple_results else [made], strict=True)
        return [values[variable] for variable in outputs]

    shardings = tuple(getattr(operand, 'sharding', None) for operand in operands)
    same = (*map(id, piece), shardings)
    if same not in compiled:
        lowered = jax.jit(program, out_shardings=_by_rows(outputs, operands)).lower(*operands)
        alike = lowered.as_text(), shardings
        if any(np.ndim(atom.val) for equation in piece for atom in equation.invars if not _is_variable(atom)):
            # JAX may pass constant arrays separately, so that the text does not identify the program.
            alike = same
        if alike not in compiled:
            compiled[alike] = lowered.compile()
        compiled[same] = compiled[alike]
    return jax.block_until_ready(compiled[same](*operands))


def _by_rows(outputs: Sequence[Any], operands: Sequence[Any]) -> list[Sharding | None]:
    """Returns the shardings of the values passed between pieces: split by rows, like batches, or replicated.

    By default XLA may shard another axis unevenly, which JAX refuses between programs.
    """
    shardings = [operand.sharding for operand in operands if isinstance(operand, jax.Array)]
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    if mesh is None:
        return [None] * len(outputs)
    rows, shards = partitioning.batch_sharding(mesh), partitioning.batch_shards(mesh)
    shapes = [variable.aval.shape for variable in outputs]
    return [rows if shape and shape[0] % shards == 0 else partitioning.replicated(mesh) for shape in shapes]
