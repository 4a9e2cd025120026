"""Buckets, devices and processes that do not answer or refuse: a clear error, and a status that tells whether to retry."""

import os
import socket
import subprocess
import sys

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import jax
import pytest
from etils import epath

from tests.test_cli import call, command
from upcycle import files, hosts, platforms
from upcycle.data import tensorflow_quiet
from upcycle.errors import Unavailable, UserError

ADDRESS = 'gs://my-bucket/run'


def tf_error(name, text):
    return getattr(tensorflow_quiet.tensorflow().errors, name)(None, None, text)


def s3_error(status):
    """An error of botocore, which need not be installed; its module identifies it."""
    kind = type('ClientError', (Exception,), {'__module__': 'botocore.exceptions'})
    error = kind('An error occurred (x) when calling the HeadObject operation')
    error.response = {'ResponseMetadata': {'HTTPStatusCode': status}}
    return error


def caused(error, cause):
    error.__cause__ = cause
    return error


SILENT = {
    'no network': lambda: tf_error(
        'FailedPreconditionError',
        "Error executing an HTTP request: libcurl code 6 meaning 'Could not resolve hostname', error details: Could not "
        'resolve host: www.googleapis.com\n\t when reading metadata of gs://my-bucket/run',
    ),
    'unavailable': lambda: tf_error('UnavailableError', 'busy'),
    'deadline': lambda: tf_error('DeadlineExceededError', ''),
    'gcsfs 503': lambda: gcsfs.retry.HttpError({'code': 503, 'message': 'backend error'}),
    'gcsfs 429': lambda: gcsfs.retry.HttpError({'code': 429, 'message': 'slow down'}),
    'aiohttp': lambda: aiohttp.ServerTimeoutError('too slow'),
    'disconnected': lambda: aiohttp.ClientOSError(104, 'Connection reset by peer'),
    'google.auth': lambda: google.auth.exceptions.TransportError('no metadata server'),
    'timeout': lambda: TimeoutError(),
    'tensorstore': lambda: ValueError('UNAVAILABLE: Error reading "gs://my-bucket/run/0": CURL error'),
    'a name': lambda: socket.gaierror(-2, 'Name or service not known'),
    's3': lambda: s3_error(500),
    'wrapped': lambda: caused(RuntimeError('save failed'), tf_error('UnavailableError', 'busy')),
    'in a group': lambda: ExceptionGroup('tasks', [ValueError('x'), tf_error('UnavailableError', 'busy')]),
}
REFUSING = {
    'no bucket': lambda: tf_error('NotFoundError', 'The specified bucket does not exist.'),
    'no rights': lambda: tf_error('PermissionDeniedError', '403 on gs://my-bucket/run'),
    'no credentials': lambda: tf_error('UnauthenticatedError', '401'),
    'no client': lambda: tf_error('UnimplementedError', "File system scheme 's3' not implemented (file: 's3://b/x')"),
    'gcsfs 403': lambda: gcsfs.retry.HttpError({'code': 403, 'message': 'Anonymous caller does not have access'}),
    'gcsfs forbidden': lambda: OSError('Forbidden: https://storage.googleapis.com/storage/v1/b/my-bucket/o'),
    'google.auth': lambda: google.auth.exceptions.DefaultCredentialsError('no credentials were found'),
    's3': lambda: s3_error(403),
    's3 rights': lambda: PermissionError('Access Denied'),
    's3fs is missing': lambda: ImportError('Install s3fs to access S3'),
    'tensorstore': lambda: ValueError(
        'PERMISSION_DENIED: Error reading "gs://my-bucket/run/0": HTTP response code 403'
    ),
}


@pytest.mark.parametrize('case', SILENT)
def test_a_bucket_that_does_not_answer(case):
    error = files.refused_by_bucket(SILENT[case](), ['inspect', ADDRESS])
    assert isinstance(error, Unavailable)
    assert str(error).startswith('gs://my-bucket/run') and 'does not answer' in str(error) and '\n' not in str(error)


@pytest.mark.parametrize('case', REFUSING)
def test_a_bucket_that_says_no(case):
    error = files.refused_by_bucket(REFUSING[case](), ['--gin.INITIAL_CHECKPOINT_PATH=gs://my-bucket/run'])
    assert isinstance(error, UserError) and not isinstance(error, Unavailable)
    assert 'cannot be used' in str(error) and '\n' not in str(error)


@pytest.mark.parametrize(
    'error', [ValueError('shapes differ'), KeyError('x'), RuntimeError('x'), FileNotFoundError(2, 'No such file', '/x')]
)
def test_other_errors_are_no_bucket_s(error):
    assert files.refused_by_bucket(error, ['train', f'--gin.MODEL_DIR={ADDRESS}']) is None
    assert files.refused_by_bucket(SILENT['timeout'](), ['train', '--gin.MODEL_DIR=/x']) is None


@pytest.mark.parametrize(
    'arguments',
    [
        ['inspect', ADDRESS],
        ['report', ADDRESS],
        ['import', f'--from={ADDRESS}', '--to=x'],
        ['export', f'--from={ADDRESS}', '--to=x', '--format=huggingface'],
        ['eval', f'--from={ADDRESS}'],
        ['convert', '--gin_file=models/t5_1_1_tiny.gin', '--gin_file=moe/t5.gin', f'--from={ADDRESS}', '--to=x'],
        ['plan', *command('upcycle', 'x')[1:], f'--from={ADDRESS}'],
        command('dense', ADDRESS),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(('name', 'status'), [('UnavailableError', 69), ('PermissionDeniedError', 2)])
def test_every_command_says_it(arguments, name, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def raises(path, *arguments, **more):
        if str(path).startswith('gs://'):
            raise tf_error(name, f'it is about {path}')
        return os.path.exists(path)

    for method in ('exists', 'is_file', 'is_dir'):
        monkeypatch.setattr(epath.gpath.PosixGPath, method, raises)
    code, _, error = call(arguments, capsys)
    assert code == status
    assert error.splitlines()[-1].startswith('upcycle: gs://my-bucket/run') and 'Traceback' not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('address', ['gs://', 's3://', 'gs:///x', 'gs://?x'])
def test_an_address_without_a_bucket(address, capsys):
    code, _, error = call(['inspect', address], capsys)
    assert code == 2 and 'names no bucket' in error


@pytest.mark.parametrize(
    'address',
    [
        'localhost',
        'localhost:',
        'localhost:abc',
        ':1',
        'x:0',
        'x:65536',
        'x:-1',
        '::1:80',
        '[::1]',
        '[x]:80',
        'a b:80',
        '',
        'u@h:1',
        'x:１２３',
    ],
)
def test_a_coordinator_that_is_no_address(address, tmp_path, capsys):
    options = [f'--coordinator_address={address}', '--process_count=2', '--process_index=0']
    code, _, error = call([*command('dense', tmp_path / 'run'), *options], capsys)
    assert code == 2 and 'is not HOST:PORT' in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('address', ['localhost:1', '10.0.0.1:65535', '[fd00::1]:1234', 'run-0.svc.cluster.local:80'])
def test_a_coordinator_s_address(address):
    host, port = hosts.parse_address(address)
    assert (f'[{host}]:{port}' if ':' in host else f'{host}:{port}') == address


@pytest.mark.parametrize(
    'options', [['--coordinator_timeout=0'], ['--coordinator_timeout=nan'], ['--coordinator_timeout=inf']]
)
def test_a_wait_that_is_none(options, capsys):
    code, _, error = call(['eval', '--from=x', *options], capsys)
    assert code == 2 and '--coordinator_timeout=' in error


class Store:
    """The key-value store of JAX's coordination service, in this process."""

    def __init__(self):
        self.held = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.held
        self.held[key] = value

    def key_value_try_get(self, key):
        return self.held[key]

    def blocking_key_value_get(self, key, milliseconds):
        return self.held[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.held.items() if key.startswith(prefix)]


def test_processes_that_were_told_different_numbers(monkeypatch):
    """JAX uses the number of process 0. A process with another number ends with a message, and so do the others."""
    from jax._src.distributed import global_state

    store, ended = Store(), []
    monkeypatch.setattr(hosts, '_together', None)
    monkeypatch.setattr(hosts, '_end', ended.append)
    monkeypatch.setattr(hosts, '_POLL', 0.01)
    monkeypatch.setattr(global_state, 'client', store)
    for index, count in ((0, 2), (1, 2)):
        monkeypatch.setattr(global_state, 'process_id', index)
        monkeypatch.setattr(global_state, 'num_processes', count)
        hosts._watch_others()
        hosts._together.close()
    first = hosts.Together(store, 0, 2, ended.append, 0.01)
    monkeypatch.setattr(global_state, 'num_processes', 4)
    with pytest.raises(
        UserError, match='--process_count=4, but process 0 was started with 2: use the same number'
    ) as refusal:
        hosts._watch_others()
    hosts._together.fail(2, str(refusal.value))
    first._watching.join()
    assert ended == [2]


def processes(*indices, port, count=2, timeout=4):
    options = [
        f'--coordinator_address=localhost:{port}',
        f'--process_count={count}',
        f'--coordinator_timeout={timeout}',
    ]
    started = [
        subprocess.Popen(
            [sys.executable, '-m', 'upcycle', 'eval', '--from=/nowhere', *options, f'--process_index={index}'],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]
    return [(process.communicate()[1], process.returncode) for process in started]


def test_a_process_that_never_comes():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    (first,) = processes(0, port=port)
    assert first[1] == 69 and first[0].startswith('upcycle: not all 2 processes have connected within 4 s'), first
    assert first[0].count('\n') == 1
    (second,) = processes(1, port=port)
    assert second[1] == 69 and second[0].startswith('upcycle: process 0 does not answer at localhost:'), second


def test_a_port_that_is_taken():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(('::', 0))
        taken.listen()
        ((error, code),) = processes(0, port=taken.getsockname()[1])
    assert code == 2 and error.splitlines()[-1].startswith(
        'upcycle: --coordinator_address: process 0 cannot listen at port '
    )


@pytest.mark.parametrize(
    ('error', 'reason'),
    [
        (AssertionError(), 'this JAX has no support for it'),
        (
            RuntimeError(
                "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 7. (set "
                "JAX_PLATFORMS='' to automatically choose an available backend)"
            ),
            'The TPU is already in use by process with pid 7:',
        ),
        (RuntimeError("Unknown backend: 'rubbish'\nmore"), "Unknown backend: 'rubbish':"),
    ],
)
@pytest.mark.parametrize('name', ['train', 'plan', 'eval', 'quickstart'])
def test_a_platform_that_is_not_there(name, error, reason, tmp_path, dense, monkeypatch, capsys):
    def raises():
        raise error

    monkeypatch.setattr(jax, 'devices', raises)
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    arguments = {
        'eval': ['eval', f'--from={dense}'],
        'quickstart': ['quickstart', f'--out={tmp_path / "q"}'],
        'plan': ['plan', *command('upcycle', tmp_path / 'run')[1:], f'--from={dense}'],
    }.get(name, command('dense', tmp_path / 'run'))
    code, _, said = call(arguments, capsys)
    assert code == 2
    assert said.startswith('upcycle: JAX_PLATFORMS=tpu cannot be used: ') and reason in said and said.count('\n') == 1
    assert os.listdir(tmp_path) == []


def test_on_a_machine_without_a_tpu_libtpu_says_nothing_and_jax_warns(monkeypatch, capfd):
    def noisy():
        os.write(2, b'WARNING: Logging before InitGoogle() is written to STDERR\n')
        platforms.logging.getLogger('jax._src.xla_bridge').warning('An NVIDIA GPU may be present')

    monkeypatch.setattr(jax, 'devices', noisy)
    monkeypatch.setattr(platforms, '_CHIPS', ())
    monkeypatch.delenv('XLA_FLAGS')
    platforms.devices()
    assert capfd.readouterr().err == 'warning: An NVIDIA GPU may be present\n'


def test_xla_says_which_flag_it_does_not_know():
    environment = {**os.environ, 'XLA_FLAGS': '--xla_no_such_flag=1'}
    ended = subprocess.run(
        [sys.executable, '-c', 'from upcycle import platforms; platforms.devices()'],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert 'Unknown flag in XLA_FLAGS: --xla_no_such_flag=1' in ended.stderr


@pytest.mark.parametrize('address', ['gs:/my-bucket/run', 's3:/my-bucket/run', 'gs:my-bucket/run'])
def test_an_address_that_lost_a_slash_is_no_folder(address, tmp_path, dense, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ['inspect', address],
        ['import', f'--from={dense}', f'--to={address}'],
        command('dense', address),
    ):
        code, _, error = call(arguments, capsys)
        assert code == 2 and '://my-bucket/run, with two slashes' in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(('name', 'words'), [('runs\\new', 'holds a backslash'), ('\udcff', 'is not UTF-8')])
def test_a_folder_of_checkpoints_that_tensorstore_cannot_open(name, words, tmp_path, dense, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (['import', f'--from={dense}', f'--to={name}'], command('dense', name)):
        code, _, error = call(arguments, capsys)
        assert code == 2 and words in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'JAX_PLATFORMS': 'cpuu'}, "JAX_PLATFORMS=cpuu cannot be used: Unable to initialize backend 'cpuu'"),
        ({'JAX_ENABLE_X64': 'maybe'}, 'JAX_ENABLE_X64=maybe'),
    ],
)
def test_settings_that_jax_refuses_wherever_it_first_looks_at_them(settings, words):
    look = 'import jax; jax.process_index()'
    program = 'import sys; from upcycle import cli, handlers; '
    program += f'handlers.evaluate = lambda **_: exec({look!r}); cli.main(sys.argv[1:])'
    arguments = [sys.executable, '-c', program, 'eval', '--from=x']
    done = subprocess.run(arguments, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1
