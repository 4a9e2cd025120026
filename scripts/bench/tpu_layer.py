"""Compiles one MoE layer of T5 Base, forward and backward, for four TPU v4 chips: the compiler's account of each dispatch.

  python scripts/bench/tpu_layer.py [expert_choice,gather expert_choice,einsum top_k,gather top_k,einsum]

16384 tokens a chip, as in a step of 2048 x 512 on 64 chips; D=768, F=2048 (gated), E=32, cf=2, groups of 4096, bfloat16. Nothing
is run. Cycles are the compiler's estimates of fused operations, without row gathers and collectives.
"""

import os
import sys

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
from upcycle.hlo import Collective, Program
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import MoELayer

B, L, D, F, E = 128, 512, 768, 2048, 32
DEFAULT = ['expert_choice,gather', 'expert_choice,einsum', 'top_k,gather', 'top_k,einsum']


def account(router: str, dispatch: str, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns a row of the table."""
    config = MoEConfig(E, router=router, dispatch=dispatch, groups_multiple_of=4)
    arguments = {'mlp_dim': F, 'dtype': jnp.bfloat16, 'embed_axis': 'mlp_embed', 'mlp_axis': 'expert_mlp'}
    layer = MoELayer(config, MlpBlock, arguments)
    real = jnp.ones((B, L), bool)

    def init(key):
        return layer.init(key, jnp.zeros((B, L, D), jnp.bfloat16), real, training=True)['params']

    def place(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    boxed = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(place, partitioning.unbox(boxed), partitioning.param_specs(boxed, mesh))
    x = place(jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16), PartitionSpec(('data', 'expert')))

    def loss(params, x):
        y = layer.apply({'params': params}, x, jnp.ones((B, L), bool), training=True)
        return jnp.square(y.astype(jnp.float32)).sum()

    with partitioning.use(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    program = Program(compiled.as_text())
    exchanged = program.collectives().get('all-to-all', Collective())  # `ragged` goes around a ring
    return [
        router,
        dispatch,
        f'{program.estimated_cycles() / 1e6:.1f}',
        f'{program.matmul_flops() / 1e12:.2f}',
        f'{compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f}',
        f'{exchanged.count}, {exchanged.operand_bytes / 1e9:.2f}',
    ]


def main() -> None:
    """Prints the table."""
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v4:2x2x1', chip_config_name='megacore')
    mesh = partitioning.make_mesh((1, 4, 1), E, topology.devices)
    rows = [account(*case.split(','), mesh) for case in sys.argv[1:] or DEFAULT]
    print(table(['router', 'dispatch', 'M cycles', 'TFLOP', 'temporary GB', 'all-to-alls, GB'], rows))


if __name__ == '__main__':
    main()
