"""Real processes: interrupted, in odd environments, with odd output paths, two on one folder.

A case passes if it ends with status 0, 2, 69 or 130, without a traceback, and with nothing half-written: the output is absent, or
whole, or is finished when the same command is repeated.
"""

import contextlib
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from fuzzing.case import LOST, REFUSED, SAME, Case, StatusError
from fuzzing.places import Places
from upcycle.checkpoints import open_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ('models/t5_1_1_tiny.gin', 'tasks/synthetic_text.gin', 'runs/pretrain.gin')
BINDINGS = {'EMBED_DIM': 16, 'MLP_DIM': 32, 'NUM_HEADS': 2, 'HEAD_DIM': 8, 'ACTIVATION_DTYPE': 'float32'}
BINDINGS |= {'BATCH_SIZE': 2, 'CHECKPOINT_PERIOD': 2, 'WARMUP_STEPS': 10}
# Allowed exit statuses in every environment: success, a mistake, no answer, interrupted.
FINE = (0, 2, 69, 130, -signal.SIGINT)
ENVIRONMENTS: tuple[Mapping[str, str | None], ...] = (
    {'PYTHONIOENCODING': 'ascii'},
    {'LANG': 'C', 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
    {'LC_ALL': 'no_SUCH.locale'},
    {'HOME': None},
    {'HOME': '/nonexistent'},
    {'TMPDIR': '/nonexistent'},
    {'TMPDIR': '/proc'},
    {'COLUMNS': '0', 'LINES': '0'},
    {'COLUMNS': '1'},
    {'COLUMNS': '-7'},
    {'COLUMNS': 'many'},
    {'TERM': 'dumb'},
    {'TERM': ''},
    {'NO_COLOR': '1', 'FORCE_COLOR': '1'},
    {'JAX_PLATFORMS': 'cuda'},
    {'JAX_PLATFORMS': 'tpu'},
    {'JAX_PLATFORMS': 'cuda,cpu'},
    {'JAX_PLATFORMS': 'no_such'},
    {'JAX_PLATFORMS': ''},
    {'JAX_PLATFORMS': None},
    {'JAX_ENABLE_X64': '1'},
    {'JAX_NUM_CPU_DEVICES': '3'},
    {'JAX_DEFAULT_MATMUL_PRECISION': 'highest'},
    {'JAX_COMPILATION_CACHE_DIR': '/proc/none'},
    {'JAX_COMPILATION_CACHE_DIR': '/dev/null'},
    {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'},
    {'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONHASHSEED': '7'},
    {'PYTHONOPTIMIZE': '2'},
    {'PYTHONWARNINGS': 'error::UserWarning'},
    {'MALLOC_ARENA_MAX': '1'},
    {'MPLBACKEND': 'no_such'},
    {'MPLCONFIGDIR': '/proc/none'},
    {'TFDS_DATA_DIR': '/nonexistent'},
    {'GCE_METADATA_HOST': 'not a host'},
    {'UPCYCLE_TRACEBACK': '0'},
    {'PATH': ''},
)
STREAMS = ('closed', 'full', 'ended', 'none')


class Processes:
    """Makes cases of commands in processes."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder / 'processes'
        self._folder.mkdir()
        self._run = self._folder / 'run'
        self._count = 0
        self._places = Places(self._folder / 'places')
        done = self._start(self._train(self._run, 4))
        said, _ = done.communicate()
        if done.returncode:
            raise RuntimeError(f'the run that the cases work on failed: {said.decode()}')

    def __call__(self, rng: random.Random) -> Case:
        return rng.choice((self._interrupted, self._interrupted, self._environment, self._place, self._two))(rng)

    def _commands(self, out: pathlib.Path) -> dict[str, list[str]]:
        """Returns the commands by name; those that write anything write to `out`."""
        run = str(self._run)
        return {
            'inspect': ['inspect', run],
            'import': ['import', f'--from={run}/checkpoints/4', f'--to={out}'],
            'export': ['export', f'--from={run}', f'--to={out}', '--format=huggingface', '--optimizer_state=none'],
            'report': ['report', run, f'--out={out}'],
            'eval': ['eval', f'--from={run}', f'--out={out}'],
            'train': self._train(out, 4),
        }

    def _train(self, folder: pathlib.Path, steps: int) -> list[str]:
        bindings = {**BINDINGS, 'MODEL_DIR': folder, 'TRAIN_STEPS': steps}
        return [
            'train',
            *(f'--gin_file={file}' for file in TINY),
            *(f'--gin.{name}={value}' for name, value in bindings.items()),
        ]

    def _interrupted(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(self._commands(self._run)))
        seconds = rng.choice((rng.uniform(0, 1), rng.uniform(0, 8)))
        again = rng.random() < 0.4

        def run() -> str:
            with self._fresh() as out:
                command = self._commands(out)[name]
                with self._started(command) as process:
                    time.sleep(seconds)
                    process.send_signal(signal.SIGINT)
                    outcome = _ended(process)
                if outcome not in (SAME, REFUSED):
                    return outcome
                if again:
                    with self._started(command) as process:
                        said, _ = process.communicate()
                    # A command that had finished refuses to overwrite its result; one that had not finishes it now.
                    if process.returncode not in (0, 2) or b'Traceback' in said:
                        raise StatusError(f'given again: {process.returncode} {said.decode(errors="replace")[-2000:]}')
                    if process.returncode == 2 and name in ('train', 'report', 'eval', 'inspect'):
                        raise StatusError(f'given again it is refused: {said.decode(errors="replace")[-2000:]}')
                    self._require_whole(name, out)
                return outcome

        return Case(
            f'interrupt: {name}', f'SIGINT after {seconds:.3f} s of {name}{", and again" if again else ""}', run
        )

    def _require_whole(self, name: str, out: pathlib.Path) -> None:
        if name in ('import', 'export', 'train'):
            reader = open_checkpoint(out)
            for leaf in reader.leaves():
                reader.read(leaf)

    def _environment(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(self._commands(self._run)))
        changes = dict(rng.choice(ENVIRONMENTS))
        if rng.random() < 0.3:
            changes |= rng.choice(ENVIRONMENTS)
        stream = rng.choice(STREAMS) if rng.random() < 0.3 else None
        gone = rng.random() < 0.1

        def run() -> str:
            with self._fresh() as out, self._started(self._commands(out)[name], changes, stream, gone) as process:
                return _ended(process)

        return Case(f'environment: {name}', f'{name} with {changes}, output {stream}, folder gone: {gone}', run)

    def _place(self, rng: random.Random) -> Case:
        name = rng.choice(sorted({*self._commands(self._run)} - {'inspect'}))
        place, path = self._places.draw(rng)

        def run() -> str:
            with self._places.unchanged(may_write=path):
                command = [argument.replace('OUT', path) for argument in self._commands(pathlib.Path('OUT'))[name]]
                with self._started(command) as process:
                    return _ended(process)

        return Case(f'place: {name}', f'{name} to {place}: {path[:200]}', run)

    def _two(self, rng: random.Random) -> Case:
        apart, number = rng.uniform(0, 6), rng.choice((None, None, signal.SIGKILL, signal.SIGINT))

        def run() -> str:
            with self._fresh() as out:
                command = self._train(out, 8)
                with self._started(command) as first:
                    time.sleep(apart)
                    with self._started(command) as second:
                        if number is not None:
                            time.sleep(apart / 2)
                            first.send_signal(number)
                        outcomes = [_ended(process, allowed=(-signal.SIGKILL,)) for process in (first, second)]
                for outcome in outcomes:
                    if outcome not in (SAME, REFUSED):
                        return outcome
                with self._started(command) as last:
                    outcome = _ended(last)
                if outcome != SAME:
                    raise StatusError(f'given alone afterwards it ends with {last.returncode}')
                reader = open_checkpoint(out)
                return SAME if reader.step == 8 else LOST

        return Case('two on one folder', f'{apart:.2f} s apart, the first gets {number}', run)

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[pathlib.Path]:
        """Yields an unused path, and removes it on exit."""
        self._count += 1
        folder = self._folder / f'case_{self._count}'
        folder.mkdir()
        try:
            yield folder / 'out'
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _started(self, *arguments: object) -> Iterator[subprocess.Popen]:
        process = self._start(*arguments)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(
        self,
        arguments: Sequence[str],
        changes: Mapping[str, str | None] | None = None,
        stream: str | None = None,
        gone: bool = False,
    ) -> subprocess.Popen:
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'UPCYCLE_TRACEBACK': '1', 'PYTHONPATH': str(ROOT)}
        environment |= {'JAX_COMPILATION_CACHE_DIR': str(self._folder / 'cache')}
        environment |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
        for name, value in (changes or {}).items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        where = self._folder / 'gone'
        where.mkdir(exist_ok=True)

        def before() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            _redirect(stream)
            if gone:
                os.chdir(where)
                where.rmdir()

        return subprocess.Popen(
            [sys.executable, '-m', 'upcycle', *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder,
            env=environment,
            preexec_fn=before,
            start_new_session=True,
        )


def _redirect(stream: str | None) -> None:
    """Replaces standard output in the child: closed, a full device, a pipe without a reader, or no streams at all."""
    if stream == 'closed':
        os.close(1)
    elif stream == 'full':
        os.dup2(os.open('/dev/full', os.O_WRONLY), 1)
    elif stream == 'ended':
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
        os.close(writing)
    elif stream == 'none':
        os.close(0)
        os.close(1)


def _ended(process: subprocess.Popen, allowed: Sequence[int] = ()) -> str:
    """Returns how a process ended; raises its output if it ended wrongly."""
    said, _ = process.communicate()
    text = said.decode(errors='replace')
    if 'init_import_site' in text:  # Python was interrupted during its own start
        return REFUSED
    if 'Traceback (most recent call last)' in text:
        raise RuntimeError(f'status {process.returncode}: {text[-3000:]}')
    if process.returncode not in (*FINE, *allowed):
        raise StatusError(f'{process.returncode}: {text[-3000:]}')
    return SAME if process.returncode == 0 else REFUSED
