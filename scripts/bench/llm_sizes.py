"""Compiles the sizes of decoder-only models for TPU v5p, dense and with 8 experts, and writes docs/benchmarks/llm_sizes.csv.

  python scripts/bench/llm_sizes.py                            # every program that the CSV lacks, smallest first
  python scripts/bench/llm_sizes.py --only smollm2_135m        # of these sizes
  python scripts/bench/llm_sizes.py --show llama3_1_8b         # prints the commands
  python scripts/bench/llm_sizes.py --table                    # prints the table of docs/llm.md from the CSV

Needs `upcycle[tpu]`. Nothing is run. A program that takes more than the limits of time and memory is stopped and written down as
such. To compile a program again, remove its row.
"""

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from timing import table

CSV = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'benchmarks' / 'llm_sizes.csv'
FITS = 'fits'
REFUSED = 2  # exit status
SMALL = 0.05  # GB on the wire that the table leaves out
COLUMNS = (
    'model', 'experts', 'slice', 'mesh', 'batch', 'length', 'REMAT', 'result', 'reserved, GB', 'arguments, GB', 'TFLOP',
    'TFLOP by cost.py', 'TFLOP over cost.py', 'collectives', 'collectives, GB on the wire', 'seconds',
    'memory of the compiler, GB',
)  # fmt: skip
KEY = COLUMNS[:7]


@dataclasses.dataclass(frozen=True)
class Program:
    """One training step: FSDP over `data`, layers in a loop, AdamW, bfloat16 activations.

    Attributes:
      size: name of the gin file.
      experts: of every layer, Top-2; 0 for a dense model.
      slice: v5p topology.
      chips: of the slice.
      batch: sequences a step.
      remat: `REMAT`.
      length: tokens of a sequence.
    """

    size: str
    experts: int
    slice: str
    chips: int
    batch: int
    remat: str
    length: int = 2048

    def key(self) -> dict[str, str]:
        """Returns the columns that identify the program."""
        mesh = f'({self.chips},1,1)'
        values = (self.size, self.experts, f'v5p:{self.slice}', mesh, self.batch, self.length, self.remat)
        return dict(zip(KEY, map(str, values), strict=True))

    def arguments(self) -> list[str]:
        """Returns the arguments of `upcycle`."""
        key = self.key()
        bindings = {
            'BATCH_SIZE': self.batch,
            'SEQUENCE_LENGTH': self.length,
            'MESH_SHAPE': key['mesh'],
            'PARAMETERS_OVER_DATA': True,
            'SCAN_LAYERS': True,
            'REMAT': f"'{self.remat}'",
        }
        moe = ['--gin_file=moe/llm.gin', f'--gin.NUM_EXPERTS={self.experts}'] if self.experts else []
        return [
            'compile',
            f'--topology={key["slice"]}',
            f'--gin_file=models/{self.size}.gin',
            *moe,
            '--gin_file=tasks/synthetic_tokens.gin',
            '--gin_file=runs/scratch.gin',
            *(f'--gin.{name}={value}' for name, value in bindings.items()),
        ]


# Dense programs recompute nothing, so that their FLOPs are those of cost.py.
PROGRAMS = (
    Program('smollm2_135m', 0, '2x2x1', 4, 32, 'none'),
    Program('smollm2_135m', 8, '2x2x1', 4, 32, 'full'),
    Program('gemma3_270m', 0, '2x2x1', 4, 16, 'none'),
    Program('gemma3_270m', 8, '2x2x1', 4, 16, 'full'),
    Program('qwen3_0_6b', 0, '2x2x1', 4, 16, 'none'),
    Program('qwen3_0_6b', 8, '2x2x1', 4, 32, 'full'),
    Program('llama3_2_1b', 0, '2x2x1', 4, 8, 'none'),
    Program('llama3_2_1b', 8, '2x2x1', 4, 32, 'full'),
    Program('mistral_7b', 0, '2x2x1', 4, 4, 'none'),
    Program('qwen2_5_7b', 0, '2x2x1', 4, 4, 'none'),
    Program('llama3_1_8b', 0, '2x2x1', 4, 4, 'none'),
    Program('llama3_1_8b', 8, '2x2x2', 8, 8, 'full'),
    Program('llama3_1_8b', 8, '2x2x4', 16, 64, 'full'),
    Program('mistral_7b', 8, '2x2x2', 8, 8, 'full'),
    Program('mistral_7b', 8, '2x2x4', 16, 64, 'full'),
    Program('qwen2_5_7b', 8, '2x2x2', 8, 8, 'full'),
    Program('qwen2_5_7b', 8, '2x2x4', 16, 64, 'full'),
)


def compile_program(program: Program, minutes: float, gigabytes: float) -> dict[str, str]:
    """Returns the row of a program, compiled in a process that is stopped at these limits."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = pathlib.Path(folder, 'account.json'), pathlib.Path(folder, 'log.txt')
        command = [sys.executable, '-m', 'upcycle', *program.arguments(), f'--out={out}']
        begin, peak, result = time.monotonic(), 0.0, ''
        with log.open('w') as stream:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
            try:
                while process.poll() is None and not result:
                    time.sleep(1)
                    peak = max(peak, _peak_gigabytes(process.pid))
                    if _cpu_seconds(process.pid) > 60 * minutes:
                        result = f'not compiled in {minutes:g} minutes of a core'
                    if peak > gigabytes:
                        result = f'not compiled in {gigabytes:g} GB of memory'
            finally:
                process.kill()
                process.wait()
        row = program.key() | {
            'seconds': f'{time.monotonic() - begin:.0f}',
            'memory of the compiler, GB': f'{peak:.1f}',
        }
        if result:
            return row | {'result': result}
        text = log.read_text('utf-8')
        if process.returncode not in (0, REFUSED):
            sys.exit(f'{text}\nthe compiler ended with status {process.returncode}')
        if process.returncode:
            return row | {'result': text.strip().splitlines()[-1].removeprefix('upcycle: ').partition(' Raise ')[0]}
        return row | figures(json.loads(out.read_text('utf-8')))


def figures(account: Mapping[str, Any]) -> dict[str, str]:
    """Returns the columns that the compiler's account fills."""
    collectives = sorted(account['collectives'].items())
    return {
        'result': FITS if account['fits'] else 'does not fit',
        'reserved, GB': f'{account["reserved"] / 1e9:.1f}',
        'arguments, GB': f'{account["arguments"] / 1e9:.1f}',
        'TFLOP': f'{account["matmul_flops"] / 1e12:.2f}',
        'TFLOP by cost.py': f'{account["analytic_flops"] / 1e12:.2f}',
        'TFLOP over cost.py': f'{account["matmul_flops"] / account["analytic_flops"]:.3f}',
        'collectives': ', '.join(f'{total["count"]} {kind}' for kind, total in collectives),
        'collectives, GB on the wire': ', '.join(f'{total["wire_bytes"] / 1e9:.2f}' for _, total in collectives),
    }


def _peak_gigabytes(pid: int) -> float:
    try:
        status = pathlib.Path(f'/proc/{pid}/status').read_text('utf-8')
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e6 for line in status.splitlines() if line.startswith('VmHWM')), 0.0)


def _cpu_seconds(pid: int) -> float:
    try:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text('utf-8').rpartition(')')[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')


def rows() -> list[dict[str, str]]:
    """Returns the rows of the CSV."""
    if not CSV.exists():
        return []
    with CSV.open(encoding='utf-8', newline='') as stream:
        return list(csv.DictReader(stream))


def append(row: Mapping[str, str]) -> None:
    """Adds a row to the CSV, in the order of `PROGRAMS`."""
    order = [program.key() for program in PROGRAMS]
    found = sorted([*rows(), row], key=lambda row: order.index({name: row[name] for name in KEY}))
    with CSV.open('w', encoding='utf-8', newline='') as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator='\n', restval='')
        writer.writeheader()
        writer.writerows(found)


def as_markdown(found: Sequence[Mapping[str, str]]) -> str:
    """Formats the table of docs/llm.md."""
    head = [
        'size',
        'v5p slice',
        'batch x length',
        'reserved, GB',
        'TFLOP, over `cost.py`',
        'collectives, GB on the wire',
    ]
    lines = []
    for row in found:
        name = f'`{row["model"]}`, ' + (f'{row["experts"]} experts' if row['experts'] != '0' else 'dense')
        place = [name, row['slice'].removeprefix('v5p:'), f'{row["batch"]} x {row["length"]}']
        if row['result'] != FITS:
            lines.append([*place, row['result'], '–', '–'])
            continue
        kinds = [kind.split()[1] for kind in row['collectives'].split(', ')]
        wire = sorted(zip(map(float, row['collectives, GB on the wire'].split(', ')), kinds, strict=True), reverse=True)
        flops = f'{row["TFLOP"]}, {float(row["TFLOP over cost.py"]):.2f}'
        sent = ', '.join(f'{kind} {size:.1f}' for size, kind in wire if size >= SMALL)
        lines.append([*place, row['reserved, GB'], flops, sent])
    return table(head, lines)


def main() -> None:
    """Compiles what is missing, or prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', help='sizes (default: all)')
    parser.add_argument('--show', nargs='*', help='print the commands of these sizes')
    parser.add_argument('--table', action='store_true', help='print the table')
    parser.add_argument('--minutes', type=float, default=25, help='limit of a program, of one core')
    parser.add_argument('--gigabytes', type=float, default=9, help='limit of a program')
    arguments = parser.parse_args()
    if arguments.table:
        print(as_markdown(rows()))
        return
    if arguments.show is not None:
        for program in PROGRAMS:
            if program.size in arguments.show or not arguments.show:
                print(shlex.join(['upcycle', *program.arguments()]))
        return
    for program in PROGRAMS:
        done = [{name: row[name] for name in KEY} for row in rows()]
        if program.key() in done or (arguments.only and program.size not in arguments.only):
            continue
        print(shlex.join(['upcycle', *program.arguments()]), flush=True)
        row = compile_program(program, arguments.minutes, arguments.gigabytes)
        append(row)
        print(row['result'], row.get('TFLOP over cost.py', ''), flush=True)


if __name__ == '__main__':
    main()
