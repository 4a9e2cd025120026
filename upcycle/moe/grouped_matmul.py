"""Products of rows, sorted by expert, with the matrices of their experts. The platform chooses the kernel."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from upcycle.moe import megablox
from upcycle.moe.grouped_blocks import gradients_in_blocks, in_blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, axes: megablox.Axes = (None, None)
) -> jax.Array:
    """Multiplies each row with the matrix of its expert.

    - CPU: `grouped_blocks`. The work is that of R + E * block rows at most, in both gradients too. XLA:CPU would expand
      `jax.lax.ragged_dot` to the products of every row with every matrix.
    - TPU: `megablox` where it can (`megablox.allows`), otherwise `jax.lax.ragged_dot`, whose gradient for the matrices multiplies
      every row with every expert.
    - GPU: `tokamax.ragged_dot` where it is installed (`pip install "upcycle[tokamax]"`), otherwise `jax.lax.ragged_dot`.

    Args:
      x_RxD: rows, sorted by expert. Rows after those of the last expert have no expert.
      kernel_ExDxF: cast to the type of the rows. Its gradient is summed in float32 and has the kernel's own type.
      sizes_E: int32, number of rows of each expert.
      axes: logical axes of a matrix, by which `model` splits it.

    Returns:
      (R, F) in the type of the rows; undefined for rows without an expert, whose gradients are 0.
    """
    kernels = {'cpu': in_blocks, 'default': _library_of_gpus() or jax.lax.ragged_dot}
    if megablox.allows(x_RxD, kernel_ExDxF, axes):
        kernels['tpu'] = functools.partial(megablox.product, axes=axes)
    return jax.lax.platform_dependent(x_RxD, kernel_ExDxF.astype(x_RxD.dtype), sizes_E, **kernels)


def _forward(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, axes: megablox.Axes
) -> tuple[jax.Array, Any]:
    return grouped_matmul(x_RxD, kernel_ExDxF, sizes_E, axes), (x_RxD, kernel_ExDxF, sizes_E)


def _backward(axes: megablox.Axes, kept: Any, dy_RxF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RxD, kernel_ExDxF, sizes_E = kept
    dtype = kernel_ExDxF.dtype
    kernels = {
        'cpu': functools.partial(gradients_in_blocks, dtype=dtype),
        'default': functools.partial(_gradients_of_a_library, dtype=dtype),
    }
    if megablox.allows(x_RxD, kernel_ExDxF, axes):
        kernels['tpu'] = functools.partial(megablox.gradients, axes=axes, dtype=dtype)
    operands = x_RxD, kernel_ExDxF.astype(x_RxD.dtype), sizes_E, dy_RxF
    return *jax.lax.platform_dependent(*operands, **kernels), None


grouped_matmul.defvjp(_forward, _backward)


def _gradients_of_a_library(
    x_RxD: jax.Array, kernel_ExDxF: jax.Array, sizes_E: jax.Array, dy_RxF: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    has_expert_Rx1 = (jnp.arange(len(x_RxD)) < sizes_E.sum())[:, None]
    product = functools.partial(_library_of_gpus() or jax.lax.ragged_dot, group_sizes=sizes_E)
    dx_RxD, dkernel_ExDxF = jax.vjp(product, x_RxD, kernel_ExDxF)[1](jnp.where(has_expert_Rx1, dy_RxF, 0))
    return jnp.where(has_expert_Rx1, dx_RxD, 0), dkernel_ExDxF.astype(dtype)


@functools.cache
def _library_of_gpus() -> Any:
    """Returns `tokamax.ragged_dot`, which chooses among its kernels by the GPU; None without it or without a GPU."""
    if jax.default_backend() != 'gpu' or importlib.util.find_spec('tokamax') is None:
        return None
    return tokamax_ragged_dot()


def tokamax_ragged_dot() -> Any:
    """Returns `tokamax.ragged_dot`. Versions 0.0.12 (Python 3.11) and 0.0.17 have the signature of `jax.lax.ragged_dot`."""
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Else tokamax parses the arguments of this program, which are not its own.
        flags.FLAGS.mark_as_parsed()
    return tokamax.ragged_dot
