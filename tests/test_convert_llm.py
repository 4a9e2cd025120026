"""From a Hugging Face folder to a folder with experts, without a file of a model: bytes, types, files, interruptions."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from tests import runs
from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.test_cli import call
from upcycle.checkpoints import arrays, open_checkpoint, safetensors
from upcycle.checkpoints.hf.writer import HuggingFaceWriter
from upcycle.formats import ANY_FOLDER
from upcycle.gin_files import FROM_CHECKPOINT

pytestmark = requires_fixtures

DENSE = 'upcycle_llama_to_mixtral/dense'
FILES = {
    'generation_config.json': '{"eos_token_id": 2}',
    'tokenizer.json': '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": []}',
    'tokenizer_config.json': '{"auto_map": {"AutoTokenizer": "tokenization_x.Tokenizer"}}',
    'chat_template.jinja': '{{ messages }}',
    'LICENSE.txt': 'all rights given',
}
_GATE = 'model.layers.1.mlp.gate_proj.weight'


@pytest.fixture
def source(tmp_path):
    """A dense folder in bfloat16, with one tensor in float32, a tokenizer and code."""

    def change(tensors):
        return {name: x if name == _GATE else x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}

    folder = llms.copy(DENSE, tmp_path / 'dense', change=change)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / 'modeling_x.py').write_text('raise SystemExit')
    return folder


@pytest.fixture
def convert(capsys):
    def run(source, target, *options):
        named = [f'--from={each}' for each in (source if isinstance(source, list) else [source])]
        more = ['--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=4', '--format=huggingface', *options]
        return call(['convert', *named, f'--to={target}', *more], capsys)

    return run


def test_a_folder_with_the_bytes_and_files_of_the_dense_one(source, tmp_path, convert):
    target = tmp_path / 'moe'
    code, output, error = convert(source, target, '--verify')
    assert code == 0, error
    assert 'does not tell its step' not in error and open_checkpoint(target).step is None
    assert output.endswith(f'wrote {target} (Mixtral, 4 experts, top 2, bfloat16)\n')
    assert 'on random inputs the logits differ from those of the dense model by at most' in output
    # Nothing but routers changes on the way, and each tensor keeps its type.
    dense, moe = llms.tensors_of(source), llms.tensors_of(target)
    gates = {name for name in moe if name.endswith('.gate.weight')}
    assert len(gates) == 3 and {moe[name].dtype for name in gates} == {np.dtype('float32')}
    parts = {'w1': 'gate_proj', 'w3': 'up_proj', 'w2': 'down_proj'}
    for name in moe.keys() - gates:
        layer, _, rest = name.partition('.block_sparse_moe.experts.')
        original = dense[f'{layer}.mlp.{parts[rest.split(".")[1]]}.weight' if rest else name]
        assert moe[name].dtype == original.dtype and moe[name].tobytes() == original.tobytes(), name
    # The files of the folder, without its code.
    assert {name: (target / name).read_text() for name in FILES} == FILES
    assert not list(target.glob('*.py')) and not list(target.glob('*journal*'))
    assert 'is not copied' in error and 'modeling_x.py, tokenizer_config.json (auto_map)' in error
    config = json.loads((target / 'config.json').read_text())
    assert config['model_type'] == 'mixtral' and config['torch_dtype'] == 'bfloat16'
    assert config['max_position_embeddings'] == llms.config_of(DENSE)['max_position_embeddings']
    # The receipt, and its hash in the header.
    text = (target / 'upcycle_receipt.json').read_bytes()
    reader = open_checkpoint(target)
    _, notes = safetensors.read_files(target_file(target))
    assert notes['upcycle_receipt'] == hashlib.sha256(text).hexdigest() and notes['format'] == 'pt'
    check = json.loads(text)['function_check']
    assert check['whole_model'] == 'pending' and len(check['layers']) == 3
    assert all(
        layer['max_abs_difference_covered'] < 1e-5 and layer['covered'] == 1 for layer in check['layers'].values()
    )
    assert check['logits']['max_abs_difference'] < 1e-4
    assert reader.metadata['receipt'] == json.loads(text)


def target_file(folder):
    from etils import epath

    return epath.Path(folder) / safetensors.SINGLE


def test_a_receipt_of_other_weights_is_ignored(source, tmp_path, convert, capsys):
    convert(source, tmp_path / 'moe')
    (tmp_path / 'moe' / 'upcycle_receipt.json').write_text('{}')
    assert 'receipt' not in open_checkpoint(tmp_path / 'moe').metadata
    assert 'is not the receipt that the weights were written with' in capsys.readouterr().err


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_one_type_for_all(dtype, source, tmp_path, convert):
    assert convert(source, tmp_path / 'moe', f'--dtype={dtype}')[0] == 0
    types = {name: x.dtype.name for name, x in llms.tensors_of(tmp_path / 'moe').items()}
    assert {types[name] for name in types if not name.endswith('.gate.weight')} == {dtype}


def test_an_interrupted_write_continues(source, tmp_path, convert, monkeypatch):
    assert convert(source, tmp_path / 'whole')[0] == 0
    write, done = HuggingFaceWriter.write, []

    def fail(self, name, region, value):
        if len(done) == 40:
            raise KeyboardInterrupt
        done.append((name, str(region)))
        write(self, name, region, value)

    monkeypatch.setattr(HuggingFaceWriter, 'write', fail)
    assert convert(source, tmp_path / 'cut')[0] == 130
    again = []

    def count(self, name, region, value):
        again.append((name, str(region)))
        write(self, name, region, value)

    monkeypatch.setattr(HuggingFaceWriter, 'write', count)
    assert not (tmp_path / 'cut').exists()
    code, _, error = convert(source, tmp_path / 'cut', '--dtype=float32')
    assert code == 2 and 'holds another interrupted write' in error
    assert convert(source, tmp_path / 'cut', '--verify')[0] == 0
    assert {*done} & {*again} <= {('step', '()')} and len(again) > 10
    whole, cut = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ('whole', 'cut'))
    assert whole == cut


_KILLED = """
import os, signal
from upcycle import cli
from upcycle.checkpoints import journal, staging
from upcycle.checkpoints.direct import DirectFile
from upcycle.checkpoints.hf.writer import HuggingFaceWriter
HuggingFaceWriter.__init__.__defaults__ = (HuggingFaceWriter.__init__.__defaults__[0], {shard_bytes})
journal._SECONDS_BETWEEN_SYNCS = 0.0
write, calls = {owner}.{name}, [0]
def die(*arguments):
    calls[0] += 1
    if calls[0] == {call}:
        if {name!r} == 'write':  # half of it
            write(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
{owner}.{name} = die
cli.main({command!r})
"""


@pytest.mark.exhaustive  # starts a process for each case
@pytest.mark.parametrize(
    ('owner', 'name', 'number'),
    [
        *(('DirectFile', 'write', number) for number in (1, 7, 20, 40, 61)),
        ('DirectFile', 'finish', 1),  # one of two headers is written
        ('DirectFile', 'finish', 2),
        ('journal.Journal', 'remove', 1),
        ('staging', 'give_name', 1),
    ],
)
def test_killed_at_any_moment(owner, name, number, source, tmp_path, convert, monkeypatch):
    shard_bytes = 100_000
    cut, whole = tmp_path / 'cut', tmp_path / 'whole'
    command = ['convert', f'--from={source}', f'--to={cut}', '--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=4']
    command = [*command, '--format=huggingface']
    code = _KILLED.format(owner=owner, name=name, call=number, shard_bytes=shard_bytes, command=command)
    killed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not cut.exists()
    monkeypatch.setattr(HuggingFaceWriter.__init__, '__defaults__', (ANY_FOLDER, shard_bytes))
    for target in (cut, whole):
        status, _, error = convert(source, target)
        assert status == 0, error
    files = [{file.name: file.read_bytes() for file in target.iterdir()} for target in (cut, whole)]
    assert files[0] == files[1] and len([file for file in files[0] if file.endswith('.safetensors')]) > 1
    assert {path.name for path in tmp_path.iterdir()} == {'dense', 'cut', 'whole'}


def test_verification_notices_a_disk_that_lies(source, tmp_path, convert, monkeypatch):
    read = arrays.ArrayReader.read

    def lie(self, name, *rest, **more):
        value = read(self, name, *rest, **more)
        if self.path.endswith('upcycle') and name.endswith('layers_1/mlp/expert/wo/kernel'):
            value = value.copy()
            value[0, 5] += 1
        return value

    monkeypatch.setattr(arrays.ArrayReader, 'read', lie)
    code, _, error = convert(source, tmp_path / 'moe', '--verify')
    assert code == 2 and 'layers_1/mlp/expert/wo/kernel was not written correctly' in error
    assert {path.name for path in tmp_path.iterdir()} == {'dense'}


def test_a_run_from_a_folder_that_is_gone_later(source, tmp_path, capsys):
    """plan, train, resume and export; the folder is removed after the first steps."""
    run, target = tmp_path / 'run', tmp_path / 'out'
    files = (FROM_CHECKPOINT, 'moe/llm.gin', runs.LLM_TASK, 'runs/upcycle.gin')
    small = {**runs.LLM_STEPS, 'NUM_EMBEDDINGS': 128, 'NUM_EXPERTS': 4, 'MODEL_DIR': run, 'WARMUP_STEPS': 2}
    named = [f'--gin_file={file}' for file in files]
    named += [f'--gin.{name}={value}' for name, value in (small | {'INITIAL_CHECKPOINT_PATH': source}).items()]
    code, output, error = call(['plan', '--json', *named, '--gin.TRAIN_STEPS=2'], capsys)
    assert code == 0 and json.loads(output)['leaves'] and 'start at step 0' in error
    assert call(['train', *named, '--gin.TRAIN_STEPS=2'], capsys)[0] == 0
    shutil.rmtree(source)
    longer = ['train', *named, '--gin.TRAIN_STEPS=2', '--gin.CHECKPOINT_PERIOD=1']
    assert call(longer, capsys)[0] == 0  # the learning rate depends on the last step, which cannot change
    assert (
        call(['export', f'--from={run}', f'--to={target}', '--format=huggingface', '--optimizer_state=none'], capsys)[0]
        == 0
    )
    assert {name: (target / name).read_text() for name in FILES} == FILES
    ours, theirs = open_checkpoint(run), open_checkpoint(target)
    names = [name for name in ours.leaves() if name.startswith('params/')]
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in names)
    assert json.loads((target / 'config.json').read_text())['bos_token_id'] == 1


def test_through_a_checkpoint_of_ours(source, tmp_path, convert, capsys):
    """The companions follow a conversion into our format, and leave it again."""
    ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
    assert convert(source, ours, '--format=upcycle', '--dtype=bfloat16', '--optimizer_state=none')[0] == 0
    shutil.rmtree(source)
    assert call(['export', f'--from={ours}', f'--to={theirs}', '--format=huggingface'], capsys)[0] == 0
    assert {name: (theirs / name).read_text() for name in FILES} == FILES


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rope_theta': 500.0}, r'other is not of the same base model (rope_theta is 500.0 there and 10000.0 in'),
        (
            {'tokenizer.json': '{"model": {"type": "WordLevel", "vocab": {"b": 0, "a": 1}}}'},
            'in model.vocab of tokenizer.json',
        ),
    ],
)
def test_branches_of_other_models_are_refused(change, message, source, tmp_path, convert):
    other = tmp_path / 'other'
    shutil.copytree(source, other)
    config = json.loads((other / 'config.json').read_text())
    for name, value in change.items():
        if name.endswith('.json'):
            (other / name).write_text(value)
        else:
            (other / 'config.json').write_text(
                json.dumps(config | {'rope_parameters': {name: value, 'rope_type': 'default'}})
            )
    code, _, error = convert([source, other], tmp_path / 'moe', '--gin_file=surgery/branches.gin')
    assert code == 2 and message in error
    assert not (tmp_path / 'moe').exists()


def test_a_branch_of_another_size_is_named(source, tmp_path, convert):
    def fewer(tensors):
        rows = ('lm_head.weight', 'model.embed_tokens.weight')
        return {name: x[:120] if name in rows else x for name, x in tensors.items() if '.layers.2.' not in name}

    other = llms.copy(DENSE, tmp_path / 'other', change=fewer, vocab_size=120, num_hidden_layers=2)
    code, _, error = convert([source, other], tmp_path / 'moe', '--gin_file=surgery/branches.gin')
    assert code == 2 and error.count('\n') == 1 + error.count('warning')
    assert (
        f'{other} is not of the same base model (vocab_size is 120 there and 128 in {source}; num_layers is 2' in error
    )


def test_what_the_first_branch_decides_is_said(source, tmp_path, convert):
    other = tmp_path / 'other'
    shutil.copytree(source, other)
    config = json.loads((other / 'config.json').read_text())
    (other / 'config.json').write_text(json.dumps(config | {'eos_token_id': [2, 5]}))
    (other / 'chat_template.jinja').write_text('{{ other }}')
    code, _, error = convert([source, other], tmp_path / 'moe', '--gin_file=surgery/branches.gin')
    assert code == 0
    assert f'{other} differs from {source} in eos_token_id, chat_template.jinja: those of {source} are written' in error


@pytest.mark.parametrize('rest', ['mean', 'first'])
def test_branches(rest, source, tmp_path, convert):
    other = llms.copy(DENSE, tmp_path / 'other', change=lambda tensors: {n: 2 * x for n, x in tensors.items()})
    options = ['--gin_file=surgery/branches.gin', f'--gin.BRANCHES_REST={rest}', '--dtype=float32']
    assert convert([source, other], tmp_path / 'moe', *options)[0] == 0
    one, two, moe = (llms.tensors_of(tmp_path / name) for name in ('dense', 'other', 'moe'))
    norm = one['model.norm.weight'].astype(np.float32)
    expected = norm if rest == 'first' else (norm + two['model.norm.weight']) / 2
    np.testing.assert_array_equal(moe['model.norm.weight'], expected)
    for expert, dense in enumerate([one, two, one, two]):
        made = moe[f'model.layers.1.block_sparse_moe.experts.{expert}.w1.weight']
        np.testing.assert_array_equal(made, dense[_GATE].astype(np.float32))
