"""A Pallas TPU kernel for attention with a bias that the batch shares, such as T5's, and for short rows of keys without one.

A block of queries sees its whole row of keys, so that forward and backward pass are one softmax in fast memory, and nothing but
the arguments is kept: no array (B, H, Q, K) exists. Operands stay (B, L, H * N), as projections write them, since arrays with a
last axis of 64 would take twice the memory. Blocks reach past the ends of lengths that are not multiples of them; what lies there
is undefined, and is masked.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle import partitioning
from upcycle.models.layers.row_kernels import FAST_MEMORY, ROWS, Form, Operands, backward_kernel, forward_kernel

LONGEST_ROW = 2048  # keys

Segments = tuple[jax.Array, jax.Array]


def _form(query_BxQxHxN: jax.Array, key_BxKxHxN: jax.Array, bias_HxQxK: jax.Array | None, **how: Any) -> Form:
    B, Q, H, N = query_BxQxHxN.shape
    sizes = query_BxQxHxN.dtype.itemsize, 0 if bias_HxQxK is None else bias_HxQxK.dtype.itemsize
    return Form(B, H, N, Q, key_BxKxHxN.shape[1], *sizes, **how)


def fits(query_BxQxHxN: jax.Array, key_BxKxMxN: jax.Array, bias_HxQxK: jax.Array | None) -> bool:
    """Whether the kernel takes these: as many key heads as query heads, and rows of keys that fit into fast memory."""
    if query_BxQxHxN.shape[2] != key_BxKxMxN.shape[2]:
        return False
    form, mesh = _form(query_BxQxHxN, key_BxKxMxN, bias_HxQxK), partitioning.current_mesh()
    if mesh is not None:
        form = _part(form, mesh)
    return form.keys <= LONGEST_ROW and form.bytes_of(ROWS) <= FAST_MEMORY


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
      key_BxKxHxN: keys, of the same type; see `fits`.
      value_BxKxHxN: values, of the same type.
      bias_HxQxK: of the logits. Its gradient is summed over the batch in float32.
      segment_ids: int32 (B, Q) and (B, K): a query sees the keys with its own number. One that sees no key has the mean of all.
      causal: a query sees the keys up to its own position.
      scale: factor of the logits.
      interpret: run on CPUs.
    """
    B, Q, H, N = query_BxQxHxN.shape
    form = _form(query_BxQxHxN, key_BxKxHxN, bias_HxQxK, causal=causal, scale=scale, interpret=interpret)
    wide = (x.reshape(*x.shape[:2], H * N) for x in (query_BxQxHxN, key_BxKxHxN, value_BxKxHxN))
    return _attention(form, Operands(*wide, bias_HxQxK, *(segment_ids or (None, None)))).reshape(B, Q, H, N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: Form, operands: Operands) -> jax.Array:
    mesh = partitioning.current_mesh()
    if mesh is None:
        return _forward(form, operands)
    form, specs = _shard(form, operands, mesh)
    return jax.shard_map(functools.partial(_forward, form), in_specs=(specs,), out_specs=specs.query, check_vma=False)(
        operands
    )


def _attention_forward(form: Form, operands: Operands) -> tuple[jax.Array, Operands]:
    return _attention(form, operands), operands


def _attention_backward(form: Form, operands: Operands, dout: jax.Array) -> tuple[Operands]:
    mesh = partitioning.current_mesh()
    if mesh is None:
        return (Operands(*_backward(form, operands, dout)),)
    form, specs = _shard(form, operands, mesh)

    def local(operands: Operands, dout: jax.Array) -> tuple[jax.Array, ...]:
        *grads, dbias = _backward(form, operands, dout)
        if dbias is not None and partitioning.batch_shards(mesh) > 1:
            dbias = jax.lax.psum(dbias, partitioning.BATCH_AXES)
        return *grads, dbias

    out_specs = specs.query, specs.key, specs.value, specs.bias
    split = jax.shard_map(local, in_specs=(specs, specs.query), out_specs=out_specs, check_vma=False)
    return (Operands(*split(operands, dout)),)


_attention.defvjp(_attention_forward, _attention_backward)


def _shard(form: Form, operands: Operands, mesh: AbstractMesh) -> tuple[Form, Operands]:
    """Returns one device's part of the problem, and the mesh axes of the operands."""
    heads = partitioning.head_axis(mesh, form.heads)
    batch = P(partitioning.BATCH_AXES)
    wide = P(partitioning.BATCH_AXES, None, heads)
    specs = Operands(wide, wide, wide, P(heads), batch, batch)
    specs = Operands(*(None if x is None else spec for x, spec in zip(operands, specs, strict=True)))
    return _part(form, mesh), specs


def _part(form: Form, mesh: AbstractMesh) -> Form:
    shards = mesh.shape['model'] if partitioning.head_axis(mesh, form.heads) else 1
    return dataclasses.replace(form, batch=form.batch // partitioning.batch_shards(mesh), heads=form.heads // shards)


@functools.partial(jax.jit, static_argnums=0)
def _forward(form: Form, operands: Operands) -> jax.Array:
    """One device's part; jitted, so that layers share one program."""
    in_specs, values = _inputs(form, operands, batch_axis=2)
    W, grid = form.width, (form.heads // form.heads_a_block, form.query_blocks, form.batch)
    return pl.pallas_call(
        functools.partial(forward_kernel, form, Operands(*(x is not None for x in operands))),
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, form.query_block, W), lambda h, q, b: (b, q, h)),
        out_shape=jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype),
        scratch_shapes=_scratch(form, operands),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        cost_estimate=_cost(form, operands, 2, 2, [operands.query]),
        interpret=form.interpret,
        name='row_attention',
    )(*values)


@functools.partial(jax.jit, static_argnums=0)
def _backward(form: Form, operands: Operands, dout: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradients of query, key, value and bias. One kernel computes all of them if all queries are one block."""
    if operands.bias is None:
        return *_gradients(form, operands, dout, rows=True, bias=False), None
    if form.query_blocks == 1:
        return _gradients(form, operands, dout, rows=True, bias=True)
    return *_gradients(form, operands, dout, rows=True, bias=False), *_gradients(
        form, operands, dout, rows=False, bias=True
    )


def _gradients(form: Form, operands: Operands, dout: jax.Array, *, rows: bool, bias: bool) -> tuple[jax.Array, ...]:
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
        functools.partial(backward_kernel, form, Operands(*(x is not None for x in operands)), rows, bias),
        grid=(form.heads // form.heads_a_block, *blocks),
        in_specs=[*in_specs, of_query],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        cost_estimate=_cost(form, operands, batch_axis, 5 if rows else 2, [dout, *out_shape]),
        interpret=form.interpret,
        name='row_attention_backward',
    )(*values, dout)
    return (*grads[:-1], grads[-1].astype(operands.bias.dtype)) if bias else tuple(grads)


def _specs(form: Form, batch_axis: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, keys, and bias, in a grid whose axis `batch_axis` is the batch."""
    T, Q, K, W = form.heads_a_block, form.query_block, form.key_block, form.width

    def at(index):
        return (lambda h, q, b: index(h, q, b)) if batch_axis == 2 else (lambda h, b, q: index(h, q, b))

    return (
        pl.BlockSpec((1, Q, W), at(lambda h, q, b: (b, q, h))),
        pl.BlockSpec((1, K, W), at(lambda h, q, b: (b, 0, h))),
        pl.BlockSpec((T, Q, K), at(lambda h, q, b: (h, q, 0))),
    )


def _inputs(form: Form, operands: Operands, batch_axis: int) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
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


def _scratch(form: Form, operands: Operands) -> list[Any]:
    return [] if operands.query_ids is None else [pltpu.VMEM((form.query_block, 8), jnp.int32)]


def _cost(form: Form, operands: Operands, batch_axis: int, products: int, results: Sequence[Any]) -> pl.CostEstimate:
    """What the compiler is told. Keys are read again for each block of queries, or the bias for each example."""
    logits = form.batch * form.heads * form.queries * form.keys
    size = {name: 0 if x is None else x.size * x.dtype.itemsize for name, x in operands._asdict().items()}
    again = form.query_blocks if batch_axis == 2 else 1
    bias_again = form.batch if batch_axis == 1 and form.query_blocks > 1 else 1
    moved = size['query'] + again * (size['key'] + size['value']) + bias_again * size['bias']
    moved += sum(x.size * x.dtype.itemsize for x in results)
    return pl.CostEstimate(flops=2 * products * logits * form.head_dim, transcendentals=logits, bytes_accessed=moved)
