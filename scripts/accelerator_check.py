"""Checks this machine's accelerator in minutes: kernels, training steps, online upcycling. What to run first on a GPU or TPU.

  python scripts/accelerator_check.py                          # every row; writes accelerator_check.json and .md
  python scripts/accelerator_check.py --only='attention/*'     # some rows; --list prints their names

Needs no network and no data. A row that fails says why, and the others still run; the exit status is 1 if any failed. Rows run in
processes of their own, one after the other. On CPUs models have toy sizes, and times mean nothing. docs/accelerators.md says how
to read the table.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from accelerator.names import BASELINES, ROWS

Row = dict[str, Any]
OK, FAILED, LEFT_OUT = 'ok', 'failed', 'left out'
# Lines of a child's standard output that are for the parent.
MARK = 'accelerator_check: '
ROW_SECONDS = 300
COLUMNS = (
    'row',
    'result',
    'sizes',
    'time',
    'a second and device',
    'MFU',
    'memory, GB',
    'over its baseline',
    'difference',
)


def run_rows(names: Sequence[str]) -> int:
    """Runs rows in this process, which holds the device; reports each to the parent."""
    # JAX takes three quarters of a GPU's memory by default.
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
    import dataclasses

    import jax
    from accelerator.device import LeftOutError, this_device

    device = this_device()
    _tell({'device': {**dataclasses.asdict(device), 'jax': jax.__version__, 'python': platform.python_version()}})
    steps: dict[str, Any] = {}
    for name in names:
        _tell({'begins': name})
        begin = time.monotonic()
        try:
            found = {'result': OK, **_measure(name, device, steps)}
        except LeftOutError as error:
            found = {'result': LEFT_OUT, 'why': str(error)}
        except Exception as error:
            found = {'result': FAILED, 'why': _sentence(error)}
        _tell({'row': name, 'seconds': round(time.monotonic() - begin, 1), **found})
    return 0


def _measure(name: str, device: Any, steps: dict[str, Any]) -> Row:
    kind, _, variant = name.partition('/')
    if kind == 'online':
        from accelerator import online

        return online.row(variant, device)
    if name in ROWS['kernels']:
        from accelerator import kernels

        return kernels.row(name, device)
    from accelerator.steps import Steps

    steps.setdefault(kind, Steps(kind, device))
    return steps[kind].row(variant)


def _tell(message: Row) -> None:
    print(MARK + json.dumps(message), flush=True)


def _sentence(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), '')
    return f'{type(error).__name__}: {first}' if first else f'{type(error).__name__}.'


def check(names: Sequence[str], seconds: float) -> Iterator[Row]:
    """Runs rows in child processes and yields each when it is done, and first of all the device.

    Args:
      names: of the rows.
      seconds: after which a row fails.
    """
    known = False
    for group in ROWS.values():
        rest = [name for name in group if name in names]
        while rest:
            for message in _child(rest, seconds):
                if 'device' not in message:
                    rest = rest[rest.index(message['row']) + 1 :]
                elif known:
                    continue
                known = True
                yield message


def _child(names: Sequence[str], seconds: float) -> Iterator[Row]:
    """Runs rows in one process. If it ends early, the row that it was at fails; if that is before the first, all of them."""
    with tempfile.TemporaryFile('w+') as errors:
        command = [sys.executable, os.path.abspath(__file__), '--child', *names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        current, begin, why = '', time.monotonic(), ''
        done: list[str] = []
        try:
            while True:
                try:
                    line = lines.get(timeout=max(begin + seconds - time.monotonic(), 0.1))
                except queue.Empty:
                    why = f'it took more than {seconds:g} seconds.'
                    break
                if line is None:
                    process.wait()
                    errors.seek(0)
                    last = [each.strip() for each in errors if each.strip()][-1:]
                    why = f'its process ended with status {process.returncode}: {"".join(last)}'
                    break
                message = json.loads(line)
                if 'begins' in message:
                    current, begin = message['begins'], time.monotonic()
                    continue
                done += [message['row']] if 'row' in message else []
                yield message
        finally:
            process.kill()
            process.wait()
        if len(done) < len(names):
            for name in [current] if current else names:
                yield {'row': name, 'seconds': round(time.monotonic() - begin, 1), 'result': FAILED, 'why': why}


def _read(stream: Any, lines: 'queue.Queue[str | None]') -> None:
    for line in stream:
        if line.startswith(MARK):
            lines.put(line.removeprefix(MARK))
    lines.put(None)


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """Adds the ratios of time and FLOPs to the row's baseline, if that was measured."""
    baseline = next((each for each in rows if each['row'] == BASELINES.get(row['row']) and 'rate' in each), None)
    if baseline is None or 'rate' not in row:
        return row
    slower = baseline['rate'] / row['rate']
    flops = row['tflop'] / baseline['tflop']
    return {**row, 'baseline': baseline['row'], 'time_over_baseline': slower, 'flops_over_baseline': flops}


def cells(row: Row) -> list[str]:
    """Returns a row of the table, in the order of `COLUMNS`."""

    def written(name: str, form: str) -> str:
        return form.format(row[name]) if row.get(name) is not None else ''

    over = ''
    if 'baseline' in row:
        over = '{time_over_baseline:.2f} in time, {flops_over_baseline:.2f} in FLOPs of {baseline}'.format(**row)
    difference = written('difference', '{:.1e}') + written('bound', ' of at most {:.1e}')
    result = row['result'] + (f': {row["why"]}' if 'why' in row else '')
    speed = written('rate', '{:,.0f} ') + written('unit', '{}')
    return [
        row['row'],
        result,
        row.get('sizes', ''),
        _duration(row['time']) if 'time' in row else '',
        speed,
        written('mfu', '{:.1%}'),
        written('memory_gb', '{:.2f}'),
        over,
        difference,
    ]


def in_a_line(row: Row) -> str:
    """Formats a row for the terminal."""
    labels = {'MFU': 'MFU ', 'memory, GB': 'memory, GB: ', 'difference': 'difference '}
    shown = [labels.get(name, '') + cell for name, cell in zip(COLUMNS, cells(row), strict=True) if cell]
    return '; '.join([*shown, f'{row["seconds"]:.0f} s in all'])


def _duration(seconds: float) -> str:
    return f'{seconds:.1f} s' if seconds >= 1 else f'{1e3 * seconds:.1f} ms'


def markdown(device: Row, rows: Sequence[Row], seconds: float) -> str:
    """Formats the table, with the device above it."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + '---|' * len(COLUMNS)]
    lines += ['| ' + ' | '.join(cell.replace('|', '/') for cell in cells(row)) + ' |' for row in rows]
    return '\n'.join([f'{_described(device)}; {seconds:.0f} s in all.', '', *lines]) + '\n'


def _described(device: Row) -> str:
    memory = f'{device["memory"] / 1e9:.0f} GB' if device['memory'] else 'memory unknown'
    peak = f'peak {device["peak"] / 1e12:.0f} TFLOP/s in bfloat16' if device['peak'] else 'peak unknown, so no MFU'
    return f'{device["count"]} x {device["kind"]} ({device["platform"]}, {memory}, {peak}), JAX {device["jax"]}'


def chosen(patterns: Sequence[str]) -> list[str]:
    """Returns the names of rows that patterns match; a pattern may be the part before the slash."""
    every = [name for group in ROWS.values() for name in group]
    found: list[str] = []
    for pattern in patterns or ('*',):
        matches = [name for name in every if fnmatch.fnmatch(name, pattern) or name.partition('/')[0] == pattern]
        if not matches:
            sys.exit(_refusal(f'--only={pattern} matches no row: --list prints their names.'))
        found += matches
    return [name for name in every if name in found]


def _refusal(sentence: str) -> int:
    print(f'accelerator_check: {sentence}', file=sys.stderr)
    return 2


def main() -> int:
    """Prints the rows as they come, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--only', action='append', default=[], help='a row, a pattern, or a part before the slash; repeatable'
    )
    parser.add_argument('--list', action='store_true', help='print the names of the rows')
    parser.add_argument('--out', default='accelerator_check', help='path of the tables, without .json and .md')
    parser.add_argument('--row_seconds', type=float, default=ROW_SECONDS, help='after which a row fails')
    parser.add_argument('--child', nargs='+', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_rows(arguments.child)
    names = chosen(arguments.only)
    if arguments.list:
        print('\n'.join(names))
        return 0
    out = pathlib.Path(arguments.out)
    if not out.parent.is_dir():
        return _refusal(f'--out={out} is in no folder that exists.')
    device: Row = {}
    rows: list[Row] = []
    begin = time.monotonic()
    for message in check(names, arguments.row_seconds):
        if 'device' in message:
            device = message['device']
            print(_described(device), flush=True)
            continue
        rows.append(compared(message, rows))
        print(in_a_line(rows[-1]), flush=True)
    seconds = time.monotonic() - begin
    if device:
        out.with_name(f'{out.name}.json').write_text(json.dumps({'device': device, 'rows': rows}, indent=1) + '\n')
        out.with_name(f'{out.name}.md').write_text(markdown(device, rows, seconds))
    failed = sum(row['result'] == FAILED for row in rows)
    print(f'{len(rows)} rows in {seconds:.0f} s, {failed} failed' + (f': {out}.json, {out}.md' if device else ''))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
