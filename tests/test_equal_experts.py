"""--dense_layers=experts: dense layers of a model with experts, written as equal experts."""

import json

import numpy as np
import pytest

import upcycle
from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.hf.decoder_only import equal_experts
from upcycle.checkpoints.hf.writer import HuggingFaceWriter, _AsGiven
from upcycle.errors import UserError
from upcycle.formats import folder_request

pytestmark = requires_fixtures

DENSE = llms.FOLDERS / 'upcycle_llama_to_mixtral' / 'dense'
QWEN3 = llms.FOLDERS / 'upcycle_qwen3_to_qwen3_moe' / 'dense'
MIDDLE = '--gin.MOE_LAYERS=(1,)'  # of three
EQUAL = '--dense_layers=experts'


@pytest.fixture
def convert(capsys):
    def run(target, *options, source=DENSE):
        more = ['--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=4', '--format=huggingface', MIDDLE, *options]
        return call(['convert', f'--from={source}', f'--to={target}', *more], capsys)

    return run


def logits_of(folder):
    model, params = upcycle.load(folder)
    return np.asarray(jit(model.logits)(params, {'tokens': np.arange(24).reshape(2, 12)}))


def test_a_half_sparse_model_as_mixtral(convert, tmp_path):
    code, _, error = convert(tmp_path / 'no', '--layout=mixtral')
    assert code == 2 and '--dense_layers=experts writes dense layers as equal experts' in error
    target = tmp_path / 'moe'
    code, output, error = convert(target, EQUAL, '--verify', '--operator=drop')
    assert code == 0, error
    assert 'Mixtral, 4 experts, top 2' in output
    dense, moe = llms.tensors_of(DENSE), llms.tensors_of(target)
    for layer in range(3):
        for theirs, name in {'w1': 'gate_proj', 'w3': 'up_proj', 'w2': 'down_proj'}.items():
            experts = [moe[f'model.layers.{layer}.block_sparse_moe.experts.{e}.{theirs}.weight'] for e in range(4)]
            mlp = dense[f'model.layers.{layer}.mlp.{name}.weight']
            assert all(np.array_equal(expert, mlp) for expert in experts) == (layer != 1)
        assert moe[f'model.layers.{layer}.block_sparse_moe.gate.weight'].any() == (layer == 1)
    names = [f'params/decoder/layers_{i}/mlp/{name}/kernel' for i in (0, 2) for name in ('wi_0', 'wi_1', 'wo')]
    assert json.loads((target / 'upcycle_receipt.json').read_text())['equal_experts'] == names
    assert b'"upcycle_equal_experts": "0,2"' in (target / 'model.safetensors').read_bytes()[:2000]
    reader = open_checkpoint(target)
    assert reader.metadata['model']['config']['moe_layers'] == 'all' and 'receipt' not in reader.metadata


@pytest.mark.exhaustive
def test_the_function_of_copies_stays(convert, tmp_path):
    """Also of Qwen3, whose layout has dense layers that llama.cpp has not, and of the fused GraniteMoE."""
    qwen = tmp_path / 'qwen'
    code, _, error = convert(tmp_path / 'no', '--for=llama.cpp', source=QWEN3)
    assert code == 2 and 'cannot convert layers without experts' in error
    assert convert(qwen, '--for=llama.cpp', EQUAL, source=QWEN3)[0] == 0
    assert convert(tmp_path / 'mixtral', EQUAL)[0] == 0
    assert convert(tmp_path / 'granite', EQUAL, '--layout=granitemoe', '--verify')[0] == 0
    expected = {'qwen': logits_of(QWEN3)} | dict.fromkeys(('mixtral', 'granite'), logits_of(DENSE))
    for name, logits in expected.items():
        np.testing.assert_allclose(logits_of(tmp_path / name), logits, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_an_interrupted_write_continues(convert, tmp_path, monkeypatch):
    assert convert(tmp_path / 'whole', EQUAL)[0] == 0
    write, done = HuggingFaceWriter.write, []

    def fail(self, name, region, value):
        if len(done) == 25:
            raise KeyboardInterrupt
        done.append(name)
        write(self, name, region, value)

    monkeypatch.setattr(HuggingFaceWriter, 'write', fail)
    assert convert(tmp_path / 'cut', EQUAL)[0] == 130
    assert 'params/decoder/layers_0/mlp/wo/kernel' in done
    monkeypatch.setattr(HuggingFaceWriter, 'write', write)
    code, _, error = convert(tmp_path / 'cut', '--layout=qwen3_moe')
    assert code == 2, error
    assert convert(tmp_path / 'cut', EQUAL, '--verify')[0] == 0
    whole, cut = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ('whole', 'cut'))
    assert whole == cut


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'normalize_combine_weights': False}, 'whose normalize_combine_weights is False: .* only if it is True'),
        ({'num_shared_experts': 1, 'shared_gate': True}, 'whose num_shared_experts is 1'),
        ({'expert_mlp_dim': 8}, 'whose expert_mlp_dim is 8'),
        ({'weight_scale': 0.5}, 'whose weight_scale is 0.5'),
    ],
)
def test_layers_that_experts_would_change(settings, message):
    sizes = {'vocab_size': 64, 'emb_dim': 16, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 4, 'mlp_dim': 24}
    moe = {'router': 'top_k', 'num_experts': 4, 'normalize_combine_weights': True, 'dispatch': 'ragged'}
    config = sizes | {'num_layers': 3, 'moe_layers': [1], 'moe': moe}
    assert equal_experts.of_all_layers({'model': {'config': config}})['equal_experts'] == [0, 2]
    whole = {'model': {'config': config | {'moe_layers': 'all'}}}
    assert equal_experts.of_all_layers(whole) == whole
    with pytest.raises(UserError, match=message):
        equal_experts.of_all_layers({'model': {'config': config | {'moe': moe | settings}}})


def test_models_without_experts_and_other_formats(capsys, tmp_path):
    export = ['export', f'--from={DENSE}', f'--to={tmp_path / "x"}', EQUAL]
    code, _, error = call([*export, '--format=huggingface'], capsys)
    assert code == 2 and 'is for models with experts, and this one has none' in error
    code, _, error = call([*export, '--format=upcycle'], capsys)
    assert code == 2 and '--dense_layers=experts needs --format=huggingface' in error
    with pytest.raises(UserError, match='needs --format=huggingface'):
        folder_request('vit_npz', None, None, 'experts')


def test_copies_that_differ_are_what_is_read_back():
    class Reader:
        path = 'x'

        def __init__(self, stack):
            self.stack = stack

        def leaves(self):
            return {'mlp/expert/wo/kernel': self.stack}

        def read(self, name, *, region=()):
            return self.stack[region]

    stack = np.zeros((3, 2, 2))
    written = _AsGiven(Reader(stack), {'mlp/wo/kernel': 'mlp/expert/wo/kernel'})
    assert written.path == 'x' and not written.read('mlp/wo/kernel').any()
    stack[2, 1, 1] = 1
    assert written.read('mlp/wo/kernel').any()
