"""Times one MoE layer, forward and backward, with every dispatch, against its experts on tokens that are already dispatched.

  python scripts/bench/layer.py            # time, d=512, F=2048, E=32, cf=2, 4096 tokens a group
  python scripts/bench/layer.py --grow     # time and memory as the tokens of a group grow 1x, 2x, 4x, 8x

The floor is the lower bound of any dispatch: only the experts' matrix products, on as many slots.
"""

import argparse
import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import flax.linen as nn
import jax
import jax.numpy as jnp
from timing import medians, table

from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import MoELayer

MLP = {'activations': ('gelu', 'linear'), 'dtype': jnp.float32}


def build(config: MoEConfig, tokens: int, width: int, mlp_width: int):
    """Returns the compiled gradient of a layer, and its arguments."""
    layer = MoELayer(config, MlpBlock, MLP | {'mlp_dim': mlp_width})
    x = jax.random.normal(jax.random.key(0), (1, tokens, width))
    real = jnp.ones((1, tokens), bool)
    params = nn.unbox(jax.jit(lambda key: layer.init(key, x, real, training=True))(jax.random.key(1)))['params']

    def loss(params, x):
        return jnp.square(layer.apply({'params': params}, x, real, training=True)).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile(), (params, x)


def build_floor(config: MoEConfig, tokens: int, width: int, mlp_width: int):
    """Returns the same for the experts alone, on slots that are already filled."""
    experts = nn.vmap(
        MlpBlock,
        in_axes=(0, None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        axis_size=config.num_experts,
        metadata_params={nn.PARTITION_NAME: 'expert'},
    )(**MLP, mlp_dim=mlp_width)
    slots = config.capacity(tokens, training=True)
    x = jax.random.normal(jax.random.key(0), (config.num_experts, slots, width))
    params = nn.unbox(jax.jit(lambda key: experts.init(key, x, True))(jax.random.key(1)))['params']

    def loss(params, x):
        return jnp.square(experts.apply({'params': params}, x, True)).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile(), (params, x)


def compare(tokens: int, arguments: argparse.Namespace, names: list[str]) -> list[list[str]]:
    """A row for every dispatch: its time over the floor's, and its temporary memory."""
    shared = {
        'num_experts': arguments.experts,
        'group_size': tokens,
        'train_capacity_factor': arguments.capacity_factor,
    }
    configs = {
        'expert choice, gather': MoEConfig(**shared),
        'expert choice, einsum': MoEConfig(**shared, dispatch='einsum'),
        'top 2, gather': MoEConfig(**shared, router='top_k'),
        'top 2, einsum': MoEConfig(**shared, router='top_k', dispatch='einsum'),
        'top 2, ragged': MoEConfig(**shared, router='top_k', dispatch='ragged'),
    }
    sizes = (tokens, arguments.width, arguments.mlp_width)
    programs = {'floor': build_floor(configs['expert choice, gather'], *sizes)}
    programs |= {name: build(configs[name], *sizes) for name in names}
    seconds = medians(
        {name: lambda program=program, given=given: program(*given) for name, (program, given) in programs.items()},
        arguments.rounds,
    )
    return [
        [
            str(tokens),
            name,
            f'{1e3 * seconds[name]:.0f}',
            f'{seconds[name] / seconds["floor"]:.2f}',
            f'{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}',
        ]
        for name, (program, _) in programs.items()
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--width', type=int, default=512)
    parser.add_argument('--mlp_width', type=int, default=2048)
    parser.add_argument('--experts', type=int, default=32)
    parser.add_argument('--capacity_factor', type=float, default=2.0)
    parser.add_argument('--tokens', type=int, default=4096)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--grow', action='store_true', help='smaller, at 1x, 2x, 4x and 8x the tokens')
    parser.add_argument('--only', nargs='*', default=None, help='names of dispatches')
    arguments = parser.parse_args()
    names = ['expert choice, gather', 'expert choice, einsum', 'top 2, gather', 'top 2, einsum', 'top 2, ragged']
    names = [name for name in names if arguments.only is None or name in arguments.only]
    counts = [arguments.tokens]
    if arguments.grow:
        arguments.width, arguments.mlp_width, arguments.experts = 128, 256, 16
        counts = [1024, 2048, 4096, 8192]
    rows = [row for count in counts for row in compare(count, arguments, names)]
    print(
        f'd={arguments.width}, F={arguments.mlp_width}, E={arguments.experts}, cf={arguments.capacity_factor:g}, float32,'
    )
    print(f'one group, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, median of {arguments.rounds}\n')
    print(table(['tokens', 'dispatch', 'ms', 'over the floor', 'temporary MiB'], rows))


if __name__ == '__main__':
    main()
