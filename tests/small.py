"""Small models, batches and parameter trees for tests."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tests.fixtures import fixtures_dir
from upcycle import partitioning
from upcycle.models.decoder_config import DecoderConfig
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.t5 import T5Config
from upcycle.models.vit import ViTConfig
from upcycle.moe.config import MoEConfig
from upcycle.moe.routers.base import MoE

# The sizes of the fixtures.
FIXTURE_T5 = T5Config(
    vocab_size=512,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=4,
    num_decoder_layers=4,
    dtype='float32',
)
FEATURES = ('encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')


def with_moe(config: T5Config, **settings: Any) -> T5Config:
    """Adds the paper's MoE layers to a T5: Expert Choice in the encoder, Top-2 in the decoder."""
    settings = {'num_experts': 8, 'group_size': 4096, **settings}
    encoder, decoder = MoEConfig(**settings), MoEConfig(**settings | {'router': 'top_k'})
    return dataclasses.replace(config, encoder_moe=encoder, decoder_moe=decoder)


def flaxformer_moe(**settings: Any) -> T5Config:
    """The fixtures' T5 with MoE layers, in flaxformer's conventions."""
    settings = {'groups_multiple_of': 8, 'fill_order': 'choice_major', 'route_padding': 'route', **settings}
    return dataclasses.replace(with_moe(FIXTURE_T5, **settings), zero_padded_activations=True)


def small_t5(**settings: Any) -> T5Config:
    """A T5 of 2 + 2 layers, at width 128, from which Adafactor factors its state."""
    sizes = {
        'vocab_size': 256,
        'emb_dim': 128,
        'num_heads': 2,
        'head_dim': 32,
        'mlp_dim': 256,
        'num_encoder_layers': 2,
        'num_decoder_layers': 2,
        'dtype': 'float32',
    }
    return T5Config(**{**sizes, **settings})


def small_llm(**settings: Any) -> DecoderConfig:
    """A decoder-only model of two layers with grouped queries."""
    sizes = {
        'vocab_size': 128,
        'emb_dim': 48,
        'num_heads': 4,
        'num_kv_heads': 2,
        'head_dim': 16,
        'mlp_dim': 96,
        'num_layers': 2,
        'dtype': 'float32',
    }
    return DecoderConfig(**{**sizes, **settings})


def llm_moe(**settings: Any) -> MoE:
    """The recipe of decoder-only models: dropless Top-2 with normalised weights."""
    recipe = {'router': 'top_k', 'dispatch': 'ragged', 'normalize_combine_weights': True}
    return MoEConfig(**{'num_experts': 4, **recipe, **settings})


def random_batch(
    vocab_size: int = 256, batch: int = 4, inputs: int = 16, targets: int = 8, seed: int = 0, padding: int = 0
) -> dict[str, jax.Array]:
    """A batch of random tokens; the last `padding` positions of the inputs and targets of odd rows are padding."""
    rng = np.random.default_rng(seed)
    encoder = rng.integers(1, vocab_size, (batch, inputs))
    target = rng.integers(1, vocab_size, (batch, targets))
    if padding:
        encoder[1::2, -padding:] = 0
        target[1::2, -padding:] = 0
    decoder = np.pad(target[:, :-1], ((0, 0), (1, 0)))
    arrays = (
        encoder.astype(np.int32),
        decoder.astype(np.int32),
        target.astype(np.int32),
        (target > 0).astype(np.float32),
    )
    return {name: jnp.asarray(array) for name, array in zip(FEATURES, arrays, strict=True)}


def spec_of(batch: Mapping[str, jax.Array]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The batch spec of a batch."""
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


def init(model: EncoderDecoderModel, batch: Mapping[str, jax.Array], seed: int = 0) -> tuple[Any, Any]:
    """Initialises parameters; returns them and the number of stacked axes of each."""
    boxed = _initializer(model, tuple(spec_of(batch).items()))(jax.random.key(seed))
    return partitioning.unbox(boxed), partitioning.batch_axes(boxed)


@functools.cache
def _initializer(model: EncoderDecoderModel, spec: tuple[tuple[str, Any], ...]) -> Callable[[jax.Array], Any]:
    return jax.jit(lambda key: model.init(key, dict(spec)))


def fixture(name: str) -> Any:
    """Opens an npz file of the fixtures."""
    return np.load(fixtures_dir() / name)


def fixture_tree(arrays: Any, prefix: str) -> dict[str, Any]:
    """The arrays below a prefix, as a nested dict."""
    return unflatten_dict(
        {
            tuple(name.removeprefix(prefix).split('/')): jnp.asarray(arrays[name])
            for name in arrays.files
            if name.startswith(prefix)
        }
    )


def fixture_batch(arrays: Any, prefix: str) -> dict[str, jax.Array]:
    """The batch below a prefix."""
    return {name: jnp.asarray(arrays[prefix + name]) for name in FEATURES}


def close_to_largest(actual: jax.Array, expected: jax.Array, tolerance: float = 1e-5) -> bool:
    """Whether two arrays are equal up to `tolerance` times the largest entry, as float32 sums round."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(np.max(np.abs(expected)))
    return float(np.max(np.abs(actual - expected))) <= tolerance * max(scale, 1e-30)


def small_vit(**settings: Any) -> ViTConfig:
    """A ViT of 4 blocks on 16 patches, at width 128, from which Adafactor factors its state."""
    sizes = {
        'num_classes': 10,
        'image_size': 16,
        'patch_size': 4,
        'emb_dim': 128,
        'num_heads': 4,
        'mlp_dim': 256,
        'num_layers': 4,
        'dtype': 'float32',
    }
    return ViTConfig(**{**sizes, **settings})


def vit_moe(**settings: Any) -> MoE:
    """The paper's MoE layers for vision: Expert Choice with normalised weights."""
    return MoEConfig(
        **{'num_experts': 8, 'capacity_rule': 'vmoe', 'normalize_combine_weights': True, 'group_size': 1, **settings}
    )


def image_batch(config: ViTConfig, batch: int = 4, seed: int = 0, filled: int = 0) -> dict[str, jax.Array]:
    """A batch of random images; the last `filled` rows are padding."""
    rng = np.random.default_rng(seed)
    shape = (batch, config.image_size, config.image_size, config.image_channels)
    return {
        'image': jnp.asarray(rng.standard_normal(shape), jnp.float32),
        'labels': jnp.asarray(rng.integers(0, config.num_classes, (batch, 1)), jnp.int32),
        'weights': jnp.asarray(np.arange(batch) < batch - filled, jnp.float32),
    }


def llm_batch(vocab_size: int = 128, batch: int = 4, length: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Rows of two packed documents, of which every second one ends in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (batch, length + 1)).astype(np.int32)
    mask = np.ones((batch, length), bool)
    mask[1::2, -3:] = False
    segments = np.arange(length)[None] >= rng.integers(4, length - 4, (batch, 1))
    arrays = {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'loss_weights': mask.astype(np.float32),
        'segment_ids': segments.astype(np.int32),
        'mask': mask,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def module_inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The inputs of the batch's model, of any family."""
    if 'image' in batch:
        return {'image': batch['image'], 'real_B': batch['weights'] > 0}
    if 'tokens' in batch:
        return {name: batch[name] for name in ('tokens', 'segment_ids', 'mask')}
    return {name: batch[name] for name in FEATURES[:3]}


def real_tokens(batch: Mapping[str, jax.Array], path: str, num_tokens: int = 0) -> jax.Array:
    """Bool (B, L): which tokens are real at the MoE layer of that path; a ViT has `num_tokens` per image."""
    if 'mask' in batch:
        return batch['mask']
    if 'image' in batch:
        return jnp.broadcast_to(batch['weights'][:, None] > 0, (batch['weights'].size, num_tokens))
    return batch['encoder_input_tokens' if path.startswith('encoder') else 'decoder_target_tokens'] > 0
