"""Products of rows with the matrices of their experts on CPUs: each expert's rows in blocks, in a loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (block, rows of the block, its expert, number of the expert's rows in it) -> what the blocks add up to so far.
_Step = Callable[[Any, jax.Array, jax.Array, jax.Array], Any]


def in_blocks(x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, kernel_axis: int = 0) -> jax.Array:
    """Computes `grouped_matmul`; `kernel_axis` is the axis of a matrix over which products are summed."""
    R, E = x_RxD.shape[0], sizes_E.shape[0]
    block = block_size(R, E)
    x_PxD = jnp.pad(x_RxD, ((0, block), (0, 0)))

    def multiply(y_PxF: jax.Array, first: jax.Array, expert: jax.Array, count: jax.Array) -> jax.Array:
        x_BxD = jax.lax.dynamic_slice_in_dim(x_PxD, first, block)
        kernel = jax.lax.dynamic_index_in_dim(kernel_ExDxF, expert, keepdims=False)
        y_BxF = jax.lax.dot_general(x_BxD, kernel, (((1,), (kernel_axis,)), ((), ())))
        # A last block reaches into the rows of the next expert, whose blocks follow and overwrite these.
        return jax.lax.dynamic_update_slice_in_dim(y_PxF, y_BxF, first, axis=0)

    start_PxF = jnp.zeros((R + block, kernel_ExDxF.shape[2 - kernel_axis]), x_RxD.dtype)
    return _over_blocks(multiply, start_PxF, sizes_E, R, block)[:R]


def gradients_in_blocks(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, dy_RxF: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of `in_blocks` for rows and matrices, the latter in `dtype`."""
    has_expert_R = jnp.arange(dy_RxF.shape[0]) < sizes_E.sum()
    dy_RxF = jnp.where(has_expert_R[:, None], dy_RxF, 0)
    dx_RxD = in_blocks(dy_RxF, kernel_ExDxF, sizes_E, kernel_axis=1)
    return dx_RxD, _kernel_gradient(x_RxD, dy_RxF, sizes_E).astype(dtype)


def _kernel_gradient(x_RxD: jax.Array, dy_RxF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Sums the outer products of each expert's rows, (E, D, F), in float32."""
    R, E = x_RxD.shape[0], sizes_E.shape[0]
    block = block_size(R, E)
    x_PxD, dy_PxF = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_RxD, dy_RxF))

    def add(sum_ExDxF: jax.Array, first: jax.Array, expert: jax.Array, count: jax.Array) -> jax.Array:
        is_mine_Bx1 = jnp.arange(block)[:, None] < count
        x_BxD, dy_BxF = (
            jnp.where(is_mine_Bx1, jax.lax.dynamic_slice_in_dim(rows, first, block), 0) for rows in (x_PxD, dy_PxF)
        )
        added_DxF = jax.lax.dot_general(x_BxD, dy_BxF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        old_DxF = jax.lax.dynamic_index_in_dim(sum_ExDxF, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sum_ExDxF, old_DxF + added_DxF, expert, axis=0)

    start_ExDxF = jnp.zeros((E, x_RxD.shape[1], dy_RxF.shape[1]), jnp.float32)
    return _over_blocks(add, start_ExDxF, sizes_E, R, block)


def block_size(num_rows: int, num_experts: int) -> int:
    """Returns the rows of a block: a power of two from 8 to 128, a quarter to an eighth of an even share of the rows.

    All experts' last blocks together then have at most a quarter as many empty rows as there are rows.
    """
    share = max(num_rows // (4 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), 8), 128)


def _over_blocks(step: _Step, start: jax.Array, sizes_E: jax.Array, num_rows: int, block: int) -> jax.Array:
    """Calls `step(result so far, first row, expert, number of its rows)` for each block of each expert, in order."""
    E = sizes_E.shape[0]
    blocks_E = -(-sizes_E // block)
    last_E, start_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E) - sizes_E
    # As many blocks as there can be: each expert may have a block that is not full.
    number_N = jnp.arange(min((num_rows + E * (block - 1)) // block, num_rows))
    # `jnp.searchsorted` would do, but fails under `shard_map` (JAX 0.10).
    expert_N = jnp.minimum((last_E <= number_N[:, None]).sum(axis=1, dtype=jnp.int32), E - 1)
    before_N = (number_N - (last_E - blocks_E)[expert_N]) * block
    count_N = jnp.clip(sizes_E[expert_N] - before_N, 0, block)

    def one(result: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        do = functools.partial(step, first=block[0], expert=block[1], count=block[2])
        return jax.lax.cond(block[2] > 0, do, lambda result: result, result), None

    return jax.lax.scan(one, start, (start_E[expert_N] + before_N, expert_N, count_N))[0]
