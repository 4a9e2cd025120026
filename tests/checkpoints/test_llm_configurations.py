"""Random configurations of all decoder-only layouts, as transformers writes them: sizes, heads, windows, shards, dtypes.

Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough), and is skipped without it.
"""

import json

import numpy as np
import pytest

from upcycle.checkpoints import open_checkpoint
from upcycle.transfer import transfer

_WHY = 'needs `pip install upcycle[hf]`: no random configuration is compared with transformers'
torch = pytest.importorskip('torch', reason=_WHY)
pytest.importorskip('transformers', minversion='5', reason=_WHY)

from tests.checkpoints import torch_models  # noqa: E402

pytestmark = pytest.mark.exhaustive

DENSE = ('Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma', 'Gemma2', 'Gemma3Text', 'SmolLM3', 'Olmo2', 'Phi3', 'Granite')
MOE = ('Mixtral', 'Qwen2Moe', 'Qwen3Moe', 'Olmoe', 'FlexOlmo', 'GraniteMoe', 'JetMoe')
KINDS = DENSE + MOE
# Classes whose heads may have any width.
ANY_HEAD = {'Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma', 'Gemma2', 'Gemma3Text', 'Mixtral', 'Qwen3Moe'}
WITH_BIASES = {'Llama', 'Qwen3', 'Gemma', 'SmolLM3', 'Olmo2', 'Granite', 'Qwen3Moe', 'Olmoe', 'FlexOlmo', 'GraniteMoe'}
FULL, SLIDING = 'full_attention', 'sliding_attention'


def draw(rng, *values):
    return values[rng.integers(len(values))]


def rope(kind, rng):
    """Random rotary positions that the class has."""
    theta = draw(rng, 50.0, 1e4, 5e5)
    original = {'original_max_position_embeddings': draw(rng, 8, 16, 32)}
    factor = {'factor': draw(rng, 1.5, 4.0, 8.0)}
    scalings = [
        {'rope_type': 'default'},
        {'rope_type': 'linear', **factor},
        {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': draw(rng, 2.0, 4.0), **factor, **original},
        {'rope_type': 'yarn', **factor, **original},
    ]
    if kind == 'Phi3':
        return {'rope_type': 'default', 'rope_theta': theta, 'partial_rotary_factor': draw(rng, 1.0, 0.5)}
    chosen = {**draw(rng, *scalings), 'rope_theta': theta}
    return {FULL: chosen, SLIDING: {'rope_type': 'default', 'rope_theta': 9.0}} if kind == 'Gemma3Text' else chosen


def own(kind, rng, depth):
    """Random fields of one class."""
    types = {'layer_types': [draw(rng, FULL, SLIDING) for _ in range(depth)]}
    window = draw(rng, 3, 7, 40)
    experts = int(rng.integers(2, 7))
    # Trained here, one expert with a weight of 1 is refused.
    routing = {'num_experts_per_tok': int(rng.integers(2, experts + 1))}
    raw = {'norm_topk_prob': draw(rng, True, False)}
    multipliers = {'embedding_multiplier': 3.0, 'residual_multiplier': 0.6, 'attention_multiplier': 0.2}
    multipliers |= {'logits_scaling': draw(rng, 0.5, 2.0)}
    sparse = {'moe_intermediate_size': draw(rng, 10, 27), 'decoder_sparse_step': draw(rng, 1, 2)}
    sparse |= {'mlp_only_layers': draw(rng, [], [0])} if depth > 2 else {'decoder_sparse_step': 1}
    sliding = {'use_sliding_window': True, 'sliding_window': window}
    caps = {'final_logit_softcapping': draw(rng, None, 5.0)}
    gemma = {'sliding_window': window, 'query_pre_attn_scalar': draw(rng, 8, 30), **types, **caps}
    return {
        'Llama': {'mlp_bias': draw(rng, True, False), 'hidden_act': draw(rng, 'silu', 'gelu_pytorch_tanh', 'relu')},
        'Mistral': {'sliding_window': draw(rng, None, window)},
        'Qwen2': draw(rng, {}, {**sliding, **types}, {**sliding, 'max_window_layers': 1}),
        'Qwen3': draw(rng, {}, {**sliding, **types}),
        'Gemma': {},
        'Gemma2': {**gemma, 'attn_logit_softcapping': draw(rng, None, 2.0)},
        'Gemma3Text': gemma,
        'SmolLM3': {'no_rope_layers': [draw(rng, 0, 1) for _ in range(depth)], **draw(rng, {}, {**sliding, **types})},
        'Olmo2': {},
        'Phi3': {'sliding_window': draw(rng, None, window)},
        'Granite': {**multipliers, 'mlp_bias': draw(rng, True, False)},
        'Mixtral': {'num_local_experts': experts, 'sliding_window': draw(rng, None, window), **routing},
        'Qwen2Moe': {'num_experts': experts, 'shared_expert_intermediate_size': 13, **sparse, **routing, **raw},
        'Qwen3Moe': {'num_experts': experts, **sparse, **routing, **raw},
        'Olmoe': {'num_experts': experts, 'clip_qkv': draw(rng, None, 1.3), **routing, **raw},
        'FlexOlmo': {'num_experts': experts, **routing, **raw},
        'GraniteMoe': {'num_local_experts': experts, **multipliers, **routing},
        'JetMoe': {'num_local_experts': experts, 'kv_channels': draw(rng, 4, 10), **routing},
    }[kind]


def configuration(seed):
    """A class and a random configuration."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    kv_heads = draw(rng, 1, 2, 3)
    heads, depth = kv_heads * draw(rng, 1, 2, 3), draw(rng, 1, 2, 3)
    return kind, {
        'vocab_size': draw(rng, 61, 97, 130),
        'hidden_size': heads * draw(rng, 4, 6, 8),
        'intermediate_size': draw(rng, 17, 33, 50),
        'num_hidden_layers': depth,
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'tie_word_embeddings': draw(rng, True, False),
        'rms_norm_eps': draw(rng, 1e-6, 1e-5, 1e-3),
        'rope_parameters': rope(kind, rng),
        **({'head_dim': draw(rng, 4, 6, 10, 16)} if kind in ANY_HEAD else {}),
        **({'attention_bias': draw(rng, True, False)} if kind in WITH_BIASES else {}),
        **own(kind, rng, depth),
    }


@pytest.mark.parametrize('seed', range(2 * len(KINDS)))
def test_a_random_configuration(seed, tmp_path):
    kind, fields = configuration(seed)
    rng = np.random.default_rng([seed, 1])
    dtype = draw(rng, torch.float32, torch.bfloat16, torch.float16)
    shard, is_hub = draw(rng, '5GB', '10KB'), draw(rng, True, False)
    folder = tmp_path / 'theirs'
    model = torch_models.make(kind, dtype=dtype, **fields)
    model.save_pretrained(folder, max_shard_size=shard)
    if is_hub:
        torch_models.to_hub_spelling(folder)
    model = torch_models.load(folder)
    tokens = torch_models.tokens_with_margin(model)
    expected = torch_models.theirs(model, tokens)
    assert expected['plain'].std() > 0.05
    torch_models.assert_equal_logits(torch_models.ours(folder, tokens), expected)
    again = transfer(folder, tmp_path / 'again', 'huggingface')
    assert open_checkpoint(again).metadata['model_type'] == model.config.model_type
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['torch_dtype'] == str(dtype).split('.')[-1]
    torch_models.assert_equal_logits(torch_models.theirs(torch_models.load(again), tokens), expected, atol=1e-5)
