"""Commands on run folders in a bucket of a Google Cloud Storage emulator, on loopback; test_buckets.py runs it.

python -m tests.on_a_bucket FOLDER

TensorFlow's client only knows Google's address, so gcsfs reads and writes the paths here.
"""

import contextlib
import os
import sys
from unittest import mock

HOST = '127.0.0.1'


@contextlib.contextmanager
def served():
    """Runs the emulator and yields its address."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def with_generation(request, response, storage, *rest, **named):
        # Google's servers send the generation of an object, and TensorStore requires it.
        with contextlib.suppress(NotFound):
            found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
            response['x-goog-generation'] = found['generation']
        return download(request, response, storage, *rest, **named)

    objects.download = with_generation
    from gcp_storage_emulator.server import create_server

    with create_server(HOST, 0, in_memory=True, default_bucket='bucket') as server:
        # If a client disconnects early, the emulator would print a traceback into a command's output.
        server._api._httpd.handle_error = lambda *_: None
        yield f'http://{HOST}:{server._api._httpd.server_port}'


@contextlib.contextmanager
def clients_at(address):
    """Points every client of this process at the emulator; clients keep the first address that they get."""
    from etils.epath import gpath

    before = dict(os.environ)
    os.environ |= {'EPATH_USE_TF': 'false', 'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address}
    gpath._is_tf_installed.cache_clear()
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before
        gpath._is_tf_installed.cache_clear()


REQUESTS = ('write_bytes', 'write_text', 'read_bytes', 'read_text', 'mkdir', 'exists', 'is_dir', 'unlink', 'rmtree')


@contextlib.contextmanager
def outages():
    """Makes each kind of request to each object of a bucket fail once during a run; yields the failed requests."""
    import gcsfs.retry
    from etils.epath import gpath

    from upcycle import files

    failed = set()

    def failing(name, method):
        def request(self, *arguments, **named):
            if files.is_remote(self) and files._Patience.of_all and (name, str(self)) not in failed:
                failed.add((name, str(self)))
                raise gcsfs.retry.HttpError({'code': 503, 'message': 'backend error'})
            return method(self, *arguments, **named)

        return request

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(files, '_PAUSES', (0.0,)))
        for name in REQUESTS:
            method = failing(name, getattr(gpath.PosixGPath, name))
            patches.enter_context(mock.patch.object(gpath.PosixGPath, name, method))
        yield failed


def main(folder: str) -> None:
    """Trains a dense run and, in two parts, an upcycled one, evaluates and reports; on disk and in the bucket, to compare."""
    from tests import programs, runs
    from upcycle import cli

    programs.share()

    def call(*arguments: str) -> None:
        try:
            cli.main(arguments)
        except SystemExit as end:
            assert not end.code, (end.code, arguments)

    def train(kind: str, model_dir: str, steps: int, **more: object) -> None:
        layers = runs.ONE_LAYER if kind == 'dense' else runs.ONE_SPARSE_LAYER
        named = runs.bindings(kind, model_dir, steps, **layers, **more)
        files = [f'--gin_file={file}' for file in runs.FILES[kind]]
        call('train', *files, *(f'--gin.{name}={value}' for name, value in named.items()))

    for name, root in (('local', folder), ('remote', 'gs://bucket/runs')):
        train('dense', f'{root}/dense', 4)
        for steps in (6, 8):
            train('upcycle', f'{root}/upcycled', steps, INITIAL_CHECKPOINT_PATH=f'{root}/dense')
        call('eval', f'--from={root}/upcycled', '--json', f'--out={folder}/{name}.json')
        call('report', f'{root}/dense', f'{root}/upcycled', f'--out={folder}/report_{name}')
    from etils import epath

    for path in epath.Path('gs://bucket/runs/upcycled').iterdir():
        print('in the bucket:', path.name)


if __name__ == '__main__':
    with served() as address, clients_at(address):
        main(*sys.argv[1:])
