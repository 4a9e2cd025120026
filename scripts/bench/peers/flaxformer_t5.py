"""Times our T5 against flaxformer's under t5x (forward, gradient, step); both must be installed, neither is on a package index.

  PYTHONPATH=/path/to/flaxformer:/path/to/t5x python scripts/bench/peers/flaxformer_t5.py

d=256, F=1024, 4+4 layers of which half are sparse, 8 heads of 32, vocabulary 512, 8 experts, 8 x 128 tokens into encoder and
decoder each, float32. Both with their own Adafactor. They take turns, each in its own process (`--one_process`: both in one).
Their model comes from flaxformer's `experts_choose_base.gin`, resized.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import flax.linen as nn
import flax.linen.partitioning as partitioning
import flaxformer
import jax
import jax.numpy as jnp
from step import Step, batch_of
from t5x.models import EncoderDecoderModel
from timing import SERVE, side_by_side, table, updating

import gin
from upcycle.models.t5 import T5Config
from upcycle.moe.config import MoEConfig

WIDTH, MLP, LAYERS, HEADS, VOCABULARY, EXPERTS = 256, 1024, 4, 8, 512, 8
# Name: capacity factor of the sparse half of the layers.
VARIANTS = {'dense': None, 'cf=1': 1.0, 'cf=2': 2.0}
RESIZED = f"""
from __gin__ import dynamic_registration
import seqio
VOCABULARY = @seqio.PassThroughVocabulary()
seqio.PassThroughVocabulary.size = {VOCABULARY}
NUM_ENCODER_LAYERS = {LAYERS}
NUM_DECODER_LAYERS = {LAYERS}
NUM_HEADS = {HEADS}
HEAD_DIM = {WIDTH // HEADS}
EMBED_DIM = {WIDTH}
MLP_DIM = {MLP}
NUM_EMBEDDINGS = {VOCABULARY}
NUM_EXPERTS = {EXPERTS}
NUM_EXPERT_PARTITIONS = 1
NUM_MODEL_PARTITIONS = 1
ACTIVATION_DTYPE = 'float32'
MOE_TRUNCATED_DTYPE = 'float32'
"""


def theirs(factor: float | None, batch: dict[str, jax.Array]):
    """Builds flaxformer's model with t5x's loss and optimizer."""
    folder = pathlib.Path(next(iter(flaxformer.__path__))).parent
    gin.clear_config()
    gin.add_config_file_search_path(str(folder))
    sparse = 0 if factor is None else LAYERS // 2
    more = f'NUM_ENCODER_SPARSE_LAYERS = {sparse}\nNUM_DECODER_SPARSE_LAYERS = {sparse}\n'
    more += f'TRAIN_EXPERT_CAPACITY_FACTOR = {factor or 1.0}\n'
    gin.parse_config_file('flaxformer/t5x/configs/moe/models/experts_choose_base.gin')
    gin.parse_config(RESIZED + more)
    model = gin.query_parameter('MODEL/macro.value').scoped_configurable_fn()
    shapes = {name: array.shape for name, array in batch.items()}
    variables = jax.jit(lambda: model.get_initial_variables(jax.random.PRNGKey(0), shapes))()
    params = nn.unbox(variables['params'])
    model.optimizer_def.set_param_axes(partitioning.get_axis_names(nn.unbox(variables['params_axes'])))
    optimizer = model.optimizer_def.create(params)
    rng = jax.random.PRNGKey(1)

    # The loss of an MoE model expects metrics of sparse layers.
    loss_fn = EncoderDecoderModel.loss_fn if factor is None else type(model).loss_fn

    def loss(params):
        return loss_fn(model, params, batch, rng)[0]

    def step(optimizer):
        return optimizer.apply_gradient(jax.grad(loss)(optimizer.target), learning_rate=1e-3), None

    forward, gradient = (jax.jit(f).lower(params).compile() for f in (loss, jax.grad(loss)))
    return {
        'forward': lambda: forward(params),
        'gradient': lambda: gradient(params),
        'step': updating(step, optimizer),
    }


def ours(factor: float | None, batch: dict[str, jax.Array]):
    """Builds our model and optimizer of the same sizes."""
    moe = {}
    if factor is not None:
        encoder = MoEConfig(EXPERTS, train_capacity_factor=factor)
        moe = {'encoder_moe': encoder, 'decoder_moe': MoEConfig(EXPERTS, 'top_k', train_capacity_factor=factor)}
    config = T5Config(
        vocab_size=VOCABULARY,
        emb_dim=WIDTH,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        mlp_dim=MLP,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        dtype='float32',
        **moe,
    )
    ours = Step(config, batch, None if factor is None else EXPERTS)
    # Theirs does not measure the norm of the parameters. Ours keeps that of the gradient, on which the update depends.
    parts = ours.parts()
    return {
        'forward': parts['forward'],
        'gradient': parts['forward and backward'],
        'step': updating(lambda state: (ours.train_step(state, ours.batch)[0], None), ours.state),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=8)
    parser.add_argument('--length', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--one_process', action='store_true')
    parser.add_argument(SERVE, help=argparse.SUPPRESS)
    parser.add_argument('--only', nargs='*', default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    batch = batch_of(arguments.rows, arguments.length, arguments.length, VOCABULARY)
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    builders = {
        't5x': lambda name: theirs(VARIANTS[name], batch),
        'ours': lambda name: ours(VARIANTS[name], batch),
    }
    parts = ('forward', 'gradient', 'step')
    rows = side_by_side(builders, arguments.only, parts, arguments.rounds, one_process=arguments.one_process)
    print(f'{arguments.rows} x {arguments.length} tokens, median of {arguments.rounds}, {os.cpu_count()} cores\n')
    print(table(['model', 'part', 't5x + flaxformer, ms', 'ours, ms', 'theirs / ours'], rows))


if __name__ == '__main__':
    main()
