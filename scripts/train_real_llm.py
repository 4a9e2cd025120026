"""Trains SmolLM2-135M-Instruct further, dense and with 4 experts in every layer, on CPUs.

  pip install -e '.[gguf,hf,data]'
  python scripts/real_llm.py --out=smollm2
  python scripts/train_real_llm.py train --model=smollm2/dense --out=smollm2/runs    # the same command continues
  python scripts/train_real_llm.py starts --model=smollm2/dense --out=smollm2/runs   # the gaps before training
  python scripts/train_real_llm.py report                                            # tables and picture from the CSVs

`train` trains run after run, about 8 hours on two idle cores, and needs 11 GB of memory and 15 GB of disk in --out. A finished
run appends its row to runs.csv and its losses to curves.csv in --results, and its checkpoints are deleted. An interrupted run
continues from its last checkpoint; SIGTERM saves one and ends with status 75. `--smoke` is the same with runs of 2 steps.

Fixed before the first run:

Data. The source of Python's standard library, without `pydoc_data`, in the tokens of the model; about 5% of the files are held
  out, those of tasks/stdlib_bytes.gin. Rows of 512 tokens, two a step: 1,024 tokens.
Optimizer. AdamW and its settings in models/llm.gin, with fresh state, float32. Linear warm-up over a tenth of the steps, then a
  cosine to 0. Upcycled: moe/llm.gin (Top-2, dropless, normalised weights, balance loss 0.01) with 4 experts, 373M parameters.
Rates. Peaks of 3e-5, 1e-4 and 3e-4, for each branch, on seeds 0 to 2 (data order, routers), 80 steps each. The branch uses the
  one with the lowest mean of the validation loss at the last step, on 16 batches that are the same for all.
Continued. Seeds 3 to 5: 300 steps of the upcycled model, and the dense steps with the same FLOPs by cost.py (457). Reported:
  the loss on 40 batches of held-out code, and on two texts that no run trains on, topics of Python's reference and chapters of
  the Bible (King James), 40 batches each at most; differences between branches are paired by seed, intervals are Student's over
  three seeds.
Chat. 1,000 questions about the standard library, answered by docstrings, 80 of held-out files; 60 steps of the upcycled model,
  and the dense ones with the same FLOPs, peak 5e-5, by runs/finetune_llm.gin on two rows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from serving.programs import CheckError
from smollm2 import results, starts, texts
from smollm2.schedule import (
    BRANCHES,
    CHAT,
    CONTINUED,
    DENSE,
    FROM_CHECKPOINT,
    SMOKE,
    START,
    TOKENS,
    UPCYCLED,
    Run,
    Sizes,
    runs,
)

from upcycle import configuration, cost
from upcycle.errors import PREEMPTED, UserError
from upcycle.metrics import read_metrics
from upcycle.report.text import markdown_table
from upcycle.sweep.conduct import lock

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / 'docs' / 'results' / 'smollm2', ROOT / 'docs' / 'smollm2.png'
STARTS = 'starts.csv'
EVAL_FILES = (FROM_CHECKPOINT, TOKENS, 'runs/eval.gin')


class Programs:
    """Runs `upcycle` commands one after the other; SIGTERM reaches the one that runs."""

    def __init__(self, inherited: Sequence[int] = ()):
        self._inherited, self._process, self._stopped = tuple(inherited), None, False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def run(self, arguments: Sequence[str]) -> float:
        """Runs `upcycle ARGUMENTS`; returns its largest resident memory, in GB.

        Raises:
          SystemExit: 75 after SIGTERM; with a message if the command fails.
        """
        if not self._stopped:
            self._process = subprocess.Popen([sys.executable, '-m', 'upcycle', *arguments], pass_fds=self._inherited)
            _, status, usage = os.wait4(self._process.pid, 0)
            code, self._process.returncode = os.waitstatus_to_exitcode(status), 0
            self._process = None
        if self._stopped:
            sys.exit(PREEMPTED)
        if code:
            sys.exit(
                f'train_real_llm.py: upcycle {arguments[0]} ended with status {code}: repeat the command to continue.'
            )
        return usage.ru_maxrss * 1024 / 1e9


class Sweep:
    """All runs of a schedule.

    Args:
      model: folder of the dense model.
      out: folder of the runs.
      folder: of the CSVs.
      sizes: the schedule.
      programs: runs the commands.
    """

    def __init__(self, model: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, sizes: Sizes, programs: Programs):
        self._model, self._out, self._sizes, self._programs = model, out, sizes, programs
        self._csv, self._curves = folder / results.RUNS, folder / results.CURVES
        examples = texts.EXAMPLES if sizes != SMOKE else {'train': 40, 'validation': 10}
        self._texts = texts.prepare(out / 'texts', model, examples)
        facts = {'Python': platform.python_version(), 'data': self._texts.digest(), 'commit': _commit()}
        self._facts = facts
        results.require_same_data(self._rows, facts['data'], lambda reason: CheckError(f'{self._csv}: {reason}'))
        self._flops = {branch: self._step_flops(branch) for branch in BRANCHES}
        self._pace: float | None = None  # seconds a TFLOP

    @property
    def _rows(self) -> list[results.Row]:
        return results.read(self._csv)

    def _step_flops(self, branch: str) -> float:
        run = Run(CONTINUED, branch, 1e-4, 0, 2)
        arguments = run.arguments(self._sizes, self._texts, self._model, self._out / 'unused')
        files = [word.removeprefix('--gin_file=') for word in arguments if word.startswith('--gin_file=')]
        named = [word.removeprefix('--gin.').split('=', 1) for word in arguments if word.startswith('--gin.')]
        built = configuration.load(files, dict(named))
        return cost.step_flops(built.model, built.train_data.batch_spec())

    def _plan(self) -> list[Run]:
        return runs(self._sizes, self._rows, self._flops[UPCYCLED] / self._flops[DENSE])

    def conduct(self) -> None:
        """Trains all runs that have no row."""
        self._start()
        while True:
            finished = {results.key_of(row) for row in self._rows}
            plan = self._plan()
            for run in plan:
                if run.key in finished:
                    shutil.rmtree(self._folder(run) / 'checkpoints', ignore_errors=True)
            left = [run for run in plan if run.key not in finished]
            if not left:
                return
            self._train(left[0], len(plan) - len(left), left)

    def _folder(self, run: Run) -> pathlib.Path:
        return self._out / run.name

    def _start(self) -> None:
        """Evaluates the dense model, once."""
        row = dict(zip(results.KEY, (START, DENSE, '', ''), strict=True))
        if results.key_of(row) not in map(results.key_of, self._rows):
            losses = self._losses(self._model, self._out / START)
            row |= {'steps': 0, 'loss': losses['code loss'], **losses, **self._facts}
            results.append(self._csv, results.COLUMNS, [row])

    def _losses(self, checkpoint: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
        """Returns the losses of a checkpoint on whole texts, by column."""
        losses = {}
        for name in results.TEXTS:
            bindings = {
                'TOKENS_DIR': getattr(self._texts, name),
                'EVAL_STEPS': self._sizes.text_batches,
                'EVAL_BATCH_SIZE': self._sizes.batch,
                'SEQUENCE_LENGTH': self._sizes.length,
                'ACTIVATION_DTYPE': 'float32',
            }
            out = folder / f'{name}.json'
            if not out.exists():
                folder.mkdir(parents=True, exist_ok=True)
                arguments = [
                    'eval',
                    f'--from={checkpoint}',
                    f'--out={out}',
                    *(f'--gin_file={file}' for file in EVAL_FILES),
                ]
                self._programs.run([*arguments, *(f'--gin.{key}={value}' for key, value in bindings.items())])
            losses[f'{name} loss'] = f'{json.loads(out.read_text("utf-8"))["metrics"]["validation"]["loss"]:.5f}'
        return losses

    def _train(self, run: Run, done: int, left: Sequence[Run]) -> None:
        print(f'{run.name}: {run.steps} steps, run {done + 1} of {done + len(left)}{self._time_left(left)}', flush=True)
        folder, begin = self._folder(run), time.monotonic()
        start = self._with_experts() if (run.part, run.branch) == (CHAT, UPCYCLED) else self._model
        peak = self._largest(
            folder, self._programs.run(['train', *run.arguments(self._sizes, self._texts, start, folder)])
        )
        lines = read_metrics(folder / 'metrics.jsonl')
        losses = self._losses(folder, folder) if run.part == CONTINUED else {}
        if run.part == CHAT or (run.part == CONTINUED and run.seed == self._sizes.seeds[0]):
            self._export(folder, self._out / f'{run.part}_{run.branch}')
        row = results.row_of(run, lines, {**losses, 'peak GB': f'{peak:.1f}', **self._facts})
        results.append(self._curves, results.CURVE_COLUMNS, results.curve_of(run, lines))
        results.append(self._csv, results.COLUMNS, [row])
        self._pace = (time.monotonic() - begin) / float(row['TFLOP'])
        print(f'{run.name}: validation loss {row["loss at start"]} -> {row["loss"]}, {peak:.1f} GB', flush=True)

    @staticmethod
    def _largest(folder: pathlib.Path, peak: float) -> float:
        """Returns the largest memory of the processes that trained a run, in GB."""
        file = folder / 'peak_gb'
        peak = max(peak, float(file.read_text()) if file.exists() else 0.0)
        file.write_text(f'{peak:.3f}')
        return peak

    def _time_left(self, left: Sequence[Run]) -> str:
        if self._pace is None:
            return ''
        hours = sum(run.steps * self._flops[run.branch] for run in left) / 1e12 * self._pace / 3600
        return f'; the runs that are known take {hours:.1f} hours more'

    def _with_experts(self) -> pathlib.Path:
        """Returns the folder of the upcycled model, which `upcycle convert` writes once."""
        folder = self._out / 'experts'
        if not (folder / 'model.safetensors').exists():
            convert = [
                'convert',
                f'--from={self._model}',
                f'--to={folder}',
                '--format=huggingface',
                '--gin_file=moe/llm.gin',
            ]
            self._programs.run([*convert, f'--gin.NUM_EXPERTS={self._sizes.experts}'])
        return folder

    def _export(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        if not (target / 'model.safetensors').exists():
            export = ['export', f'--from={folder}', f'--to={target}', '--format=huggingface', '--optimizer_state=none']
            self._programs.run(export)


def _commit() -> str:
    command = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measure_starts(model: pathlib.Path, out: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes and prints the gaps of upcycled models before training."""
    rows = list(starts.measure(model, texts.prepare(out / 'texts', model)))
    results.write(folder / STARTS, starts.COLUMNS, rows)
    print(_as_table(starts.COLUMNS, rows))


def report(folder: pathlib.Path, picture: pathlib.Path) -> None:
    """Prints the tables of all CSVs, and draws the picture."""
    from smollm2.picture import draw

    rows, gaps = results.read(folder / results.RUNS), results.read(folder / STARTS)
    print(results.table(rows))
    if gaps:
        print(_as_table(starts.COLUMNS, gaps))
    draw(rows, results.read(folder / results.CURVES), picture)
    print(picture)


def _as_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(columns, [[row[name] for name in columns] for row in rows])


def main() -> None:
    """Parses, and does the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=('train', 'starts', 'report'))
    parser.add_argument('--model', type=pathlib.Path, default='smollm2/dense', help='of the dense model (%(default)s)')
    parser.add_argument('--out', type=pathlib.Path, default='smollm2/runs', help='folder of the runs (%(default)s)')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='folder of the CSVs (%(default)s)')
    parser.add_argument('--picture', type=pathlib.Path, default=PICTURE, help='of the report (%(default)s)')
    parser.add_argument('--smoke', action='store_true', help='runs of 2 steps; the CSVs are in OUT/results')
    options = parser.parse_args()
    folder = options.out / 'results' if options.smoke else options.results
    try:
        if options.task == 'report':
            report(folder, options.picture)
        elif options.task == 'starts':
            measure_starts(options.model, options.out, folder)
        else:
            with lock(str(options.out)) as held:
                sizes = SMOKE if options.smoke else Sizes()
                Sweep(options.model, options.out, folder, sizes, Programs([held])).conduct()
            print(results.table(results.read(folder / results.RUNS)))
    except (CheckError, UserError) as error:
        sys.exit(f'train_real_llm.py: {error}')


if __name__ == '__main__':
    main()
