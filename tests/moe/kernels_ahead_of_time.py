"""Compiles grouped products and their gradients for one device of a TPU topology, and prints the compiler's account as JSON.

In a process: see `tests/test_compile.py`.
"""

import os

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from upcycle import partitioning
from upcycle.compile import _devices
from upcycle.hlo import Program
from upcycle.moe.grouped_matmul import grouped_matmul

# Rows, experts, D, F, type of the rows: a layer of Llama-3.1-8B, one expert of it with float32, and sides that do not divide.
CASES = ((16384, 8, 4096, 14336, 'bfloat16'), (8192, 1, 14336, 4096, 'float32'), (300, 8, 200, 72, 'float32'))


def main() -> None:
    mesh = partitioning.make_mesh((1, 1, 1), None, _devices(sys.argv[1], 1)[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    accounts = []
    with partitioning.use(mesh):
        for R, E, D, F, dtype in CASES:
            shapes = (((R, D), dtype), ((E, D, F), 'float32'), ((E,), 'int32'), ((R, F), dtype))

            def product(x_RxD, kernel_ExDxF, sizes_E, dy_RxF):
                y_RxF, pull = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, sizes_E), x_RxD, kernel_ExDxF)
                return y_RxF, pull(dy_RxF)

            operands = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=whole) for shape, kind in shapes]
            text = jax.jit(product).lower(*operands).compile().as_text()
            padded = R + -R % 128
            accounts.append(
                {
                    'kernels': text.count('custom_call_target="tpu_custom_call"'),
                    'flops': Program(text).matmul_flops(),
                    'needed': 3 * 2 * padded * D * F,
                }
            )
    print(json.dumps(accounts))


if __name__ == '__main__':
    main()
