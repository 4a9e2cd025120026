"""Random damage to configurations and to checkpoints: never a traceback, never a hang, never a silent success.

  python scripts/fuzz.py --what configurations --cases 10000
  python scripts/fuzz.py --what checkpoints --cases 10000      # with UPCYCLE_FIXTURES also checkpoints that T5X wrote
  python scripts/fuzz.py --replay fuzz_checkpoints.jsonl       # the cases that failed, again

A case is made by its seed and number alone. Configurations are checked as every command checks them, and those that pass are
laid out abstractly, as `upcycle plan` does; checkpoints are opened, identified and read whole. Allowed is a `UserError`, the same
result as without the damage, or another valid configuration or checkpoint that says what it is. Everything else is written to a
file, one case a line. The exit code is 1 when a case failed. Interrupted, it says how far it has come.
"""

import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['UPCYCLE_TRACEBACK'] = '1'

import jax
import msgpack
import numpy as np
from flax.traverse_util import unflatten_dict

from upcycle import cli, configuration, gin_files, inspection, jobs, partitioning
from upcycle.checkpoints import create_checkpoint, open_checkpoint
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.native import CheckpointManager
from upcycle.errors import UserError
from upcycle.models import identify
from upcycle.train import loop
from upcycle.train.optimizer import Adafactor
from upcycle.train.state import layout

SECONDS = 60  # of processor time for a case, before it counts as hanging
PATIENCE = 600  # seconds for a case that waits, on a machine that may be busy
GIGABYTES = 8  # of addresses that a case may take more than the program before it
LARGE = 200_000_000  # parameters, above which a valid configuration is not laid out

REFUSED, SAME, ANOTHER, BLIND = 'refused', 'as without the damage', 'another valid one', 'the format cannot tell'
TRACEBACK, HANG, SILENT = 'TRACEBACK', 'HANG', 'SILENT SUCCESS'
FAILURES = (TRACEBACK, HANG, SILENT)


@dataclasses.dataclass(frozen=True)
class Case:
    """One trial.

    Attributes:
      kind: of the damage, for the table.
      description: of this damage, to read.
      run: does it; returns an outcome, or raises.
    """

    kind: str
    description: str
    run: Callable[[], str]


class Hang(BaseException):
    """A case took too long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases and prints how they ended; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', choices=('configurations', 'checkpoints'), default='configurations')
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--first', type=int, default=0, metavar='N', help='number of the first case (%(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--replay', metavar='FILE', help='only the cases of this file')
    parser.add_argument('--out', metavar='FILE', help='where cases that fail are written (fuzz_WHAT.jsonl)')
    options = parser.parse_args(arguments)
    whats = [(options.what, options.seed, n) for n in range(options.first, options.first + options.cases)]
    if options.replay:
        lines = pathlib.Path(options.replay).read_text('utf-8').splitlines()
        whats = [(case['what'], case['seed'], case['number']) for case in map(json.loads, lines)]
    with tempfile.TemporaryDirectory() as folder:
        failures = _carry_out(whats, pathlib.Path(folder), show_each=options.replay is not None)
    if failures:
        out = options.out or f'fuzz_{options.what}.jsonl'
        pathlib.Path(out).write_text(''.join(json.dumps(failure) + '\n' for failure in failures), 'utf-8')
        print(f'{len(failures)} failed: {out}')
    return 1 if failures else 0


def _carry_out(whats: Sequence[tuple[str, int, int]], folder: pathlib.Path, *, show_each: bool) -> list[dict[str, Any]]:
    """Runs the cases; the failed ones."""
    makers: dict[str, Callable[[random.Random], Case]] = {}
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    start, slowest, done = time.monotonic(), 0.0, 0
    for what, seed, number in whats:
        if what not in makers:
            makers[what] = {'configurations': Configurations, 'checkpoints': Checkpoints}[what](folder)
            start = time.monotonic()
        began = time.monotonic()
        try:
            case = makers[what](random.Random(f'{seed}/{what}/{number}'))
            outcome, detail = _outcome(case)
        except KeyboardInterrupt:
            break
        slowest = max(slowest, time.monotonic() - began)
        table[case.kind][outcome] += 1
        if outcome in FAILURES:
            failures.append(
                {'what': what, 'seed': seed, 'number': number, 'kind': case.kind, 'outcome': outcome}
                | {'description': case.description, 'detail': detail}
            )
        if show_each or outcome in FAILURES:
            print(f'{what} {seed}/{number}: {outcome}\n  {case.description}\n  {detail}', flush=True)
        done += 1
        if done % 500 == 0:
            jax.clear_caches()
            print(f'{done} cases in {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)
    _print_table(table)
    print(f'{done} cases in {time.monotonic() - start:.0f} s, the slowest {slowest:.1f} s')
    return failures


def _outcome(case: Case) -> tuple[str, str]:
    def too_long(*_: Any) -> None:
        raise Hang

    old = {number: signal.signal(number, too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    output = io.StringIO()
    try:
        with _bounded_memory(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return case.run(), ''
    except UserError as error:
        sentences = str(error).strip()
        return (REFUSED, sentences) if sentences else (TRACEBACK, 'an empty sentence')
    except Hang:
        return HANG, traceback.format_exc(limit=-4)
    except Exception:
        return TRACEBACK, traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """A size that a header makes up must not be allocated, nor take the machine down where it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (GIGABYTES << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _print_table(table: Mapping[str, Mapping[str, int]]) -> None:
    outcomes = (REFUSED, SAME, ANOTHER, BLIND, *FAILURES)
    used = [outcome for outcome in outcomes if any(outcome in row for row in table.values()) or outcome in FAILURES]
    rows = [['damage', *used, 'cases']]
    rows += [[kind, *(str(row[o]) for o in used), str(sum(row.values()))] for kind, row in sorted(table.items())]
    total = sum(map(collections.Counter, table.values()), collections.Counter())
    rows.append(['all', *(str(total[o]) for o in used), str(sum(total.values()))])
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
        if row is rows[0]:
            print('|---' * len(row) + '|')


# --- configurations ---

TEXT, IMAGES = 'tasks/synthetic_text.gin', 'tasks/synthetic_images.gin'
SMALL = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '6', 'BATCH_SIZE': '4', 'WARMUP_STEPS': '2'}
START = {'INITIAL_CHECKPOINT_PATH': 'nowhere'}
# Files, and bindings besides SMALL, of valid configurations.
RUNS: tuple[tuple[tuple[str, ...], Mapping[str, str]], ...] = (
    (('models/t5_1_1_tiny.gin', TEXT, 'runs/pretrain.gin'), {}),
    (('models/t5_1_1_tiny.gin', 'optimizers/adamw.gin', TEXT, 'runs/continue_dense.gin'), START),
    (('models/t5_1_1_tiny.gin', 'moe/t5.gin', TEXT, 'runs/scratch.gin'), {'NUM_EXPERTS': '4'}),
    (('models/t5_1_1_tiny.gin', 'moe/t5.gin', TEXT, 'runs/upcycle.gin'), {'NUM_EXPERTS': '4', **START}),
    (
        ('models/t5_1_1_tiny.gin', 'moe/t5.gin', TEXT, 'runs/upcycle.gin', 'surgery/drop.gin'),
        {'NUM_EXPERTS': '4', **START},
    ),
    (('models/t5_1_1_tiny.gin', 'tasks/stdlib_span_corruption.gin', 'runs/pretrain.gin'), {}),
    (
        ('models/t5_1_1_tiny.gin', 'moe/t5.gin', TEXT, 'runs/scratch.gin', 'recipes/shared_experts.gin'),
        {'NUM_EXPERTS': '4'},
    ),
    (('models/vit_mini.gin', IMAGES, 'runs/pretrain.gin'), {'IMAGE_SIZE': '28', 'NUM_CLASSES': '10'}),
    (('models/vit_mini.gin', 'moe/vit.gin', 'tasks/mnist5k.gin', 'runs/scratch.gin'), {'NUM_EXPERTS': '4'}),
    (('models/vit_mini.gin', 'moe/vit.gin', 'tasks/mnist5k.gin', 'runs/upcycle.gin'), {'NUM_EXPERTS': '4', **START}),
    (('models/vit_mini.gin', 'tasks/mnist5k.gin', 'runs/finetune_vit.gin', 'runs/few_shot.gin'), START),
)
WORDS = (
    'copy',
    'top_k',
    'expert_choice',
    'soft',
    'merged',
    'dense',
    'ragged',
    'priority',
    'every_other',
    'last_2',
    'last_99',
)
WORDS += (
    'none',
    'auto',
    'float32',
    'restart',
    'constant * cosine_decay',
    'tile',
    'fresh',
    'vmoe',
    'xft',
    'train',
    'full',
)
NUMBERS = (
    '0',
    '-1',
    '1',
    '2',
    '3',
    '7',
    '64',
    '1000',
    '2147483647',
    '2147483648',
    str(2**63),
    '1' + '0' * 40,
    '0x' + 'f' * 5000,
)
NUMBERS += ('0.0', '-0.5', '0.5', '1.0', '1e-30', '1e400', '-1e400', '1e-400', '1_000', '1j', 'nan', 'inf')
ODD = (
    'None',
    'True',
    'False',
    '',
    ' ',
    "''",
    '[]',
    '()',
    '{}',
    '(1, 2, 1)',
    '(1, 1, 1)',
    '[0, 1]',
    '[1, 1]',
    '(0.5,)',
    "['a']",
)
ODD += (
    "{'inputs': 32, 'targets': 9}",
    "{'inputs': 0}",
    '{1: 2}',
    '{[]: 1}',
    '[[[[]]]]',
    '[' * 50,
    '(' * 5000,
    "b'x'",
    '...',
    '{1, 2}',
)
ODD += (
    '%gin.REQUIRED',
    '%NO_SUCH',
    '%BATCH_SIZE',
    '@',
    '%',
    '@x',
    '@gin.macro()',
    '@a/b/c()',
    'a\nb',
    'a = 1',
    '\0',
    '\u2603',
    '"',
    "it's",
)
ODD += (
    '@upcycle.train.optimizer.Adafactor()',
    '@upcycle.train.optimizer.Adafactor',
    '@upcycle.moe.config.MoEConfig()',
    '(',
)
ODD += (
    '@upcycle.train.run.Run()',
    '../../x',
    '/etc/passwd',
    'gs://bucket/x',
    'a' * 10_000,
    '*',
    '(?P<x',
    '[%BATCH_SIZE, %SEED]',
)
LINES = (
    'include "runs/pretrain.gin"',
    'include "nowhere.gin"',
    'include "fuzz.gin"',
    'import nowhere',
    'from upcycle.train import rum',
)
LINES += (
    'BATCH_SIZ = 8',
    'a.b = 3',
    'x/y.z = 1',
    'run.Run:',
    '  model_dir = 3',
    'A = %B',
    'B = %A',
    'A',
    '=',
    '\tq = 1',
    'run.Run.sed = 1',
)
LINES += (
    'BATCH_SIZE = %BATCH_SIZE',
    'MODEL = @run.Run()',
    'moe.MoEConfig.num_experts = %MODEL',
    '# only words',
    '"""',
    'MODEL = None',
)


class Configurations:
    """Makes cases of damaged configurations."""

    def __init__(self, folder: pathlib.Path):
        self._file = folder / 'fuzz.gin'
        self._shipped = gin_files.shipped()
        self._names = sorted(gin_files.macros_of(self._shipped.values()) - {'gin'})
        self._identities = []
        for files, more in RUNS:
            configuration.load(files, {**SMALL, **more})
            self._identities.append(configuration.resolved())

    def __call__(self, rng: random.Random) -> Case:
        number = rng.randrange(len(RUNS))
        files, more = list(RUNS[number][0]), RUNS[number][1]
        bindings = {**SMALL, **more}
        ways = [self._value] * 6 + [self._files] * 3 + [self._text] * 5 + [self._name] * 2 + [self._flags]
        kinds = [rng.choice(ways)]
        kinds += [rng.choice((self._value, self._text)) for _ in range(rng.choice((0, 0, 1, 3)))]
        extra: list[str] = []
        for kind in kinds:
            kind(rng, files, bindings, extra)
        arguments = ['train', *(f'--gin_file={file}' for file in files), *extra]
        arguments += [f'--gin.{name}={value}' for name, value in bindings.items()]
        text = self._file.read_text('utf-8', 'replace') if str(self._file) in files else ''
        shown = ' '.join(argument[:200] for argument in arguments) + (f'\n  fuzz.gin: {text[-600:]!r}' if text else '')
        return Case(kinds[0].__name__.strip('_'), shown, lambda: self._run(number, arguments, bindings))

    def _run(self, number: int, arguments: list[str], bindings: Mapping[str, str]) -> str:
        found = []
        old, jobs.train = jobs.train, lambda files, named, **_: found.append(configuration.load(files, named))
        try:
            cli.run(arguments)
        except SystemExit as stop:  # argparse has said what is wrong
            return REFUSED if stop.code == 2 else TRACEBACK
        finally:
            jobs.train = old
        (run,) = found
        identity = configuration.resolved()
        same = identity == self._identities[number]
        if same and any(self._said(name, bindings, number) for name in bindings):
            return SILENT
        mesh = loop.check(run)
        if jax.tree.reduce(lambda a, b: a + b, _guess(run)) < LARGE:
            with partitioning.use(mesh):
                layout(run, mesh)
        return SAME if same else ANOTHER

    def _said(self, name: str, bindings: Mapping[str, str], number: int) -> bool:
        """Whether a binding asks for something that the undamaged configuration does not have under the same name."""
        known = {**SMALL, **RUNS[number][1]}
        value = bindings[name]
        if value.startswith('%'):
            # What a macro of a file stands for is not known here.
            value = bindings.get(value[1:], known.get(name))
        return name in known and not _equal(value, known[name])

    def _value(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        name = rng.choice([*bindings, *rng.choices(self._used(files), k=12), *rng.choices(self._names, k=3)])
        plausible = self._plausible(name)
        bindings[name] = rng.choice(rng.choice((NUMBERS, WORDS, ODD, plausible, plausible, plausible)))

    def _used(self, files: Sequence[str]) -> list[str]:
        """Macros that the files mention, which a run of them mostly uses."""
        return sorted(gin_files.macros_of(text for name, text in self._shipped.items() if name in files) | {*SMALL})

    def _plausible(self, name: str) -> list[str]:
        """What our own files set a macro to, and numbers near that."""
        found = [re.findall(rf'^{re.escape(name)} = ([^#\n]*)', text, re.MULTILINE) for text in self._shipped.values()]
        values = [value.strip() for values in found for value in values]
        near = [str(int(value) + more) for value in values if value.isdigit() for more in (-1, 1, int(value))]
        return values + near or ['4']

    def _name(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        name = rng.choice(
            [*bindings, 'upcycle.train.run.Run.total_steps', 'train/upcycle.data.text.DatasetConfig.seed']
        )
        bindings[_misspelt(rng, name)] = bindings.get(name, '3')

    def _files(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        at = rng.randrange(len(files))
        match rng.randrange(5):
            case 0:
                del files[at]
            case 1:
                files.insert(rng.randrange(len(files) + 1), rng.choice(list(self._shipped)))
            case 2:
                files[at] = _misspelt(rng, files[at])
            case 3:
                rng.shuffle(files)
            case _:
                files[at] = rng.choice(['', '.', '/', os.sep * 2, 'gin', '/dev/null', 'a\0b', '~', *self._shipped])

    def _text(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        shipped = self._shipped
        at = rng.randrange(len(files))
        if str(self._file) in files:
            return
        if rng.random() < 0.3 or files[at] not in shipped:
            head = ['from __gin__ import dynamic_registration', '', 'from upcycle.train import run', '']
            lines = head + [rng.choice(LINES) for _ in range(rng.randint(1, 4))]
            files.append(str(self._file))
        else:
            lines = shipped[files[at]].splitlines()
            files[at] = str(self._file)
            for _ in range(rng.randint(1, 3)):
                line = rng.randrange(len(lines))
                match rng.randrange(6):
                    case 0:
                        del lines[line]
                        lines = lines or ['']
                    case 1:
                        lines.insert(line, rng.choice(LINES))
                    case 2 if ' = ' in lines[line]:
                        lines[line] = (
                            lines[line].split(' = ')[0] + ' = ' + rng.choice(rng.choice((NUMBERS, WORDS, ODD)))
                        )
                    case 3:
                        other = rng.randrange(len(lines))
                        lines[line], lines[other] = lines[other], lines[line]
                    case _:
                        lines[line] = _misspelt(rng, lines[line])
        content = '\n'.join(lines).encode('utf-8', 'replace') + b'\n'
        if rng.random() < 0.05:
            content = _damaged(rng, content)[1]
        self._file.write_bytes(content)

    def _flags(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        choices = ('--gin.', '--gin', '--gin.=3', '--gin_file', '--gin_file=', '--steps=3', '-x', '--', 'positional')
        choices += (
            '--process_count=many',
            '--process_count=2',
            '--coordinator_address=x',
            '--gin.A',
            '--distribute',
            '--gin_fil=x',
        )
        extra.append(rng.choice(choices))


def _guess(run: Any) -> list[float]:
    """Rough number of parameters, so that no huge model is traced for its sizes alone."""
    config = run.model.config
    depth = getattr(config, 'num_layers', 0) or config.num_encoder_layers + config.num_decoder_layers
    vocabulary = getattr(config, 'vocab_size', 0) or config.num_classes + config.patch_size**2 * config.image_channels
    experts = max([moe.num_experts for moe in run.model.moe_layers().values()] or [1])
    return [vocabulary * config.emb_dim, depth * config.emb_dim * (config.mlp_dim * experts + 1_000_000)]


def _equal(text: str, other: str) -> bool:
    values = []
    for value in (text, other):
        try:
            values.append(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values.append(value)
    return values[0] == values[1]


def _misspelt(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    char = rng.choice('aZ_./%@=:()[]{}\'"# 0\t')
    return rng.choice(
        (text[:at] + char + text[at:], text[:at] + char + text[at + 1 :], text[:at] + text[at + 1 :], text.lower())
    )


# --- checkpoints ---

JUNK = (
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**60,
    -(2**60),
    0.5,
    1e300,
    True,
    None,
    '',
    'x',
    '..',
    '../../x',
    '/etc/passwd',
    'gs://b/x',
    '\0',
    '\u2603',
)
JUNK += (
    [],
    {},
    [0],
    [2**60],
    [2**60, 0],
    [-1],
    {'a': 1},
    'float64',
    'int32',
    'F64',
    'zarr',
    'file',
    'http',
    '|O',
    '<f8',
    'a' * 5000,
)
# Where a format keeps numbers without a checksum, a byte of them cannot be told from a weight.
SEMANTIC = 'metadata'


class Checkpoints:
    """Makes cases of damaged checkpoints, each format's in a folder of its own, which is whole again after a case."""

    def __init__(self, folder: pathlib.Path):
        self._paths = {**_written(folder), **_by_t5x(folder)}
        self._whole = {name: _contents(path) for name, path in self._paths.items()}

    def __call__(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(self._paths))
        path = self._paths[name]
        files = [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.is_file())
        indices = [file for file in files if _is_index(file)]
        file = rng.choice(indices) if indices and rng.random() < 0.6 else rng.choice(files)
        ways = [self._bytes, self._bytes]
        if file in indices:
            ways += [self._index] * 4
        if path.is_dir():
            ways.append(self._place)
        way = rng.choice(ways)
        kind, what, carry_out = way(rng, file, files)

        def run() -> str:
            with _restored(path):
                carry_out()
                return self._compare(name, path, kind, file)

        return Case(f'{name}: {kind}', f'{path}: {file.relative_to(path.parent)}: {what}', run)

    def _compare(self, name: str, path: pathlib.Path, kind: str, file: pathlib.Path) -> str:
        found, facts = _contents(path)
        whole, whole_facts = self._whole[name]
        changed = [n for n in found.keys() & whole.keys() if not _same(found[n], whole[n])]
        if changed and name.startswith('safetensors'):
            return BLIND
        # A reshaped or renamed leaf is another checkpoint, which a plan compares with the model; other numbers are wrong weights.
        if any(n != 'step' and found[n].shape == whole[n].shape and found[n].dtype == whole[n].dtype for n in changed):
            # T5X writes no checksums but gzip's; a file's own checksum says nothing about where it lies; an archive that was
            # written anew has the right ones.
            rewritten = name == 'npz' and kind == SEMANTIC
            blind = (
                kind == 'files' or rewritten or name == 'by_t5x_orbax' or (name == 'by_t5x_legacy' and _is_index(file))
            )
            return BLIND if blind else SILENT
        return SAME if not changed and found.keys() == whole.keys() and facts == whole_facts else ANOTHER

    def _bytes(
        self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]
    ) -> tuple[str, str, Callable[[], Any]]:
        what, content = _damaged(rng, file.read_bytes())
        return 'bytes', what, lambda: file.write_bytes(content)

    def _place(
        self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]
    ) -> tuple[str, str, Callable[[], Any]]:
        other = rng.choice(files)

        def swap() -> None:
            mine, others = file.read_bytes(), other.read_bytes()
            file.write_bytes(others)
            other.write_bytes(mine)

        def becomes_a_folder() -> None:
            file.unlink()
            file.mkdir()

        def points_away() -> None:
            file.unlink()
            file.symlink_to(rng.choice(('/nowhere', file.name, '/dev/null')))

        ways = {
            'removed': file.unlink,
            'folder removed': lambda: shutil.rmtree(file.parent),
            f'swapped with {other.name}': swap,
            'a folder': becomes_a_folder,
            'a link': points_away,
            'renamed': lambda: file.rename(file.with_name(file.name + 'x')),
            'a copy of another': lambda: shutil.copyfile(other, file) if other != file else None,
        }
        what = rng.choice(sorted(ways))
        return 'files', what, ways[what]

    def _index(
        self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]
    ) -> tuple[str, str, Callable[[], Any]]:
        before = file.read_bytes()
        if file.suffix == '.npz':
            what, content = _other_archive(rng, before)
        elif file.suffix == '.safetensors':
            length = int.from_bytes(before[:8], 'little')
            what, tree = _mutated(rng, json.loads(before[8 : 8 + length]))
            header = json.dumps(tree).encode()
            claimed = rng.choice((len(header),) * 9 + (2**60, 2**63 + 5, 0, len(header) - 1))
            content = claimed.to_bytes(8, 'little') + header + before[8 + length :]
        elif file.name == 'checkpoint':
            what, tree = _mutated(rng, msgpack.unpackb(before, raw=False))
            content = msgpack.packb(tree)
        else:
            what, tree = _mutated(rng, json.loads(before))
            content = json.dumps(tree).encode()
        return SEMANTIC, what, lambda: file.write_bytes(content)


def _is_index(file: pathlib.Path) -> bool:
    if file.suffix in ('.npz', '.safetensors', '.json') or file.name in (
        'checkpoint',
        '_METADATA',
        '.zarray',
        'metadata',
    ):
        return file.stat().st_size > 2
    return False


def _written(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """A checkpoint of each format that we write, and one as a training run saves it."""
    t5, vit = _tree(('models/t5_1_1_tiny.gin', TEXT)), _tree(('models/vit_mini.gin', 'tasks/mnist5k.gin'))
    dense_t5, dense_vit = (
        {n: v for n, v in tree.items() if n.startswith('params/') or n == 'step'} for tree in (t5, vit)
    )
    trees = {
        'upcycle': (t5, folder / 'native', 'upcycle'),
        't5x_legacy': (t5, folder / 'legacy', 't5x_legacy'),
        't5x_orbax': (t5, folder / 'orbax', 't5x_orbax'),
        'npz': (dense_vit, folder / 'vit.npz', 'vit_npz'),
        'safetensors': (dense_t5, folder / 'hf', 'huggingface'),
    }
    paths = {name: _write(path, format, tree) for name, (tree, path, format) in trees.items()}
    with CheckpointManager(folder / 'trained') as manager:
        manager.save(100, unflatten_dict(t5, sep='/'), {}, {'family': 't5'})
    return paths | {'trained': folder / 'trained' / 'checkpoints' / '100'}


def _tree(files: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Random leaves of a tiny model and its Adafactor state."""
    vocabulary = {'NUM_EMBEDDINGS': '40', 'MLP_DIM': '24'} if TEXT in files else {'NUM_LAYERS': '2'}
    small = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1', 'EMBED_DIM': '16', 'NUM_HEADS': '2', **vocabulary}
    small |= {'HEAD_DIM': '6'} if TEXT in files else {}
    run = configuration.load((*files, 'runs/pretrain.gin'), small)
    run = dataclasses.replace(run, optimizer=Adafactor(min_dim_size_to_factor=16))
    mesh = partitioning.make_mesh((1, 1, 1), None, jax.devices()[:1])
    with partitioning.use(mesh):
        leaves = layout(run, mesh, identify.smallest_batch(run.model)).flat()
    rng = np.random.default_rng(0)
    tree = {name: rng.random(leaf.shape).astype(leaf.dtype) for name, leaf in leaves.items()}
    return tree | {name: np.asarray(100, np.int32) for name in ('step', 'opt_state/count')}


def _write(path: pathlib.Path, format: str, tree: Mapping[str, np.ndarray]) -> pathlib.Path:
    leaves = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}
    writer = create_checkpoint(path, format, leaves, step=100, identity={})
    for name, regions in writer.todo().items():
        for region in regions:
            writer.write(name, region, tree[name][region])
    writer.finish({'family': 't5'})
    return pathlib.Path(writer.path)


def _by_t5x(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Copies of the checkpoints that T5X itself wrote, where they are."""
    fixtures = os.environ.get('UPCYCLE_FIXTURES')
    copies = {}
    for name in ('legacy', 'orbax') if fixtures else ():
        source = pathlib.Path(fixtures) / f't5x_dense_{name}' / 'checkpoint_100'
        target = folder / f'by_t5x_{name}' / 'checkpoint_100'
        shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns('*dataset*'))
        copies[f'by_t5x_{name}'] = target
    return copies


@contextlib.contextmanager
def _restored(path: pathlib.Path) -> Iterator[None]:
    """Puts a checkpoint back as it was."""
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file in [path] if path in before else list(path.rglob('*')):
            if file.is_symlink() or (file.is_file() and file not in before):
                file.unlink()
        for file, content in before.items():
            if file.is_dir():
                shutil.rmtree(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)


def _contents(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every leaf, after what import, export and conversion look at first; and what else the checkpoint says."""
    reader = open_checkpoint(path)
    require_whole(reader.path)
    leaves = reader.leaves()
    facts = identify.facts_of(reader.metadata)
    identify.check(str(path), leaves, facts)
    inspection.describe(reader, quick=True)
    found = {name: np.asarray(reader.read(name)) for name in leaves}
    return found, {'facts': facts, 'step': reader.step, 'metadata': dict(reader.metadata)}


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.shape, left.dtype, left.tobytes()) == (right.shape, right.dtype, right.tobytes())


def _damaged(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 100))
    if rng.random() < 0.3:
        at = min(at, rng.randrange(200))  # headers
    junk = rng.randbytes(length)
    ways = {
        'cut': content[:at],
        'overwritten': content[:at] + junk + content[at + length :],
        'zeroed': content[:at] + bytes(length) + content[at + length :],
        'longer': content[:at] + junk + content[at:],
        'shorter': content[:at] + content[at + length :],
        'twice': content + content,
        'empty': b'',
    }
    way = rng.choice(sorted(ways))
    return f'{way} at {at} of {len(content)}, {length} bytes', ways[way]


def _mutated(rng: random.Random, tree: Any) -> tuple[str, Any]:
    """A tree of JSON, or of msgpack, with one node changed."""
    tree = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if isinstance(tree, dict | list):
        visit(tree)
    if not nodes:
        return 'replaced', rng.choice(JUNK)
    node, key = rng.choice(nodes)
    other, other_key = rng.choice(nodes)
    old, junk = node[key], rng.choice(JUNK)
    way = rng.choice(('value', 'value', 'value', 'number', 'gone', 'renamed', 'exchanged', 'deep'))
    if way == 'number' and isinstance(old, int):
        node[key] = old + rng.choice((-1, 1, 1000, 2**40))
    elif way == 'gone':
        del node[key]
    elif way == 'renamed' and isinstance(node, dict):
        new = junk if isinstance(junk, str) else f'{key}x'
        node[rng.choice((new, str(key).replace('0', '999999999'), f'../{key}'))] = node.pop(key)
    elif way == 'exchanged' and not isinstance(old, dict | list) and not isinstance(other[other_key], dict | list):
        node[key], other[other_key] = other[other_key], old
    elif way == 'deep':
        for _ in range(rng.choice((5, 300))):
            old = [old]
        node[key] = old
    else:
        way, node[key] = 'value', junk
    return f'{way}: {str(key)[:80]!r} {str(old)[:80]!r} -> {str(junk)[:80]!r}', tree


def _other_archive(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """The same zip archive with one member's name or header changed."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    data = members.pop(name)
    way = rng.choice(('name', 'header', 'gone', 'pickle', 'twice', 'bomb', 'metadata'))
    if way == 'name':
        members[
            rng.choice(
                (
                    '../x.npy',
                    '/x.npy',
                    'params/x.npy',
                    'x',
                    name.replace('0', '99999999'),
                    name + '/../a.npy',
                    '\u2603.npy',
                )
            )
        ] = data
    elif way == 'header' and data[:6] == b'\x93NUMPY':
        size = int.from_bytes(data[8:10], 'little')
        header = data[10 : 10 + size].decode()
        old, new = rng.choice(
            (
                ("'<f4'", "'|O'"),
                ("'<f4'", "'<f8'"),
                ('False', 'True'),
                ("'<f4'", "'<i4'"),
                ('(', f'({2**60}, '),
                ('(', '(-1, '),
            )
        )
        changed = header.replace(old, new, 1).rstrip().ljust(size - 1)[: size - 1] + '\n'
        members[name] = data[:10] + changed.encode() + data[10 + size :]
    elif way == 'pickle':
        buffer = io.BytesIO()
        np.save(buffer, np.array([{'a': 1}], dtype=object), allow_pickle=True)
        members[name] = buffer.getvalue()
    elif way == 'bomb':
        members[name] = data + bytes(50_000_000)
    elif way == 'metadata':
        members[name] = data
        members['metadata.json'] = rng.choice(
            (b'', b'{', b'[]', b'3', b'{"facts": 3}', b'{"facts": {"gelu": 7}}', b'{"family": []}', b'null')
        )
    elif way != 'gone':
        members[name] = data
        members[f'./{name}'] = data
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED if way == 'bomb' else zipfile.ZIP_STORED) as new_archive:
        for member, bytes_ in members.items():
            new_archive.writestr(member, bytes_)
    return f'{way}: {name}', out.getvalue()


if __name__ == '__main__':
    sys.exit(main())
