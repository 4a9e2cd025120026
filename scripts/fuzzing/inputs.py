"""Damaged inputs of other kinds, in this process: Hugging Face configs, logs, output paths, environment variables."""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from fuzzing.case import ANOTHER, REFUSED, SAME, SILENT, TRACEBACK, Case, LostError
from fuzzing.checkpoints import random_tree, write_checkpoint
from fuzzing.configurations import TEXT
from fuzzing.damage import JUNK, damaged, mutated
from fuzzing.places import Places
from upcycle import cli, warning
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.metrics import MetricsLog
from upcycle.models import identify
from upcycle.report.runs import load_run

# Fields of transformers' configs that change the function of a T5 or a ViT, and other values for them.
FUNCTION: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    't5': {
        **dict.fromkeys(('d_model', 'd_ff', 'vocab_size'), (1, 3, 8, 64)),
        **dict.fromkeys(('num_layers', 'num_decoder_layers', 'num_heads'), (1, 3, 8, 64)),
        'd_kv': (1, 5, 64),
        'feed_forward_proj': ('relu', 'gated-relu', 'gated-silu', 'gelu', 'silu', 'tanh', 'gated-tanh'),
        'dense_act_fn': ('relu', 'silu', 'gelu', 'tanh', 'mish'),
        'is_gated_act': (False,),
        'layer_norm_epsilon': (1e-5, 1e-12, 0.1),
        'relative_attention_num_buckets': (16, 64),
        'relative_attention_max_distance': (64, 256),
        'tie_word_embeddings': (True,),
        'scale_decoder_outputs': (True,),
        'is_encoder_decoder': (False,),
    },
    'vit': {
        **dict.fromkeys(('hidden_size', 'intermediate_size'), (1, 3, 8, 64)),
        **dict.fromkeys(('num_attention_heads', 'num_hidden_layers'), (1, 3, 8, 64)),
        'hidden_act': ('relu', 'gelu_new', 'quick_gelu', 'silu'),
        'image_size': (8, 32, [8, 32], [32, 8]),
        'patch_size': (2, 8, [2, 8]),
        'num_channels': (1, 3, 4),
        'layer_norm_eps': (1e-5, 1e-3),
        'qkv_bias': (False,),
    },
}
# Fields that do not change the function of given weights.
HARMLESS = (
    *('transformers_version', 'torch_dtype', 'dtype', 'use_cache', '_name_or_path', 'initializer_range'),
    'dropout_rate',
)
VARIABLES = (
    *('COLUMNS', 'LINES', 'HOME', 'TMPDIR', 'TERM', 'NO_COLOR', 'FORCE_COLOR', 'LANG', 'MPLBACKEND', 'MPLCONFIGDIR'),
    *('JAX_PLATFORMS', 'XLA_FLAGS', 'TFDS_DATA_DIR', 'GCE_METADATA_HOST', 'AWS_EC2_METADATA_SERVICE_ENDPOINT'),
)
VALUES = ('', '0', '-1', '1', 'x', '/nonexistent', '/dev/null', '/proc', 'a' * 5000, '\u2603', '~', 'http://', '1e9')
LINES = ('{', 'NaN', '\x00', '[]', '{"step": NaN}', '{"step": 1e400}', '{"step": "4", "split": "train"}')
SPLITS = ('train', 'validation', 'diversity')


class Inputs:
    """Makes cases of damaged inputs."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder / 'inputs'
        self._folder.mkdir()
        self._places = Places(self._folder / 'places')
        t5 = random_tree(('models/t5_1_1_tiny.gin', TEXT))
        vit = random_tree(('models/vit_mini.gin', 'tasks/mnist5k.gin'), POOLING='token')
        self._models = {}
        for name, leaves in (('t5', t5), ('vit', vit)):
            dense = {leaf: value for leaf, value in leaves.items() if leaf.startswith('params/') or leaf == 'step'}
            path = write_checkpoint(self._folder / name, 'huggingface', dense)
            self._models[name] = path, json.loads((path / 'config.json').read_text('utf-8')), self._read(path)
        self._native = write_checkpoint(self._folder / 'native', 'upcycle', {**t5})
        self._log = [*_log(random.Random(0))]

    def __call__(self, rng: random.Random) -> Case:
        makers = (self._field, self._field, self._place, self._reported_log, self._resumed_log, self._variable)
        return rng.choice(makers)(rng)

    def _field(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(self._models))
        path, config, whole = self._models[name]
        functional = FUNCTION[name]
        way = rng.choice(('function', 'function', 'unknown', 'harmless', 'junk', 'gone', 'tree'))
        changed = dict(config)
        field = rng.choice(sorted(functional))
        match way:
            case 'function':
                changed[field] = rng.choice(functional[field])
            case 'unknown':
                field = rng.choice(('use_', 'num_', 'attn_', 'is_', 'x_')) + ''.join(rng.choices('abcdefg', k=6))
                changed[field] = rng.choice((True, 2, 'x', [1], {'a': 1}, 0.5))
            case 'harmless':
                field = rng.choice(HARMLESS)
                changed[field] = rng.choice(('float32', 0.1, '5.0', True))
            case 'junk':
                field = rng.choice(sorted(config))
                changed[field] = rng.choice(JUNK)
            case 'gone':
                field = rng.choice(sorted(config))
                del changed[field]
            case _:
                field, changed = mutated(rng, config)
        text = json.dumps(changed)

        def run() -> str:
            (path / 'config.json').write_text(text, 'utf-8')
            errors = io.StringIO()
            try:
                warning.forget()
                with contextlib.redirect_stderr(errors):
                    model = self._read(path)
            finally:
                (path / 'config.json').write_text(json.dumps(config), 'utf-8')
            if model != whole:
                return ANOTHER
            differs = changed.get(field) != config.get(field) if isinstance(changed, dict) else False
            named = field in errors.getvalue()
            if (way == 'unknown' and not named) or (way == 'function' and differs and not named):
                return SILENT
            return SAME

        return Case(f'config.json of a {name}: {way}', f'{field}: {text[:600]}', run)

    def _read(self, path: pathlib.Path) -> Any:
        """Returns the model of a folder according to its config, and its facts."""
        reader = open_checkpoint(path)
        facts = identify.facts_of(reader.metadata)
        return identify.check(str(path), reader.leaves(), facts), facts

    def _damaged_log(self, rng: random.Random) -> tuple[str, bytes]:
        lines = [json.dumps(line) for line in self._log]
        at = rng.randrange(len(lines))
        way = rng.choice(('bytes', 'cut', 'junk', 'tree', 'order', 'twice', 'empty line', 'encoding', 'ending', 'none'))
        match way:
            case 'cut':
                lines[at] = lines[at][: rng.randrange(len(lines[at]))]
            case 'junk':
                lines.insert(at, rng.choice((*map(json.dumps, JUNK), *LINES)))
            case 'tree':
                lines[at] = json.dumps(mutated(rng, self._log[at])[1])
            case 'order':
                rng.shuffle(lines)
            case 'twice':
                lines.insert(at, lines[at])
            case 'empty line':
                lines.insert(at, rng.choice(('', ' ', '\t', '\r')))
        text = '\n'.join(lines) + '\n'
        content = text.encode('utf-8', 'surrogatepass')
        match way:
            case 'bytes':
                _, content = damaged(rng, content)
            case 'encoding':
                content = text.encode(rng.choice(('utf-16', 'utf-32', 'utf-8-sig', 'cp037')), 'replace')
            case 'ending':
                content = rng.choice(
                    (content[:-1], content.replace(b'\n', b'\r\n'), content.replace(b'\n', b'\r'), b'', b'\n')
                )
        return way, content

    def _reported_log(self, rng: random.Random) -> Case:
        way, content = self._damaged_log(rng)
        whole = rng.random() < 0.05

        def run() -> str:
            with self._run_folder(content) as folder:
                if whole:
                    return self._command(['report', str(folder), f'--out={folder}/report'])
                loaded = load_run(folder)
                for split in SPLITS:
                    loaded.split(split)
                return ANOTHER if list(loaded.records) != self._log else SAME

        return Case(f'log in a report: {way}', repr(content[-300:]), run)

    def _resumed_log(self, rng: random.Random) -> Case:
        way, content = self._damaged_log(rng)
        step = rng.choice((0, 4, 8))

        def run() -> str:
            with self._run_folder(content) as folder:
                before = _whole_lines(content)
                try:
                    MetricsLog(str(folder), step).close()
                    outcome = ANOTHER
                except UserError:
                    outcome = REFUSED
                after = [
                    line for file in folder.rglob('*') if file.is_file() for line in _whole_lines(file.read_bytes())
                ]
                lost = [line for line in before if line not in after]
                if lost:
                    raise LostError(f'lines are missing from the folder: {lost[:2]}')
                return outcome

        return Case(f'log of a run that is resumed: {way}', f'step {step}: {content[-300:]!r}', run)

    @contextlib.contextmanager
    def _run_folder(self, log: bytes) -> Iterator[pathlib.Path]:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = pathlib.Path(folder)
            (path / 'metrics.jsonl').write_bytes(log)
            yield path

    def _place(self, rng: random.Random) -> Case:
        kind, path = self._places.draw(rng)
        vit, _, _ = self._models['vit']
        commands = {
            'import': ['import', f'--from={vit}', f'--to={path}'],
            'export': ['export', f'--from={vit}', f'--to={path}', '--format=vit_npz'],
            'export to a folder': ['export', f'--from={self._native}', f'--to={path}', '--format=t5x_legacy'],
            'inspect': ['inspect', path, '--quick'],
            'report': ['report', path, f'--out={self._folder}/report'],
            'sweep': ['sweep', '--config=configs/finetune_imagenet.py', '--where=print', f'--out={path}'],
        }
        name = rng.choice(sorted(commands))

        def run() -> str:
            with self._places.unchanged(may_write=path):
                return self._command(commands[name])

        return Case(f'place: {name}', f'{kind}: {path[:200]!r}', run)

    def _variable(self, rng: random.Random) -> Case:
        changes = {rng.choice(VARIABLES): rng.choice(VALUES) for _ in range(rng.choice((1, 1, 2)))}
        commands = {
            'inspect': ['inspect', str(self._native)],
            'import': ['import', f'--from={self._native}', f'--to={self._folder}/imported'],
            'help': ['train', '--help'],
        }
        name = rng.choice(sorted(commands))

        def run() -> str:
            try:
                with mock.patch.dict(os.environ, changes):
                    return self._command(commands[name])
            finally:
                shutil.rmtree(self._folder / 'imported', ignore_errors=True)

        return Case(f'environment: {name}', str(changes)[:300], run)

    def _command(self, arguments: list[str]) -> str:
        try:
            with mock.patch.dict(os.environ):
                return SAME if cli.run(arguments) == 0 else REFUSED
        except SystemExit as stop:  # argparse has printed a mistake, or the help
            return {0: SAME, 2: REFUSED}.get(stop.code, TRACEBACK)


def _log(rng: random.Random) -> Any:
    """Yields lines as a run writes them."""
    for step in range(1, 9):
        for split in SPLITS if step % 4 == 0 else SPLITS[:1]:
            line = {'step': step, 'split': split, 'loss': rng.uniform(1, 3), 'accuracy': rng.random()}
            line |= {'experts/encoder/layers_1/load': [rng.random() for _ in range(4)], 'seconds': 0.5 * step}
            yield line | {'flops': 1e9 * step, 'tokens': 82.0 * step, 'start_step': 0, 'steps_per_second': 2.0}


def _whole_lines(content: bytes) -> list[dict[str, Any]]:
    """Returns the readable lines of a log that have a step."""
    lines = []
    for line in content.split(b'\n'):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get('step'), int):
            lines.append(json.dumps(value, sort_keys=True))
    return lines
