"""Times our ViT against vmoe's; vmoe and vision_transformer must be installed, neither is on a package index.

  PYTHONPATH=/path/to/vmoe:/path/to/vision_transformer python scripts/bench/peers/vmoe_vit.py

Width 192, 12 blocks of which 6 are sparse (1, 3, 5, ...), 8 experts, 64 tokens an image, 32 images, float32. Both have the same
sizes and the same optimizer (optax Adam). They take turns, each in its own process (`--one_process`: both in one).
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import SERVE, side_by_side, table, updating
from vmoe.nn.vit_moe import VisionTransformerMoe

from upcycle import partitioning
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.vit import ViTConfig
from upcycle.moe.config import MoEConfig

WIDTH, BLOCKS, HEADS, EXPERTS, TOKENS, CLASSES = 192, 12, 3, 8, 64, 1000
PATCH = 8
SPARSE = tuple(range(1, BLOCKS, 2))
# Name: capacity factor, images in a group.
VARIANTS = {'dense': None, 'cf=1': (1.0, 1), 'cf=2': (2.0, 1), 'cf=2, one group': (2.0, None)}


class Candidate:
    """A loss with its parameters, compiled three ways."""

    def __init__(self, loss, params):
        optimizer = optax.adam(1e-3)

        def step(held):
            params, state = held
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        compiled = {
            'forward': jax.jit(loss).lower(params).compile(),
            'gradient': jax.jit(jax.grad(loss)).lower(params).compile(),
        }
        self.parts = {name: lambda run=run: run(params) for name, run in compiled.items()}
        self.parts['step'] = updating(step, (params, optimizer.init(params)))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def theirs(variant, image, labels) -> Candidate:
    """Builds vmoe's model as its configs do."""
    encoder = {'num_layers': BLOCKS, 'mlp_dim': 4 * WIDTH, 'num_heads': HEADS}
    if variant is not None:
        factor, images = variant
        group = (images or len(image)) * TOKENS
        encoder['moe'] = {
            'layers': SPARSE,
            'num_experts': EXPERTS,
            'group_size': group,
            'router': {
                'name': 'NoisyTopItemsPerExpertRouter',
                'noise_std': 0.0,
                'dispatcher': {'name': 'einsum', 'bfloat16': False, 'capacity_factor': factor},
            },
        }
    model = VisionTransformerMoe(
        num_classes=CLASSES, patch_size=(PATCH, PATCH), hidden_size=WIDTH, encoder=encoder, classifier='gap'
    )
    rngs = {name: jax.random.key(i) for i, name in enumerate(('params', 'gating', 'dropout'))}
    params = jax.jit(lambda: model.init(rngs, image)['params'])()

    def loss(params):
        logits, metrics = model.apply({'params': params}, image, rngs=rngs)
        return cross_entropy(logits, labels) + metrics.get('auxiliary_loss', 0.0)

    return Candidate(loss, params)


def ours(variant, image, labels) -> Candidate:
    """Builds our model of the same sizes, with combine weights as theirs, not normalised."""
    moe, images = None, 1
    if variant is not None:
        factor, images = variant[0], variant[1] or len(image)
        moe = MoEConfig(EXPERTS, train_capacity_factor=factor, capacity_rule='vmoe')
    config = ViTConfig(
        num_classes=CLASSES,
        image_size=image.shape[1],
        patch_size=PATCH,
        emb_dim=WIDTH,
        num_heads=HEADS,
        mlp_dim=4 * WIDTH,
        num_layers=BLOCKS,
        dtype='float32',
        moe=moe,
        moe_layers=SPARSE,
        group_images=images,
    )
    model = ImageClassifier(config)
    batch = {'image': image, 'labels': labels[:, None], 'weights': jnp.ones(len(image))}
    spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
    params = jax.jit(lambda: partitioning.unbox(model.init(jax.random.key(0), spec)))()

    def loss(params):
        sums, moe_loss, _ = model.forward(params, batch, None, training=True)
        return sums['loss'] / sums['weight'] + moe_loss

    return Candidate(loss, params)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--one_process', action='store_true')
    parser.add_argument(SERVE, help=argparse.SUPPRESS)
    parser.add_argument('--only', nargs='*', default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    side = PATCH * int(TOKENS**0.5)
    image = jnp.asarray(rng.standard_normal((arguments.images, side, side, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, arguments.images))
    builders = {
        'vmoe': lambda name: theirs(VARIANTS[name], image, labels).parts,
        'ours': lambda name: ours(VARIANTS[name], image, labels).parts,
    }
    parts = ('forward', 'gradient', 'step')
    rows = side_by_side(builders, arguments.only, parts, arguments.rounds, one_process=arguments.one_process)
    print(f'{arguments.images} images, median of {arguments.rounds}, {os.cpu_count()} cores\n')
    print(table(['model', 'part', 'vmoe, ms', 'ours, ms', 'vmoe / ours'], rows))


if __name__ == '__main__':
    main()
