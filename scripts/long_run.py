"""Watches resident memory, step time and log size of a long run of a small sparse model.

  python scripts/long_run.py                             # 20,000 steps of the tiny T5 with 4 experts
  python scripts/long_run.py --steps=400 --every=20

Prints a row every `--every` steps, and exits with 1 if the run drifts. The first quarter of the rows is warm-up. The median over
the last quarter is compared with the median over the second:

- memory: at most 5% more, plus 16 MiB;
- seconds per step: at most 25% more;
- log bytes per step (metrics.jsonl and TensorBoard's event files): at most 10% more.

The run evaluates, saves and logs like a real one, so a leak in any of these is found.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FILES = ('models/t5_1_1_tiny.gin', 'moe/t5.gin', 'tasks/stdlib_span_corruption.gin', 'runs/scratch.gin')
MEMORY, SLACK, TIME, LOG = 1.05, 16 * 2**20, 1.25, 1.10


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements after `step` steps.

    Attributes:
      step: number of steps.
      resident: resident memory, in bytes.
      seconds: time spent in steps since the run began.
      log: size of the log, in bytes.
    """

    step: int
    resident: int
    seconds: float
    log: int


def main() -> None:
    """Runs, prints the rows, and exits with 1 if the run drifts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=20_000)
    parser.add_argument('--every', type=int, default=1000, help='steps between rows (%(default)s)')
    parser.add_argument('--model_dir', help='a folder to keep (default: a temporary one)')
    options = parser.parse_args()
    if options.steps < 8 * options.every:
        parser.error('--steps must be at least 8 times --every: a quarter of the rows needs two.')
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        print(f'{"step":>8}{"MiB":>10}{"ms a step":>12}{"KiB of log":>12}')
        for row in watch(options.model_dir or folder, options.steps, options.every):
            before = rows[-1] if rows else Row(0, 0, 0.0, 0)
            pace = 1000 * (row.seconds - before.seconds) / (row.step - before.step)
            print(f'{row.step:>8}{row.resident / 2**20:>10.1f}{pace:>12.2f}{row.log / 2**10:>12.1f}', flush=True)
            rows.append(row)
    complaints = drifts(rows)
    print('\n'.join(complaints) or 'flat')
    sys.exit(1 if complaints else 0)


def watch(model_dir: str, steps: int, every: int) -> Iterator[Row]:
    """Trains in a subprocess; yields a row for each multiple of `every` steps that it logs."""
    bindings = {
        'MODEL_DIR': model_dir,
        'TRAIN_STEPS': steps,
        'NUM_EXPERTS': 4,
        'BATCH_SIZE': 8,
        'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 9}",
        'LOG_PERIOD': every,
        'EVAL_PERIOD': every,
        'EVAL_STEPS': 2,
        'CHECKPOINT_PERIOD': every,
    }
    command = [sys.executable, '-m', 'upcycle', 'train', *(f'--gin_file={file}' for file in FILES)]
    command += [f'--gin.{name}={value}' for name, value in bindings.items()]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])}
    log = pathlib.Path(model_dir) / 'metrics.jsonl'
    with tempfile.TemporaryFile('w+') as output:
        trainer = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            seen = 0
            while seen < steps:
                resident = _resident(trainer.pid)
                for line in _training_lines(log)[seen // every :]:
                    seen = line['step']
                    yield Row(seen, resident, line['seconds'], _log_size(log.parent))
                if trainer.poll() is not None:
                    break
                time.sleep(0.02)
            if trainer.wait() or seen < steps:
                output.seek(0)
                sys.exit(f'the run ended with status {trainer.returncode} after step {seen}:\n{output.read()[-2000:]}')
        finally:
            trainer.kill()
            trainer.wait()


def drifts(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each drift; see the module's docstring."""
    quarter = len(rows) // 4
    gains = list(zip(rows, rows[1:], strict=False))
    second, last = gains[quarter - 1 : 2 * quarter - 1], gains[-quarter:]

    def medians(of) -> tuple[float, float]:
        return statistics.median(of(*pair) for pair in second), statistics.median(of(*pair) for pair in last)

    complaints = []
    early, late = medians(lambda before, row: row.resident)
    if late > MEMORY * early + SLACK:
        complaints.append(f'memory drifts: {early / 2**20:.0f} MiB became {late / 2**20:.0f}')
    early, late = medians(lambda before, row: (row.seconds - before.seconds) / (row.step - before.step))
    if late > TIME * early:
        complaints.append(f'step time drifts: {1000 * early:.2f} ms became {1000 * late:.2f}')
    early, late = medians(lambda before, row: (row.log - before.log) / (row.step - before.step))
    if late > LOG * early:
        complaints.append(f'the log drifts: {early:.1f} bytes a step became {late:.1f}')
    return complaints


def _training_lines(log: pathlib.Path) -> list[dict]:
    """Returns the whole training lines; the last line may be incomplete."""
    if not log.exists():
        return []
    text = log.read_text(encoding='utf-8')
    lines = [json.loads(line) for line in text[: text.rfind('\n') + 1].splitlines()]
    return [line for line in lines if line['split'] == 'train']


def _resident(pid: int) -> int:
    """Returns the resident bytes according to Linux; 0 for a process that has ended."""
    try:
        with open(f'/proc/{pid}/statm', encoding='ascii') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except (OSError, IndexError):
        return 0


def _log_size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in [folder / 'metrics.jsonl', *folder.rglob('events.out.tfevents.*')])


if __name__ == '__main__':
    main()
