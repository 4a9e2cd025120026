"""Outputs of commands: every option and binding is checked before any work, and a wrong path gives a clear error."""

import os
import pathlib
import shutil
import socket

import pytest

from tests import runs
from tests.checkpoints import trees
from tests.test_cli import call, command
from upcycle import outputs
from upcycle.errors import UserError, writing_to
from upcycle.outputs import Kind
from upcycle.transfer import transfer

LONG = 'n' * 250


@pytest.fixture
def places(tmp_path):
    """A folder with paths of several kinds."""
    folder = tmp_path / 'places'
    folder.mkdir()
    (folder / 'file').write_text('mine')
    (folder / 'full').mkdir()
    (folder / 'full' / 'letter').write_text('mine')
    (folder / 'dangling').symlink_to('/nonexistent/disk')
    (folder / 'loop').symlink_to(folder / 'pool')
    (folder / 'pool').symlink_to(folder / 'loop')
    os.mkfifo(folder / 'pipe')
    (folder / 'run' / 'checkpoints' / '4' / 'state').mkdir(parents=True)
    (folder / 'run' / 'checkpoints' / '4' / 'state' / '_METADATA').write_text('{}')
    return folder


# For a folder and for a file: path, words of the message.
NEVER = {
    'below a file': ('file/x', ['file is a file, not a folder']),
    'dangling link': ('dangling', ['dangling is a link to /nonexistent/disk, which does not exist']),
    'below a dangling link': ('dangling/run', ['dangling is a link to /nonexistent/disk']),
    'loop of links': ('loop', ['loop of links']),
    'below a loop': ('loop/run', ['loop of links']),
    'long name': (LONG, ['a name of 250 bytes is too long']),
    'long path': ('/'.join(['p' * 200] * 21), ['bytes is too long']),
    'proc': ('/proc/x', ['/proc']),
    'pipe': ('pipe', ['it is a pipe']),
    'device': ('/dev/null', ['it is a device']),
    'below a device': ('/dev/null/x', ['/dev/null is a device, not a folder']),
    'empty': ('', ['is empty']),
    'zero byte': ('a\0b', ['zero byte']),
    'no such store': ('ftp://host/x', ['ftp://host/x']),
    'no bucket': ('gs://', ['names no bucket']),
    'home of nobody': ('~nobody_here/x', ['~nobody_here/x', 'an unknown user']),
    'among checkpoints': ('run/checkpoints/new', ['run/checkpoints, which holds checkpoints such as 4']),
    'in a checkpoint': ('run/checkpoints/4/state/x', ['run/checkpoints, which holds checkpoints such as 4']),
}


@pytest.mark.parametrize('kind', Kind)
@pytest.mark.parametrize('case', NEVER)
def test_a_path_that_takes_nothing(case, kind, places):
    path, words = NEVER[case]
    before = listing(places)
    with pytest.raises(UserError) as error:
        outputs.check('--out', path if not path or '://' in path or '~' in path else places / path, kind)
    message = str(error.value)
    assert message.startswith(('--out', '~')) or 'bucket' in message
    assert '\n' not in message and all(word in message for word in words), message
    assert listing(places) == before


def listing(folder):
    return sorted(os.fspath(path) for path in folder.rglob('*'))


@pytest.mark.parametrize(
    ('path', 'kind', 'words'),
    [
        ('full', Kind.FILE, 'it is a folder, not a file'),
        ('full', Kind.NEW_FILE, 'it is a folder, not a file'),
        ('file', Kind.FOLDER, 'it is a file, not a folder'),
        ('file', Kind.NEW_FOLDER, 'it is a file, not a folder'),
        ('file', Kind.NEW_FILE, 'exists already'),
        ('full', Kind.NEW_FOLDER, 'exists already'),
    ],
)
def test_something_else_is_there(path, kind, words, places):
    with pytest.raises(UserError, match=words):
        outputs.check('--to', places / path, kind)


@pytest.mark.parametrize(
    ('path', 'kind'),
    [
        ('a/b/c', Kind.FOLDER),
        ('a/b/c.json', Kind.FILE),
        ('file', Kind.FILE),
        ('full', Kind.FOLDER),
        ('.', Kind.NEW_FOLDER),
        ('link/x', Kind.NEW_FOLDER),
        ('é中\udcff', Kind.NEW_FILE),
    ],
)
def test_a_path_that_is_right(path, kind, tmp_path):
    (tmp_path / 'file').write_text('mine') if path == 'file' else None
    (tmp_path / 'full').mkdir() if path == 'full' else None
    if path == 'link/x':
        (tmp_path.parent / f'{tmp_path.name}_real').mkdir()
        (tmp_path / 'link').symlink_to(tmp_path.parent / f'{tmp_path.name}_real')
    before = listing(tmp_path)
    found = outputs.check('--out', tmp_path / path, kind)
    assert os.fspath(found) == os.path.realpath(tmp_path / path)
    assert listing(tmp_path) == before
    if path == 'file':
        assert (tmp_path / 'file').read_text() == 'mine'


def test_sockets_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('s')
        with pytest.raises(UserError, match='it is a socket'):
            outputs.check('--out', 's', Kind.FILE)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_permissions(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match='Permission denied: change the permissions'):
        outputs.check('--out', tmp_path / 'x', Kind.FOLDER)


def test_a_disk_that_is_read_only(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(outputs.tempfile, 'TemporaryFile', refuse)
    state = type('State', (), {'f_flag': os.ST_RDONLY})
    monkeypatch.setattr(outputs.os, 'statvfs', lambda path: state)
    with pytest.raises(UserError, match='Read-only file system: the disk is read-only'):
        outputs.check('--to', tmp_path / 'x', Kind.NEW_FOLDER)


@pytest.mark.parametrize(
    ('free', 'needed', 'said'),
    [
        (
            60_000_000,
            100_000,
            'has 60 MB free, but 67.2 MB are needed (100 kB for the checkpoint and 67.1 MB to stay free)',
        ),
        (0, 0, 'has 0 bytes free, but 1.05 MB are needed'),
        (999, 0, 'has 999 bytes free, but 1.05 MB are needed'),
        (10**9, 3 * 10**12, 'has 1 GB free, but 3 TB are needed (3 TB for the checkpoint and 67.1 MB to stay free)'),
    ],
)
def test_units_show_the_difference(free, needed, said, tmp_path, monkeypatch):
    usage = type('Usage', (), {'free': free})
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(UserError) as error:
        outputs.check('MODEL_DIR', tmp_path / 'x', Kind.FOLDER, needed=needed)
    assert said in str(error.value)


def commands(path):
    """All commands with an output. The other arguments would fail later."""
    model = ['--gin_file=models/t5_1_1_tiny.gin', '--gin_file=moe/t5.gin']
    text = [*model, '--gin_file=tasks/synthetic_text.gin', '--gin_file=runs/scratch.gin']
    return {
        'eval --out': ['eval', '--from=/nowhere', f'--out={path}'],
        'compile --out': ['compile', '--topology=v4:2x2x1', f'--out={path}', *text],
        'compile --hlo': ['compile', '--topology=v4:2x2x1', f'--hlo={path}', *text],
        'report --out': ['report', '/nowhere', f'--out={path}'],
        'sweep --out': ['sweep', '--grid=BATCH_SIZE=4,8', f'--out={path}', *text],
        'quickstart --out': ['quickstart', '--budget=0.001', f'--out={path}'],
        'import --to': ['import', '--from=/nowhere', f'--to={path}'],
        'export --to': ['export', '--from=/nowhere', '--format=huggingface', f'--to={path}'],
        'convert --to': ['convert', '--from=/nowhere', f'--to={path}', *model],
        'train': command('dense', path),
    }


@pytest.mark.parametrize('name', commands(''))
def test_every_command_looks_before_it_works(name, places, capsys):
    code, _, error = call(commands(places / 'file' / 'below')[name], capsys)
    option = name.split(' ')[-1] if ' ' in name else 'MODEL_DIR'
    assert code == 2
    assert f'upcycle: {option}' in error and 'is a file, not a folder' in error, error
    assert (places / 'file').read_text() == 'mine'


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax', 'huggingface', 'vit_npz'])
def test_one_rule_for_folders_that_exist(format, tmp_path, dense_vit, dense):
    source = dense_vit if format == 'vit_npz' else dense
    target = tmp_path / ('x.npz' if format == 'vit_npz' else 'x')
    if format != 'vit_npz':
        target.mkdir()  # an empty one is as good as none
    more = {} if format in ('upcycle', 't5x_legacy', 't5x_orbax') else {'optimizer_state': 'none'}
    transfer(source, target, format, **more)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f'{target} exists already'):
        transfer(source, target, format, **more)
    assert listing(tmp_path) == before


@pytest.mark.parametrize('below', ['', 'checkpoints', 'imported/deep'])
def test_nothing_is_imported_or_converted_into_the_folder_of_a_run(below, dense, tmp_path, capsys):
    before = listing(pathlib.Path(dense))
    model = runs.FILES['upcycle'][:2]
    for arguments in (['import'], ['convert', *(f'--gin_file={file}' for file in model)]):
        code, _, error = call([*arguments, f'--from={dense}', f'--to={os.path.join(dense, below)}'], capsys)
        words = ('the folder of a run', 'exists already', 'holds checkpoints such as')
        assert code == 2 and any(word in error for word in words)
    assert listing(pathlib.Path(dense)) == before


def test_a_write_that_was_cut_off_is_gone_on_with(tmp_path):
    (tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir(parents=True)
    source = trees.write(tmp_path.parent / f'{tmp_path.name}_in', 'upcycle', trees.vit(False, state=False))
    transfer(source, tmp_path, 'upcycle')


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax'])
def test_a_name_that_tensorstore_cannot_open(format, dense, tmp_path):
    with pytest.raises(UserError, match=r'a\\udcff.* is not UTF-8: use another name'):
        transfer(dense, str(tmp_path / 'a\udcff' / 'x'), format)
    assert listing(tmp_path) == []


def test_a_folder_that_vanishes_is_named(tmp_path):
    with pytest.raises(UserError, match='gone/x cannot be written'), writing_to(tmp_path / 'gone'):
        (tmp_path / 'gone' / 'x').write_text('')


def test_what_is_written_replaces_a_file_at_once(places):
    (places / 'link').symlink_to('file')
    outputs.write('--out', places / 'link', 'ä')
    assert (places / 'link').is_symlink() and (places / 'file').read_text(encoding='utf-8') == 'ä'
    outputs.write('--out', places / 'a' / 'b.json', 'x')
    assert (places / 'a' / 'b.json').read_text() == 'x'


@pytest.mark.parametrize('name', ['metrics.jsonl', 'config.gin', 'checkpoints/4/state/_METADATA'])
def test_a_file_of_a_run_is_not_replaced(name, dense, tmp_path):
    run = shutil.copytree(dense, tmp_path / 'run')
    assert (run / name).is_file()
    with pytest.raises(UserError, match='holds checkpoints' if '/' in name else 'is a file of the run in'):
        outputs.check('--out', run / name, outputs.Kind.FILE)
    outputs.check('--out', run / 'eval.json', outputs.Kind.FILE)


@pytest.mark.parametrize('arguments', [['quickstart', '--budget=0.0001'], ['report', 'x']])
def test_an_output_that_is_empty_is_not_the_default(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, error = call([*arguments, '--out='], capsys)
    assert code == 2 and '--out is empty' in error
    assert listing(tmp_path) == []
