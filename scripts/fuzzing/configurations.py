"""Damaged configurations."""

import ast
import os
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fuzzing.case import ANOTHER, REFUSED, SAME, SILENT, TRACEBACK, Case
from fuzzing.damage import damaged, misspelt
from upcycle import cli, configuration, gin_files, partitioning
from upcycle.commands import train
from upcycle.training.start import check_batches
from upcycle.training.state import make_layout

LARGE = 200_000_000  # parameters; larger valid configurations are not laid out

TEXT, IMAGES = 'tasks/synthetic_text.gin', 'tasks/synthetic_images.gin'
SMALL = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '6', 'BATCH_SIZE': '4', 'WARMUP_STEPS': '2'}
START = {'INITIAL_CHECKPOINT_PATH': 'nowhere'}
# Files of valid configurations, and bindings in addition to SMALL.
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
    *('copy', 'top_k', 'expert_choice', 'soft', 'merged', 'dense', 'ragged', 'priority', 'every_other', 'last_2'),
    *('last_99', 'none', 'auto', 'float32', 'restart', 'constant * cosine_decay', 'tile', 'fresh', 'vmoe', 'xft'),
    *('train', 'full'),
)
NUMBERS = (
    *('0', '-1', '1', '2', '3', '7', '64', '1000', '2147483647', '2147483648'),
    *(str(2**63), '1' + '0' * 40, '0x' + 'f' * 5000),
    *('0.0', '-0.5', '0.5', '1.0', '1e-30', '1e400', '-1e400', '1e-400', '1_000', '1j', 'nan', 'inf'),
)
ODD = (
    *('None', 'True', 'False', '', ' ', "''", '[]', '()', '{}', '(1, 2, 1)', '(1, 1, 1)', '[0, 1]', '[1, 1]', '(0.5,)'),
    *("['a']", "{'inputs': 32, 'targets': 9}", "{'inputs': 0}", '{1: 2}', '{[]: 1}', '[[[[]]]]', '[' * 50, '(' * 5000),
    *("b'x'", '...', '{1, 2}', '%gin.REQUIRED', '%NO_SUCH', '%BATCH_SIZE', '@', '%', '@x', '@gin.macro()', '@a/b/c()'),
    *('a\nb', 'a = 1', '\0', '\u2603', '"', "it's"),
    *('@upcycle.training.optimizer.Adafactor()', '@upcycle.training.optimizer.Adafactor'),
    *('@upcycle.moe.config.MoEConfig()', '(', '@upcycle.training.run.Run()', '../../x', '/etc/passwd', 'gs://bucket/x'),
    *('a' * 10_000, '*', '(?P<x', '[%BATCH_SIZE, %SEED]'),
)
LINES = (
    *('include "runs/pretrain.gin"', 'include "nowhere.gin"', 'include "fuzz.gin"', 'import nowhere'),
    *('from upcycle.training import rum', 'BATCH_SIZ = 8', 'a.b = 3', 'x/y.z = 1', 'run.Run:', '  model_dir = 3'),
    *('A = %B', 'B = %A', 'A', '=', '\tq = 1', 'run.Run.sed = 1', 'BATCH_SIZE = %BATCH_SIZE', 'MODEL = @run.Run()'),
    *('moe.MoEConfig.num_experts = %MODEL', '# only words', '"""', 'MODEL = None'),
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
        loaded = []
        old, train.run = train.run, lambda files, named, **_: loaded.append(configuration.load(files, named))
        try:
            cli.run(arguments)
        except SystemExit as stop:  # argparse has printed the mistake
            return REFUSED if stop.code == 2 else TRACEBACK
        finally:
            train.run = old
        (run,) = loaded
        identity = configuration.resolved()
        same = identity == self._identities[number]
        if same and any(self._said(name, bindings, number) for name in bindings):
            return SILENT
        mesh = partitioning.make_mesh(run.mesh_shape, run.num_experts)
        check_batches(run, mesh)
        if jax.tree.reduce(lambda a, b: a + b, _guess(run)) < LARGE:
            with partitioning.use(mesh):
                make_layout(run, mesh)
        return SAME if same else ANOTHER

    def _said(self, name: str, bindings: Mapping[str, str], number: int) -> bool:
        """Returns whether a binding has another value than in the undamaged configuration."""
        known = {**SMALL, **RUNS[number][1]}
        value = bindings[name]
        if value.startswith('%'):
            # The values of macros in files are unknown here.
            value = bindings.get(value[1:], known.get(name))
        return name in known and not _equal(value, known[name])

    def _value(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        name = rng.choice([*bindings, *rng.choices(self._used(files), k=12), *rng.choices(self._names, k=3)])
        plausible = self._plausible(name)
        bindings[name] = rng.choice(rng.choice((NUMBERS, WORDS, ODD, plausible, plausible, plausible)))

    def _used(self, files: Sequence[str]) -> list[str]:
        """Returns the macros that the files mention; a run uses most of them."""
        return sorted(gin_files.macros_of(text for name, text in self._shipped.items() if name in files) | {*SMALL})

    def _plausible(self, name: str) -> list[str]:
        """Returns the values of a macro in our files, and numbers near them."""
        pattern = re.compile(rf'^{re.escape(name)} = ([^#\n]*)', re.MULTILINE)
        values = [value.strip() for text in self._shipped.values() for value in pattern.findall(text)]
        near = [str(int(value) + more) for value in values if value.isdigit() for more in (-1, 1, int(value))]
        return values + near or ['4']

    def _name(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        fields = ('upcycle.training.run.Run.total_steps', 'train/upcycle.data.text.DatasetConfig.seed')
        name = rng.choice([*bindings, *fields])
        bindings[misspelt(rng, name)] = bindings.get(name, '3')

    def _files(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        at = rng.randrange(len(files))
        match rng.randrange(5):
            case 0:
                del files[at]
            case 1:
                files.insert(rng.randrange(len(files) + 1), rng.choice(list(self._shipped)))
            case 2:
                files[at] = misspelt(rng, files[at])
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
            head = ['from __gin__ import dynamic_registration', '', 'from upcycle.training import run', '']
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
                        lines[line] = misspelt(rng, lines[line])
        content = '\n'.join(lines).encode('utf-8', 'replace') + b'\n'
        if rng.random() < 0.05:
            content = damaged(rng, content)[1]
        self._file.write_bytes(content)

    def _flags(self, rng: random.Random, files: list[str], bindings: dict[str, str], extra: list[str]) -> None:
        choices = ('--gin.', '--gin', '--gin.=3', '--gin_file', '--gin_file=', '--steps=3', '-x', '--', 'positional')
        choices += ('--process_count=many', '--process_count=2', '--coordinator_address=x', '--gin.A', '--distribute')
        extra.append(rng.choice((*choices, '--gin_fil=x')))


def _guess(run: Any) -> list[float]:
    """Estimates the number of parameters, so that huge models are not traced."""
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
