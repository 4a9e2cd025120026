"""Small checkpoints as flat trees, T5 and ViT, dense and MoE, with and without optimizer state; and how to write one."""

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.checkpoints import vits
from tests.small import small_t5, with_moe
from upcycle import partitioning
from upcycle.checkpoints import create_checkpoint
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.t5 import T5Config
from upcycle.training.optimizer import Adafactor

STEP = 100
# T5X factors experts of any size.
ADAFACTOR = Adafactor(min_dim_size_to_factor=16, expert_min_dim_size_to_factor=1)
SIZES = {'vocab_size': 40, 'emb_dim': 16, 'num_heads': 2, 'head_dim': 6, 'mlp_dim': 24}


def t5(moe: bool, *, state: bool, tied: bool = False, seed: int = 0, **more):
    """A T5 of 2 + 2 layers; the second of each stack has 4 experts where `moe`."""
    return random_tree(*_t5_shapes(moe, tied, tuple(more.items())), state=state, seed=seed)


def vit(moe: bool, *, state: bool, pooling: str = 'token', seed: int = 0):
    """A ViT of 3 blocks; the last two have 4 experts where `moe`."""
    params = {
        name.removeprefix('params/'): jax.ShapeDtypeStruct(value.shape, value.dtype)
        for name, value in vits.ours(pooling, moe=(1, 2) if moe else ()).items()
    }
    return random_tree(params, {name: int('expert' in name) for name in params}, state=state, seed=seed)


@functools.cache
def _t5_shapes(moe: bool, tied: bool, more: tuple):
    config = T5Config(**{**vars(small_t5()), **SIZES, 'logits_via_embedding': tied, **dict(more)})
    if moe:
        config = with_moe(config, num_experts=4)
    features = ('encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens')
    spec = dict.fromkeys(features, ((1, 8), 'int32'))
    boxed = jax.eval_shape(lambda key: EncoderDecoderModel(config).init(key, spec), jax.random.key(0))
    return flatten_dict(partitioning.unbox(boxed), sep='/'), flatten_dict(partitioning.batch_axes(boxed), sep='/')


def random_tree(params, batch_axes, *, state: bool, seed: int = 0):
    """Random numbers for parameters, their Adafactor state and a step."""
    rng = np.random.default_rng(seed)
    tree = {f'params/{name}': rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}
    tree['step'] = np.asarray(STEP, np.int32)
    if state:
        axes = unflatten_dict(batch_axes, sep='/')
        slots = jax.eval_shape(lambda: ADAFACTOR.init(unflatten_dict(dict(params), sep='/'), axes))
        for name, leaf in flatten_dict(slots, sep='/').items():
            tree[f'opt_state/{name}'] = rng.random(leaf.shape).astype(np.float32)
        tree['opt_state/count'] = np.asarray(STEP, np.int32)
        tree['rng'] = np.arange(2, dtype=np.uint32)
    return tree


def write(path, format, tree, metadata=None):
    """Writes a tree without checks. Returns the new checkpoint's path."""
    leaves = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}
    step = int(tree['step']) if 'step' in tree else None
    writer = create_checkpoint(path, format, leaves, step=step, identity={}, metadata=metadata or {})
    for name, regions in writer.todo().items():
        for region in regions:
            writer.write(name, region, tree[name][region])
    writer.finish(metadata or {})
    return writer.path


def assert_same(reader, expected):
    """Asserts that a checkpoint holds exactly these leaves."""
    leaves = reader.leaves()
    assert leaves.keys() == expected.keys()
    for name, value in expected.items():
        read = reader.read(name)
        assert (leaves[name].shape, leaves[name].dtype) == (read.shape, read.dtype) == (value.shape, value.dtype), name
        assert read.tobytes() == np.asarray(value).tobytes(), name
