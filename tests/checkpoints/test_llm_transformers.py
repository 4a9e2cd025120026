"""Random decoder-only models of transformers compute the same here, and written by us again there.

Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough), and is skipped without it.
"""

import json

import numpy as np
import pytest

from upcycle.transfer import transfer

_WHY = 'needs `pip install upcycle[hf]`: no decoder-only layout is compared with transformers'
pytest.importorskip('torch', reason=_WHY)
pytest.importorskip('transformers', reason=_WHY)

from tests.checkpoints import torch_models  # noqa: E402

pytestmark = pytest.mark.exhaustive


def rope(kind, **fields):
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': 10000.0, **fields}}


FULL, SLIDING = 'full_attention', 'sliding_attention'
DENSE = {
    'llama': ('Llama', {}),
    'llama, tied, biases': (
        'Llama',
        {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True, 'head_dim': 12, 'rms_norm_eps': 1e-3},
    ),
    'llama, linear': ('Llama', rope('linear', factor=4.0)),
    'llama, llama3': (
        'Llama',
        rope('llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    'llama, yarn': ('Llama', rope('yarn', factor=4.0, original_max_position_embeddings=16)),
    'llama, yarn of other ends': (
        'Llama',
        rope('yarn', factor=8.0, original_max_position_embeddings=24, beta_fast=8.0, beta_slow=0.5, truncate=False),
    ),
    'llama, yarn with a factor of attention': (
        'Llama',
        rope('yarn', factor=4.0, original_max_position_embeddings=16, attention_factor=1.4),
    ),
    'llama, yarn with mscale': (
        'Llama',
        rope('yarn', factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3),
    ),
    'mistral': ('Mistral', {'sliding_window': None, 'head_dim': 16}),
    'mistral, window': ('Mistral', {'sliding_window': 5}),
    'qwen2': ('Qwen2', {'tie_word_embeddings': True}),
    'qwen2, windows': (
        'Qwen2',
        {'use_sliding_window': True, 'sliding_window': 5, 'num_hidden_layers': 3, 'max_window_layers': 1},
    ),
    'qwen2, yarn': ('Qwen2', rope('yarn', factor=4.0, original_max_position_embeddings=16)),
    'qwen3': ('Qwen3', {'head_dim': 16}),
    'qwen3, biases, windows': (
        'Qwen3',
        {'attention_bias': True, 'head_dim': 10, 'use_sliding_window': True, 'sliding_window': 5}
        | {'layer_types': [SLIDING, FULL]},
    ),
    'gemma': ('Gemma', {'head_dim': 16, 'num_key_value_heads': 1}),
    'gemma2': (
        'Gemma2',
        {'head_dim': 12, 'sliding_window': 5, 'query_pre_attn_scalar': 24}
        | {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 5.0},
    ),
    'gemma3': (
        'Gemma3',
        {'head_dim': 12, 'sliding_window': 5, 'query_pre_attn_scalar': 24, 'num_hidden_layers': 3}
        | {'layer_types': [SLIDING, FULL, SLIDING]}
        | {
            'rope_parameters': {
                FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
                SLIDING: {'rope_type': 'default', 'rope_theta': 1e4},
            }
        },
    ),
    'smollm3': ('SmolLM3', {'no_rope_layers': [1, 0, 1], 'num_hidden_layers': 3}),
    'smollm3, windows': (
        'SmolLM3',
        {'no_rope_layers': [1, 0], 'use_sliding_window': True, 'sliding_window': 5, 'layer_types': [SLIDING, FULL]},
    ),
    'olmo2': ('Olmo2', {'attention_bias': True}),
    'phi3': ('Phi3', {'sliding_window': 5}),
    'phi3, partial': (
        'Phi3',
        {'hidden_size': 48, 'num_attention_heads': 6, **rope('default', partial_rotary_factor=0.75)},
    ),
    'granite': (
        'Granite',
        {'embedding_multiplier': 3.0, 'logits_scaling': 2.0, 'residual_multiplier': 0.6, 'attention_multiplier': 0.2}
        | {'attention_bias': True, 'mlp_bias': True},
    ),
}
EXPERTS = {'num_experts_per_tok': 2}
MOE = {
    'mixtral': ('Mixtral', {'num_local_experts': 4, 'sliding_window': 5}),
    'mixtral, 5 experts, 3 chosen': ('Mixtral', {'num_local_experts': 5, 'num_experts_per_tok': 3, 'head_dim': 16}),
    'qwen2_moe': (
        'Qwen2Moe',
        {'num_experts': 4, 'moe_intermediate_size': 24, 'shared_expert_intermediate_size': 36, 'norm_topk_prob': True},
    ),
    'qwen2_moe, raw, some layers': (
        'Qwen2Moe',
        {'num_experts': 4, 'moe_intermediate_size': 24, 'shared_expert_intermediate_size': 36, 'qkv_bias': False}
        | {'num_hidden_layers': 4, 'decoder_sparse_step': 2, 'mlp_only_layers': [3]},
    ),
    'qwen3_moe': ('Qwen3Moe', {'num_experts': 4, 'moe_intermediate_size': 24, 'norm_topk_prob': True, 'head_dim': 12}),
    'qwen3_moe, raw, biases, a dense layer': (
        'Qwen3Moe',
        {'num_experts': 6, 'moe_intermediate_size': 24, 'attention_bias': True, 'mlp_only_layers': [0], 'head_dim': 10},
    ),
    'olmoe': ('Olmoe', {'num_experts': 4, 'clip_qkv': 1.2}),
    'olmoe, normalised': ('Olmoe', {'num_experts': 4, 'norm_topk_prob': True, 'attention_bias': True}),
    'flex_olmo': ('FlexOlmo', {'num_experts': 4}),
    'flex_olmo, normalised': ('FlexOlmo', {'num_experts': 4, 'norm_topk_prob': True}),
    'granitemoe': (
        'GraniteMoe',
        {'num_local_experts': 4, 'attention_bias': True, 'embedding_multiplier': 3.0, 'logits_scaling': 2.0}
        | {'residual_multiplier': 0.6, 'attention_multiplier': 0.2},
    ),
}
MOE = {name: (kind, EXPERTS | fields) for name, (kind, fields) in MOE.items()}
CASES = DENSE | MOE


def folder_of(name, tmp_path):
    kind, fields = CASES[name]
    model = torch_models.make_with_margin(kind, **fields)
    model.save_pretrained(tmp_path / 'theirs')
    return model, tmp_path / 'theirs'


@pytest.mark.parametrize('name', CASES)
def test_a_folder_of_transformers(name, tmp_path):
    model, folder = folder_of(name, tmp_path)
    tokens = torch_models.tokens_of(model)
    expected = torch_models.theirs(model, tokens)
    torch_models.assert_equal_logits(torch_models.ours(folder, tokens), expected)
    # Written by us it is the same model, from either spelling of its configuration.
    for spelling in ('transformers 5', 'hub'):
        if spelling == 'hub':
            torch_models.to_hub_spelling(folder)
        written = transfer(folder, tmp_path / spelling, 'huggingface')
        again = torch_models.theirs(torch_models.load(written), tokens)
        for inputs in torch_models.INPUTS:
            np.testing.assert_array_equal(again[inputs], expected[inputs])
        assert json.loads((tmp_path / spelling / 'config.json').read_text())['model_type'] == model.config.model_type
