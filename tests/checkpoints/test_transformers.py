"""Models of the transformers library with random weights give the same logits here, and exported ones there.

Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough), and is skipped without it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from upcycle.checkpoints import open_checkpoint
from upcycle.models import identify
from upcycle.transfer import transfer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

T5_SIZES = {
    'vocab_size': 96,
    'd_model': 32,
    'd_kv': 8,
    'd_ff': 48,
    'num_layers': 2,
    'num_decoder_layers': 3,
    'num_heads': 3,
    'dropout_rate': 0.0,
    'decoder_start_token_id': 0,
}
V1_1 = {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
# Class, configuration, and whether the head is separate from the embedding.
T5S = {
    'T5 1.1 and Flan': ('T5', V1_1, True),
    'T5 1.1 with a tied head': ('T5', V1_1, False),
    'T5 1.0': ('T5', {}, False),
    'mT5': ('MT5', V1_1, True),
    'umT5': ('UMT5', V1_1, True),
    'umT5 with a tied head': ('UMT5', {}, False),
}
VIT_SIZES = {
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 64,
    'image_size': 24,
    'patch_size': 8,
}


def randomize(model, seed=0):
    """Randomises all parameters: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 and parameter.mean() == 1 else 0.3 * noise)
    return model.eval()


def logits_here(path, batch):
    """Returns our model's logits, with the configuration from the checkpoint."""
    reader = open_checkpoint(path)
    facts = identify.facts_of(reader.metadata)
    model = identify.check(path, reader.leaves(), facts)
    params = unflatten_dict(
        {tuple(name.split('/')[1:]): jnp.asarray(reader.read(name)) for name in reader.leaves() if 'params/' in name}
    )
    apply = functools.partial(model.module().apply, {'params': params})
    with jax.default_matmul_precision('highest'):
        return np.asarray(apply(**batch))


def t5_batch(seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, 96, (2, 11))
    targets = rng.integers(2, 96, (2, 6))
    inputs[1, -4:] = 0
    ours = {
        'encoder_input_tokens': jnp.asarray(inputs),
        'decoder_input_tokens': jnp.asarray(np.pad(targets[:, :-1], ((0, 0), (1, 0)))),
        'decoder_target_tokens': jnp.asarray(targets),
    }
    theirs = {
        'input_ids': torch.tensor(inputs),
        'attention_mask': torch.tensor((inputs > 0).astype(int)),
        'decoder_input_ids': torch.tensor(np.asarray(ours['decoder_input_tokens'])),
    }
    return ours, theirs


def logits_there(model, batch):
    with torch.no_grad():
        return model(**batch).logits.numpy()


@pytest.mark.parametrize('kind', T5S)
@pytest.mark.parametrize('shard', ['5GB', '20KB'])
def test_t5(kind, shard, tmp_path):
    name, more, has_head = T5S[kind]
    cls = getattr(transformers, f'{name}ForConditionalGeneration')
    model = randomize(cls(getattr(transformers, f'{name}Config')(**T5_SIZES, **more)))
    if has_head:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(96, 32, generator=torch.Generator().manual_seed(9)))
    model.save_pretrained(tmp_path / 'theirs', max_shard_size=shard)
    assert (tmp_path / 'theirs' / 'model.safetensors.index.json').exists() == (shard == '20KB')
    ours, theirs = t5_batch()
    expected = logits_there(model, theirs)
    np.testing.assert_allclose(logits_here(tmp_path / 'theirs', ours), expected, rtol=1e-4, atol=1e-4)
    imported = transfer(tmp_path / 'theirs', tmp_path / 'imported', 'upcycle', source_format='huggingface')
    np.testing.assert_allclose(logits_here(imported, ours), expected, rtol=1e-4, atol=1e-4)
    exported = transfer(imported, tmp_path / 'exported', 'huggingface')
    again = cls.from_pretrained(exported).eval()
    np.testing.assert_array_equal(logits_there(again, theirs), expected)


@pytest.mark.parametrize(
    'fields',
    [
        {'feed_forward_proj': 'gated-gelu', 'dense_act_fn': 'relu'},
        {'feed_forward_proj': 'relu', 'dense_act_fn': 'silu'},
        {'feed_forward_proj': 'gelu_new'},
        {'feed_forward_proj': 'gated-silu', 'dense_act_fn': 'gelu_pytorch_tanh'},
    ],
)
def test_activations_of_t5(fields, tmp_path):
    model = randomize(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES, **fields)))
    model.save_pretrained(tmp_path / 'theirs')
    ours, theirs = t5_batch()
    expected = logits_there(model, theirs)
    np.testing.assert_allclose(logits_here(tmp_path / 'theirs', ours), expected, rtol=1e-4, atol=1e-4)
    exported = transfer(tmp_path / 'theirs', tmp_path / 'exported', 'huggingface')
    again = transformers.T5ForConditionalGeneration.from_pretrained(exported).eval()
    # Two implementations of one approximation of GELU.
    np.testing.assert_allclose(logits_there(again, theirs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bare', [False, True])
def test_vit_in_the_names_of_transformers_5(bare, tmp_path):
    if int(transformers.__version__.split('.')[0]) < 5:
        pytest.skip('transformers 4 knows no other names')
    config = transformers.ViTConfig(**VIT_SIZES, num_labels=5)
    cls = transformers.ViTModel if bare else transformers.ViTForImageClassification
    model = randomize(cls(config))
    model.save_pretrained(tmp_path / 'old')
    model.save_pretrained(tmp_path / 'new', save_original_format=False)
    old, new = (open_checkpoint(tmp_path / kind) for kind in ('old', 'new'))
    names = [(tmp_path / kind / 'model.safetensors').read_bytes() for kind in ('old', 'new')]
    assert [b'layers.0.attention.q_proj' in name for name in names] == [False, True]
    assert old.leaves() == new.leaves()
    for name in old.leaves():
        np.testing.assert_array_equal(old.read(name), new.read(name), err_msg=name)
    exported = transfer(tmp_path / 'new', tmp_path / 'exported', 'huggingface')
    assert b'encoder.layer.0.attention.attention.query' in (tmp_path / 'exported' / 'model.safetensors').read_bytes()
    again, info = cls.from_pretrained(exported, output_loading_info=True)
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    batch = {'pixel_values': torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        expected, found = (one.eval()(**batch)[0 if not bare else 1].numpy() for one in (model, again))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('activation', ['gelu', 'gelu_new'])
@pytest.mark.parametrize('epsilon', [1e-12, 1e-2])
def test_vit(activation, epsilon, tmp_path):
    config = transformers.ViTConfig(**VIT_SIZES, num_labels=5, hidden_act=activation, layer_norm_eps=epsilon)
    model = randomize(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path / 'theirs')
    image = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    theirs = {'pixel_values': torch.tensor(image.transpose(0, 3, 1, 2))}
    expected = logits_there(model, theirs)
    np.testing.assert_allclose(logits_here(tmp_path / 'theirs', {'image': image}), expected, rtol=1e-4, atol=1e-4)
    imported = transfer(tmp_path / 'theirs', tmp_path / 'imported', 'upcycle')
    exported = transfer(imported, tmp_path / 'exported', 'huggingface')
    again = transformers.ViTForImageClassification.from_pretrained(exported).eval()
    # The token's position is added to the token, which rounds once.
    np.testing.assert_allclose(logits_there(again, theirs), expected, rtol=1e-5, atol=1e-5)
