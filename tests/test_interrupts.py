"""SIGINT at any moment, broken streams, and unexpected errors."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from tests.test_cli import call
from upcycle import cli, interrupts
from upcycle.errors import Preempted, Unavailable, UserError


def program(code, *, arguments=(), **more):
    """Runs a process that can be interrupted, wherever these tests run."""
    return subprocess.run(
        [sys.executable, '-c', code, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


# Where the process interrupts itself, and its exit status or signal.
MOMENTS = {
    'before main': ('import upcycle.__main__; os.kill(os.getpid(), 2); time.sleep(60)', -2),
    'while our command line loads': ('hook("upcycle.cli"); import upcycle.__main__ as m; m.main()', -2),
    'while a library loads': ('hook("numpy"); from upcycle.__main__ import main; main()', -2),
    'while a library loads, by way of upcycle.cli': ('hook("numpy"); from upcycle.cli import main; main()', -2),
    'at work': ('work(lambda: os.kill(os.getpid(), 2))', 130),
    'a library takes it for an error of its own': ('work(translated)', 130),
    'in a destructor': ('work(destroyed)', -2),
    'twice': ('work(twice)', -2),
    'at the end': ('import atexit; atexit.register(lambda: os.kill(os.getpid(), 2)); work(lambda: None)', -2),
    'ignored': ('signal.signal(2, signal.SIG_IGN); work(lambda: os.kill(os.getpid(), 2))', 0),
}
MOMENT = """
import builtins, importlib.abc, os, signal, sys, time
sys.argv = ['upcycle', 'inspect', '/nowhere/at/all']

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == self.wanted:
            os.kill(os.getpid(), 2)
            time.sleep(60)

def hook(name):
    Hook.wanted = name
    sys.meta_path.insert(0, Hook())

def translated():
    try:
        os.kill(os.getpid(), 2)
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError('could not initialize') from None

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), 2)
        time.sleep(60)

def destroyed():
    Destroyed()
    time.sleep(60)

def twice():
    try:
        os.kill(os.getpid(), 2)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), 2)
        time.sleep(60)

def work(what):
    from upcycle import cli
    cli.run = lambda arguments: what() or 0
    cli.main()
"""


@pytest.mark.parametrize('moment', MOMENTS)
def test_an_interrupt_is_130_or_death_by_the_signal_and_no_traceback(moment, tmp_path):
    code, status = MOMENTS[moment]
    done = program(f'{MOMENT}\n{code}', cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr
    assert len(done.stderr.splitlines()) == (status == 130)
    assert os.listdir(tmp_path) == []


def test_the_handler_before_comes_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    call(['inspect', '/nowhere/at/all'], capsys)
    assert signal.getsignal(signal.SIGINT) is before
    assert not interrupts.came()


@pytest.mark.parametrize(
    ('error', 'status', 'said'),
    [
        (UserError('no such thing.'), 2, 'upcycle: no such thing.\n'),
        (Unavailable('no answer.'), 69, 'upcycle: no answer.\n'),
        (Preempted('saved.'), 75, 'upcycle: saved.\n'),
        (KeyError('x'), 1, "upcycle: unexpected KeyError: 'x' (UPCYCLE_TRACEBACK=1 shows where)\n"),
        (AssertionError(), 1, 'upcycle: unexpected AssertionError (UPCYCLE_TRACEBACK=1 shows where)\n'),
        (ValueError('two\nlines'), 1, 'upcycle: unexpected ValueError: two lines (UPCYCLE_TRACEBACK=1 shows where)\n'),
        (MemoryError(), 1, 'upcycle: unexpected MemoryError (UPCYCLE_TRACEBACK=1 shows where)\n'),
        (RecursionError('deep'), 1, 'upcycle: unexpected RecursionError: deep (UPCYCLE_TRACEBACK=1 shows where)\n'),
    ],
)
def test_every_end_is_one_sentence(error, status, said, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr(cli, 'run', run)
    monkeypatch.delenv('UPCYCLE_TRACEBACK')
    assert call([], capsys) == (status, '', said)


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(cli, 'run', lambda arguments: 1 / 0)
    monkeypatch.setenv('UPCYCLE_TRACEBACK', '1')
    code, _, error = call([], capsys)
    assert (
        code == 1
        and 'Traceback' in error
        and error.endswith('upcycle: unexpected ZeroDivisionError: division by zero\n')
    )


SPEAKS_AND_WORKS = 'print("x" * 99999, flush=True); print("x" * 99999, file=sys.stderr); open("made", "w").write("x")'
CLOSES_ITS_TERMINAL = 'a, b = pty.openpty(); os.dup2(b, 1); os.dup2(b, 2); os.close(a); os.close(b)'
SHELL = {
    # Redirections, action of the command, exit status, words on standard error.
    'no stdout': ('>&-', 'print("x")', 0, ''),
    'no stderr': ('2>&-', 'raise UserError("x")', 2, ''),
    'none at all': ('<&- >&- 2>&-', 'print("x", file=sys.stderr); open("made", "w").write("x")', 0, ''),
    'full stdout': ('>/dev/full', 'print("x")', 2, 'standard output cannot be written (No space left on device)'),
    'full stdout, much': ('>/dev/full', 'print("x" * 100000)', 2, 'standard output cannot be written'),
    'full stderr': ('2>/dev/full', 'raise UserError("x")', 2, ''),
    'nobody reads': ('| true', 'print("x" * 100000)', 0, ''),
    'nobody reads, and there is work to do': ('2>&1 | true', SPEAKS_AND_WORKS, 0, ''),
    'nobody reads, and it ends in an error': (
        '2>&1 | true',
        'print("x" * 100000, flush=True); raise UserError("x")',
        2,
        '',
    ),
    'nobody reads a table': ('| true', 'from rich.console import Console; Console().print("x " * 100000)', 0, ''),
    'nobody reads what is not buffered': ('2>&1 | true', f'assert sys.stdout.write_through; {SPEAKS_AND_WORKS}', 0, ''),
    'a terminal that is gone': ('', f'{CLOSES_ITS_TERMINAL}; {SPEAKS_AND_WORKS}', 0, ''),
}


@pytest.mark.parametrize('case', SHELL)
def test_streams_that_take_nothing(case, tmp_path):
    redirection, what, status, words = SHELL[case]
    script = tmp_path / 'script.py'
    script.write_text(
        f'import os, pty, sys\nfrom upcycle import cli\nfrom upcycle.errors import UserError\n'
        f'def run(arguments):\n    {what}\n    return 0\ncli.run = run\ncli.main()\n'
    )
    shell = f'set -o pipefail; "{sys.executable}" {"-u" * ("buffered" in case)} "{script}" {redirection}'
    done = subprocess.run(['bash', '-c', shell], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == bool(words)
    if 'made' in what:
        assert (tmp_path / 'made').read_text() == 'x'


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252'])
def test_a_terminal_without_our_characters(encoding, tmp_path):
    code = (
        'import sys\nfrom upcycle import cli\nfrom rich.console import Console\nfrom rich.table import Table\n'
        'def run(arguments):\n    print("± é 中 \\udcff")\n    t = Table("a", title="±")\n    t.add_row("…")\n'
        '    Console().print(t)\n    return 0\ncli.run = run\ncli.main()'
    )
    done = program(code, env={**os.environ, 'PYTHONIOENCODING': encoding, 'COLUMNS': '0'}, encoding=encoding)
    assert done.returncode == 0 and done.stderr == ''
    assert '\\u4e2d' in done.stdout


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'gone'
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    code, _, error = call(['inspect', '/nowhere/at/all'], capsys)
    assert code == 2 and error.startswith('upcycle: the working folder is gone')


def test_no_folder_for_temporary_files(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, 'tempdir', None)
    monkeypatch.setattr(tempfile, '_candidate_tempdir_list', lambda: ['/proc/none'])
    code, _, error = call(['inspect', '/nowhere/at/all'], capsys)
    assert code == 2 and 'TMPDIR' in error


@pytest.mark.parametrize('budget', ['inf', '-inf', 'nan', '0', '-1', '1e300'])
def test_a_budget_that_is_none(budget, tmp_path, capsys):
    code, _, error = call(['quickstart', f'--budget={budget}', f'--out={tmp_path / "q"}'], capsys)
    assert code == 2 and f'--budget={float(budget):g}' in error
    assert os.listdir(tmp_path) == []
