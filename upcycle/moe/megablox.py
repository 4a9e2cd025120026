"""Products of rows with the matrices of their experts on TPU, by JAX's Pallas kernels `megablox`.

A kernel walks over tiles of rows. It visits a tile once for each expert that has rows in it, so that it multiplies at most one
tile of rows more than it needs for each expert, and nothing for rows without an expert.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec as P

from upcycle import partitioning

# Rows of a tile: the many, unless a tile for each expert is more than this share of the rows.
MANY, FEW = 256, 128
PADDING = 1 / 10
# Columns of a tile are multiples of this that divide the matrix, or all of a matrix that is at most `WHOLE` wide.
LANES, WHOLE = 128, 2048
# Bytes of a kernel's tiles and masked copies. XLA grants 16 MiB of vector memory; the rest is for temporaries.
VECTOR_MEMORY = 14 * 2**20

Tiles = tuple[int, int, int]
# Logical axes of a matrix, by which the mesh axis `model` splits it.
Axes = tuple[str | None, str | None]
MODEL = 'model'


def allows(x_RxD: jax.Array, kernel_ExDxF: jax.Array, axes: Axes) -> bool:
    """Whether the kernels can multiply these operands.

    They multiply bfloat16 or float32, on TPU v4 and later, and matrices whose sides are at most 2048 or multiples of 128. The
    compiler cannot split them: `shard_map` must have split the batch already, and only `model` may split the matrices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _split(axes, kernel_ExDxF.shape[1:])
    sides = (
        size // (mesh.shape[axis] if axis else 1) for axis, size in zip(split, kernel_ExDxF.shape[1:], strict=True)
    )
    return (
        x_RxD.dtype in (jnp.bfloat16, jnp.float32)
        and x_RxD.shape[0] > 0
        and all(size <= WHOLE or size % LANES == 0 for size in sides)
        and all(mesh.shape[axis] == 1 for axis in _free_axes(mesh) if axis != MODEL)
        and getattr(mesh.abstract_device, 'device_kind', None) not in ('TPU v2', 'TPU v3')
    )


def product(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, axes: Axes, interpret: bool = False
) -> jax.Array:
    """Computes `grouped_matmul`; `interpret` runs the kernel on a CPU."""
    inner, outer = _split(axes, kernel_ExDxF.shape[1:])
    multiply = functools.partial(_product, transposed=False, interpret=interpret)
    return _over_model(multiply, (P(None, inner), P(None, inner, outer), P()), P(None, outer), inner)(
        x_RxD, kernel_ExDxF, sizes_E
    )


def gradients(
    x_RxD: jax.Array,
    kernel_ExDxF: jax.Array,
    sizes_E: jax.Array,
    dy_RxF: jax.Array,
    axes: Axes,
    dtype: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of `product` for rows, 0 without an expert, and for matrices, in `dtype`."""
    inner, outer = _split(axes, kernel_ExDxF.shape[1:])
    rows, matrices, results = P(None, inner), P(None, inner, outer), P(None, outer)
    multiply = functools.partial(_product, transposed=True, interpret=interpret)
    dx_RxD = _over_model(multiply, (results, matrices, P()), rows, outer)(dy_RxF, kernel_ExDxF, sizes_E)
    has_expert_R = jnp.arange(dx_RxD.shape[0]) < sizes_E.sum()
    outer_products = functools.partial(_kernel_gradient, dtype=dtype, interpret=interpret)
    dkernel_ExDxF = _over_model(outer_products, (rows, results, P()), matrices, None)(x_RxD, dy_RxF, sizes_E)
    return jnp.where(has_expert_R[:, None], dx_RxD, 0), dkernel_ExDxF


def _product(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, transposed: bool, interpret: bool
) -> jax.Array:
    R, E = x_RxD.shape[0], sizes_E.shape[0]
    D, F = kernel_ExDxF.shape[1:][:: -1 if transposed else 1]
    tiles = product_tiles(R, E, D, F, x_RxD.dtype.itemsize)
    x_PxD = _padded(x_RxD, tiles[0])
    with _named(tiles):
        y_PxF = gmm(x_PxD, kernel_ExDxF, sizes_E, x_RxD.dtype, tiles, transpose_rhs=transposed, interpret=interpret)
    return y_PxF[:R]


def _kernel_gradient(x_RxD: jax.Array, dy_RxF: jax.Array, sizes_E: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    (R, D), F = x_RxD.shape, dy_RxF.shape[1]
    tiles = gradient_tiles(R, sizes_E.shape[0], D, F, x_RxD.dtype.itemsize)
    x_PxD, dy_PxF = (_padded(rows, tiles[0]) for rows in (x_RxD, dy_RxF))
    with _named(tiles):
        return tgmm(x_PxD.swapaxes(0, 1), dy_PxF, sizes_E, dtype, tiles, interpret=interpret)


def _named(tiles: Tiles) -> AbstractContextManager[None]:
    """Writes tiles into the kernel's name in the compiled program, which says nothing else of them."""
    return jax.named_scope('megablox_{}x{}x{}'.format(*tiles))


def _padded(x_RxD: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x_RxD, ((0, -x_RxD.shape[0] % tile), (0, 0)))


def row_tile(num_rows: int, num_experts: int) -> int:
    """Returns the rows of a tile. About half a tile for each expert is padding."""
    return MANY if num_experts * MANY <= PADDING * num_rows else FEW


def product_tiles(num_rows: int, num_experts: int, inner: int, outer: int, item: int) -> Tiles:
    """Returns the tiles of (R, D) @ (E, D, F), rows x D x F: those that move the fewest bytes and fit into vector memory.

    All of D in a tile, so that a matrix stays in vector memory while its expert's rows pass, moves each matrix once.
    """
    tm = row_tile(num_rows, num_experts)
    visits = -(-num_rows // tm) + num_experts - 1

    def fits(tk: int, tn: int) -> bool:
        return 2 * item * (tm * tk + tk * tn + tm * tn) + 4 * tm * tn <= VECTOR_MEMORY

    def bytes_moved(tk: int, tn: int) -> float:
        matrices = num_experts if tk == inner else visits
        return item * (num_rows * inner * math.ceil(outer / tn) + matrices * inner * outer)

    return tm, *_fewest_bytes(inner, outer, fits, bytes_moved)


def gradient_tiles(num_rows: int, num_experts: int, inner: int, outer: int, item: int) -> Tiles:
    """Returns the tiles of the matrices' gradient, (D, R) @ (R, F) for each expert; see `product_tiles`."""
    tm = row_tile(num_rows, num_experts)

    def fits(tk: int, tn: int) -> bool:
        # Both operands are also masked in float32, and one of them is transposed; results are float32 at most.
        return (2 * item + 8) * tm * (tk + tn) + 12 * tk * tn <= VECTOR_MEMORY

    def bytes_moved(tk: int, tn: int) -> float:
        return item * num_rows * (inner * math.ceil(outer / tn) + outer * math.ceil(inner / tk))

    return tm, *_fewest_bytes(inner, outer, fits, bytes_moved)


def _fewest_bytes(
    inner: int, outer: int, fits: Callable[[int, int], bool], bytes_moved: Callable[[int, int], float]
) -> tuple[int, int]:
    pairs = [pair for pair in itertools.product(_columns(inner, outer=False), _columns(outer)) if fits(*pair)]
    return min(pairs, key=lambda pair: (bytes_moved(*pair), -pair[0] * pair[1]))


def _columns(size: int, outer: bool = True) -> Iterator[int]:
    """Yields the possible columns of a tile for a matrix of `size` columns."""
    if size <= WHOLE or not outer:
        yield size
    yield from (tile for tile in range(LANES, min(size, WHOLE + 1), LANES) if size % tile == 0)


def _free_axes(mesh: jax.sharding.AbstractMesh) -> list[str]:
    """The axes that no `shard_map` splits yet."""
    return [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]


def _split(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The mesh axes that split a matrix."""
    mesh = jax.sharding.get_abstract_mesh()
    inner, outer = partitioning.mesh_axes(P(*axes), shape, mesh)
    return inner, outer


def _over_model(
    multiply: Callable[..., jax.Array], in_specs: tuple[P, ...], out_spec: P, summed: str | None
) -> Callable[..., jax.Array]:
    """Maps `multiply` over the axes that the compiler would split; sums its results over the axis `summed`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not (free := _free_axes(mesh)):
        return multiply

    def local(*operands: jax.Array) -> jax.Array:
        y = multiply(*operands)
        return y if summed is None else jax.lax.psum(y, summed)

    return jax.shard_map(local, in_specs=in_specs, out_specs=out_spec, axis_names=set(free), check_vma=False)
