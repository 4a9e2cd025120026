"""Progress of long operations: plain lines, and a bar on a terminal."""

import os
import re
import sys
import types

import pytest

from upcycle import progress
from upcycle.progress import Progress, counted, waiting


def test_plain_lines_without_a_terminal(capsys):
    with Progress('train', 'step', 5, first=3, period=0.0) as shown:
        shown.show(4, 'loss 1.5000')
        shown.show(5, 'loss 1.2500')
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r'train  step 4/5  loss 1\.5000  [\d.]+ step/s  \d:\d\d left', first)
    assert re.fullmatch(r'train  step 5/5  loss 1\.2500  [\d.]+ step/s  0:00 left', last)


def test_only_the_last_count_is_shown_within_the_period(capsys):
    with Progress('loading', 'leaf', 3, period=1e6) as shown:
        for done in (1, 2, 3):
            shown.show(done, f'params/{done}')
    assert re.fullmatch(r'loading  leaf 3/3  params/3  .*\n', capsys.readouterr().err)


def test_batches_are_counted_without_a_total(capsys, monkeypatch):
    clock = types.SimpleNamespace(monotonic=iter(range(0, 100, 8)).__next__)
    monkeypatch.setattr(progress, 'time', clock)
    assert list(counted('abcd', 'validation')) == [*'abcd']
    assert [line.split('  ')[:2] for line in capsys.readouterr().err.splitlines()] == [
        ['validation', 'batch 2'],
        ['validation', 'batch 4'],
    ]


def test_an_operation_without_a_count_is_named_at_once(capsys):
    with waiting('compiling', period=1e6):
        assert capsys.readouterr().err == 'compiling ...\n'
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('text', ['[red]params[/]', 'x' * 500])
def test_a_bar_on_a_terminal(text, monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, 'w') as terminal:
        monkeypatch.setattr(sys, 'stderr', terminal)
        with Progress('loading', 'leaf', 2) as shown:
            shown.show(2, text)
            print('warning: above the bar', file=sys.stderr)
        assert sys.stderr is terminal
        terminal.flush()
        screen = ''
        while not screen.endswith('\x1b[?25h'):  # shows the cursor again
            screen += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert 'loading  leaf 2/2  ' + text[:10] in screen and 'warning: above the bar\r\n' in screen
