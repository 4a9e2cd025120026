"""For any damaged `metrics.jsonl`, `upcycle report` prints one sentence with the file and the line."""

import json

import pytest

from tests.test_cli import call
from upcycle.report import runs

LOADS = 'experts/encoder/layers_1/load'
LINES = [
    {'step': step, 'split': split, 'loss': 2.0, 'flops': 1e9 * step, 'seconds': 0.5 * step, LOADS: [0.5, 0.5]}
    for step in (2, 4)
    for split in ('train', 'validation')
]
WHOLE = ''.join(json.dumps(line) + '\n' for line in LINES).encode()


def with_field(**fields):
    first, *others = WHOLE.splitlines(keepends=True)
    second = json.dumps({**LINES[1], **fields}).encode() + b'\n'
    return b''.join([first, second, *others[1:]])


def without(name):
    first, _, *others = WHOLE.splitlines(keepends=True)
    return b''.join([first, json.dumps({k: v for k, v in LINES[1].items() if k != name}).encode() + b'\n', *others])


NAN, INFINITE = float('nan'), float('inf')
# What the file holds, and words of the message.
DAMAGED = {
    'no JSON': (WHOLE.replace(b'"validation"', b'validation'), 'line 2, is not a JSON object'),
    'half a line': (WHOLE.replace(b'"seconds": 1.0', b'"sec', 1).replace(b'\n', b'\n'), 'line 1, is not a JSON object'),
    'a list': (WHOLE.replace(WHOLE.splitlines()[1], b'[1, 2]'), 'line 2, is not a JSON object'),
    'a number': (WHOLE.replace(WHOLE.splitlines()[1], b'7'), 'line 2, is not a JSON object'),
    'zeros': (WHOLE.replace(WHOLE.splitlines()[1], b'\0' * 100), 'line 2, is not a JSON object'),
    'binary': (bytes(range(256)) * 10, 'is not a JSON object'),
    'UTF-16': (WHOLE.decode().encode('utf-16'), 'line 1, is not a JSON object'),
    'latin-1': (WHOLE.replace(b'"train"', '"übung"'.encode('latin-1')), 'line 1, is not a JSON object'),
    'deep': (WHOLE.replace(WHOLE.splitlines()[1], b'[' * 100_000), 'line 2, is not a JSON object'),
    'empty': (b'', 'has no complete line'),
    'blank': (b'\n\n  \n', 'has no complete line'),
    'only half a line': (b'{"step": 2', 'has no complete line'),
    'no step': (without('step'), "line 2, has no 'step'"),
    'no split': (without('split'), "line 2, has no 'split'"),
    **{
        f'step {value!r}': (with_field(step=value), "line 2, has 'step': ")
        for value in ('two', None, 2.5, -1, True, [2], {}, NAN, INFINITE, 10**400)
    },
    **{f'split {value!r}': (with_field(split=value), "line 2, has 'split': ") for value in (None, 3, ['train'], {})},
    **{
        f'{name} {value!r}': (with_field(**{name: value}), f"line 2, has '{name}': ")
        for name in ('flops', 'seconds', 'sunk_flops', 'start_step')
        for value in ('many', None, [], {}, NAN, -INFINITE, -1.0, 10**400, True)
    },
    **{
        f'loss {str(value)[:9]!r}': (with_field(loss=value), "line 2, has 'loss': ")
        for value in ({'a': 1}, [[{}]], 10**400)
    },
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_log_is_one_sentence(case, tmp_path, capsys):
    damaged, words = DAMAGED[case]
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'metrics.jsonl').write_bytes(damaged)
    code, out, error = call(['report', str(run), f'--out={tmp_path / "report"}'], capsys)
    assert code == 2 and out == ''
    assert error.startswith(f'upcycle: {run / "metrics.jsonl"}') and words in error and error.count('\n') == 1, error
    assert not (tmp_path / 'report').exists()


READ = {
    'whole': WHOLE,
    'odd': with_field(split='übung', loss=NAN, accuracy='x', z_loss=None, **{LOADS: 'x'}) + b'\n{"step": 6, "spl',
    'a run that is writing': WHOLE + b'{"step": 6, "spl',
    'in the middle of a character': WHOLE + '{"step": 6, "split": "ü'.encode()[:-1],
    'diverged': with_field(loss=NAN),
    'infinite': with_field(loss=INFINITE),
    'words': with_field(loss='nan'),
    'no metric': with_field(loss=None),
    'blank lines': WHOLE.replace(b'\n', b'\n\n'),
    'Windows': WHOLE.replace(b'\n', b'\r\n'),
    'out of order': b''.join(reversed(WHOLE.splitlines(keepends=True))),
    'twice': WHOLE + WHOLE,
    'a new split': with_field(split='übung'),
    'words and lists at the end': WHOLE.replace(b'"loss": 2.0', b'"loss": "low", "accuracy": [0.1]'),
    'too large to draw': with_field(loss=1e308),
    'ragged loads': with_field(**{LOADS: [0.5]}),
    'no loads': with_field(**{LOADS: 'x'}),
}


# Each draws a report's figures, in seconds.
@pytest.mark.parametrize(
    'case',
    [
        case if case in ('odd', 'words and lists at the end') else pytest.param(case, marks=pytest.mark.exhaustive)
        for case in READ
    ],
)
def test_what_a_run_may_have_written_is_read(case, tmp_path, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'metrics.jsonl').write_bytes(READ[case])
    code, _, error = call(['report', str(run), f'--out={tmp_path / "report"}'], capsys)
    assert code == 0, error
    assert (tmp_path / 'report' / 'report.html').is_file()


@pytest.mark.parametrize('text', ['', '{', '[]', '7', '\0', '[' * 100_000])
def test_a_damaged_receipt_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_bytes(WHOLE)
    (tmp_path / 'receipt.json').write_text(text)
    code, _, error = call(['report', str(tmp_path), f'--out={tmp_path / "report"}'], capsys)
    assert code == 2 and 'receipt.json' in error and error.count('\n') == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize('text', ['{"layers": 3}', '{"plan": [], "function_check": 3, "source": "x"}'])
def test_a_receipt_of_another_kind_is_left_out(text, tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_bytes(WHOLE)
    (tmp_path / 'receipt.json').write_text(text)
    assert call(['report', str(tmp_path), f'--out={tmp_path / "report"}'], capsys)[0] == 0


def test_large_logs_are_read(tmp_path):
    lines = [json.dumps({**LINES[0], 'step': step}).encode() + b'\n' for step in range(20_000)]
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(lines))
    assert len(runs.load_run(tmp_path).records) == 20_000


@pytest.mark.parametrize('name', ['run\udcff', 'run$^$'])
def test_names_of_folders_that_are_hard_to_draw(name, tmp_path, capsys):
    run = tmp_path / name
    run.mkdir()
    (run / 'metrics.jsonl').write_bytes(WHOLE)
    code, _, error = call(['report', str(run), f'--out={tmp_path / "report"}\udcff'], capsys)
    assert code == 0, error
    assert (tmp_path / 'report\udcff' / 'report.csv').is_file()
