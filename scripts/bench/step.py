"""Times the training step, sparse and dense, and its parts: forward, backward, optimizer.

  python scripts/bench/step.py                                        # E = 8, 32, 128 and cf = 1, 2
  XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/bench/step.py

*Overhead* is the ratio of times over the ratio of FLOPs: 1.00 means that a sparse step costs as much as its FLOPs.
"""

import argparse
import functools
import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from timing import medians, table, updating

from upcycle import cost, partitioning
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.t5 import T5Config
from upcycle.moe.config import MoEConfig
from upcycle.training.optimizer import Adafactor
from upcycle.training.step import TrainState, train_step


def batch_of(rows: int, inputs: int, targets: int, vocabulary: int) -> dict[str, jax.Array]:
    """Returns a batch of random tokens without padding."""
    rng = np.random.default_rng(0)
    target = rng.integers(1, vocabulary, (rows, targets)).astype(np.int32)
    return {
        'encoder_input_tokens': jnp.asarray(rng.integers(1, vocabulary, (rows, inputs)), jnp.int32),
        'decoder_input_tokens': jnp.asarray(np.pad(target[:, :-1], ((0, 0), (1, 0)))),
        'decoder_target_tokens': jnp.asarray(target),
        'decoder_loss_weights': jnp.ones((rows, targets), jnp.float32),
    }


class Step:
    """A compiled training step, and its parts."""

    def __init__(self, config: T5Config, batch: dict[str, jax.Array], num_experts: int | None):
        self.model = EncoderDecoderModel(config)
        self.mesh = partitioning.make_mesh('auto', num_experts)
        spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
        self.flops = cost.step_flops(self.model, spec)
        optimizer = Adafactor()
        boxed = jax.eval_shape(lambda key: self.model.init(key, spec), jax.random.key(0))
        axes, specs = partitioning.batch_axes(boxed), partitioning.param_specs(boxed, self.mesh)
        shardings = jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs)
        init = jax.jit(lambda key: partitioning.unbox(self.model.init(key, spec)), out_shardings=shardings)
        with partitioning.use(self.mesh):
            params = init(jax.random.key(0))
            whole = partitioning.replicated(self.mesh)
            self.state = TrainState(
                step=jax.device_put(jnp.zeros((), jnp.int32), whole),
                params=params,
                opt_state=jax.jit(functools.partial(optimizer.init, batch_axes=axes))(params),
                rng=jax.device_put(jax.random.key_data(jax.random.key(0)), whole),
            )
            self.batch = jax.device_put(batch, partitioning.batch_sharding(self.mesh))
            self.train_step = functools.partial(
                train_step,
                model=self.model,
                optimizer=optimizer,
                learning_rate=lambda step: jnp.asarray(1e-3),
                batch_axes=axes,
            )
            self.step = updating(lambda state: self.train_step(state, self.batch), self.state)

            def loss(params, batch):
                sums, moe_loss, _ = self.model.forward(params, batch, None, training=True)
                return sums['loss'] / sums['weight'] + moe_loss

            self.forward = jax.jit(loss).lower(params, self.batch).compile()
            self.gradient = jax.jit(jax.grad(loss)).lower(params, self.batch).compile()
            grads = self.gradient(params, self.batch)
            update = functools.partial(optimizer.update, learning_rate=jnp.asarray(1e-3), batch_axes=axes)
            self.update = jax.jit(lambda grads, state, params: update(grads, state, params))
            self.update = self.update.lower(grads, self.state.opt_state, params).compile()
            self.grads = grads

    def parts(self):
        """Returns the timed functions by name."""
        params = self.state.params
        return {
            'step': self.step,
            'forward': lambda: self.forward(params, self.batch),
            'forward and backward': lambda: self.gradient(params, self.batch),
            'optimizer': lambda: self.update(self.grads, self.state.opt_state, params),
        }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--experts', type=int, nargs='*', default=[8, 32, 128])
    parser.add_argument('--capacity_factors', type=float, nargs='*', default=[1.0, 2.0])
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--rows', type=int, default=8)
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=15)
    arguments = parser.parse_args()
    # The sizes at which t5x with flaxformer was measured.
    dense = T5Config(
        vocab_size=512,
        emb_dim=256,
        num_heads=8,
        head_dim=32,
        mlp_dim=1024,
        num_encoder_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dtype='float32',
    )
    batch = batch_of(arguments.rows, arguments.length, arguments.length, 512)
    devices = jax.device_count()
    steps = {'dense': Step(dense, batch, None)}
    for experts in arguments.experts:
        for factor in arguments.capacity_factors:
            moe = MoEConfig(experts, train_capacity_factor=factor, groups_multiple_of=devices)
            decoder = MoEConfig(experts, 'top_k', train_capacity_factor=factor, groups_multiple_of=devices)
            sparse = T5Config(**{**vars(dense), 'encoder_moe': moe, 'decoder_moe': decoder})
            steps[f'E={experts}, cf={factor:g}'] = Step(sparse, batch, experts)
    candidates = {(name, part): run for name, step in steps.items() for part, run in step.parts().items()}
    seconds = medians(candidates, arguments.rounds)
    rows = []
    for name, step in steps.items():
        ms = {part: 1e3 * seconds[name, part] for part in step.parts()}
        ratio = ms['step'] / (1e3 * seconds['dense', 'step'])
        flops = step.flops / steps['dense'].flops
        backward = ms['forward and backward'] - ms['forward']
        rows.append(
            [
                name,
                f'{ms["step"]:.0f}',
                f'{ms["forward"]:.0f}',
                f'{backward:.0f}',
                f'{ms["optimizer"]:.0f}',
                f'{ratio:.2f}',
                f'{flops:.2f}',
                f'{ratio / flops:.2f}',
            ]
        )
    print(
        f'd=256, F=1024, {arguments.layers}+{arguments.layers} layers, half of them sparse, {arguments.rows} x '
        f'{arguments.length} tokens, float32, {devices} devices, {os.cpu_count()} cores, median of {arguments.rounds}\n'
    )
    print(table(['step', 'ms', 'forward', 'backward', 'optimizer', 'over dense', 'FLOPs over dense', 'overhead'], rows))


if __name__ == '__main__':
    main()
