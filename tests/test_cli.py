"""The command line: help is quick; a mistake gives one sentence and exit code 2, and writes nothing."""

import json
import os
import subprocess
import sys

import pytest

from tests import runs
from upcycle import cli


def call(arguments, capsys):
    """Runs a command; returns its exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code, *capsys.readouterr()


def command(kind, model_dir, steps=6, files=None, **more):
    return [
        'train',
        *(f'--gin_file={file}' for file in files or runs.FILES[kind]),
        *(f'--gin.{name}={value}' for name, value in runs.bindings(kind, model_dir, steps, **more).items()),
    ]


# Mistake: the kind of run, bindings, words of the message.
MISTAKES = {
    'unused binding': ('dense', {'NUM_EXPERTS': 8}, ['NUM_EXPERTS', 'is unused']),
    'mistyped binding': ('dense', {'BATCH_SIZ': 8}, ['BATCH_SIZ', 'did you mean BATCH_SIZE']),
    'unused parameter': ('dense', {'upcycle.moe.config.MoEConfig.num_experts': 8}, ['MoEConfig.num_experts']),
    'experts and mesh': ('scratch', {'MESH_SHAPE': '(1, 3, 1)', 'NUM_EXPERTS': 4}, ['MESH_SHAPE']),
    'layer out of range': ('scratch', {'ENCODER_MOE_LAYERS': '(1, 2)'}, ['ENCODER_MOE_LAYERS', 'layer 2', '0 to 1']),
    'expert choice decoder': ('scratch', {'DECODER_ROUTER': 'expert_choice'}, ['DECODER_ROUTER', 'top_k']),
    'priority in a decoder': ('scratch', {'DECODER_FILL_ORDER': 'priority'}, ['FILL_ORDER', 'token_major']),
    'capacity of zero': ('scratch', {'TRAIN_EXPERT_CAPACITY_FACTOR': 0}, ['TRAIN_EXPERT_CAPACITY_FACTOR']),
    'no such checkpoint': (
        'upcycle',
        {'INITIAL_CHECKPOINT_PATH': '/nowhere/at/all'},
        ['/nowhere/at/all', 'does not exist'],
    ),
    'no checkpoint named': ('upcycle', {}, ['INITIAL_CHECKPOINT_PATH']),
    'microbatches': ('dense', {'NUM_MICROBATCHES': 3}, ['BATCH_SIZE = 4', '3 microbatches']),
    'groups': ('scratch', {'GROUPS_MULTIPLE_OF': 7}, ['GROUPS_MULTIPLE_OF']),
    'microbatches cut groups': ('scratch', {'NUM_MICROBATCHES': 2}, ['NUM_MICROBATCHES = 2', 'GROUPS_MULTIPLE_OF']),
    'too many chosen': ('scratch', {'NUM_SELECTED_EXPERTS': 9}, ['NUM_SELECTED_EXPERTS']),
    'steps': ('dense', {'TRAIN_STEPS': 'many'}, ['TRAIN_STEPS']),
    'vocabulary': ('text dense', {'NUM_EMBEDDINGS': 128}, ['NUM_EMBEDDINGS', '359']),
    'dtype': ('dense', {'ACTIVATION_DTYPE': 'float8'}, ['ACTIVATION_DTYPE']),
    'activation': (
        'dense',
        {'MLP_ACTIVATIONS': "('gelu', 'linaer')"},
        ["MLP_ACTIVATIONS = ('gelu', 'linaer')", 'gelu, relu, silu, linear'],
    ),
    'no activation': ('dense', {'MLP_ACTIVATIONS': '()'}, ['MLP_ACTIVATIONS = () must be one or several of']),
    'mesh in a word': ('dense', {'MESH_SHAPE': 'atuo'}, ["MESH_SHAPE = 'atuo' must be 'auto' or three sizes"]),
    'checkpoints, but none': (
        'upcycle',
        {'INITIAL_CHECKPOINT_PATH': '()'},
        ['INITIAL_CHECKPOINT_PATH = () is empty'],
    ),
    'task': (
        'text dense',
        {'MIXTURE_OR_TASK_NAME': 'stdlib_span_corruptio'},
        ['MIXTURE_OR_TASK_NAME', 'stdlib_span_corruption'],
    ),
    'lengths': ('text dense', {'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 3}"}, ['TASK_FEATURE_LENGTHS']),
    'schedule': ('dense', {'LEARNING_RATE_FACTORS': 'constant * nothing'}, ['LEARNING_RATE_FACTORS', 'nothing']),
    'operator': ('upcycle', {'EXPERT_OPERATOR': 'clone', 'INITIAL_CHECKPOINT_PATH': '/x'}, ['EXPERT_OPERATOR', 'copy']),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence(mistake, tmp_path, capsys):
    kind, more, words = MISTAKES[mistake]
    code, _, error = call(command(kind, tmp_path / 'run', **more), capsys)
    assert code == 2
    assert error.startswith('upcycle: ')
    assert 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert os.listdir(tmp_path) == []


def test_another_architecture_lists_the_leaves(tmp_path, capsys, dense):
    code, _, error = call(command('upcycle', tmp_path / 'run', INITIAL_CHECKPOINT_PATH=dense, MLP_DIM=256), capsys)
    assert code == 2
    assert 'another architecture' in error
    assert 'params/encoder/layers_0/mlp/wi_0/kernel' in error
    assert not (tmp_path / 'run').exists()


def test_a_folder_with_another_run_is_refused(tmp_path, capsys, dense):
    before = sorted(os.listdir(dense))
    code, _, error = call(command('dense', dense, BASE_LEARNING_RATE=0.5), capsys)
    assert code == 2
    assert 'holds another run' in error
    assert 'base_learning_rate is 1.0 and not 0.5' in error
    assert sorted(os.listdir(dense)) == before


def test_a_missing_gin_file(capsys, tmp_path):
    code, _, error = call(command('dense', tmp_path / 'x', files=('models/t5_9.gin',)), capsys)
    assert code == 2
    assert 'models/t5_9.gin does not exist' in error


def test_a_folder_named_as_one_of_ours_hides_no_gin_file(tmp_path, monkeypatch):
    (tmp_path / 'runs').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'runs', raising=False)
    assert runs.build('dense', tmp_path / 'run', 4).total_steps == 4


def test_files_without_a_run(capsys, tmp_path):
    code, _, error = call(['train', '--gin_file=models/t5_1_1_tiny.gin'], capsys)
    assert code == 2
    assert 'runs/' in error


def test_a_file_that_does_not_parse(capsys, tmp_path):
    path = tmp_path / 'bad.gin'
    path.write_text('A = [1, 2\n')
    code, _, error = call(['train', f'--gin_file={path}'], capsys)
    assert code == 2
    assert 'does not parse' in error


def test_plan_prints_and_reads_no_array(capsys, dense, monkeypatch):
    """Except the step, one number, which `train` compares with TRAIN_STEPS."""
    from upcycle.checkpoints import arrays

    read = arrays.ArrayReader.read

    def only_the_step(self, name, *arguments, **more):
        assert name == 'step', 'plan read an array'
        return read(self, name, *arguments, **more)

    monkeypatch.setattr(arrays.ArrayReader, 'read', only_the_step)
    arguments = [*command('upcycle', '/nowhere')[1:], f'--from={dense}']
    code, out, _ = call(['plan', *arguments, '--json'], capsys)
    assert code == 0
    plan = json.loads(out)
    by_target = {row['target']: row for row in plan['rows']}
    assert by_target['params/encoder/layers_1/mlp/expert/wo/kernel']['sources'] == [
        'params/encoder/layers_1/mlp/wo/kernel'
    ]
    assert plan['parameters_after'] > plan['parameters_before'] > 0
    assert plan['bytes_per_device'] > 0
    code, out, _ = call(['plan', *arguments], capsys)
    assert code == 0
    assert 'expert/wo/kernel' in out


def test_plan_fails_when_a_leaf_does_not_match(capsys, dense):
    arguments = [*command('upcycle', '/nowhere', EMBED_DIM=32)[1:], f'--from={dense}']
    code, _, error = call(['plan', *arguments], capsys)
    assert code == 2
    assert 'leaves' in error


def test_inspect(capsys, dense):
    code, out, _ = call(['inspect', dense, '--json'], capsys)
    assert code == 0
    facts = json.loads(out)
    assert (facts['format'], facts['step']) == ('upcycle', 4)


def test_unknown_argument(capsys):
    code, _, error = call(['train', '--steps=3'], capsys)
    assert code == 2
    assert '--steps=3' in error


def test_help_loads_nothing_heavy():
    script = """
import sys
sys.argv = ['upcycle', '--help']
from upcycle import cli
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
    heavy = {'jax', 'flax', 'tensorflow', 'seqio', 'numpy', 'gin'} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'quickstart' in done.stdout
