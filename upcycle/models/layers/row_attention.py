"""A Pallas TPU kernel for attention with a bias that the batch shares, such as T5's, and for short rows of keys without one.

A block of queries sees its whole row of keys, so that forward and backward pass are one softmax in fast memory, and nothing but
the arguments is kept: no array (B, H, Q, K) exists. Operands stay (B, L, H * N), as projections write them, since arrays with a
last axis of 64 would take twice the memory. Blocks reach past the ends of lengths that are not multiples of them; what lies there
is undefined, and is masked.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle import partitioning

LANES = 128
LONGEST_ROW = 2048  # keys
_LOGITS = 512 * 512  # of a block of queries and all keys, at most
_ROWS = 128  # queries that are computed at a time
_MASKED = float(jnp.finfo(jnp.float32).min) / 2

Segments = tuple[jax.Array, jax.Array]


class _Operands(NamedTuple):
    """(B, Q, W), (B, K, W) twice with W = H * N, (H, Q, K), int32 (B, Q) and (B, K)."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    query_ids: Any = None
    key_ids: Any = None


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static: sizes of one device's part of the problem, and of blocks.

    Attributes:
      batch, heads, head_dim, queries, keys: B, H, N, Q, K.
      causal: a query sees the keys up to its own position.
      scale: factor of the logits.
      interpret: run on CPUs.
    """

    batch: int
    heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool
    scale: float
    interpret: bool

    @property
    def heads_a_block(self) -> int:
        """Heads of a block, the fewest that fill lanes."""
        sizes = (n for n in range(1, self.heads) if self.heads % n == 0 and n * self.head_dim % LANES == 0)
        return next(sizes, self.heads)

    @property
    def width(self) -> int:
        return self.heads_a_block * self.head_dim

    @property
    def key_block(self) -> int:
        return pl.cdiv(self.keys, LANES) * LANES

    @property
    def query_block(self) -> int:
        most = max(_LOGITS // self.key_block // _ROWS, 1) * _ROWS
        return min(most, pl.cdiv(self.queries, _ROWS) * _ROWS)

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.query_block)


def fits(query_BxQxHxN: jax.Array, key_BxKxMxN: jax.Array) -> bool:
    """Whether the kernel takes these queries and keys: as many key heads as query heads, and a row of keys that fits."""
    return query_BxQxHxN.shape[2] == key_BxKxMxN.shape[2] and key_BxKxMxN.shape[1] <= LONGEST_ROW


def row_attention(
    query_BxQxHxN: jax.Array,
    key_BxKxHxN: jax.Array,
    value_BxKxHxN: jax.Array,
    bias_HxQxK: jax.Array | None = None,
    segment_ids: Segments | None = None,
    *,
    causal: bool = False,
    scale: float = 1.0,
    interpret: bool = False,
) -> jax.Array:
    """Averages values under softmax(scale * query . key + bias), (B, Q, H, N). The softmax is float32.

    Args:
      query_BxQxHxN: queries.
      key_BxKxHxN: keys, of the same type; at most `LONGEST_ROW`.
      value_BxKxHxN: values, of the same type.
      bias_HxQxK: of the logits. Its gradient is summed over the batch in float32.
      segment_ids: int32 (B, Q) and (B, K): a query sees the keys with its own number. One that sees no key has the mean of all.
      causal: a query sees the keys up to its own position.
      scale: factor of the logits.
      interpret: run on CPUs.
    """
    B, Q, H, N = query_BxQxHxN.shape
    form = _Form(B, H, N, Q, key_BxKxHxN.shape[1], causal, scale, interpret)
    wide = (x.reshape(*x.shape[:2], H * N) for x in (query_BxQxHxN, key_BxKxHxN, value_BxKxHxN))
    return _attention(form, _Operands(*wide, bias_HxQxK, *(segment_ids or (None, None)))).reshape(B, Q, H, N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: _Form, operands: _Operands) -> jax.Array:
    mesh = partitioning.current_mesh()
    if mesh is None:
        return _forward(form, operands)
    form, specs = _shard(form, operands, mesh)
    return jax.shard_map(functools.partial(_forward, form), in_specs=(specs,), out_specs=specs.query, check_vma=False)(
        operands
    )


def _attention_forward(form: _Form, operands: _Operands) -> tuple[jax.Array, _Operands]:
    return _attention(form, operands), operands


def _attention_backward(form: _Form, operands: _Operands, dout: jax.Array) -> tuple[_Operands]:
    mesh = partitioning.current_mesh()
    if mesh is None:
        return (_Operands(*_backward(form, operands, dout)),)
    form, specs = _shard(form, operands, mesh)

    def local(operands: _Operands, dout: jax.Array) -> tuple[jax.Array, ...]:
        *grads, dbias = _backward(form, operands, dout)
        if dbias is not None and partitioning.batch_shards(mesh) > 1:
            dbias = jax.lax.psum(dbias, partitioning.BATCH_AXES)
        return *grads, dbias

    out_specs = specs.query, specs.key, specs.value, specs.bias
    split = jax.shard_map(local, in_specs=(specs, specs.query), out_specs=out_specs, check_vma=False)
    return (_Operands(*split(operands, dout)),)


_attention.defvjp(_attention_forward, _attention_backward)


def _shard(form: _Form, operands: _Operands, mesh: AbstractMesh) -> tuple[_Form, _Operands]:
    """Returns one device's part of the problem, and the mesh axes of the operands."""
    axes = partitioning.head_axis(mesh, form.heads)
    batch = P(partitioning.BATCH_AXES)
    wide = P(partitioning.BATCH_AXES, None, axes)
    specs = _Operands(wide, wide, wide, P(axes), batch, batch)
    specs = _Operands(*(None if x is None else spec for x, spec in zip(operands, specs, strict=True)))
    part = dataclasses.replace(
        form,
        batch=form.batch // partitioning.batch_shards(mesh),
        heads=form.heads // (mesh.shape[axes] if axes else 1),
    )
    return part, specs


@functools.partial(jax.jit, static_argnums=0)
def _forward(form: _Form, operands: _Operands) -> jax.Array:
    """One device's part; jitted, so that layers share one program."""
    in_specs, values = _inputs(form, operands, batch_axis=2)
    W, grid = form.width, (form.heads // form.heads_a_block, form.query_blocks, form.batch)
    return pl.pallas_call(
        functools.partial(_forward_kernel, form, _Operands(*(x is not None for x in operands))),
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, form.query_block, W), lambda h, q, b: (b, q, h)),
        out_shape=jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype),
        scratch_shapes=_scratch(form, operands),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        cost_estimate=_cost(form, operands, products=2),
        interpret=form.interpret,
        name='row_attention',
    )(*values)


@functools.partial(jax.jit, static_argnums=0)
def _backward(form: _Form, operands: _Operands, dout: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradients of query, key, value and bias. One kernel computes all of them if all queries are one block."""
    if operands.bias is None:
        return *_gradients(form, operands, dout, rows=True, bias=False), None
    if form.query_blocks == 1:
        return _gradients(form, operands, dout, rows=True, bias=True)
    return *_gradients(form, operands, dout, rows=True, bias=False), *_gradients(
        form, operands, dout, rows=False, bias=True
    )


def _gradients(form: _Form, operands: _Operands, dout: jax.Array, *, rows: bool, bias: bool) -> tuple[jax.Array, ...]:
    """Gradients of query, key and value (`rows`), and of the bias.

    The batch is the inner axis of the grid if the bias's gradient is summed over it, else the blocks of queries, over which those
    of keys and values are summed.
    """
    batch_axis = 2 if bias else 1
    in_specs, values = _inputs(form, operands, batch_axis)
    blocks = (form.query_blocks, form.batch) if bias else (form.batch, form.query_blocks)
    of_query, of_key, of_bias = _specs(form, batch_axis)
    out_specs, out_shape = [], []
    if rows:
        out_specs += [of_query, of_key, of_key]
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
    if bias:
        out_specs.append(of_bias)
        out_shape.append(jax.ShapeDtypeStruct(operands.bias.shape, jnp.float32))
    scratch = _scratch(form, operands)
    if rows:
        scratch += [pltpu.VMEM((form.key_block, form.width), jnp.float32)] * 2
    grads = pl.pallas_call(
        functools.partial(_backward_kernel, form, _Operands(*(x is not None for x in operands)), rows, bias),
        grid=(form.heads // form.heads_a_block, *blocks),
        in_specs=[*in_specs, of_query],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        cost_estimate=_cost(form, operands, products=5 if rows else 2),
        interpret=form.interpret,
        name='row_attention_backward',
    )(*values, dout)
    return (*grads[:-1], grads[-1].astype(operands.bias.dtype)) if bias else tuple(grads)


def _specs(form: _Form, batch_axis: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, keys, and bias, in a grid whose axis `batch_axis` is the batch."""
    T, Q, K, W = form.heads_a_block, form.query_block, form.key_block, form.width

    def at(index):
        return (lambda h, q, b: index(h, q, b)) if batch_axis == 2 else (lambda h, b, q: index(h, q, b))

    return (
        pl.BlockSpec((1, Q, W), at(lambda h, q, b: (b, q, h))),
        pl.BlockSpec((1, K, W), at(lambda h, q, b: (b, 0, h))),
        pl.BlockSpec((T, Q, K), at(lambda h, q, b: (h, q, 0))),
    )


def _inputs(form: _Form, operands: _Operands, batch_axis: int) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
    """Blocks and values of the operands that there are. Numbers of segments are (B, 1, L)."""
    of_query, of_key, of_bias = _specs(form, batch_axis)
    specs, values = [of_query, of_key, of_key], list(operands[:3])
    if operands.bias is not None:
        specs.append(of_bias)
        values.append(operands.bias)
    if operands.query_ids is not None:
        of_ids = [pl.BlockSpec((1, 1, form.query_block), lambda *at: (at[batch_axis], 0, at[3 - batch_axis]))]
        of_ids.append(pl.BlockSpec((1, 1, form.key_block), lambda *at: (at[batch_axis], 0, 0)))
        specs += of_ids
        values += [operands.query_ids[:, None], operands.key_ids[:, None]]
    return specs, values


def _scratch(form: _Form, operands: _Operands) -> list[Any]:
    return [] if operands.query_ids is None else [pltpu.VMEM((form.query_block, 8), jnp.int32)]


def _cost(form: _Form, operands: _Operands, products: int) -> pl.CostEstimate:
    logits = form.batch * form.heads * form.queries * form.keys
    moved = sum(x.size * x.dtype.itemsize for x in operands if x is not None)
    return pl.CostEstimate(
        flops=2 * products * logits * form.head_dim,
        transcendentals=logits,
        bytes_accessed=moved * (1 if products == 2 else 2),
    )


def _split(has: _Operands, refs: tuple[Any, ...]) -> tuple[_Operands, list[Any]]:
    """Names the references of a kernel's operands; returns the others too."""
    rest = list(refs)
    return _Operands(*(rest.pop(0) if given else None for given in has)), rest


def _forward_kernel(form: _Form, has: _Operands, *refs: Any) -> None:
    given, (out_ref, *columns) = _split(has, refs)
    _transpose_ids(given, columns)
    key, value = (_within(ref[0], form.keys) for ref in (given.key, given.value))

    def compute(rows: pl.Slice, query_Rx1: jax.Array) -> None:
        visible = _visible(form, given, columns, rows, query_Rx1)
        for h, lanes in _heads(form):
            weights, total = _weights(form, given, h, rows, given.query[0, rows, lanes], key[:, lanes], visible)
            out = _dot(weights.astype(value.dtype), value[:, lanes], 1, 0)
            out_ref[0, rows, lanes] = (out / total).astype(out_ref.dtype)

    _for_rows(form, pl.program_id(1), compute)


def _backward_kernel(form: _Form, has: _Operands, rows_wanted: bool, bias_wanted: bool, *refs: Any) -> None:
    given, (dout_ref, *rest) = _split(has, refs)
    dquery_ref, dkey_ref, dvalue_ref = (rest.pop(0) for _ in range(3)) if rows_wanted else (None,) * 3
    dbias_ref = rest.pop(0) if bias_wanted else None
    columns = [rest.pop(0)] if given.query_ids is not None else []
    block, batch = (pl.program_id(1), pl.program_id(2)) if bias_wanted else (pl.program_id(2), pl.program_id(1))
    if bias_wanted:
        pl.when(batch == 0)(lambda: _zero(dbias_ref))
    if rows_wanted:
        pl.when(block == 0)(lambda: _zero(*rest))
    _transpose_ids(given, columns)
    key, value = (_within(ref[0], form.keys) for ref in (given.key, given.value))

    def compute(rows: pl.Slice, query_Rx1: jax.Array) -> None:
        visible = _visible(form, given, columns, rows, query_Rx1)
        real_Rx1 = None
        if form.queries % form.query_block:
            real_Rx1 = query_Rx1 < form.queries
            visible = real_Rx1 if visible is None else visible & real_Rx1
        for h, lanes in _heads(form):
            query, dout = given.query[0, rows, lanes], dout_ref[0, rows, lanes]
            if real_Rx1 is not None:
                query, dout = (jnp.where(real_Rx1, x, jnp.zeros_like(x)) for x in (query, dout))
            weights, total = _weights(form, given, h, rows, query, key[:, lanes], visible)
            weights /= total
            dweights = _dot(dout, value[:, lanes], 1, 1)
            dlogits = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
            if bias_wanted:
                dbias_ref[h, rows, :] += dlogits
            if rows_wanted:
                dkey_sum, dvalue_sum = rest
                dvalue_sum[:, lanes] += _dot(weights.astype(dout.dtype), dout, 0, 0)
                dlogits = (dlogits if form.scale == 1 else dlogits * form.scale).astype(query.dtype)
                dkey_sum[:, lanes] += _dot(dlogits, query, 0, 0)
                dquery_ref[0, rows, lanes] = _dot(dlogits, key[:, lanes], 1, 0).astype(dquery_ref.dtype)

    _for_rows(form, block, compute)
    if rows_wanted:

        def write() -> None:
            for ref, total in zip((dkey_ref, dvalue_ref), rest, strict=True):
                ref[0] = total[...].astype(ref.dtype)

        pl.when(block == form.query_blocks - 1)(write)


def _for_rows(form: _Form, block: jax.Array, compute: Callable[[pl.Slice, jax.Array], None]) -> None:
    """Calls `compute(rows of the block, their positions (R, 1))` for `_ROWS` queries at a time."""

    def step(i: jax.Array | int, _: None) -> None:
        first = i * _ROWS if isinstance(i, int) else pl.multiple_of(i * _ROWS, _ROWS)
        position = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
        compute(pl.ds(first, _ROWS), position + block * form.query_block + first)

    if form.query_block == _ROWS:
        step(0, None)
    else:
        jax.lax.fori_loop(0, form.query_block // _ROWS, step, None)


def _heads(form: _Form) -> Iterator[tuple[int, slice]]:
    """Yields the heads of a block, and their lanes."""
    for h in range(form.heads_a_block):
        yield h, slice(h * form.head_dim, (h + 1) * form.head_dim)


def _zero(*refs: Any) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _within(x_LxW: jax.Array, length: int) -> jax.Array:
    """Replaces rows after `length`, which may hold anything, by 0."""
    if x_LxW.shape[0] == length:
        return x_LxW
    real_Lx1 = jax.lax.broadcasted_iota(jnp.int32, (x_LxW.shape[0], 1), 0) < length
    return jnp.where(real_Lx1, x_LxW, jnp.zeros_like(x_LxW))


def _transpose_ids(given: _Operands, columns: list[Any]) -> None:
    """Writes the block's numbers of segments as columns, for comparison with a row of keys."""
    for ref in columns:
        row_1xQ = given.query_ids[0]
        ref[...] = jnp.broadcast_to(row_1xQ, (8, row_1xQ.shape[1])).T


def _visible(
    form: _Form, given: _Operands, columns: list[Any], rows: pl.Slice, query_Rx1: jax.Array
) -> jax.Array | None:
    """Which keys the queries see, (R, K); None for all."""
    masks = [ref[rows, :1] == given.key_ids[0] for ref in columns]
    if form.causal:
        masks.append(jax.lax.broadcasted_iota(jnp.int32, (1, form.key_block), 1) <= query_Rx1)
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _weights(
    form: _Form, given: _Operands, h: int, rows: pl.Slice, query: jax.Array, key: jax.Array, visible: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns exponentials (R, K) in float32, and their sums (R, 1)."""
    logits = _dot(query, key, 1, 1)
    if form.scale != 1:
        logits *= form.scale
    if given.bias is not None:
        logits += given.bias[h, rows, :].astype(jnp.float32)
    if visible is not None:
        logits = jnp.where(visible, logits, _MASKED)
    if form.keys < form.key_block:
        is_key = jax.lax.broadcasted_iota(jnp.int32, (1, form.key_block), 1) < form.keys
        logits = jnp.where(is_key, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights, weights.sum(axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
