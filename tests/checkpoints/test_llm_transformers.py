"""Decoder-only models of transformers with random weights give the same logits here, and written ones there.

These are variants without a fixture: types of RoPE, windows, biases, head sizes. Needs PyTorch, as `test_transformers` does.
"""

import jax
import numpy as np
import pytest

import upcycle
from tests.checkpoints import trees
from tests.moe.quick import jit
from upcycle.checkpoints import open_checkpoint

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
if int(transformers.__version__.split('.')[0]) < 5:
    pytest.skip('the configurations are in the spelling of transformers 5', allow_module_level=True)

LENGTH = 21
SIZES = {
    'vocab_size': 96,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
}
THETA = {'rope_theta': 100.0}
LINEAR = THETA | {'rope_type': 'linear', 'factor': 3.0}
YARN = THETA | {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
LLAMA3 = THETA | {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 16}
BIASES = {'attention_bias': True}
TYPES = ['full_attention', 'sliding_attention', 'full_attention']
WINDOW = {'use_sliding_window': True, 'sliding_window': 5}
# Class and configuration, and the layout in which the model is written if its origin is forgotten.
CASES = {
    'llama, linear': ('Llama', {'rope_parameters': LINEAR, 'tie_word_embeddings': True}, 'llama'),
    'llama, yarn': ('Llama', {'rope_parameters': YARN}, 'llama'),
    'llama, gelu': ('Llama', {'hidden_act': 'gelu_pytorch_tanh', 'head_dim': 6, 'num_key_value_heads': 4}, 'llama'),
    'mistral, 3 heads': (
        'Mistral',
        {'num_attention_heads': 3, 'num_key_value_heads': 1, 'sliding_window': None},
        'mistral',
    ),
    'mistral, wide window': ('Mistral', {'sliding_window': 30, 'rope_parameters': LLAMA3}, 'mistral'),
    'qwen2, last layers': ('Qwen2', WINDOW | {'max_window_layers': 2}, 'qwen2'),
    'qwen2, types': ('Qwen2', WINDOW | {'layer_types': TYPES, 'head_dim': 12, 'rope_parameters': YARN}, 'qwen2'),
    'qwen3, biases': ('Qwen3', WINDOW | BIASES | {'layer_types': TYPES, 'head_dim': 16}, 'qwen3'),
    'gemma, biases': ('Gemma', BIASES | {'head_dim': 10}, 'gemma'),
    'gemma, untied': ('Gemma', {'head_dim': 8, 'tie_word_embeddings': False, 'rope_parameters': LINEAR}, 'gemma'),
    'gemma2, no caps': (
        'Gemma2',
        {'head_dim': 8, 'attn_logit_softcapping': None, 'final_logit_softcapping': None, 'sliding_window': 5},
        'gemma2',
    ),
    'gemma2, no windows': ('Gemma2', BIASES | {'head_dim': 8, 'layer_types': ['full_attention'] * 3}, 'gemma2'),
    'gemma3': (
        'Gemma3Text',
        {'head_dim': 8, 'final_logit_softcapping': 3.0, 'sliding_window': 5, 'layer_types': TYPES}
        | {
            'rope_parameters': {
                'full_attention': YARN,
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 9.0},
            }
        },
        'gemma3_text',
    ),
    'gemma3, no windows': ('Gemma3Text', {'head_dim': 8, 'layer_types': ['full_attention'] * 3}, 'gemma3_text'),
    'smollm3, windows': ('SmolLM3', WINDOW | BIASES | {'no_rope_layer_interval': 3, 'mlp_bias': False}, 'smollm3'),
    'smollm3, types': ('SmolLM3', WINDOW | {'layer_types': TYPES, 'no_rope_layers': [1, 1, 1]}, 'smollm3'),
    'smollm3 without options': ('SmolLM3', {'no_rope_layers': [1, 1, 1]}, 'llama'),
    'olmo2, biases': ('Olmo2', BIASES | {'rope_parameters': YARN | {'beta_fast': 4.0, 'beta_slow': 0.5}}, 'olmo2'),
    'phi3, window': ('Phi3', {'sliding_window': 6}, 'mistral'),
    'phi3, half': ('Phi3', {'rope_parameters': THETA | {'partial_rotary_factor': 0.5}, 'sliding_window': 6}, 'phi3'),
    'granite, biases': ('Granite', BIASES | {'attention_multiplier': 0.2, 'rope_parameters': LINEAR}, 'granite'),
    'granite without multipliers': ('Granite', {'attention_multiplier': 8**-0.5}, 'llama'),
}
YARNS = {
    'factor': {'attention_factor': 1.3},
    'scales': {'mscale': 1.2, 'mscale_all_dim': 0.7},
    'ends': {'truncate': False, 'beta_fast': 5.0, 'beta_slow': 0.7},
    'implied': {'factor': 0.5},
}


@pytest.fixture(scope='module')
def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, LENGTH))


def made(name, fields):
    """A model with random parameters, none of them zero."""
    config = getattr(transformers, f'{name}Config')(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 and parameter.mean() == 1 else 0.2 * noise)
    return model.eval()


def there(folder, tokens):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation='eager', output_loading_info=True, dtype='float32'
    )
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    return run(model.eval(), tokens)


def run(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def here(folder, tokens):
    model, params = upcycle.load(folder)
    with jax.default_matmul_precision('highest'):
        return np.asarray(jit(model.logits)(params, {'tokens': tokens.astype(np.int32)}))


def written(folder, target, **metadata):
    """Writes a folder again, with changed metadata."""
    reader = open_checkpoint(folder)
    tree = {leaf: reader.read(leaf) for leaf in reader.leaves()}
    return trees.write(target, 'huggingface', tree, {**reader.metadata, **metadata})


def read_and_write(model, folder, tokens, layout):
    model.save_pretrained(folder / 'theirs')
    expected = run(model, tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(here(folder / 'theirs', tokens), expected, rtol=0, atol=1e-4)
    again = written(folder / 'theirs', folder / 'again')
    np.testing.assert_array_equal(there(again, tokens), expected)
    least = written(folder / 'theirs', folder / 'least', model_type='another')
    assert open_checkpoint(least).metadata['model_type'] == layout
    np.testing.assert_allclose(there(least, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_here_and_there(case, tokens, tmp_path):
    name, fields, layout = CASES[case]
    read_and_write(made(name, fields), tmp_path, tokens, layout)


@pytest.mark.exhaustive
@pytest.mark.parametrize('case', YARNS)
def test_yarn(case, tokens, tmp_path):
    read_and_write(made('Llama', {'rope_parameters': YARN | YARNS[case]}), tmp_path, tokens, 'llama')
