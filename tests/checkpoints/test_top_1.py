"""Folders whose tokens take one expert with weight 1: they compute, and only training has something to say about routers."""

import json

import numpy as np
import pytest

from tests import runs
from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.moe.config import MoEConfig

pytestmark = requires_fixtures

FOLDERS = {
    'mixtral': {},
    'qwen3_moe_norm': {'norm_topk_prob': True},
    'qwen2_moe_every_layer': {'norm_topk_prob': True},
    'granitemoe': {},
}
WARNING = 'the model computes, but the loss of the task does not train these routers'


def folder_of(name, path):
    return llms.copy(name, path, num_experts_per_tok=1, **FOLDERS[name])


def test_the_weight_is_1():
    moe = MoEConfig(4, router='top_k', dispatch='ragged', num_selected_experts=1, normalize_combine_weights=True)
    logits_GxSxE = np.random.default_rng(0).normal(size=(1, 9, 4)).astype(np.float32)
    choices, _ = jit(moe.route_dropless)(logits_GxSxE, np.ones((1, 9), bool))
    np.testing.assert_array_equal(choices.expert_GxSxK[..., 0], logits_GxSxE.argmax(axis=-1))
    np.testing.assert_array_equal(choices.weight_GxSxK, 1.0)


@pytest.mark.parametrize('name', FOLDERS)
def test_is_read_and_written_again(name, tmp_path, capsys):
    source = folder_of(name, tmp_path / 'source')
    moe = open_checkpoint(source).metadata['model']['config']['moe']
    assert moe['num_selected_experts'] == 1 and moe['normalize_combine_weights']
    options = [f'--from={source}', f'--to={tmp_path / "again"}', '--format=huggingface']
    code, _, error = call(['export', *options], capsys)
    assert code == 0 and WARNING not in error
    before, after = (llms.tensors_of(folder) for folder in (source, tmp_path / 'again'))
    assert {key: x.tobytes() for key, x in before.items()} == {key: x.tobytes() for key, x in after.items()}
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['num_experts_per_tok'] == 1


@pytest.mark.exhaustive
def test_generates(tmp_path, capsys):
    source = folder_of('mixtral', tmp_path / 'source')
    code, output, _ = call(
        ['generate', f'--from={source}', '--tokenizer=bytes', '--prompt=ab', '--max_new_tokens=2', '--json'], capsys
    )
    assert code == 0 and len(json.loads(output)['tokens']) == 2


@pytest.mark.parametrize(
    ('source', 'moe', 'run', 'code', 'said'),
    [
        ('mixtral', None, 'runs/continue_dense.gin', 0, WARNING),
        (
            'llama',
            'moe/llm.gin',
            'runs/upcycle.gin',
            2,
            'makes every weight 1, so the router gets no gradient: turn it off',
        ),
    ],
)
def test_training(source, moe, run, code, said, tmp_path, capsys):
    folder = folder_of(source, tmp_path / 'source') if source in FOLDERS else llms.FOLDERS / source
    bindings = {**runs.LLM_STEPS, 'NUM_EMBEDDINGS': 128, 'MODEL_DIR': tmp_path / 'run', 'WARMUP_STEPS': 2}
    bindings |= {'INITIAL_CHECKPOINT_PATH': folder, 'TRAIN_STEPS': 4, 'OPTIMIZER_STATE': 'fresh'}
    bindings |= {} if moe is None else {'NUM_EXPERTS': 4, 'NUM_SELECTED_EXPERTS': 1}
    files = [f'--gin_file={file}' for file in (FROM_CHECKPOINT, moe, runs.LLM_TASK, run) if file is not None]
    found, _, error = call(['plan', *files, *(f'--gin.{name}={value}' for name, value in bindings.items())], capsys)
    assert found == code and said in error, error


@pytest.mark.exhaustive
def test_converted_from_a_dense_folder(tmp_path, capsys):
    options = ['--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=3', '--gin.NUM_SELECTED_EXPERTS=1', '--format=huggingface']
    code, output, error = call(
        ['convert', f'--from={llms.FOLDERS / "llama"}', f'--to={tmp_path / "moe"}', *options], capsys
    )
    assert code == 0 and WARNING in error
    difference = float(output.partition('by at most ')[2].split()[0])
    assert difference < 1e-5
