"""Decoder-only folders that cannot be read or written: one sentence that names the file, and the field or tensor."""

import json

import numpy as np
import pytest

from tests.checkpoints import llms, trees
from tests.fixtures import requires_fixtures
from upcycle import cli
from upcycle.checkpoints import create_checkpoint, hf, open_checkpoint, safetensors
from upcycle.checkpoints.hf.decoder_only import facts
from upcycle.errors import UserError

pytestmark = requires_fixtures

EMBEDDING, HEAD, DOWN = 'model.embed_tokens.weight', 'lm_head.weight', 'model.layers.1.mlp.down_proj.weight'
LINEAR = {'rope_type': 'linear', 'factor': 2.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
SLIDING = ['sliding_attention', 'full_attention', 'sliding_attention']

# Folder, fields of config_legacy.json, message.
FIELDS = {
    'unknown': (
        'llama',
        {'rope_ratio': 2, 'qk_layernorm': True},
        'unknown fields .*: rope_ratio = 2, qk_layernorm = True',
    ),
    'quantised': (
        'llama',
        {'quantization_config': {'quant_method': 'gptq'}},
        'has quantization_config, so the model is',
    ),
    'activation': ('llama', {'hidden_act': 'gelu'}, "hidden_act is 'gelu': it must be one of silu"),
    'heads': ('llama', {'num_key_value_heads': 3}, 'num_attention_heads is 4: it must be a multiple'),
    'type': ('llama', {'rms_norm_eps': 0}, 'rms_norm_eps is 0: it must be a number above 0'),
    'null': ('llama', {'rms_norm_eps': None}, 'rms_norm_eps is null: set it, or remove it if it is 1e-06, the default'),
    'null multiplier': ('granite', {'attention_multiplier': None}, 'attention_multiplier is null: set it, or remove'),
    'null of experts': ('granitemoe', {'num_local_experts': None}, 'num_local_experts is null: set it, or remove it'),
    'null heads': ('jetmoe', {'num_key_value_heads': None}, 'num_key_value_heads is null: set it'),
    'odd heads': ('llama', {'head_dim': 7}, 'head_dim, is 7: RoPE needs an even number'),
    'dictionary': (
        'llama',
        {'rope_scaling': [1]},
        r'rope_scaling is .*: it must be a dictionary .a string: any value.\.$',
    ),
    'frequencies': (
        'llama',
        {'rope_scaling': LLAMA3 | {'low_freq_factor': 4.0}},
        'high_freq_factor of rope_scaling is 4.0: it must be above low_freq_factor, 4.0',
    ),
    'type of gemma3': (
        'gemma3_text',
        {'rope_scaling': {'type': 'linear', 'factor': 3.0}},
        'type of rope_scaling is ignored for Gemma 3 by transformers 5: name it rope_type',
    ),
    'layers': ('llama', {'num_hidden_layers': 4}, 'num_hidden_layers is 4, but the arrays have 3'),
    'width': (
        'llama',
        {'intermediate_size': 64},
        r'down_proj.weight .*\[40, 80\], but .* asks for \[40, 64\] \(intermediate_size = 64\)',
    ),
    'head_dim': (
        'llama',
        {'head_dim': 12},
        r'k_proj.weight .*asks for \[24, 40\] \(num_key_value_heads \* head_dim = 24\)',
    ),
    'vocabulary': ('llama', {'vocab_size': 127}, r'lm_head.weight .*\(vocab_size = 127\)'),
    'biases': ('llama', {'attention_bias': True}, r'has no model.layers.0.self_attn.q_proj.bias and 11 more'),
    'no biases': (
        'llama_bias',
        {'mlp_bias': False},
        r'unknown arrays: model.layers.\*.mlp.down_proj.bias \(3 of them\)',
    ),
    'biases elsewhere': (
        'mistral_window',
        {'attention_bias': True},
        'attention_bias is True: our Mistral supports False',
    ),
    'qwen2 without': ('qwen2', {'attention_bias': False}, 'unknown fields .*: attention_bias = False'),
    'longrope': ('llama', {'rope_scaling': {'type': 'longrope', 'long_factor': [1.0]}}, "rope_type .* is 'longrope'"),
    'dynamic': ('qwen2', {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type .* is 'dynamic': our qwen2"),
    'yarn of phi3': ('phi3', {'rope_scaling': YARN}, "rope_type of rope_scaling is 'yarn': our phi3 supports default"),
    'no factor': ('llama', {'rope_scaling': {'type': 'linear'}}, 'has the rope_type linear but no factor'),
    'two types': ('llama', {'rope_scaling': LINEAR | {'type': 'yarn'}}, 'type and rope_type of rope_scaling are names'),
    'unknown in scaling': (
        'llama',
        {'rope_scaling': LINEAR | {'mrope_section': [1]}},
        'the unknown field mrope_section',
    ),
    'not a number': ('llama', {'rope_scaling': LINEAR | {'factor': 'x'}}, "factor of rope_scaling is 'x': it must be"),
    'two thetas': (
        'llama',
        {'rope_parameters': {'rope_theta': 5.0}},
        'rope_theta is 10000.0, and 5.0 in rope_parameters',
    ),
    'two scalings': (
        'llama',
        {'rope_scaling': LINEAR, 'rope_parameters': {'rope_type': 'default'}},
        'rope_scaling and rope_parameters are names of the same field',
    ),
    'partial': ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5: our llama supports 1.0 only'),
    'odd': ('phi3', {'partial_rotary_factor': 0.5}, 'RoPE turns 5 of the 10 dimensions'),
    'interleaved': ('llama', {'rope_interleaved': True}, 'rope_interleaved is True: our Llama supports False only'),
    'window of a llama': ('llama', {'sliding_window': 7}, 'unknown fields .*: sliding_window = 7'),
    'types of mistral': ('mistral_window', {'layer_types': SLIDING}, 'layer_types differs from sliding_window = 7'),
    'no window': (
        'qwen2',
        {'layer_types': SLIDING},
        'sliding_attention is the type of layer 0, but there is no sliding_',
    ),
    'chunked': ('qwen3', {'layer_types': ['chunked_attention'] * 3}, "layer_types has 'chunked_attention'"),
    'count of types': ('qwen3', {'layer_types': SLIDING[:2]}, 'layer_types has 2 entries, but num_hidden_layers is 3'),
    'nope': ('smollm3', {'no_rope_layers': [1, 0]}, 'no_rope_layers has 2 entries, but num_hidden_layers is 4'),
    'bidirectional': ('gemma3_text', {'use_bidirectional_attention': True}, 'use_bidirectional_attention is True'),
    'soft cap': ('gemma3_text', {'attn_logit_softcapping': 5.0}, 'attn_logit_softcapping is 5.0: not supported'),
    'pattern': ('gemma3_text', {'layer_types': None, '_sliding_window_pattern': 2}, '_sliding_window_pattern is not 6'),
    'flat': (
        'gemma3_text',
        {'rope_parameters': {'rope_theta': 1e6}},
        'rope_parameters must have only full_attention and sliding_attention',
    ),
    'dynamic of gemma3': (
        'gemma3_text',
        {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}},
        "rope_type of rope_scaling is 'dynamic': our gemma3_text supports default, linear, llama3, yarn only",
    ),
    'scaling of windows': (
        'gemma3_text',
        {'rope_scaling': None, 'rope_parameters': {'sliding_attention': LINEAR}},
        "rope_type of sliding_attention of rope_parameters is 'linear': our gemma3_text supports default only",
    ),
    'id of an end': (
        'llama',
        {'eos_token_id': '2'},
        "eos_token_id is '2': it must be a whole number or a list, each item",
    ),
    'ids of ends': ('llama', {'eos_token_id': [2, [3]]}, r'eos_token_id is \[2, \[3\]\]: it must be a whole number or'),
    'id of a beginning': ('mixtral', {'bos_token_id': {}}, 'bos_token_id is {}: it must be a whole number'),
    'id of padding': ('llama', {'pad_token_id': 0.5}, 'pad_token_id is 0.5: it must be a whole number'),
    'range': ('llama', {'initializer_range': 'x'}, "initializer_range is 'x': it must be a number"),
    'dropout': ('qwen3', {'attention_dropout': [0]}, r'attention_dropout is \[0\]: it must be a number'),
    'balance': ('mixtral', {'router_aux_loss_coef': 'x'}, "router_aux_loss_coef is 'x': it must be a number"),
    'jitter': ('mixtral', {'router_jitter_noise': True}, 'router_jitter_noise is True: it must be a number'),
    'activations': ('gemma2', {'hidden_act': 'silu'}, 'hidden_act is silu and hidden_activation is gelu_pytorch_tanh'),
}


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('case', FIELDS)
def test_a_field(case, tmp_path):
    name, fields, message = FIELDS[case]
    refused(llms.copy(name, tmp_path / 'x', file='config_legacy.json', **fields), message)


@pytest.mark.parametrize('field', ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads'])
def test_a_missing_size(field, tmp_path):
    refused(llms.copy('llama', tmp_path / 'x', without=(field,)), f"lacks the field '{field}'")


@pytest.mark.parametrize('name', ['gpt2', 'gpt_neox', 'gpt_oss', 'deepseek_v2', 'deepseek_v3'])
def test_another_family(name):
    refused(
        llms.FOLDERS / name, f'has the model_type {name}: only T5, ViT, Llama, Mistral, .* and .* models can be read'
    )


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


TENSORS = {
    'missing': ('llama', without(DOWN), f'has no {DOWN}, which config.json asks for'),
    'several missing': ('llama', without(DOWN, EMBEDDING), f'has no {EMBEDDING} and 1 more'),
    'no head': (
        'llama',
        without(HEAD),
        f'has no {HEAD}, .* copy the checkpoint again, or set tie_word_embeddings to true',
    ),
    'extra': ('llama', lambda t: {**t, 'score.weight': t[HEAD]}, 'unknown arrays: score.weight'),
    'part of another': ('llama', lambda t: {f'x.{key}': t[key] for key in t}, r"names of 30 arrays begin with 'x\.'"),
    'adapter': ('llama', lambda t: {**t, 'model.layers.0.mlp.up_proj.lora_A.weight': t[HEAD]}, 'adapter .*not merged'),
    'transposed': (
        'llama',
        changed(DOWN, np.transpose),
        rf'{DOWN} of .*\[80, 40\], but config.json asks for \[40, 80\]',
    ),
    'flat': ('llama', changed(DOWN, np.ravel), rf'{DOWN} of .*\[3200\], but'),
    'a number': ('llama', changed(DOWN, lambda x: x[0, 0]), rf'{DOWN} of .*\[\], but'),
    'a number as norm': ('llama', changed('model.norm.weight', lambda x: x[0]), r'model.norm.weight of .*\[\], but'),
    'fused': (
        'phi3',
        changed('model.layers.0.self_attn.qkv_proj.weight', lambda x: x[:-1]),
        r'qkv_proj.weight of .* has the wrong shape \[79, 40\] \(it must be \[80, 40\]\)',
    ),
    'whole numbers': (
        'llama',
        changed(DOWN, lambda x: x.astype(np.int8)),
        f'{DOWN} of .* type int8, as in a quantised',
    ),
    'other tied head': (
        'qwen3',
        lambda t: {**t, HEAD: t[EMBEDDING][:9]},
        rf'{HEAD} of .*\[9, 40\], but config.json asks',
    ),
}


@pytest.mark.parametrize('case', TENSORS)
def test_a_tensor(case, tmp_path):
    name, change, message = TENSORS[case]
    refused(llms.copy(name, tmp_path / 'x', change=change), message)


def test_an_index_that_lies_and_a_truncated_shard(tmp_path):
    folder = llms.copy('llama', tmp_path / 'x')
    shard, index = folder / 'model-00001-of-00001.safetensors', folder / safetensors.INDEX
    (folder / safetensors.SINGLE).rename(shard)
    names = list(llms.tensors_of(llms.FOLDERS / 'llama'))
    index.write_text(json.dumps({'weight_map': {}}))
    refused(folder, f'has no {EMBEDDING} and 29 more')
    index.write_text(json.dumps({'weight_map': dict.fromkeys(names[:-1], shard.name)}))
    refused(folder, f'holds {names[-1]}, which the index does not place there')
    index.write_text(json.dumps({'weight_map': dict.fromkeys([*names, 'x'], shard.name)}))
    refused(folder, 'does not hold x')
    index.write_text(json.dumps({'weight_map': dict.fromkeys(names, shard.name)}))
    open_checkpoint(folder)
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-9])
    refused(folder, 'ends at byte .* copy the checkpoint again')


@pytest.mark.parametrize('name', [EMBEDDING, DOWN])
def test_nan(name, tmp_path):
    def damaged(tensor):
        return np.where(np.arange(tensor.size).reshape(tensor.shape) == 7, np.float32('nan'), tensor)

    folder = llms.copy('llama', tmp_path / 'x', change=changed(name, damaged))
    ours = 'token_embedder/embedding' if name == EMBEDDING else 'decoder/layers_1/mlp/wo/kernel'
    options = ['--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=2', '--format=huggingface']
    with pytest.raises(UserError, match=f'{ours} .*not finite|{ours} .*NaN'):
        cli.run(['convert', f'--from={folder}', f'--to={tmp_path / "out"}', *options])
    assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.parametrize('name', ['generation_config.json', 'tokenizer.json', 'LICENSE'])
def test_a_damaged_companion(name, tmp_path):
    folder = llms.copy('llama', tmp_path / 'x')
    if name == 'LICENSE':
        (folder / name).mkdir()
    else:
        (folder / name).write_text('{"a')
    options = ['--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=2', '--format=huggingface']
    with pytest.raises(UserError, match=f'{name} is (damaged|not a file)'):
        cli.run(['convert', f'--from={folder}', f'--to={tmp_path / "out"}', *options])
    assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.parametrize('ids', ['2', [2, None], {'a': 1}, True])
def test_ids_of_generation(ids, tmp_path):
    folder = llms.copy('llama', tmp_path / 'x')
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
    for command in (
        ['export', f'--to={tmp_path / "out"}', '--format=huggingface'],
        ['generate', '--tokenizer=bytes', '--prompt=a'],
    ):
        with pytest.raises(UserError, match='generation_config.json: eos_token_id is .*: it must be a whole number or'):
            cli.run([command[0], f'--from={folder}', *command[1:]])
    assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_an_adapter_without_its_model(tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{}')
    llms.write(tmp_path, {'base_model.model.x.lora_A.weight': np.ones((2, 2), np.float32)})
    (tmp_path / safetensors.SINGLE).rename(tmp_path / 'adapter_model.safetensors')
    refused(tmp_path, 'is an adapter and not a model')


# Folder, changes of its facts, the layout that stores them (None: no layout), message.
LAYOUTS = {
    'a window': ('llama', {'window': 9}, 'mistral', None),
    'a window in some layers': ('llama', {'window': 9, 'window_layers': [0, 2]}, 'smollm3', None),
    'no rope in a layer': ('llama', {'rope_layers': [1, 2]}, 'smollm3', None),
    'multipliers': ('llama', {'logits_divisor': 2.0}, 'granite', None),
    'a scale': ('llama', {'attention_scale': 0.25}, 'granite', None),
    'heads that do not divide': ('llama', {'emb_dim': 42, 'tied_embeddings': True}, 'mistral', None),
    'yarn': ('llama', {'rope_type': 'yarn', 'rope_factor': 4.0, 'rope_original_length': 16}, 'llama', None),
    'geglu': ('llama', {'mlp_activations': ['gelu', 'linear']}, 'llama', None),
    'partial': ('llama', {'rope_dims': 6}, 'phi3', None),
    'two options': (
        'llama',
        {'window': 9, 'logits_divisor': 2.0},
        None,
        'in mistral, logits_divisor = 2.0 would become 1.0 .granite would keep it.',
    ),
    'zeros for a missing bias': ('qwen2', {'mlp_bias': True}, 'llama', None),
    'no gate': ('llama', {'mlp_activations': ['relu']}, None, r'in llama, mlp_activations'),
    'a scalar': ('gemma2', {'attention_scale': 0.3}, None, 'in gemma2, attention_scale = 0.3 would become'),
    'no experts': (
        'llama',
        {'moe': {'num_experts': 4}},
        None,
        'mlp/wo/kernel cannot be stored as huggingface, which only',
    ),
}


@pytest.mark.parametrize('case', LAYOUTS)
def test_the_layout_follows_from_the_facts(case, tmp_path):
    """The least general layout that computes exactly the same is chosen, whatever the source was; else a field is named."""
    name, changes, layout, message = LAYOUTS[case]
    metadata = open_checkpoint(llms.FOLDERS / name).metadata
    config = {**metadata['model']['config'], **changes}
    described = {**metadata, 'model': {'family': 'llm', 'config': config}}
    shapes = open_checkpoint(llms.FOLDERS / name).leaves()
    if layout is None:
        with pytest.raises(UserError, match=message):
            create_checkpoint(tmp_path / 'x', 'huggingface', shapes, step=None, identity={}, metadata=described)
        return
    chosen = hf.of_leaves({key.removeprefix('params/'): leaf.shape for key, leaf in shapes.items()}, described)
    assert chosen.model_types == (layout,)
    spelled = {'model_type': layout, **chosen.spell(facts.canonical(config))}
    assert not {'rope_parameters', 'dtype'} & spelled.keys()


def test_without_a_description_nothing_is_written(tmp_path):
    reader = open_checkpoint(llms.FOLDERS / 'llama')
    tree = {leaf: reader.read(leaf) for leaf in reader.leaves()}
    with pytest.raises(UserError, match="the checkpoint's metadata lacks vocab_size of its model"):
        trees.write(tmp_path / 'new', 'huggingface', tree, {})
    assert not list(tmp_path.iterdir())
