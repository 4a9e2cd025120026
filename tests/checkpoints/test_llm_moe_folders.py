"""Folders of decoder-only models with experts are read, and written again with the same bits, names and fields."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from tests.checkpoints import llms, trees
from tests.fixtures import fixtures_dir, requires_fixtures
from upcycle.checkpoints import safetensors
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.checkpoints.hf.reader import HuggingFaceReader
from upcycle.errors import UserError

pytestmark = requires_fixtures

# The routers and their layers, by folder.
MOE = {
    'mixtral': ({'num_experts': 4, 'normalize_combine_weights': True}, 'all'),
    'qwen2_moe': (
        {'num_experts': 4, 'normalize_combine_weights': False, 'expert_mlp_dim': 28, 'num_shared_experts': 1}
        | {'shared_mlp_dim': 36, 'shared_gate': True},
        [1],
    ),
    'qwen2_moe_every_layer': (
        {'num_experts': 5, 'normalize_combine_weights': True, 'expert_mlp_dim': 28, 'num_shared_experts': 1}
        | {'shared_mlp_dim': 36, 'shared_gate': True},
        'all',
    ),
    'qwen3_moe_norm': ({'num_experts': 4, 'normalize_combine_weights': True, 'expert_mlp_dim': 28}, 'all'),
    'qwen3_moe_nonorm': (
        {'num_experts': 6, 'num_selected_experts': 3, 'normalize_combine_weights': False, 'expert_mlp_dim': 20},
        [1, 2],
    ),
    'olmoe': ({'num_experts': 4, 'normalize_combine_weights': False}, 'all'),
    'flex_olmo': ({'num_experts': 4, 'normalize_combine_weights': False}, 'all'),
    'granitemoe': ({'num_experts': 4, 'normalize_combine_weights': True}, 'all'),
    'jetmoe': ({'num_experts': 4, 'normalize_combine_weights': True}, 'all'),
}
PAIRS = {
    'upcycle_llama_to_mixtral': 'llama',
    'upcycle_qwen3_to_qwen3_moe': 'qwen3',
    'upcycle_olmo2_to_flex_olmo': 'olmo2',
    'upcycle_granite_to_granitemoe': 'granite',
    'upcycle_llama_to_jetmoe': 'llama',
}
FOLDERS = [*MOE, *(f'{pair}/moe' for pair in PAIRS)]
# Fields of transformers that say nothing about the function, and fields whose default is what the folder says.
NOT_WRITTEN = {'transformers_version', 'use_cache', 'sliding_window', 'max_window_layers', 'layer_types', 'head_dim'}


def folder_of(name, spelling='config.json', tmp_path=None):
    """A fixture's folder; a copy of it with its other config.json if `spelling` is the other one."""
    source = fixtures_dir() / 'llm' / name
    if spelling == 'config.json':
        return epath.Path(source)
    copy = tmp_path / 'copy'
    copy.mkdir()
    shutil.copy(source / spelling, copy / 'config.json')
    for file in source.glob('model*'):
        (copy / file.name).symlink_to(file)
    return epath.Path(copy)


def tree_of(reader):
    return {name: np.asarray(reader.read(name)) for name in reader.leaves()}


def has_both_spellings(name):
    return (fixtures_dir() / 'llm' / name / 'config_legacy.json').exists()


@pytest.mark.parametrize('spelling', ['config.json', 'config_legacy.json'])
@pytest.mark.parametrize('name', FOLDERS)
def test_reads(name, spelling, tmp_path):
    if spelling != 'config.json' and not has_both_spellings(name):
        pytest.skip('this fixture has no config_legacy.json')
    reader = HuggingFaceReader(folder_of(name, spelling, tmp_path))
    config = reader.metadata['model']['config']
    if name in MOE:
        expected, layers = MOE[name]
        usual = {'router': 'top_k', 'num_selected_experts': 2, 'dispatch': 'ragged', 'expert_mlp_dim': None}
        assert config['moe'] == usual | expected
        assert config['moe_layers'] == layers
    leaves, width, count = reader.leaves(), config['emb_dim'], config['moe']['num_experts']
    hidden = config['moe']['expert_mlp_dim'] or config['mlp_dim']
    for i in facts_lib.indices(config['moe_layers'], config['num_layers']):
        mlp = f'params/decoder/layers_{i}/mlp'
        assert leaves[f'{mlp}/router/router_weights/w/kernel'].shape == (width, count)
        assert leaves[f'{mlp}/expert/wi_0/kernel'].shape == leaves[f'{mlp}/expert/wi_1/kernel'].shape
        assert leaves[f'{mlp}/expert/wi_1/kernel'].shape == (count, width, hidden)
        assert leaves[f'{mlp}/expert/wo/kernel'].shape == (count, hidden, width)
        assert not any(leaf.startswith(f'{mlp}/wi_0') for leaf in leaves)
    reference = HuggingFaceReader(folder_of(name))
    assert reader.metadata['model'] == reference.metadata['model']
    # Bit by bit what the file holds, in our layout.
    stored, _ = safetensors.read_files(folder_of(name) / safetensors.SINGLE)
    assert sum(np.prod(leaf.shape) for leaf in leaves.values()) == sum(np.prod(t.shape) for t in stored.values())


@pytest.mark.parametrize('name', FOLDERS)
def test_writes_the_names_bits_and_fields_of_the_hub(name, tmp_path):
    source = folder_of(name)
    reader = HuggingFaceReader(source)
    tree = tree_of(reader)
    written = epath.Path(trees.write(tmp_path / 'out', 'huggingface', tree, reader.metadata))
    again = HuggingFaceReader(written)
    trees.assert_same(again, tree)
    assert again.metadata['model'] == reader.metadata['model']
    theirs, _ = safetensors.read_files(source / safetensors.SINGLE)
    ours, _ = safetensors.read_files(written / safetensors.SINGLE)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key].read(()), tensor.read(()))
    hub = json.loads((source / ('config_legacy.json' if has_both_spellings(name) else 'config.json')).read_text())
    config = json.loads((written / 'config.json').read_text())
    for field, value in hub.items():
        if field in NOT_WRITTEN or not has_both_spellings(name):
            continue
        assert config.get(field) == value, field
    if 'norm_topk_prob' in hub:
        assert config['norm_topk_prob'] is hub['norm_topk_prob']


def fused(stored, block, matrices):
    """The tensors as transformers has them in memory."""
    tensors, gates = {}, {}
    for name, tensor in stored.items():
        before, found, after = name.partition('.experts.')
        before = before.replace(f'.{block}', '.mlp')
        if not found:
            tensors[name.replace(f'.{block}.gate.', '.mlp.gate.')] = tensor.read(())
            continue
        expert, matrix, _ = after.split('.')
        gates.setdefault(before, {})[int(expert), matrices[matrix]] = tensor.read(())
    for before, parts in gates.items():
        count = 1 + max(expert for expert, _ in parts)
        tensors[f'{before}.experts.gate_up_proj'] = np.stack(
            [np.concatenate([parts[e, 'gate'], parts[e, 'up']]) for e in range(count)]
        )
        tensors[f'{before}.experts.down_proj'] = np.stack([parts[e, 'down'] for e in range(count)])
    return tensors


MIXTRAL = {'w1': 'gate', 'w3': 'up', 'w2': 'down'}
USUAL = {'gate_proj': 'gate', 'up_proj': 'up', 'down_proj': 'down'}


@pytest.mark.parametrize('name', ['mixtral', 'qwen2_moe', 'qwen3_moe_nonorm', 'olmoe', 'flex_olmo', 'granitemoe'])
def test_fused_tensors_are_read_to_the_same_leaves(name, tmp_path):
    source = folder_of(name)
    stored, _ = safetensors.read_files(source / safetensors.SINGLE)
    if name == 'granitemoe':
        renamed = {'input_linear.weight': 'experts.gate_up_proj', 'output_linear.weight': 'experts.down_proj'}
        renamed['router.layer.weight'] = 'router.weight'
        tensors = {}
        for key, tensor in stored.items():
            before, _, after = key.partition('block_sparse_moe.')
            tensors[f'{before}block_sparse_moe.{renamed[after]}' if after else key] = tensor.read(())
    else:
        block, matrices = ('block_sparse_moe', MIXTRAL) if name == 'mixtral' else ('mlp', USUAL)
        tensors = fused(stored, block, matrices)
    assert any(key.endswith('experts.gate_up_proj') for key in tensors)
    llms.write(tmp_path, tensors)
    shutil.copy(source / 'config.json', tmp_path)
    trees.assert_same(HuggingFaceReader(epath.Path(tmp_path)), tree_of(HuggingFaceReader(source)))


def test_a_fused_tensor_of_another_shape(tmp_path):
    source = folder_of('olmoe')
    stored, _ = safetensors.read_files(source / safetensors.SINGLE)
    tensors = fused(stored, 'mlp', USUAL)
    name = 'model.layers.1.mlp.experts.gate_up_proj'
    for case, (changed, said) in enumerate(
        (
            (tensors[name][:, 1:], 'has the wrong shape .4, 87, 40.: it must hold all experts'),
            (tensors[name][:3], r'has no model.layers.1.mlp.experts.3.gate_proj.weight, one of 4 arrays'),
            (tensors[name][:, 2:], r'experts.0.gate_proj.weight.* asks for .44, 40.'),
        )
    ):
        folder = tmp_path / str(case)
        folder.mkdir()
        shutil.copy(source / 'config.json', folder)
        llms.write(folder, tensors | {name: np.ascontiguousarray(changed)})
        with pytest.raises(UserError, match=said):
            HuggingFaceReader(epath.Path(folder))


def test_a_config_that_contradicts_the_tensors(tmp_path):
    source = folder_of('qwen3_moe_norm', 'config_legacy.json', tmp_path)
    config = json.loads((source / 'config.json').read_text())
    for fields, said in (
        ({'num_experts': 3}, 'unknown arrays: model.layers..*experts.3'),
        ({'num_experts': 5}, 'has no model.layers.0.mlp.experts.4'),
        ({'num_local_experts': 5}, 'num_local_experts and num_experts are names of the same field and must be equal'),
        ({'num_experts_per_tok': 5}, 'num_experts_per_tok is 5, but num_experts is 4'),
        ({'moe_intermediate_size': 44}, r'asks for .*moe_intermediate_size = 44'),
        ({'decoder_sparse_step': 2}, 'unknown arrays|has no model.layers.0.mlp.gate_proj.weight'),
        ({'mlp_only_layers': [2]}, 'unknown arrays|has no model.layers.2.mlp.gate_proj.weight'),
        ({'use_sliding_window': True}, 'use_sliding_window is True'),
        ({'router_bias': True}, 'unknown fields that may change what the model computes: router_bias'),
        ({'norm_topk_prob': 'yes'}, 'norm_topk_prob is .yes.: it must be True or False'),
    ):
        (tmp_path / 'copy' / 'config.json').write_text(json.dumps(config | fields))
        with pytest.raises(UserError, match=said):
            HuggingFaceReader(source)


def test_norm_topk_prob_is_false_where_it_is_absent(tmp_path):
    for name in ('qwen2_moe_every_layer', 'qwen3_moe_norm', 'upcycle_olmo2_to_flex_olmo/moe', 'olmoe'):
        folder = tmp_path / name.replace('/', '_')
        folder.mkdir()
        source = folder_of(name, 'config_legacy.json', folder)
        config = json.loads((source / 'config.json').read_text())
        del config['norm_topk_prob']
        (folder / 'copy' / 'config.json').write_text(json.dumps(config))
        assert HuggingFaceReader(source).metadata['model']['config']['moe']['normalize_combine_weights'] is False
