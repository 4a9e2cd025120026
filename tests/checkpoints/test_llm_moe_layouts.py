"""The layout of a model with experts follows from its facts; what a layout or an engine would change is refused by name."""

import json
import re
import shutil

import numpy as np
import pytest
from etils import epath

import upcycle
from tests.checkpoints import llms, trees
from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from upcycle import warning
from upcycle.checkpoints import create_checkpoint, hf, open_checkpoint
from upcycle.checkpoints.hf.decoder_only import LAYOUTS
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.checkpoints.hf.engines import engine_limits
from upcycle.errors import UserError
from upcycle.formats import FolderRequest, folder_request
from upcycle.models.causal_lm import CausalLM
from upcycle.models.decoder_config import DecoderConfig
from upcycle.moe.config import MoEConfig
from upcycle.transfer import discarded_if_refused

SIZES = {'vocab_size': 64, 'emb_dim': 16, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 4, 'mlp_dim': 24}
SIZES['num_layers'] = 3
TOP_2 = {'router': 'top_k', 'num_experts': 4, 'normalize_combine_weights': True, 'dispatch': 'ragged'}
RAW = {'normalize_combine_weights': False}
LLAMA = {'norm_epsilon': 1e-5}
QWEN2, QWEN3 = {'qkv_bias': True}, {'qk_norm': 'head', 'head_dim': 8}
OLMO2 = {'norm_placement': 'post', 'qk_norm': 'projection'}
GRANITE = {'embedding_multiplier': 6.0, 'residual_multiplier': 0.4, 'logits_divisor': 1.6, 'attention_scale': 0.15}
HALF = {'moe_layers': 'every_other'}


def described(fields, router=None):
    """The metadata of a run of ours: the whole configuration, with every setting of its router."""
    moe = MoEConfig(**{**TOP_2, 'causal': True, **(router or {})})
    moe = {name: getattr(moe, name) for name in moe.__dataclass_fields__}
    config = {**SIZES, **facts_lib.NEUTRAL, **fields, 'moe': json.loads(json.dumps(moe, default=str))}
    return {'family': 'llm', 'model': {'family': 'llm', 'config': config}}


def chosen(metadata, layout=None):
    return hf.of_leaves({'decoder/decoder_norm/scale': (16,)}, metadata, layout).model_types[0]


def tree_of(metadata):
    """Random leaves of a described model."""
    facts = facts_lib.of_metadata(metadata)
    layout = next(each for each in LAYOUTS if each.model_types == ('qwen2_moe',))
    sizes = layout.dimensions(facts)
    rng = np.random.default_rng(0)
    return {
        f'params/{name}': rng.normal(size=[sizes[size] for size in leaf.sizes]).astype(np.float32)
        for name, leaf in layout.leaves(facts).items()
    }


# Fields, router, layout.
FIT = {
    'llama': (LLAMA, {}, 'mixtral'),
    'llama, tied, llama3': (
        {'tied_embeddings': True, 'head_dim': 8, 'rope_type': 'llama3', 'rope_factor': 8.0, 'rope_original_length': 32},
        {},
        'mixtral',
    ),
    'mistral': ({'window': 7}, {}, 'mixtral'),
    'fine-grained': (LLAMA, {'granularity': 2, 'num_experts': 8}, 'mixtral'),
    'llama, raw weights': (LLAMA, RAW, 'qwen2_moe'),
    'llama, all experts': (LLAMA, {'num_selected_experts': 4, **RAW}, 'mixtral'),
    'llama, some layers': (HALF, {}, 'qwen2_moe'),
    'llama with a gated shared expert': ({}, {'num_shared_experts': 1, 'shared_gate': True}, 'qwen2_moe'),
    'a scale that the experts take': (
        QWEN2,
        {'num_shared_experts': 1, 'shared_gate': True, 'weight_scale': 0.5},
        'qwen2_moe',
    ),
    'attention biases': ({'qkv_bias': True, 'out_bias': True}, {}, 'granitemoe'),
    'qwen2': (QWEN2, {}, 'qwen2_moe'),
    'qwen2, some layers': (QWEN2 | HALF, {}, 'qwen2_moe'),
    'qwen3': (QWEN3, {}, 'qwen3_moe'),
    'qwen3, some layers, raw': (QWEN3 | {'moe_layers': [0, 2]}, RAW, 'qwen3_moe'),
    'qwen3 with biases': (QWEN3 | {'qkv_bias': True}, {}, 'qwen3_moe'),
    'olmo2': (OLMO2, {}, 'flex_olmo'),
    'olmo2, raw': (OLMO2, RAW, 'flex_olmo'),
    'granite': (GRANITE, {}, 'granitemoe'),
    'olmoe': ({'qk_norm': 'projection'}, {}, 'olmoe'),
    'olmoe with clipping': ({'qk_norm': 'projection', 'clip_qkv': 5.0}, RAW, 'olmoe'),
    'slots that hold every choice': (LLAMA, {'dispatch': 'gather', 'eval_capacity_factor': 4.0}, 'mixtral'),
    'settings of training': (
        LLAMA,
        {'jitter_noise': 0.1, 'gate_noise': 1.0, 'balance_loss': 'importance_load', 'train_capacity_factor': 1.25},
        'mixtral',
    ),
}
# Fields, router, what the message says.
NO_FIT = {
    'partial rotary': ({'rope_dims': 2}, {}, 'in mixtral, rope_dims = 2 would become None .no layout has it'),
    'MLP biases': ({'mlp_bias': True}, {}, 'mlp_bias = True would become False .no layout has it'),
    'no RoPE in a layer': ({'rope_layers': [0, 1]}, {}, r'rope_layers = \[0, 1\] would become .all. .no layout has it'),
    'a window and norms of heads': (
        QWEN3 | {'window': 3},
        {},
        "qk_norm = 'head' would become 'none' .qwen3_moe would keep it",
    ),
    'a window in some layers': (
        {'window': 3, 'window_layers': [0]},
        {},
        r'in mixtral, window_layers = \[0\] would become',
    ),
    'raw weights and multipliers': (
        GRANITE,
        RAW,
        'in granitemoe, moe.normalize_combine_weights = False would become True .qwen3_moe, qwen2_moe, flex_olmo, olmoe',
    ),
    'dense layers and multipliers': (
        GRANITE | HALF,
        {},
        r'in granitemoe, moe_layers = \[1\] would become .all. .qwen3_moe, qwen2_moe would keep it',
    ),
    'soft caps': ({'logits_soft_cap': 5.0}, {}, 'logits_soft_cap = 5.0 would become None'),
    'gemma': ({'norm_offset': 1.0, 'mlp_activations': ['gelu', 'linear']}, {}, 'norm_offset = 1.0 would become 0.0'),
    'dropped choices': (
        LLAMA,
        {'dispatch': 'gather', 'eval_capacity_factor': 2.0},
        "moe.eval_capacity_factor = 2.0 would become None .evaluate without dropped choices: DISPATCH = 'ragged'",
    ),
    'expert choice': (
        LLAMA,
        {'router': 'expert_choice', 'causal': False, 'dispatch': 'gather'},
        "train with ROUTER = 'top_k'",
    ),
    'soft': (LLAMA, {'router': 'soft', 'causal': False}, "moe.router = 'soft' would become 'top_k'"),
    'standardised logits': (LLAMA, {'logit_normalization': 1.0}, 'moe.logit_normalization = 1.0 would become None'),
    'a bias of the router': (LLAMA, {'router_bias': True}, 'moe.router_bias = True would become False'),
    'sigmoid': (LLAMA, {'scores': 'sigmoid'}, "moe.scores = 'sigmoid' would become 'softmax'"),
    'groups': (LLAMA, {'score_groups': 2, 'selected_groups': 1}, 'moe.score_groups = 2 would become 1'),
    'scaled weights': (LLAMA, {'weight_scale': 2.5}, 'moe.weight_scale = 2.5 would become 1.0 .only a power of 2'),
    'a bias of the choice': (LLAMA, {'balance_bias_rate': 0.01}, 'moe.correction_bias = True would become False'),
    'shared experts without a gate': (LLAMA, {'num_shared_experts': 1}, 'moe.shared_gate = False would become True'),
    'default outputs': (
        LLAMA,
        {'dispatch': 'gather', 'eval_capacity_factor': 4.0, 'default_output_decay': 0.9, **RAW},
        'moe.default_output_decay = 0.9 would become None',
    ),
}
# Layout, fields, router, what the message says.
NAMED = {
    'norms dropped': ('mixtral', QWEN3, {}, "qk_norm = 'head' would become 'none'. Use --layout=qwen3_moe"),
    'a window dropped': ('granitemoe', {'window': 3}, {}, 'window = 3 would become None. Use --layout=mixtral'),
    'biases dropped': (
        'mixtral',
        QWEN2,
        {},
        'qkv_bias = True would become False. Use --layout=qwen2_moe or granitemoe',
    ),
    'raw weights': (
        'mixtral',
        {},
        RAW,
        'moe.normalize_combine_weights = False would become True. Use --layout=qwen2_moe',
    ),
    'dense layers': (
        'mixtral',
        HALF,
        {},
        r'moe_layers = \[1\] would become .all. .--dense_layers=experts .* --layout=qwen2_moe',
    ),
    'norms invented': ('olmoe', OLMO2, {}, "norm_placement = 'post' would become 'pre'. Use --layout=flex_olmo"),
    'a dense layout': (
        'llama',
        {},
        {},
        "model: moe = 'experts' would become None. Use --layout=mixtral",
    ),
    'none holds it': (
        'mixtral',
        {'mlp_bias': True},
        {},
        'neither --layout=mixtral nor another layout can store this model',
    ),
    'no such layout': ('dbrx', {}, {}, '--layout=dbrx is not one of llama, mistral, .*, mixtral'),
}


@pytest.mark.parametrize('case', FIT)
def test_the_layout_that_computes_the_same(case):
    fields, router, layout = FIT[case]
    metadata = described(fields, router)
    assert chosen(metadata) == layout
    assert chosen(metadata, layout) == layout


@pytest.mark.parametrize('case', NO_FIT)
def test_no_layout(case):
    fields, router, said = NO_FIT[case]
    with pytest.raises(UserError, match=said) as caught:
        chosen(described(fields, router))
    assert str(caught.value).startswith('no layout of Hugging Face can store this model: in ')


@pytest.mark.parametrize('case', NAMED)
def test_a_named_layout_that_would_change_the_model(case):
    layout, fields, router, said = NAMED[case]
    with pytest.raises(UserError, match=said):
        chosen(described(fields, router), layout)


def test_the_layout_of_the_source_comes_first():
    metadata = described(LLAMA)
    assert chosen(metadata) == 'mixtral'
    assert chosen({**metadata, 'model_type': 'granitemoe'}) == 'granitemoe'
    assert chosen(metadata, 'granitemoe') == 'granitemoe'
    assert chosen(metadata, 'qwen2_moe') == 'qwen2_moe'


@pytest.mark.parametrize(
    'layout, fields, added',
    [
        ('qwen2_moe', QWEN2 | HALF, ['shared']),
        ('qwen2_moe', {}, ['shared', 'query/bias', 'key/bias', 'value/bias']),
        ('granitemoe', QWEN2, ['out/bias']),
        ('qwen3_moe', QWEN3 | QWEN2, ['out/bias']),
    ],
)
def test_parts_that_a_layout_always_has_are_zeros(layout, fields, added, tmp_path):
    metadata = described(fields)
    tree = tree_of(metadata)
    reader = open_checkpoint(_write(tmp_path / 'out', tree, metadata, FolderRequest(layout)))
    assert reader.metadata['model_type'] == layout
    more = reader.leaves().keys() - tree.keys()
    assert {name for part in added for name in more if part in name} == more != set()
    trees.assert_same(_Only(reader, tree.keys()), tree)
    for name in more:
        value = reader.read(name)
        np.testing.assert_array_equal(value, np.full_like(value, 1e-6 if 'shared_gate' in name else 0))


@pytest.mark.parametrize('fields, layout', [(LLAMA, 'mixtral'), (GRANITE, 'granitemoe')])
def test_a_scale_of_weights_is_a_factor_of_the_experts(fields, layout, tmp_path):
    metadata = described(fields, {'weight_scale': 0.5})
    tree = tree_of(metadata)
    path = _write(tmp_path / 'out', tree, metadata, FolderRequest(layout))
    reader = open_checkpoint(path)
    trees.assert_same(reader, tree)
    assert reader.metadata['model']['config']['moe']['weight_scale'] == 0.5
    # For transformers, and for us without the note.
    (tmp_path / 'plain').mkdir()
    shutil.copy(epath.Path(path) / 'config.json', tmp_path / 'plain')
    llms.write(tmp_path / 'plain', llms.tensors_of(epath.Path(path)))
    plain = open_checkpoint(tmp_path / 'plain')
    assert 'weight_scale' not in plain.metadata['model']['config']['moe']
    for name, value in tree.items():
        np.testing.assert_array_equal(plain.read(name), value / 2 if name.endswith('expert/wo/kernel') else value)


@requires_fixtures
@pytest.mark.parametrize(
    'name, layout',
    [
        *(
            ('llama', 'mixtral'),
            ('llama_tied_rope_llama3', 'mixtral'),
            ('mistral_window', 'mixtral'),
            ('phi3', 'mixtral'),
        ),
        *(('qwen2', 'qwen2_moe'), ('qwen3', 'qwen3_moe'), ('olmo2', 'flex_olmo'), ('granite', 'granitemoe')),
        *(('llama_bias', 'mlp_bias'), ('phi3_partial', 'rope_dims'), ('smollm3', 'rope_layers')),
        *(('gemma', 'norm_offset'), ('gemma2', 'norm_placement'), ('gemma3_text', 'norm_placement')),
    ],
)
def test_the_recipe_of_a_dense_folder(name, layout):
    """Each family has its layout, or a field that no layout has."""
    stored = open_checkpoint(llms.FOLDERS / name).metadata
    sparse = upcycle.sparse(CausalLM(DecoderConfig(**stored['model']['config'])), NUM_EXPERTS=4)
    metadata = {**stored, 'model': json.loads(json.dumps(sparse.describe(), default=str))}
    if layout in hf.BY_MODEL_TYPE:
        assert chosen(metadata) == layout
        return
    with pytest.raises(UserError, match=f'{layout} = .* would become .*no layout has it'):
        chosen(metadata)


class _Only:
    """Some leaves of a reader."""

    def __init__(self, reader, names):
        self._reader, self._names = reader, names

    def leaves(self):
        return {name: leaf for name, leaf in self._reader.leaves().items() if name in self._names}

    def read(self, name):
        return self._reader.read(name)


def _write(path, tree, metadata, request):
    leaves = {name: trees.jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}
    writer = create_checkpoint(path, 'huggingface', leaves, step=None, identity={}, metadata=metadata, request=request)
    with discarded_if_refused(writer):
        for name, regions in writer.todo().items():
            for region in regions:
                writer.write(name, region, tree[name][region])
        writer.finish(metadata)
    return writer.path


def spelled(fields, router=None, layout=None):
    metadata = described(fields, router)
    architecture = hf.of_leaves({'decoder/decoder_norm/scale': (16,)}, metadata, layout)
    return architecture.config(architecture.sizes_for({}, metadata), metadata)


def test_fields_that_engines_and_versions_need_are_spelled_out():
    for fields, router, layout in FIT.values():
        config = spelled(fields, router)
        assert config['output_router_logits'] is False and config['router_aux_loss_coef'] == 0.001
        assert config['model_type'] == layout and not {'rope_parameters', 'dtype'} & config.keys()
        if layout not in ('mixtral', 'granitemoe'):
            assert config['norm_topk_prob'] is router.get('normalize_combine_weights', True)
        count = 'num_local_experts' if layout in ('mixtral', 'granitemoe') else 'num_experts'
        assert config[count] == router.get('num_experts', 4)
    assert spelled(LLAMA, {'granularity': 2, 'num_experts': 8})['intermediate_size'] == 12
    assert spelled(QWEN3)['moe_intermediate_size'] == 24


@pytest.mark.parametrize(
    ('run', 'kept', 'router', 'written'),
    [
        ({}, {}, {}, 0.001),
        ({}, {'router_aux_loss_coef': 0.02}, {}, 0.02),  # a folder without a run
        ({'aux_loss_factor': 0.01}, {'router_aux_loss_coef': 0.02}, {}, 0.01),
        ({'aux_loss_factor': 0.0}, {}, {'balance_loss': 'switch'}, 0.0),
        ({'aux_loss_factor': 0.01}, {'router_aux_loss_coef': 0.02}, {'balance_loss': 'mutual_information'}, None),
    ],
)
def test_the_weight_of_the_balance_loss_is_that_of_the_run(run, kept, router, written):
    metadata = described(LLAMA, router)
    metadata = {**metadata, 'kept': kept, 'model': metadata['model'] | run}
    architecture = hf.of_leaves({'decoder/decoder_norm/scale': (16,)}, metadata)
    config = architecture.config(architecture.sizes_for({}, metadata), metadata)
    assert config.get('router_aux_loss_coef') == written and config['output_router_logits'] is False


def test_the_balance_loss_is_that_of_transformers():
    """`load_balancing_loss_func` of one layer; of several, it pools their tokens."""
    moe = MoEConfig(6, router='top_k', num_selected_experts=2, dispatch='ragged', normalize_combine_weights=True)
    logits_GxSxE = np.random.default_rng(0).normal(size=(1, 40, 6)).astype(np.float32)
    _, metrics = jit(moe.route_dropless)(logits_GxSxE, np.ones((1, 40), bool))
    weight_SxE = np.exp(logits_GxSxE[0]) / np.exp(logits_GxSxE[0]).sum(axis=-1, keepdims=True)
    chosen_E = np.bincount(np.argsort(-weight_SxE, axis=-1)[:, :2].reshape(-1), minlength=6)
    expected = 6 * (chosen_E / 40 * weight_SxE.mean(axis=0)).sum()
    assert float(metrics['auxiliary_loss']) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    'fields, router, layout, vllm, llama_cpp',
    [
        (LLAMA, {}, None, None, None),
        (LLAMA | {'tied_embeddings': True, 'head_dim': 8}, {}, None, None, None),
        ({'window': 3}, {}, None, None, 'ignores sliding_window = 3'),
        (QWEN3, {}, None, None, None),
        (QWEN3, RAW, None, None, 'always divides the weights of the chosen experts'),
        (QWEN3 | HALF, {}, None, None, r'cannot convert layers without experts \(decoder_sparse_step = 2'),
        (QWEN2, RAW, None, None, None),
        (QWEN2, {}, None, None, 'never divides the weights'),
        (QWEN2, {'num_selected_experts': 4}, None, None, None),
        (QWEN2 | {'tied_embeddings': True}, RAW, None, None, 'does not load a tied head'),
        (QWEN2 | {'head_dim': 8}, RAW, None, 'ignores head_dim = 8', 'ignores head_dim = 8'),
        (OLMO2, {}, None, None, 'does not have the architecture flex_olmo'),
        (GRANITE, {}, None, None, None),
        (GRANITE | {'qkv_bias': True, 'out_bias': True}, {}, None, 'has no biases of attention layers', None),
        (GRANITE | {'mlp_activations': ['gelu', 'linear']}, {}, None, 'computes silu', 'computes silu'),
        (
            {'rope_type': 'llama3', 'rope_factor': 8.0, 'rope_original_length': 32},
            {},
            'granitemoe',
            None,
            'cannot convert rotary positions of the type llama3',
        ),
        ({'qk_norm': 'projection', 'norm_epsilon': 1e-5, 'num_kv_heads': 4}, RAW, None, None, None),
        (
            {'qk_norm': 'projection', 'norm_epsilon': 1e-5},
            RAW,
            None,
            None,
            'does not load grouped queries .*num_key_value_heads = 2',
        ),
        ({'qk_norm': 'projection'}, {}, None, 'never divides.*epsilon of 1e-5', 'never divides'),
    ],
)
def test_limits_of_engines(fields, router, layout, vllm, llama_cpp):
    config = spelled(fields, router, layout)
    limits = engine_limits(config['model_type'], config)
    for engine, said in (('vllm', vllm), ('llama.cpp', llama_cpp)):
        if said is None:
            assert engine not in limits
        else:
            assert all(sentence.startswith(f'{engine} ') for sentence in limits[engine])
            assert re.search(said, '; '.join(limits[engine]))


def test_an_engine_warns_or_binds(tmp_path, capsys):
    metadata = described({'window': 3})
    tree = tree_of(metadata)
    warning.forget()
    _write(tmp_path / 'out', tree, metadata, folder_request('huggingface', None, None))
    assert 'is exact in transformers, but llama.cpp ignores sliding_window = 3' in capsys.readouterr().err
    _write(tmp_path / 'vllm', tree, metadata, folder_request('huggingface', None, 'transformers,vllm'))
    with pytest.raises(
        UserError, match=r'--for=vllm,llama.cpp: llama.cpp ignores sliding_window = 3.*another --layout'
    ):
        _write(tmp_path / 'no', tree, metadata, folder_request('huggingface', None, 'vllm,llama.cpp'))
    assert not (tmp_path / 'no').exists()


def test_a_zero_gate_is_nan_in_llama_cpp(tmp_path, capsys):
    metadata = described(QWEN2, {'num_shared_experts': 1, 'shared_gate': True, **RAW})
    tree = tree_of(metadata)
    tree['params/decoder/layers_1/mlp/shared_gate/kernel'][:] = 0
    warning.forget()
    _write(tmp_path / 'out', tree, metadata, folder_request('huggingface', None, None))
    assert 'llama.cpp computes NaN if the gate of a shared expert is zero' in capsys.readouterr().err
    with pytest.raises(UserError, match='--for=llama.cpp: llama.cpp computes NaN'):
        _write(tmp_path / 'no', tree, metadata, folder_request('huggingface', None, 'llama.cpp'))
    assert [file.name for file in epath.Path(tmp_path).iterdir()] == ['out']


@pytest.mark.parametrize(
    'format, layout, engines, said',
    [
        ('upcycle', 'mixtral', None, '--layout=mixtral needs --format=huggingface'),
        ('t5x_orbax', None, 'vllm', '--for=vllm needs --format=huggingface'),
        ('huggingface', None, 'vllm,sglang', 'sglang is not one of transformers, vllm, llama.cpp'),
        ('huggingface', None, '', 'an empty name is not one of'),
    ],
)
def test_options(format, layout, engines, said):
    with pytest.raises(UserError, match=said):
        folder_request(format, layout, engines)


@requires_fixtures
def test_a_dense_model_has_no_layout_with_experts():
    metadata = open_checkpoint(llms.FOLDERS / 'llama').metadata
    with pytest.raises(UserError, match='--layout=mixtral cannot store this model: .*Use --layout=llama'):
        chosen(metadata, 'mixtral')


@pytest.mark.parametrize(
    'layout, said',
    [
        ('mixtral', '--layout=mixtral is not one of t5, mt5, umt5'),
        ('umt5', '--layout=umt5 cannot store this model, which is a t5'),
    ],
)
def test_another_family_has_its_own_names(layout, said, tmp_path):
    with pytest.raises(UserError, match=said):
        _write(tmp_path / 'x', trees.t5(False, state=False), {}, FolderRequest(layout))
    assert not list(tmp_path.iterdir())
