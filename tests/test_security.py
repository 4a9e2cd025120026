"""SECURITY.md, as far as it can be checked: nothing executes what it reads, and no password is shown."""

import ast
import json
import os
import pathlib
import shutil
import types

import pytest
from etils import epath

from upcycle import cli, configuration, files, gin_data
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import evaluate
from upcycle.errors import UserError, without_password

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ('upcycle', 'scripts', 'configs') for path in sorted((ROOT / folder).rglob('*.py'))]
MODULES = {'pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml', 'torch', 'xml'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pty.spawn'}
# Files that the user names are programs (configs/*.py), and what scripts make themselves may be anything.
ALLOWED = {
    'scripts/fuzzing/checkpoints.py': {'allow_pickle'},
    # They compare with transformers, which reads safetensors and GGUF files here.
    **dict.fromkeys(('scripts/bench/peers', 'scripts/real_llm.py', 'scripts/serve_check.py'), {'torch'}),
}


def name_of(node):
    """'os.system' of its syntax tree, '' of something that is no dotted name."""
    if isinstance(node, ast.Attribute):
        inner = name_of(node.value)
        return f'{inner}.{node.attr}' if inner else ''
    return node.id if isinstance(node, ast.Name) else ''


def dangers(source):
    """What in a program executes what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name.split('.')[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or '').split('.')[0]} & MODULES
        elif isinstance(node, ast.Call):
            yield from {name_of(node.func)} & CALLS
            for keyword in node.keywords:
                if keyword.arg in ('shell', 'allow_pickle') and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield keyword.arg
            if name_of(node.func) in ('np.load', 'numpy.load') and not any(
                k.arg == 'allow_pickle' for k in node.keywords
            ):
                yield 'np.load without allow_pickle=False'


@pytest.mark.parametrize(
    ('source', 'found'),
    [
        ('import pickle', {'pickle'}),
        ('from torch.serialization import load', {'torch'}),
        ('eval(x)', {'eval'}),
        ('import os\nos.system(x)', {'os.system'}),
        ('subprocess.run(x, shell=True)', {'shell'}),
        ('subprocess.run(x, shell=flag)', {'shell'}),
        ('np.load(x)', {'np.load without allow_pickle=False'}),
        ('np.load(x, allow_pickle=True)', {'allow_pickle'}),
        ('np.load(x, allow_pickle=False)\nast.literal_eval(x)\nre.compile(x)\nrun(shell=False)', set()),
    ],
)
def test_the_dangers_are_seen(source, found):
    assert set(dangers(source)) == found


def test_nothing_executes_what_it_reads():
    found = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        allowed = {word for place, words in ALLOWED.items() if name.startswith(place) for word in words}
        if more := set(dangers(path.read_text('utf-8'))) - allowed:
            found[name] = more
    assert SOURCES and not found


PROGRAMS = {
    'another module': 'import os\nA = @os.getcwd()\n',
    'a module of a module of ours': 'import upcycle.commands.train\nupcycle.commands.train.jax.devices.x = 1\n',
    'a function of ours': 'import upcycle.commands.train\nupcycle.training.run.Run.seed = @upcycle.commands.train.run()\n',
    'another module for tasks': "import upcycle.data.text\nupcycle.data.text.DatasetConfig.module = 'evil'\n",
    'code that TFDS downloads': "import upcycle.data.tfds_images\nupcycle.data.tfds_images.TfdsImages.name = 'huggingface:x/y'\n",
    'a namespace of TFDS': "import upcycle.data.tfds_images\ntrain/upcycle.data.tfds_images.TfdsImages.name = 'kaggle:x:1.0.0'\n",
    'a block': "import upcycle.data.tfds_images\nupcycle.data.tfds_images.TfdsImages:\n  name = ['a']\n",
    'another file': "include '/etc/passwd'\n",
    'an alias': 'from upcycle.commands import train as run\nrun.run.name = 3\n',
    'no gin': 'import os; os.getcwd()\n',
}


@pytest.mark.parametrize('program', PROGRAMS)
def test_a_program_beside_a_checkpoint_is_not_run(program, tmp_path, capsys, monkeypatch):
    (tmp_path / 'config.gin').write_text('from __gin__ import dynamic_registration\n' + PROGRAMS[program])
    monkeypatch.setattr(evaluate, 'open_checkpoint', lambda path: types.SimpleNamespace(path=path))
    monkeypatch.setattr(evaluate, 'require_whole', lambda path: None)
    monkeypatch.setattr(configuration, 'load_model', lambda *_: pytest.fail('it was read'))
    with pytest.raises(SystemExit) as stop:
        cli.main(['eval', f'--from={tmp_path}'])
    assert stop.value.code == 2
    assert f'--gin_file={tmp_path}/config.gin' in capsys.readouterr().err


def test_the_configuration_of_a_run_is_data(upcycled):
    gin_data.require_data(f'{upcycled}/config.gin')


@pytest.mark.parametrize(
    'name', ['imagenet2012', 'imagenet2012:5.1.0', 'imagenet2012_subset/1pct:5.*.*', 'cifar10/plain-text:3.0.2']
)
def test_a_data_set_of_tfds_is_data(name, tmp_path):
    lines = ['from __gin__ import dynamic_registration', 'import upcycle.data.tfds_images']
    lines += [f'validation/upcycle.data.tfds_images.TfdsImages.name = {name!r}']
    (tmp_path / 'config.gin').write_text('\n'.join(lines))
    gin_data.require_data(str(tmp_path / 'config.gin'))


def test_a_copy_of_a_configuration_in_a_bucket_is_removed(tmp_path, monkeypatch):
    """And the message names the bucket, and not the copy."""
    (tmp_path / 'config.gin').write_text('from __gin__ import dynamic_registration\n')
    monkeypatch.setattr(files, 'is_remote', lambda path: True)
    monkeypatch.setattr(files, 'absolute', epath.Path)
    with evaluate.config_of(str(tmp_path)) as copy:
        assert pathlib.Path(copy).read_text() == (tmp_path / 'config.gin').read_text()
    assert not os.path.exists(copy)
    (tmp_path / 'config.gin').write_text('import os\n')
    with pytest.raises(
        UserError, match=f'{tmp_path}/config.gin does more than describe a run .* name a local copy with --gin_file.'
    ):
        evaluate.config_of(str(tmp_path)).__enter__()


def test_passwords_are_neither_shown_nor_kept(capsys, tmp_path):
    address = 'https://me:secret@host/model'
    assert without_password(f'{address} of s3://key:secret@bucket.') == 'https://***@host/model of s3://***@bucket.'
    for plain in ('gs://bucket/run@2', 'me@host', 'https://host/@x'):
        assert without_password(plain) == plain
    arguments = ['train', '--gin_file=models/t5_1_1_tiny.gin', f'--gin.INITIAL_CHECKPOINT_PATH={address}']
    for command in (arguments, ['inspect', address], ['inspect', address.replace('https', 's3')]):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        out = ''.join(capsys.readouterr())
        assert stop.value.code == 2 and 'secret' not in out and '***@host' in out


def test_an_index_that_claims_too_much_is_refused_before_it_is_believed(dense, tmp_path):
    step = pathlib.Path(shutil.copytree(f'{dense}/checkpoints/4', tmp_path / '4'))
    index = json.loads((step / 'state' / '_METADATA').read_text())
    entry = next(iter(index['tree_metadata'].values()))
    entry['key_metadata'][-1]['key'] = '../../../elsewhere'
    (step / 'state' / '_METADATA').write_text(json.dumps(index))
    with pytest.raises(UserError, match='outside its folder'):
        open_checkpoint(step)
