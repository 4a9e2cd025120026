"""Conversion writes the state that the trainer would start from, deterministically, and checks it against the source."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import runs
from tests.checkpoints import trees
from tests.test_cli import call
from upcycle import configuration, outputs, partitioning
from upcycle import conversion as offline
from upcycle.checkpoints import arrays, folder_writer, open_checkpoint, writing
from upcycle.errors import UserError
from upcycle.training.first_state import from_checkpoint
from upcycle.training.start import Start
from upcycle.training.state import as_dict

MODEL = (runs.TINY, 'moe/t5.gin')


def arguments(source, target, *more, files=MODEL, experts=4):
    # The task of the tiny run sets it.
    vocabulary = ['--gin.NUM_EMBEDDINGS=384'] if files is MODEL else []
    named = [f'--from={source}', f'--to={target}', '--gin.NUM_EXPERTS=' + str(experts), *vocabulary]
    return ['convert', *(f'--gin_file={file}' for file in files), *named, *more]


def run_of(dense, tmp_path, **more):
    return runs.build('upcycle', tmp_path / 'unused', 10, INITIAL_CHECKPOINT_PATH=dense, **more)


def first_state(run):
    """Returns the state that a trainer starts from, flat and without its random key, and the receipt."""
    start = Start.of(run)
    with partitioning.use(start.mesh):
        batch = next(run.train_data.batches(0))
        batch = partitioning.put_batch(batch, partitioning.batch_sharding(start.mesh))
        state, paper = from_checkpoint(start, batch)
    flat = flatten_dict(as_dict(state), sep='/')
    del flat['rng']
    return flat, paper


@pytest.fixture(scope='module')
def online(dense, tmp_path_factory):
    return first_state(run_of(dense, tmp_path_factory.mktemp('online')))


@pytest.fixture(scope='module')
def converted(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp('converted')
    return offline.convert(run_of(dense, folder), str(folder / 'moe'), 'upcycle')


def contents(path):
    """Returns every leaf of a checkpoint except the run's random key."""
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.leaves() if name != 'rng'}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = np.asarray(right[name])
        assert value.dtype == other.dtype and value.shape == other.shape, name
        assert value.tobytes() == other.tobytes(), name


def test_is_what_the_trainer_starts_from(online, converted):
    flat, paper = online
    assert_equal(contents(converted), flat)
    written = open_checkpoint(converted).metadata['receipt']
    paper = json.loads(json.dumps(paper))
    assert written.keys() == paper.keys()
    for name in written.keys() - {'function_check', 'plan', 'dropped'}:
        assert written[name] == paper[name], name
    # The run makes its random key.
    assert written['plan'] == [row for row in paper['plan'] if row['target'] != 'rng']
    assert written['function_check']['whole_model'] == 'pending' and 'lineage' not in written
    layers = written['function_check']['layers']
    assert set(layers) == {'encoder/layers_1/mlp', 'decoder/layers_1/mlp'}
    for layer in layers.values():
        assert 0.5 < layer['covered'] <= 1
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)
        assert layer['max_abs_on_uncovered'] == 0


@pytest.mark.parametrize('operator', ['drop', 'noise', 'random'])
def test_an_operator_and_tiled_state(operator, dense, tmp_path):
    run = run_of(dense, tmp_path, EXPERT_OPERATOR=operator, OPTIMIZER_STATE='tile', UPCYCLE_SEED=3)
    path = offline.convert(run, str(tmp_path / 'offline'), 'upcycle', verify=True)
    assert_equal(contents(path), first_state(run)[0])


@pytest.mark.parametrize('operator', ['granular', 'partial'])
def test_narrower_experts(operator, dense, tmp_path):
    narrow = {'EXPERT_GRANULARITY': 2, 'NORMALIZE_COMBINE_WEIGHTS': True, 'NUM_SELECTED_EXPERTS': 2}
    run = run_of(dense, tmp_path, EXPERT_OPERATOR=operator, UPCYCLE_SEED=3, **narrow)
    path = offline.convert(run, str(tmp_path / 'offline'), 'upcycle', verify=True)
    assert_equal(contents(path), first_state(run)[0])


def test_groups_of_the_batches_to_come_change_nothing(dense, converted, tmp_path):
    run = run_of(dense, tmp_path, GROUPS_MULTIPLE_OF=8)
    assert_equal(contents(offline.convert(run, str(tmp_path / 'offline'), 'upcycle')), contents(converted))


@pytest.mark.parametrize('operator', ['copy', 'drop'])
def test_soft_moe_has_several_columns_for_an_expert(operator, dense, tmp_path):
    soft = {'ENCODER_ROUTER': 'soft', 'SLOTS_PER_EXPERT': 2, 'GROUP_SIZE': 32}
    run = run_of(dense, tmp_path, EXPERT_OPERATOR=operator, UPCYCLE_SEED=3, **soft)
    path = offline.convert(run, str(tmp_path / 'offline'), 'upcycle', verify=True)
    made = contents(path)
    assert_equal(made, first_state(run)[0])
    kernel = made['params/encoder/layers_1/mlp/router/router_weights/w/kernel']
    assert kernel.shape[1] == 2 * 4 and len(np.unique(kernel, axis=1).T) == 8


def test_the_same_seed_gives_the_same_bytes(dense, tmp_path, capsys):
    made = {}
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        code, out, error = call(arguments(dense, tmp_path / name, f'--seed={seed}', '--operator=drop'), capsys)
        assert code == 0, error
        assert out == f'wrote {tmp_path}/{name}/checkpoints/4\n'
        files = (tmp_path / name / 'checkpoints' / '4' / 'state').rglob('*')
        made[name] = {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files if file.is_file()}
    assert made['a'] == made['b']
    assert made['a'].keys() == made['c'].keys() and made['a'] != made['c']


def experts_of(leaves):
    return {name: leaf for name, leaf in leaves.items() if name.startswith('params/') and '/expert/' in name}


def test_out_of_several_checkpoints(dense, converted, tmp_path, capsys):
    """Of equal sources the experts are copies, and the mean equals each of them."""
    more = (f'--from={dense}', '--gin_file=surgery/branches.gin')
    code, _, error = call(arguments(dense, tmp_path / 'out', *more), capsys)
    assert code == 0, error
    made = contents(tmp_path / 'out')
    assert_equal(made, contents(converted))
    paper = open_checkpoint(tmp_path / 'out').metadata['receipt']
    assert set(map(str, paper['lineage']['params/encoder/layers_1/mlp'])) == {'[0]', '[1]'}
    assert len(paper['source']['path']) == 2 and paper['function_check']['layers'] == {}


def test_more_experts_and_back_to_a_dense_model(dense, converted, tmp_path, capsys):
    more = ('--gin_file=surgery/grow.gin', '--verify')
    code, _, error = call(arguments(converted, tmp_path / 'grown', *more, experts=8), capsys)
    assert code == 0, error
    grown = contents(tmp_path / 'grown')
    for name, leaf in experts_of(contents(converted)).items():
        np.testing.assert_array_equal(grown[name], np.concatenate([leaf, leaf]))
    paper = open_checkpoint(tmp_path / 'grown').metadata['receipt']
    assert paper['lineage']['params/encoder/layers_1/mlp'] == [[0], [1], [2], [3]] * 2
    assert len(paper['lineage']) == 2 and paper['router_noise'] == 0.01
    files = (runs.TINY, 'surgery/average.gin')
    command = ['convert', *(f'--gin_file={file}' for file in files), '--gin.NUM_EMBEDDINGS=384']
    back = [*command, f'--from={tmp_path}/grown', f'--to={tmp_path}/back', '--optimizer_state=none']
    code, _, error = call([*back, '--format=huggingface'], capsys)
    assert code == 0, error
    assert (tmp_path / 'back' / 'model.safetensors').exists()
    made = contents(tmp_path / 'back')
    expected = {name: leaf for name, leaf in contents(dense).items() if name.startswith('params/')}
    for name, leaf in expected.items():
        np.testing.assert_allclose(made[name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)


def test_large_leaves_reach_hugging_face_in_parts(converted, tmp_path, capsys, monkeypatch):
    """Leaves above 64 MiB are converted in rows, and the tensor is transposed."""
    files = (runs.TINY, 'surgery/average.gin')
    command = ['convert', *(f'--gin_file={file}' for file in files), '--gin.NUM_EMBEDDINGS=384', f'--from={converted}']
    command += ['--optimizer_state=none', '--format=huggingface', '--verify']
    assert call([*command, f'--to={tmp_path}/whole'], capsys)[0] == 0
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)
    monkeypatch.setattr(writing, '_PART_BYTES', 2000)
    writing.parts.cache_clear()
    try:
        code, _, error = call([*command, f'--to={tmp_path}/parts'], capsys)
    finally:
        writing.parts.cache_clear()
    assert code == 0, error
    assert_equal(contents(tmp_path / 'parts'), contents(tmp_path / 'whole'))


def test_what_needs_data_is_refused_before_anything_is_written(dense, tmp_path, capsys):
    code, _, error = call(arguments(dense, tmp_path / 'out', '--gin.ROUTER_INIT=hidden'), capsys)
    assert code == 2 and 'which `upcycle train` computes on a batch' in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('format', ['t5x_legacy', 't5x_orbax'])
def test_into_t5x(format, dense, tmp_path, capsys):
    ours = arguments(dense, tmp_path / 'ours', '--optimizer_state=none', '--dtype=bfloat16')
    assert call(ours, capsys)[0] == 0
    theirs = arguments(dense, tmp_path / 'theirs', '--optimizer_state=none', '--dtype=bfloat16', f'--format={format}')
    code, out, _ = call([*theirs, '--verify'], capsys)
    assert code == 0 and f'wrote {tmp_path}/theirs/checkpoint_4' in out
    assert_equal(contents(tmp_path / 'ours'), contents(tmp_path / 'theirs'))
    read = open_checkpoint(tmp_path / 'theirs')
    assert read.metadata['receipt']['operator'] == 'copy'
    experts = read.leaves()['params/encoder/layers_1/mlp/expert/wo/kernel']
    assert (experts.shape[0], experts.dtype.name) == (4, 'bfloat16')
    assert read.leaves()['params/encoder/layers_1/mlp/router/router_weights/w/kernel'].dtype.name == 'float32'


def test_a_vit_from_a_public_file(tmp_path, capsys):
    from tests.checkpoints import vits

    file, expected = vits.vision_transformer(vits.ours())
    np.savez(tmp_path / 'B_16.npz', **file)
    sizes = {
        'EMBED_DIM': vits.WIDTH,
        'NUM_HEADS': vits.HEADS,
        'MLP_DIM': vits.MLP,
        'NUM_LAYERS': vits.LAYERS,
        'PATCH_SIZE': vits.PATCH,
        'IMAGE_SIZE': vits.PATCH * vits.GRID,
        'NUM_CLASSES': vits.CLASSES,
        'POOLING': 'token',
        'MOE_LAYERS': '(2,)',
    }
    bindings = [f'--gin.{name}={value}' for name, value in sizes.items()]
    command = arguments(
        tmp_path / 'B_16.npz', tmp_path / 'moe.npz', *bindings, files=('models/vit_b16.gin', 'moe/vit.gin'), experts=3
    )
    command += ['--format=vit_npz', '--optimizer_state=none', '--verify']
    code, _, error = call(command, capsys)
    assert code == 2 and 'DENSE_STEP' in error and not (tmp_path / 'moe.npz').exists()
    code, _, error = call([*command, '--step=300'], capsys)
    assert code == 0, error
    made = contents(tmp_path / 'moe.npz')
    assert made['step'] == 300
    mlp = 'Transformer/encoderblock_2/MlpBlock_0'
    for leaf in ('Dense_0/kernel', 'Dense_1/bias'):
        experts = made[f'params/{mlp}/expert/{leaf}']
        assert len(experts) == 3 and all((expert == expected[f'params/{mlp}/{leaf}']).all() for expert in experts)
    np.testing.assert_array_equal(made['params/cls'], expected['params/cls'])
    code, _, error = call([*command, '--step=300', '--gin.GELU=erf', f'--to={tmp_path}/y.npz'], capsys)
    assert code == 2 and "GELU = 'tanh'" in error and "'erf'" in error


def test_goes_on_where_it_was_cut_off(dense, tmp_path, monkeypatch):
    run = run_of(dense, tmp_path)
    whole = offline.convert(run, str(tmp_path / 'whole'), 'upcycle')
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)  # an expert a chunk, however small
    write = folder_writer.FolderWriter.write
    cut = []

    def fail(self, name, region, value):
        cut.append((name, region))
        if name.endswith('mlp/expert/wi_1/kernel') and region[0].start == 2:
            raise KeyboardInterrupt
        write(self, name, region, value)

    monkeypatch.setattr(folder_writer.FolderWriter, 'write', fail)
    with pytest.raises(KeyboardInterrupt):
        offline.convert(run, str(tmp_path / 'cut'), 'upcycle')
    again = []
    monkeypatch.setattr(
        folder_writer.FolderWriter,
        'write',
        lambda self, name, region, value: again.append((name, region)) or write(self, name, region, value),
    )
    other = run_of(dense, tmp_path, UPCYCLE_SEED=1)
    with pytest.raises(UserError, match='holds another interrupted write .*surgery is'):
        offline.convert(other, str(tmp_path / 'cut'), 'upcycle')
    path = offline.convert(run, str(tmp_path / 'cut'), 'upcycle', verify=True)
    assert not {str(part) for part in cut[:-1]} & {str(part) for part in again}
    assert again[0] == cut[-1] or cut[-1] in again
    assert_equal(contents(path), contents(whole))
    assert open_checkpoint(path).metadata['receipt'] == open_checkpoint(whole).metadata['receipt']


def chunks_of(path, leaf):
    return sorted(path.glob(f'**/*{leaf}/*.*.*'))


def test_copied_experts_are_one_file_with_several_names(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)  # an expert a chunk, however small
    run = run_of(dense, tmp_path, OPTIMIZER_STATE='tile')
    leaves = first_state(run)[0]
    # Room for two copies of an expert, but four are needed.
    size = sum(leaf.nbytes for leaf in leaves.values()) - sum(leaf.nbytes for leaf in experts_of(leaves).values()) // 2
    usage = type('Usage', (), {'free': outputs.SPARE_BYTES + size})
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda folder: usage)
    linked = offline.convert(run, str(tmp_path / 'linked'), 'upcycle', verify=True)
    for leaf in ('params.decoder.layers_1.mlp.expert.wo.kernel', 'opt_state.*decoder.layers_1.mlp.expert.wo.kernel.v'):
        chunks = chunks_of(tmp_path / 'linked', leaf)
        assert len(chunks) == 4 and len({chunk.stat().st_ino for chunk in chunks}) == 1, leaf

    def refuse(*paths):
        raise OSError('no links here')

    monkeypatch.setattr(os, 'link', refuse)
    with pytest.raises(UserError, match='B are needed'):
        offline.convert(run, str(tmp_path / 'copied'), 'upcycle')
    monkeypatch.undo()
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)
    monkeypatch.setattr(os, 'link', refuse)
    copied = offline.convert(run, str(tmp_path / 'copied'), 'upcycle', verify=True)
    assert {chunk.stat().st_nlink for chunk in (tmp_path / 'copied').rglob('*.*.*') if chunk.is_file()} == {1}
    assert_equal(contents(linked), contents(copied))


def test_killed_while_it_writes(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)  # an expert a chunk, however small
    command = arguments(dense, tmp_path / 'out')
    code = f"""
import os, signal
from upcycle import cli
from upcycle.checkpoints import folder_writer, writing
writing._SMALL_BYTES = 0
write, count = folder_writer.FolderWriter.write, [0]
def die(self, *arguments):
    count[0] += 1
    if count[0] == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
folder_writer.FolderWriter.write = die
cli.main({command!r})
"""
    killed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(UserError, match='only interrupted saves'):
        open_checkpoint(tmp_path / 'out')
    assert call(command, capsys)[0] == 0
    assert call(arguments(dense, tmp_path / 'whole'), capsys)[0] == 0
    assert_equal(contents(tmp_path / 'out'), contents(tmp_path / 'whole'))
    files = [sorted(file.name for file in (tmp_path / name).rglob('*')) for name in ('out', 'whole')]
    assert files[0] == files[1]


def test_verification_notices_a_disk_that_lies(dense, tmp_path, monkeypatch):
    read = arrays.ArrayReader.read

    def lie(self, name, *rest, **more):
        value = read(self, name, *rest, **more)
        if self.path.endswith('tmp') and name.endswith('layers_1/mlp/expert/wo/kernel'):
            value = value.copy()
            value.reshape(-1)[5] += 1
        return value

    monkeypatch.setattr(arrays.ArrayReader, 'read', lie)
    run = run_of(dense, tmp_path)
    offline.convert(run, str(tmp_path / 'trusting'), 'upcycle')
    with pytest.raises(UserError, match='layers_1/mlp/expert/wo/kernel was not written correctly'):
        offline.convert(run, str(tmp_path / 'out'), 'upcycle', verify=True)
    assert os.listdir(tmp_path) == ['trusting']


def test_memory_holds_a_layer_and_not_a_model(dense, tmp_path, monkeypatch):
    """Parts reach the writer before the next MLP is read, and a source is read once."""
    order = []
    read, write = offline._Conversion._source, folder_writer.FolderWriter.write
    monkeypatch.setattr(
        offline._Conversion, '_source', lambda self, name: order.append(('read', name)) or read(self, name)
    )
    monkeypatch.setattr(
        folder_writer.FolderWriter,
        'write',
        lambda self, name, *rest: order.append(('write', name)) or write(self, name, *rest),
    )
    offline.convert(run_of(dense, tmp_path), str(tmp_path / 'out'), 'upcycle')
    names = [name for kind, name in order if kind == 'read' and name != 'step']
    assert len(names) == len(set(names))
    first_write = next(i for i, (kind, _) in enumerate(order) if kind == 'write')
    assert first_write < 15 and len(order) > 100


def test_bad_sources_leave_nothing_behind(tmp_path, capsys):
    tree = trees.t5(False, state=True)
    sizes = {'NUM_EMBEDDINGS': 40, 'EMBED_DIM': 16, 'NUM_HEADS': 2, 'HEAD_DIM': 6, 'MLP_DIM': 24}
    bindings = [f'--gin.{name}={value}' for name, value in sizes.items()]
    broken = {'params/encoder/layers_1/mlp/wo/kernel': np.full((24, 16), np.inf, 'f')}
    source = trees.write(tmp_path / 'in', 'upcycle', tree | broken)
    code, _, error = call(arguments(source, tmp_path / 'deep' / 'out', *bindings), capsys)
    assert code == 2 and 'params/encoder/layers_1/mlp/wo/kernel' in error and 'infinite' in error
    code, _, error = call(arguments(source, tmp_path / 'deep' / 'out', *bindings, '--gin.MLP_DIM=25'), capsys)
    assert code == 2 and 'does not fit the model' in error
    code, _, error = call(arguments(source, tmp_path / 'out', *bindings, '--optimizer_state=half'), capsys)
    assert code == 2 and 'OPTIMIZER_STATE' in error
    code, _, error = call(arguments(source, tmp_path / 'out', *bindings, '--operator=clone'), capsys)
    assert code == 2 and 'EXPERT_OPERATOR' in error
    code, _, error = call(arguments(source, tmp_path / 'out', *bindings, '--format=huggingface'), capsys)
    assert code == 2 and 'cannot be stored as huggingface' in error
    assert os.listdir(tmp_path) == ['in']


def continuation(converted, tmp_path):
    """A run that continues a converted checkpoint."""
    files = (runs.TINY, 'moe/t5.gin', runs.TASK, 'runs/continue_dense.gin')
    return configuration.load(files, runs.bindings('upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=converted))


def test_the_first_load_completes_the_receipt(converted, online, tmp_path):
    flat, paper = first_state(continuation(converted, tmp_path))
    assert_equal({name: np.asarray(leaf) for name, leaf in flat.items()}, online[0])
    assert paper['function_check'] == online[1]['function_check']
    assert paper['sha256'] == online[1]['sha256']


def tampered(converted, tmp_path, change):
    """A copy of a converted checkpoint with another receipt."""
    copy = shutil.copytree(converted, tmp_path / 'copy' / 'checkpoints' / '4')
    file = copy / 'metadata' / 'metadata'
    metadata = json.loads(file.read_text())
    change(metadata['receipt'])
    file.write_text(json.dumps(metadata))
    return copy


TAMPERED = {
    'a leaf more': (
        lambda paper: paper['plan'].append({**paper['plan'][-1], 'target': 'params/x'}),
        'params/x .* receipt only',
    ),
    'a leaf less': (
        lambda paper: paper['plan'].remove(next(row for row in paper['plan'] if 'params/' in row['target'])),
        'checkpoint only',
    ),
    'another hash': (
        lambda paper: paper['sha256'].update({'params/encoder/layers_1/mlp/wo/kernel': '0' * 64}),
        'encoder/layers_1/mlp/expert/wo/kernel of .* does not match the hash in its receipt',
    ),
}


@pytest.mark.parametrize('case', TAMPERED)
def test_a_receipt_that_does_not_match_is_reported_on_load(case, converted, tmp_path, capsys):
    change, message = TAMPERED[case]
    copy = tampered(converted, tmp_path, change)
    with pytest.raises(UserError, match=message):
        first_state(continuation(copy, tmp_path))
    if 'hash' not in case:
        code, out, _ = call(['inspect', str(copy)], capsys)
        assert code == 1 and 'the receipt does not match the checkpoint' in out


def test_inspect_shows_experts_and_receipt(converted, capsys):
    code, out, _ = call(['inspect', converted], capsys)
    assert code == 0
    for words in (
        'encoder/layers_*/mlp/expert',
        'encoder/layers_1/mlp',
        'operator copy',
        'whole model: pending',
        '1.0000',
    ):
        assert words in out
    code, out, _ = call(['inspect', converted, '--json'], capsys)
    facts = json.loads(out)
    layer = facts['moe_layers']['params/encoder/layers_1/mlp']
    assert layer['num_experts'] == 4 and layer['cosine']['min'] == pytest.approx(1, abs=1e-6)
    assert layer['router']['std'] == pytest.approx(0.02, rel=0.3)
    assert facts['components']['encoder/layers_*/mlp/expert']['leaves'] == 3
    assert facts['metadata']['receipt']['operator'] == 'copy' and facts['receipt_mismatches'] == []
    code, out, _ = call(['inspect', converted, '--quick', '--leaves'], capsys)
    assert code == 0 and 'params/encoder/layers_1/mlp/expert/wo/kernel' in out and '1.0000' not in out
