"""Compiles one attention, forward and backward, for one TPU chip: the compiler's account of the kernels and of plain JAX.

  python scripts/bench/tpu_attention.py

Sizes are those of a chip in the programs of docs/performance.md, bfloat16. Nothing is run. Traffic is XLA's count, in which JAX's
own kernels read and write their operands and results once.
"""

import os
import sys
import time
from unittest import mock

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from timing import table

from upcycle import partitioning
from upcycle.models.layers import attention as module

# Name: generation; B, Q, K, query heads, key heads, width of a head; has a bias; padding; causal.
CASES = {
    'T5 Base, encoder': ('v4', (32, 512, 512, 12, 12, 64), True, True, False),
    'T5 Base, decoder': ('v4', (32, 114, 114, 12, 12, 64), True, True, True),
    'T5 Base, decoder to encoder': ('v4', (32, 114, 512, 12, 12, 64), False, True, False),
    'ViT-B/16': ('v4', (64, 196, 196, 12, 12, 64), False, False, False),
    'Llama 3.1 8B': ('v5p', (1, 4096, 4096, 32, 8, 128), False, False, True),
}


def account(name: str, kernel: bool) -> list[str]:
    """Returns a row of the table."""
    generation, (B, Q, K, H, M, N), has_bias, padded, causal = CASES[name]
    chips = {'chip_config_name': 'megacore'} if generation == 'v4' else {}
    topology = topologies.get_topology_desc(platform='tpu', topology_name=f'{generation}:2x2x1', **chips)
    mesh = partitioning.make_mesh((1, 1, 1), None, topology.devices[:1])

    def shape(*sizes: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(query, key, value, bias, ids):
        heads = query.reshape(B, Q, H, N), key.reshape(B, K, M, N), value.reshape(B, K, M, N)
        # Logits as the model has them in plain JAX.
        out = module.attention(*heads, bias=bias, segment_ids=ids, causal=causal, float32_logits=H != M)
        return jnp.square(out.astype(jnp.float32)).sum()

    arguments = (
        shape(B, Q, H * N),
        shape(B, K, M * N),
        shape(B, K, M * N),
        shape(H, Q, K) if has_bias else None,
        (shape(B, Q, dtype=jnp.int32), shape(B, K, dtype=jnp.int32)) if padded else None,
    )
    chosen = module.implementation if kernel else lambda *_, **__: module.Implementation.REFERENCE
    with partitioning.use(mesh), mock.patch.object(module, 'implementation', chosen):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if has_bias else (0, 1, 2))).lower(*arguments)
        begin = time.monotonic()
        compiled = lowered.compile()
    return [
        name,
        generation,
        'kernel' if kernel else 'plain JAX',
        f'{compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f}',
        f'{compiled.cost_analysis()["bytes accessed"] / 1e9:.2f}',
        f'{time.monotonic() - begin:.0f}',
    ]


def main() -> None:
    """Prints the table."""
    rows = [account(name, kernel) for name in CASES for kernel in (False, True)]
    print(table(['attention', 'TPU', 'computed by', 'temporary MB', 'GB of traffic', 'seconds to compile'], rows))


if __name__ == '__main__':
    main()
