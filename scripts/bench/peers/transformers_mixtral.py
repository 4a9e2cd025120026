"""Times our dropless MoE layer against transformers' Mixtral block with grouped products; needs torch and transformers >= 5.

  python scripts/bench/peers/transformers_mixtral.py

D=512, F=1792 (Mixtral's proportions), 8 experts, Top-2, 2048 tokens, float32. They take turns, in one process.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from timing import side_by_side, table
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import MoELayer

WIDTH, MLP_WIDTH, EXPERTS, CHOSEN = 512, 1792, 8, 2
Parts = dict[str, Callable[[], object]]


def theirs(x: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[Parts, Callable[[], np.ndarray]]:
    """Builds transformers' block with our weights; returns its parts, and a function of its output."""
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        experts_implementation='grouped_mm',
    )
    block = MixtralSparseMoeBlock(config)
    up = np.concatenate([weights['wi_0'], weights['wi_1']], axis=-1)
    state = {'gate.weight': weights['router'].T, 'experts.gate_up_proj': up.swapaxes(1, 2)}
    state['experts.down_proj'] = weights['wo'].swapaxes(1, 2)
    block.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()})
    inputs = torch.tensor(x, requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return block(inputs)

    def gradient() -> None:
        block.zero_grad()
        inputs.grad = None
        block(inputs).square().sum().backward()

    return {'forward': forward, 'forward and backward': gradient}, lambda: forward().numpy()


def ours(x: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[Parts, Callable[[], np.ndarray]]:
    """Builds our layer; returns as `theirs`."""
    layer = _layer()
    experts = {name: {'kernel': jnp.asarray(weights[name])} for name in ('wi_0', 'wi_1', 'wo')}
    params = {'expert': experts, 'router': {'router_weights': {'w': {'kernel': jnp.asarray(weights['router'])}}}}
    inputs, real = jnp.asarray(x), jnp.ones(x.shape[:2], bool)

    def output(params: object, x: jax.Array) -> jax.Array:
        return layer.apply({'params': params}, x, real, training=True)

    def loss(params: object, x: jax.Array) -> jax.Array:
        return jnp.square(output(params, x)).sum()

    forward = jax.jit(output).lower(params, inputs).compile()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, inputs).compile()
    parts = {'forward': lambda: forward(params, inputs), 'forward and backward': lambda: gradient(params, inputs)}
    return parts, lambda: np.asarray(forward(params, inputs))


def _layer() -> MoELayer:
    config = MoEConfig(EXPERTS, router='top_k', dispatch='ragged', normalize_combine_weights=True)
    return MoELayer(config, MlpBlock, {'mlp_dim': MLP_WIDTH, 'activations': ('silu', 'linear')})


def main() -> None:
    """Compares the outputs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=2048)
    parser.add_argument('--rounds', type=int, default=15)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, arguments.tokens, WIDTH), np.float32)
    init = _layer().init(jax.random.key(0), jnp.asarray(x[:, :8]), jnp.ones((1, 8), bool), training=True)
    params = jax.tree.map(np.asarray, nn.unbox(init)['params'])
    weights = {name: leaf['kernel'] for name, leaf in params['expert'].items()}
    weights['router'] = rng.standard_normal((WIDTH, EXPERTS), np.float32) / np.sqrt(np.float32(WIDTH))
    built = {who: build(x, weights) for who, build in (('transformers', theirs), ('ours', ours))}
    difference = np.abs(built['transformers'][1]() - built['ours'][1]()).max()
    print(f'largest difference of outputs {difference:.1e}')
    builders = {who: lambda _, parts=parts: parts for who, (parts, _) in built.items()}
    rows = side_by_side(
        builders, ['top 2 of 8'], ('forward', 'forward and backward'), arguments.rounds, one_process=True
    )
    print(f'{arguments.tokens} tokens, median of {arguments.rounds}, {os.cpu_count()} cores\n')
    print(table(['layer', 'part', 'transformers, ms', 'ours, ms', 'transformers / ours'], rows))


if __name__ == '__main__':
    main()
