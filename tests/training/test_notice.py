"""Preemption notices, with metadata servers on loopback that answer like the platforms'."""

import http.server
import signal
import threading

import pytest

from tests import runs
from upcycle import cli
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import PREEMPTED, UserError
from upcycle.metrics import read_metrics
from upcycle.training import loop, notice


class Server(http.server.ThreadingHTTPServer):
    """Answers and refuses requests like both platforms' metadata servers."""

    def __init__(self):
        super().__init__(('localhost', 0), Handler)
        self.gone = threading.Event()
        self.is_busy = False

    @property
    def address(self):
        return f'localhost:{self.server_port}'


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, text=''):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):  # noqa: N802  the library's name
        assert self.path == '/latest/api/token'
        self.answer(200 if self.headers['X-aws-ec2-metadata-token-ttl-seconds'] else 400, 'a token')

    def do_GET(self):  # noqa: N802  the library's name
        gone = self.server.gone.is_set()
        if self.server.is_busy:
            self.answer(503)
        elif self.path == '/computeMetadata/v1/instance/preempted':
            self.answer(
                *((200, 'TRUE' if gone else 'FALSE') if self.headers['Metadata-Flavor'] == 'Google' else (403,))
            )
        elif self.path == '/latest/meta-data/spot/instance-action':
            told = self.headers['X-aws-ec2-metadata-token'] == 'a token'
            self.answer(*((200, '{"action": "terminate"}') if gone else (404,)) if told else (401,))
        else:
            self.answer(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv('GCE_METADATA_HOST', server.address)
    monkeypatch.setenv('AWS_EC2_METADATA_SERVICE_ENDPOINT', f'http://{server.address}')
    monkeypatch.setattr(notice, 'PERIOD', 0.01)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def told(monkeypatch):
    """Counts SIGTERMs."""
    told = threading.Event()
    told.times = 0

    def count(number, frame):
        told.times += 1
        told.set()

    before = signal.signal(signal.SIGTERM, count)
    yield told
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize('platform', notice.NOTICES)
def test_the_notice_becomes_one_sigterm(platform, server, told, capsys):
    with notice.listen(platform):
        assert not told.wait(0.1)
        server.is_busy = True
        server.gone.set()
        assert not told.wait(0.1)
        server.is_busy = False
        assert told.wait(60)
        told.clear()
        assert not told.wait(0.1)
    assert told.times == 1
    assert f'{platform} preempts this machine' in capsys.readouterr().err
    # The listener has stopped.
    assert 'preemption notice' not in {thread.name for thread in threading.enumerate()}


def test_a_run_saves_and_exits_with_75(server, dense, tmp_path, capsys, monkeypatch):
    path = tmp_path / 'run'
    add = loop.Window.add

    def add_and_go(self, metrics):
        add(self, metrics)
        server.gone.set()

    monkeypatch.setattr(loop.Window, 'add', add_and_go)
    bindings = runs.bindings('continue', path, 10**6, INITIAL_CHECKPOINT_PATH=dense, LOG_PERIOD=1, EVAL_PERIOD=10**6)
    files = [f'--gin_file={file}' for file in runs.FILES['continue']]
    more = [f'--gin.{name}={value}' for name, value in bindings.items()]
    with pytest.raises(SystemExit) as exit:
        cli.main(['train', '--preemption_notice=gce', *files, *more])
    assert exit.value.code == PREEMPTED
    step = read_metrics(path / 'metrics.jsonl')[-1]['step']
    assert open_checkpoint(path).step == step
    assert f'stopped on request and saved step {step};' in capsys.readouterr().err


def test_what_cannot_be_asked_is_refused(monkeypatch, server):
    with pytest.raises(UserError, match='--preemption_notice=azure is not one of gce, aws'), notice.listen('azure'):
        pass
    monkeypatch.setenv('GCE_METADATA_HOST', 'localhost:1')
    no_answer = '--preemption_notice=gce: the metadata server of this platform does not answer'
    with pytest.raises(UserError, match=no_answer), notice.listen('gce'):
        pass
    monkeypatch.setenv('AWS_EC2_METADATA_SERVICE_ENDPOINT', 'localhost')
    with (
        pytest.raises(UserError, match="aws: the metadata server .* unknown url type: 'localhost/"),
        notice.listen('aws'),
    ):
        pass
    with notice.listen(None):
        pass
