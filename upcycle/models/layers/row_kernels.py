"""The programs of `row_attention` for one block of queries and all keys of a few heads."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ROWS = 128  # queries that are computed at a time
# Bytes of a block's operands and results, of which two are in fast memory; 16 MiB is what the compiler allows.
FAST_MEMORY = 13_000_000
_LANES = 128
_MASKED = float(jnp.finfo(jnp.float32).min) / 2


class Operands(NamedTuple):
    """(B, Q, W), (B, K, W) twice with W = H * N, (H, Q, K), int32 (B, Q) and (B, K)."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    query_ids: Any = None
    key_ids: Any = None


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static: sizes of one device's part of the problem, and of blocks.

    Attributes:
      batch, heads, head_dim, queries, keys: B, H, N, Q, K.
      item_bytes: of an element of the queries, keys and values.
      bias_bytes: of the bias; 0 without one.
      causal: a query sees the keys up to its own position.
      scale: factor of the logits.
      interpret: run on CPUs.
    """

    batch: int
    heads: int
    head_dim: int
    queries: int
    keys: int
    item_bytes: int
    bias_bytes: int
    causal: bool = False
    scale: float = 1.0
    interpret: bool = False

    @property
    def heads_a_block(self) -> int:
        """Heads of a block, the fewest that fill lanes."""
        sizes = (n for n in range(1, self.heads) if self.heads % n == 0 and n * self.head_dim % _LANES == 0)
        return next(sizes, self.heads)

    @property
    def width(self) -> int:
        """Lanes of a block."""
        return self.heads_a_block * self.head_dim

    @property
    def key_block(self) -> int:
        """Keys of a block: all of them."""
        return pl.cdiv(self.keys, _LANES) * _LANES

    @property
    def query_block(self) -> int:
        """Queries of a block: the most that fit."""
        counts = range(1, pl.cdiv(self.queries, ROWS) + 1)
        blocks = [pl.cdiv(pl.cdiv(self.queries, count), ROWS) * ROWS for count in counts]
        return next((block for block in blocks if self.bytes_of(block) <= FAST_MEMORY), ROWS)

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.queries, self.query_block)

    def bytes_of(self, query_block: int) -> int:
        """Bytes of the backward pass in fast memory: operands and results twice, sums of keys and values once."""
        wide = 2 * self.width * self.item_bytes * (3 * query_block + 4 * self.key_block)
        sums = 2 * self.width * 4 * self.key_block
        bias = 2 * (self.bias_bytes + 4) * self.heads_a_block * query_block * self.key_block if self.bias_bytes else 0
        return wide + sums + bias


def _split(has: Operands, refs: tuple[Any, ...]) -> tuple[Operands, list[Any]]:
    """Names the references of a kernel's operands; returns the others too."""
    rest = list(refs)
    return Operands(*(rest.pop(0) if given else None for given in has)), rest


def forward_kernel(form: Form, has: Operands, *refs: Any) -> None:
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


def backward_kernel(form: Form, has: Operands, rows_wanted: bool, bias_wanted: bool, *refs: Any) -> None:
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


def _for_rows(form: Form, block: jax.Array, compute: Callable[[pl.Slice, jax.Array], None]) -> None:
    """Calls `compute(rows of the block, their positions (R, 1))` for `ROWS` queries at a time."""

    def step(i: jax.Array | int, _: None) -> None:
        first = i * ROWS if isinstance(i, int) else pl.multiple_of(i * ROWS, ROWS)
        position = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
        compute(pl.ds(first, ROWS), position + block * form.query_block + first)

    if form.query_block == ROWS:
        step(0, None)
    else:
        jax.lax.fori_loop(0, form.query_block // ROWS, step, None)


def _heads(form: Form) -> Iterator[tuple[int, slice]]:
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


def _transpose_ids(given: Operands, columns: list[Any]) -> None:
    """Writes the block's numbers of segments as columns, for comparison with a row of keys."""
    for ref in columns:
        row_1xQ = given.query_ids[0]
        ref[...] = jnp.broadcast_to(row_1xQ, (8, row_1xQ.shape[1])).T


def _visible(form: Form, given: Operands, columns: list[Any], rows: pl.Slice, query_Rx1: jax.Array) -> jax.Array | None:
    """Which keys the queries see, (R, K); None for all."""
    masks = [ref[rows, :1] == given.key_ids[0] for ref in columns]
    if form.causal:
        masks.append(jax.lax.broadcasted_iota(jnp.int32, (1, form.key_block), 1) <= query_Rx1)
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _weights(
    form: Form, given: Operands, h: int, rows: pl.Slice, query: jax.Array, key: jax.Array, visible: jax.Array | None
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
