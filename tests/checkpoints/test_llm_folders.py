"""Dense decoder-only folders are read into our leaves and a whole description, and written back bit for bit."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints import llms, trees
from tests.fixtures import requires_fixtures
from upcycle.checkpoints import open_checkpoint, safetensors, writing
from upcycle.checkpoints.hf.decoder_only import facts
from upcycle.errors import UserError
from upcycle.models import identify
from upcycle.models.decoder_config import DecoderConfig
from upcycle.models.registry import family
from upcycle.transfer import transfer

pytestmark = requires_fixtures

GEMMA = {
    'mlp_activations': ['gelu', 'linear'],
    'tied_embeddings': True,
    'norm_offset': 1.0,
    'embedding_multiplier': 40**0.5,
}
GEMMA_2 = GEMMA | {'norm_placement': 'both', 'attention_scale': 20**-0.5, 'window': 6}
LLAMA3 = {'rope_type': 'llama3', 'rope_factor': 8.0, 'rope_original_length': 32, 'rope_theta': 1000.0}
GRANITE = {'attention_scale': 0.15, 'embedding_multiplier': 6.0, 'residual_multiplier': 0.4, 'logits_divisor': 1.6}
# The fields that differ from a Llama's with an epsilon of 1e-5, a vocabulary of 128 and 2 key/value heads, for each folder:
# (heads, head_dim, width, layers), others.
FIELDS = {
    'llama': ((4, 10, 40, 3), {}),
    'llama_bias': ((4, 10, 40, 3), dict.fromkeys(('qkv_bias', 'out_bias', 'mlp_bias'), True)),
    'llama_tied_rope_llama3': ((4, 16, 40, 3), LLAMA3 | {'tied_embeddings': True}),
    'mistral_window': ((4, 12, 40, 3), {'window': 7}),
    'qwen2': ((4, 10, 40, 3), {'qkv_bias': True, 'rope_theta': 1e6, 'norm_epsilon': 1e-6}),
    'qwen3': ((4, 16, 40, 3), {'qk_norm': 'head', 'tied_embeddings': True, 'rope_theta': 1e6, 'norm_epsilon': 1e-6}),
    'gemma': ((4, 16, 40, 3), GEMMA | {'num_kv_heads': 1, 'norm_epsilon': 1e-6}),
    'gemma2': (
        (4, 12, 40, 4),
        GEMMA_2 | {'window_layers': [0, 2], 'attention_soft_cap': 2.0, 'logits_soft_cap': 5.0, 'norm_epsilon': 1e-6},
    ),
    'gemma3_text': (
        (4, 12, 40, 4),
        GEMMA_2
        | {'window_layers': [0, 1, 3], 'qk_norm': 'head', 'norm_epsilon': 1e-6}
        | {'rope_theta': 1e6, 'rope_type': 'linear', 'rope_factor': 8.0, 'window_rope_theta': 1e4},
    ),
    'smollm3': (
        (4, 10, 40, 4),
        {'rope_layers': [0, 2], 'rope_theta': 5e4, 'tied_embeddings': True, 'norm_epsilon': 1e-6},
    ),
    'olmo2': (
        (4, 10, 40, 3),
        {'norm_placement': 'post', 'qk_norm': 'projection', 'rope_theta': 5e5, 'norm_epsilon': 1e-6},
    ),
    'phi3': ((4, 10, 40, 3), {}),
    'phi3_partial': ((6, 8, 48, 3), {'rope_dims': 6, 'tied_embeddings': True}),
    'granite': ((4, 10, 40, 3), GRANITE | {'tied_embeddings': True}),
}


def expected_config(name):
    (heads, head_dim, width, layers), more = FIELDS[name]
    sizes = {
        'vocab_size': 128,
        'emb_dim': width,
        'num_heads': heads,
        'num_kv_heads': 2,
        'head_dim': head_dim,
        'mlp_dim': 80,
        'num_layers': layers,
    }
    return sizes | dict(facts.NEUTRAL) | {'norm_epsilon': 1e-5, 'dtype': 'float32'} | more


def test_the_neutral_values_are_the_defaults_of_the_network():
    fields = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    for name, value in facts.NEUTRAL.items():
        assert (list(fields[name]) if isinstance(fields[name], tuple) else fields[name]) == value, name
    sizes = [name for name, default in fields.items() if default is dataclasses.MISSING]
    free = {'dtype', 'dropout_rate', 'expert_dropout_rate', 'remat', 'scan_layers'}
    assert fields.keys() == {*facts.SIZES, *facts.NEUTRAL, *free} and sizes == list(facts.SIZES)


def description(folder):
    metadata = open_checkpoint(folder).metadata
    assert metadata['family'] == 'llm' and 'facts' not in metadata
    assert json.loads(json.dumps(metadata['model'])) == metadata['model']
    return metadata['model']


@pytest.mark.parametrize('name', llms.DENSE)
def test_the_description_in_both_spellings(name, tmp_path):
    expected = {'family': 'llm', 'config': expected_config(name)}
    assert description(llms.FOLDERS / name) == expected
    assert description(llms.copy(name, tmp_path / 'x', file='config_legacy.json')) == expected


# Fields of files on the hub that the fixtures do not have.
EXTRA = {
    'llama': {
        'max_sequence_length': 2048,
        'is_llama_config': True,
        'rope_interleaved': False,
        'unsloth_fixed': True,
        'transformers.js_config': {'dtype': 'q4'},
        '_flash_attn_2_enabled': True,
        'eos_token_id': [1, 2],
        'quantization_config': None,
        '_attn_implementation_autoset': True,
        'pretraining_tp': 2,
        'unsloth_version': '1',
    },
    'mistral_window': {'attention_bias': False, 'layer_types': ['sliding_attention'] * 3},
    'qwen2': {'use_mrope': False, 'sliding_window': 131072, 'use_sliding_window': False, 'max_window_layers': 1},
    'qwen3': {'sliding_window': 4096, 'rope_scaling': None, 'max_window_layers': 28},
    'gemma': {'hidden_activation': None},
    'gemma2': {'hidden_act': 'gelu_pytorch_tanh', 'cache_implementation': 'hybrid', 'sliding_window_size': 6},
    'gemma3_text': {'cache_implementation': 'hybrid', 'sliding_window_pattern': 6, 'eos_token_id': [1, 106]},
    'smollm3': {'pretraining_tp': 2, 'max_window_layers': 28, 'layer_types': ['full_attention'] * 4},
    'phi3': {
        'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'},
        'attention_bias': False,
        'lm_head_bias': False,
        'full_attn_mod': 1,
        'interpolate_factor': 1,
        'original_max_position_embeddings': 4096,
        'mlp_bias': False,
    },
    'granite': {'rope_scaling': None, 'attention_dropout': 0.1},
}


@pytest.mark.parametrize('name', EXTRA)
def test_fields_of_the_hub_say_nothing(name, tmp_path, capsys):
    folder = llms.copy(name, tmp_path / 'x', file='config_legacy.json', **EXTRA[name])
    assert description(folder)['config'] == expected_config(name)
    assert not capsys.readouterr().err


# Folder, fields to leave out, fields, what is different: the defaults of the configuration classes.
DEFAULTS = {
    'one head for each': ('llama', ('num_key_value_heads',), {}, 'num_kv_heads is|k_proj'),
    'no head_dim': ('llama', ('head_dim',), {}, {}),
    'null': ('llama', (), {'head_dim': None, 'hidden_act': 'swish'}, {}),
    'epsilon and theta': ('llama', ('rms_norm_eps', 'rope_theta'), {}, {'norm_epsilon': 1e-6}),
    'window': ('mistral_window', ('sliding_window',), {}, {'window': 4096}),
    'no window': ('mistral_window', (), {'sliding_window': None}, {'window': None}),
    'window of qwen': (
        'qwen2',
        ('sliding_window', 'layer_types'),
        {'use_sliding_window': True, 'max_window_layers': 2},
        {'window': 4096, 'window_layers': [2]},
    ),
    'no layers of qwen': ('qwen3', ('layer_types', 'max_window_layers'), {'use_sliding_window': True}, {}),
    'caps': (
        'gemma2',
        ('attn_logit_softcapping', 'layer_types', 'query_pre_attn_scalar'),
        {'final_logit_softcapping': None},
        {'attention_soft_cap': 50.0, 'logits_soft_cap': None, 'attention_scale': 1 / 16},
    ),
    'pattern': (
        'gemma3_text',
        ('layer_types', 'rope_local_base_freq', 'rope_theta', '_sliding_window_pattern'),
        {'sliding_window_pattern': 2, 'rope_scaling': None},
        {'window_layers': [0, 2], 'rope_type': 'default', 'rope_factor': 1.0},
    ),
    'no pattern': ('gemma3_text', ('layer_types',), {}, {'window_layers': 'all'}),
    'theta of smollm3': (
        'smollm3',
        ('rope_theta', 'no_rope_layer_interval'),
        {},
        {'rope_theta': 2e6, 'rope_layers': [0, 1, 2]},
    ),
    'windows of smollm3': (
        'smollm3',
        ('layer_types',),
        {'use_sliding_window': True, 'sliding_window': 5},
        {'window': 5, 'window_layers': [1, 3]},
    ),
    'a scale of 1': (
        'granite',
        ('attention_multiplier', 'logits_scaling'),
        {},
        {'attention_scale': 1.0, 'logits_divisor': 1.0},
    ),
    'linear': (
        'llama',
        (),
        {'rope_scaling': {'type': 'linear', 'factor': 2}},
        {'rope_type': 'linear', 'rope_factor': 2.0},
    ),
    'yarn': (
        'llama',
        (),
        {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0, 'attention_factor': None}},
        {'rope_type': 'yarn', 'rope_factor': 4.0, 'rope_original_length': 64},
    ),
    'yarn without its factor': (
        'llama',
        (),
        {
            'rope_scaling': {
                'rope_type': 'yarn',
                'original_max_position_embeddings': 16,
                'beta_fast': 4,
                'truncate': False,
            }
        },
        {
            'rope_type': 'yarn',
            'rope_factor': 4.0,
            'rope_original_length': 16,
            'rope_beta_fast': 4.0,
            'rope_truncate': False,
        },
    ),
}


@pytest.mark.parametrize('case', DEFAULTS)
def test_what_a_configuration_does_not_say(case, tmp_path):
    name, without, fields, different = DEFAULTS[case]
    folder = llms.copy(name, tmp_path / 'x', file='config_legacy.json', without=without, **fields)
    if isinstance(different, str):
        with pytest.raises(UserError, match=different):
            open_checkpoint(folder)
        return
    assert description(folder)['config'] == expected_config(name) | different


@pytest.mark.parametrize('name', llms.DENSE)
def test_the_leaves_are_those_of_the_network(name):
    reader = open_checkpoint(llms.FOLDERS / name)
    leaves = reader.leaves()
    config = DecoderConfig(**reader.metadata['model']['config'])
    expected = identify.shapes(family('llm')(config))
    assert {leaf: value.shape for leaf, value in leaves.items()} == expected
    assert {value.dtype.name for value in leaves.values()} == {'float32'}
    model = identify.check(reader.path, leaves, identify.facts_of(reader.metadata))
    assert model.config == config


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('name', llms.DENSE)
def test_written_back_bit_for_bit(name, dtype, tmp_path):
    def cast(tensors):
        return {key: value.astype(dtype) for key, value in tensors.items()}

    source = llms.copy(name, tmp_path / 'source', change=cast)
    reader = open_checkpoint(source)
    tree = {leaf: reader.read(leaf) for leaf in reader.leaves()}
    path = trees.write(tmp_path / 'new', 'huggingface', tree, reader.metadata)
    theirs, ours = llms.tensors_of(source), llms.tensors_of(tmp_path / 'new')
    assert theirs.keys() == ours.keys()
    assert all(value.dtype == dtype and value.tobytes() == ours[key].tobytes() for key, value in theirs.items())
    assert open_checkpoint(path).metadata == reader.metadata
    written, config = json.loads((tmp_path / 'new' / 'config.json').read_text()), llms.config_of(name)
    assert written['torch_dtype'] == np.dtype(dtype).name
    assert not {'rope_parameters', 'dtype'} & written.keys()
    # Every other field that transformers wrote is either the same or not written, because it is the default.
    renamed = {'rope_parameters', 'dtype', 'no_rope_layer_interval', '_sliding_window_pattern', 'max_window_layers'}
    different = {key for key in written.keys() & config.keys() - renamed if written[key] != config[key]}
    assert not different


def test_a_bare_model_and_old_buffers(tmp_path):
    """A model saved without its head's class has no prefix; files before transformers 4.32 hold RoPE's constants."""

    def bare(tensors):
        return {key.removeprefix('model.'): value for key, value in tensors.items()} | {
            f'layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32) for i in range(3)
        }

    name = 'llama_tied_rope_llama3'
    reader = open_checkpoint(llms.copy(name, tmp_path / 'x', change=bare))
    same = open_checkpoint(llms.FOLDERS / name)
    trees.assert_same(reader, {leaf: same.read(leaf) for leaf in same.leaves()})
    assert set(reader.metadata['not_read'].values()) == {'constants of RoPE, which are computed'}
    assert len(reader.metadata['not_read']) == 3


def test_a_tied_model_with_a_head(tmp_path, capsys):
    """As in transformers 5: an equal head is the embedding, whichever of the two is there, and another one is read."""
    name, embedding = 'qwen3', 'model.embed_tokens.weight'
    same = open_checkpoint(llms.FOLDERS / name)
    tree = {leaf: same.read(leaf) for leaf in same.leaves()}

    def copied(tensors):
        return {**tensors, 'lm_head.weight': tensors[embedding]}

    def moved(tensors):
        return {'lm_head.weight': tensors.pop(embedding), **tensors}

    def other(tensors):
        return {**tensors, 'lm_head.weight': 2 * tensors[embedding]}

    for number, change in enumerate((copied, moved)):
        reader = open_checkpoint(llms.copy(name, tmp_path / str(number), change=change))
        trees.assert_same(reader, tree)
        assert reader.metadata['model']['config']['tied_embeddings']
    assert not capsys.readouterr().err
    reader = open_checkpoint(llms.copy(name, tmp_path / 'other', change=other))
    assert 'lm_head.weight is not the embedding' in capsys.readouterr().err
    head = {'params/decoder/logits_dense/kernel': 2 * tree['params/token_embedder/embedding'].T}
    trees.assert_same(reader, tree | head)
    assert not reader.metadata['model']['config']['tied_embeddings']


def test_shards_and_parts_of_fused_tensors(tmp_path, monkeypatch):
    """Each leaf of a fused tensor is written where it belongs, in any order, and to any shard."""
    monkeypatch.setattr(safetensors, '_shards', lambda arrays, _: shards(arrays, 20_000))
    reader = open_checkpoint(llms.FOLDERS / 'phi3')
    tree = {leaf: reader.read(leaf) for leaf in reversed(reader.leaves())}
    trees.write(tmp_path / 'new', 'huggingface', tree, reader.metadata)
    files = sorted((tmp_path / 'new').glob('model-*.safetensors'))
    assert len(files) > 3
    trees.assert_same(open_checkpoint(tmp_path / 'new'), {leaf: reader.read(leaf) for leaf in reader.leaves()})


def test_an_embedding_is_written_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)
    monkeypatch.setattr(writing, '_PART_BYTES', 128 * 40 * 4 // 8)
    sizes, write = [], safetensors.FilesWriter.write

    def noted(self, name, value, *region):
        sizes.append((name, value.shape))
        write(self, name, value, *region)

    monkeypatch.setattr(safetensors.FilesWriter, 'write', noted)
    writing.parts.cache_clear()
    reader = open_checkpoint(llms.FOLDERS / 'phi3')
    tree = {leaf: reader.read(leaf) for leaf in reader.leaves()}
    path = trees.write(tmp_path / 'new', 'huggingface', tree, reader.metadata)
    writing.parts.cache_clear()
    assert [shape for name, shape in sizes if 'embed' in name] == [(16, 40)] * 8
    assert [shape for name, shape in sizes if 'lm_head' in name] == [(128, 40)]
    trees.assert_same(open_checkpoint(path), tree)


@pytest.mark.parametrize('name', ['phi3_partial', 'gemma3_text'])
def test_imported_and_exported(name, tmp_path):
    """Our format keeps the description, so an export needs no other information."""
    imported = transfer(llms.FOLDERS / name, tmp_path / 'imported', 'upcycle', source_format='huggingface')
    assert open_checkpoint(imported).metadata['model'] == open_checkpoint(llms.FOLDERS / name).metadata['model']
    exported = transfer(imported, tmp_path / 'exported', 'huggingface')
    theirs, ours = llms.tensors_of(llms.FOLDERS / name), llms.tensors_of(exported)
    assert theirs.keys() == ours.keys() and all(np.array_equal(value, ours[key]) for key, value in theirs.items())
    assert description(exported) == description(llms.FOLDERS / name)


shards = safetensors._shards
