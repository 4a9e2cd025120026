"""Decoder-only models of transformers with random weights give the same logits here, and written ones there.

These are variants without a fixture: types of RoPE, windows, biases, head sizes, routings; rows padded on either side and packed.
Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough), and is skipped without it.
"""

import pytest

from tests.checkpoints import trees
from upcycle.checkpoints import open_checkpoint
from upcycle.transfer import transfer

_WHY = 'needs `pip install upcycle[hf]`: no decoder-only layout is compared with transformers'
pytest.importorskip('torch', reason=_WHY)
pytest.importorskip('transformers', minversion='5', reason=_WHY)

from tests.checkpoints import torch_models  # noqa: E402

pytestmark = pytest.mark.exhaustive

THETA = {'rope_theta': 100.0}
LINEAR = THETA | {'rope_type': 'linear', 'factor': 3.0}
YARN = THETA | {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
LLAMA3 = THETA | {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 16}
BIASES = {'attention_bias': True}
TYPES = ['full_attention', 'sliding_attention', 'full_attention']
WINDOW = {'use_sliding_window': True, 'sliding_window': 5}
# Class and configuration, and the layout in which the model is written if its origin is forgotten.
DENSE = {
    'llama, linear': ('Llama', {'rope_parameters': LINEAR, 'tie_word_embeddings': True}, 'llama'),
    'llama, llama3': ('Llama', {'rope_parameters': LLAMA3, 'rms_norm_eps': 1e-3}, 'llama'),
    'llama, yarn': ('Llama', {'rope_parameters': YARN}, 'llama'),
    'llama, yarn, factor': ('Llama', {'rope_parameters': YARN | {'attention_factor': 1.3}}, 'llama'),
    'llama, yarn, scales': ('Llama', {'rope_parameters': YARN | {'mscale': 1.2, 'mscale_all_dim': 0.7}}, 'llama'),
    'llama, yarn, ends': (
        'Llama',
        {'rope_parameters': YARN | {'truncate': False, 'beta_fast': 5.0, 'beta_slow': 0.7}},
        'llama',
    ),
    'llama, yarn, implied': ('Llama', {'rope_parameters': YARN | {'factor': 0.5}}, 'llama'),
    'llama, gelu': ('Llama', {'hidden_act': 'gelu_pytorch_tanh', 'head_dim': 6, 'num_key_value_heads': 4}, 'llama'),
    'mistral, 3 heads': (
        'Mistral',
        {'num_attention_heads': 3, 'num_key_value_heads': 1, 'sliding_window': None},
        'mistral',
    ),
    'mistral, window': ('Mistral', {'sliding_window': 5}, 'mistral'),
    'mistral, wide window': ('Mistral', {'sliding_window': 30, 'rope_parameters': LLAMA3}, 'mistral'),
    'qwen2, last layers': ('Qwen2', WINDOW | {'max_window_layers': 2}, 'qwen2'),
    'qwen2, types': ('Qwen2', WINDOW | {'layer_types': TYPES, 'head_dim': 12, 'rope_parameters': YARN}, 'qwen2'),
    'qwen3, biases': ('Qwen3', WINDOW | BIASES | {'layer_types': TYPES, 'head_dim': 16}, 'qwen3'),
    'gemma, biases': ('Gemma', BIASES | {'head_dim': 10}, 'gemma'),
    'gemma, untied': ('Gemma', {'head_dim': 8, 'tie_word_embeddings': False, 'rope_parameters': LINEAR}, 'gemma'),
    'gemma2': (
        'Gemma2',
        {'head_dim': 12, 'sliding_window': 5, 'query_pre_attn_scalar': 24}
        | {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 5.0},
        'gemma2',
    ),
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
    'granite, biases': (
        'Granite',
        BIASES
        | {'mlp_bias': True, 'rope_parameters': LINEAR, 'attention_multiplier': 0.2, 'embedding_multiplier': 3.0}
        | {'residual_multiplier': 0.6, 'logits_scaling': 2.0},
        'granite',
    ),
    'granite without multipliers': ('Granite', {'attention_multiplier': 8**-0.5}, 'llama'),
    'jetmoe, 3 of 5': (
        'JetMoe',
        {'kv_channels': 6, 'num_local_experts': 5, 'num_experts_per_tok': 3, 'tie_word_embeddings': False}
        | {'activation_function': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-3, 'rope_parameters': YARN},
        'jetmoe',
    ),
}
TOP_2 = {'num_experts_per_tok': 2}
FOUR = TOP_2 | {'num_experts': 4}
QWEN = FOUR | {'moe_intermediate_size': 24}
SHARED = QWEN | {'shared_expert_intermediate_size': 36}
NORMALISED = {'norm_topk_prob': True}
MOE = {
    'mixtral': ('Mixtral', TOP_2 | {'num_local_experts': 4, 'sliding_window': 5}, 'mixtral'),
    'mixtral, 3 of 5 experts': (
        'Mixtral',
        {'num_local_experts': 5, 'num_experts_per_tok': 3, 'head_dim': 16, 'rope_parameters': LLAMA3},
        'mixtral',
    ),
    'qwen2_moe': ('Qwen2Moe', SHARED | NORMALISED, 'qwen2_moe'),
    'qwen2_moe, raw, some layers': (
        'Qwen2Moe',
        SHARED | {'qkv_bias': False, 'num_hidden_layers': 4, 'decoder_sparse_step': 2, 'mlp_only_layers': [3]},
        'qwen2_moe',
    ),
    'qwen3_moe': ('Qwen3Moe', QWEN | NORMALISED | {'head_dim': 12, 'rope_parameters': YARN}, 'qwen3_moe'),
    'qwen3_moe, raw, some layers': (
        'Qwen3Moe',
        QWEN | BIASES | {'num_experts': 6, 'mlp_only_layers': [0], 'head_dim': 10, 'tie_word_embeddings': True},
        'qwen3_moe',
    ),
    'olmoe': ('Olmoe', FOUR | {'clip_qkv': 1.2}, 'olmoe'),
    'olmoe, normalised': ('Olmoe', FOUR | NORMALISED | BIASES, 'olmoe'),
    'flex_olmo': ('FlexOlmo', FOUR, 'flex_olmo'),
    'flex_olmo, normalised': ('FlexOlmo', FOUR | NORMALISED | {'tie_word_embeddings': True}, 'flex_olmo'),
    'granitemoe': (
        'GraniteMoe',
        TOP_2
        | BIASES
        | {'num_local_experts': 4, 'embedding_multiplier': 3.0, 'logits_scaling': 2.0, 'rope_parameters': LINEAR}
        | {'residual_multiplier': 0.6, 'attention_multiplier': 0.2},
        'granitemoe',
    ),
    'jetmoe': (
        'JetMoe',
        TOP_2 | {'num_local_experts': 4, 'kv_channels': 10, 'rms_norm_eps': 1e-3, 'tie_word_embeddings': False},
        'jetmoe',
    ),
    'jetmoe, 3 of 5 experts': (
        'JetMoe',
        {'num_local_experts': 5, 'num_experts_per_tok': 3, 'kv_channels': 8, 'rope_parameters': LINEAR},
        'jetmoe',
    ),
}
CASES = DENSE | MOE


@pytest.mark.parametrize('case', CASES)
def test_here_and_there(case, tmp_path):
    name, fields, layout = CASES[case]
    folder = tmp_path / 'theirs'
    torch_models.make_with_margin(name, **fields).save_pretrained(folder)
    model = torch_models.load(folder)
    tokens = torch_models.tokens_of(model)
    expected = torch_models.theirs(model, tokens)
    torch_models.assert_equal_logits(torch_models.ours(folder, tokens), expected)
    reader = open_checkpoint(folder)
    tree = {leaf: reader.read(leaf) for leaf in reader.leaves()}

    def check(written, layout):
        again = open_checkpoint(written)
        assert again.metadata['model_type'] == layout
        # vLLM's Qwen2-MoE always has biases.
        added = {leaf: again.read(leaf) for leaf in again.leaves().keys() - tree.keys()}
        assert not added or (layout, fields.get('qkv_bias')) == ('qwen2_moe', False)
        assert not any(value.any() for value in added.values())
        trees.assert_same(again, tree | added)
        torch_models.assert_equal_logits(torch_models.theirs(torch_models.load(written), tokens), expected, atol=1e-5)

    # Written by us it is the same model, from either spelling of its configuration.
    check(transfer(folder, tmp_path / 'again', 'huggingface'), model.config.model_type)
    torch_models.to_hub_spelling(folder)
    check(transfer(folder, tmp_path / 'from the hub', 'huggingface'), model.config.model_type)
    least = trees.write(tmp_path / 'least', 'huggingface', tree, {**reader.metadata, 'model_type': 'another'})
    check(least, layout)
