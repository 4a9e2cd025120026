"""Writes docs/macros.md: every macro of gin/ with its default, values and meaning.

  python scripts/macros.py

The meaning is the docstring of the field that the macro is bound to, or else the comment after it in its gin file.
"""

import dataclasses
import enum
import importlib
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping

from gin import config_parser
from upcycle.moe.config import MoEConfig, settings
from upcycle.moe.routers import ROUTERS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'macros.md'
# In the order in which a run includes them: the first folder with a macro has its default.
FOLDERS = {
    'models': 'Model sizes, and all settings of a dense model. mT5 is `models/t5_1_1_*.gin` with `NUM_EMBEDDINGS=250112`. For '
    'another size bind `EMBED_DIM`, `MLP_DIM`, `NUM_HEADS`, and for T5 `HEAD_DIM`, `NUM_ENCODER_LAYERS`, '
    '`NUM_DECODER_LAYERS`, for ViT `NUM_LAYERS`, `PATCH_SIZE`, with any file of the family: for a checkpoint of another size '
    '`upcycle plan` names the values that fit.',
    'moe': "The paper's recipe, `moe/t5.gin` and `moe/vit.gin`, and that of decoder-only models, `moe/llm.gin`. Omit it for a "
    'dense model.',
    'optimizers': "Optimizers that replace the models' Adafactor. Their macros are among those of [models](#models).",
    'tasks': 'The data. A task also sets the size of the vocabulary or of the images.',
    'runs': 'The kind of run. All of them include `runs/pretrain.gin`.',
    'surgery': 'How to make experts, or another dense model: [operators](operators.md).',
    'recipes': 'Training-time methods from the literature: [recipes](recipes.md).',
}
HEADER = """\
# Every macro

Set a macro on the command line with `--gin.NAME=VALUE`, without quotes around a string, or in your own gin file with
`NAME = VALUE`. Name files in the order models, moe, optimizers, tasks, runs, and then surgery and recipes, in any order: later
files override earlier ones, and the command line overrides all files. A macro on the command line that the run does not use is
an error.

`scripts/macros.py` writes this page from `gin/` and the code. *Elsewhere* lists the files that set another value. A default in
models/vit is for ViT only, one in models/t5_1_1 for T5 only.

## From T5X's gin

These macros have T5X's names and meaning: `MIXTURE_OR_TASK_NAME`, `MIXTURE_OR_TASK_MODULE`, `TASK_FEATURE_LENGTHS`,
`USE_CACHED_TASKS`, `TRAIN_STEPS`, `BATCH_SIZE`, `EVAL_STEPS`, `EVAL_PERIOD`, `DROPOUT_RATE`, `LABEL_SMOOTHING`, `Z_LOSS`,
`LOSS_NORMALIZING_FACTOR`, `MODEL_DIR`, `INITIAL_CHECKPOINT_PATH`, `RANDOM_SEED`. Strings need no inner quotes here.

| T5X | here |
|---|---|
| `utils.create_learning_rate_scheduler.factors` | `LEARNING_RATE_FACTORS` |
| the same, `.base_learning_rate`, `.warmup_steps` | `BASE_LEARNING_RATE`, `WARMUP_STEPS` |
| `partitioning.PjitPartitioner.num_partitions` | the third number of `MESH_SHAPE` |
| `trainer.Trainer.num_microbatches` | `NUM_MICROBATCHES` |
| `SaveCheckpointConfig`: `period`, `keep` | `CHECKPOINT_PERIOD`, `CHECKPOINT_KEEP` |
| `RestoreCheckpointConfig.path` | `INITIAL_CHECKPOINT_PATH` |
| `network.T5Config.vocab_size`, `.emb_dim` | `NUM_EMBEDDINGS`, `EMBED_DIM` |
| its other sizes | the same names in capitals: `NUM_HEADS`, `HEAD_DIM`, `MLP_DIM`, ... |
"""
# The files of these folders are listed; other pages list those of the rest.
LISTED = ('models', 'optimizers', 'tasks', 'runs')


# All other files of a folder override values of these.
BASES = ('models/t5_1_1.gin', 'models/vit.gin', 'moe/base.gin', 'runs/pretrain.gin')


class Reference(str):
    """A gin reference, `%NAME` or `@name()`; its repr is the same text."""

    def __repr__(self) -> str:
        return str(self)


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(f'@{scoped_configurable_name}' + ('()' if evaluate else ''))

    def macro(self, macro_name: str) -> Reference:
        return Reference(f'%{macro_name}')


@dataclasses.dataclass
class Macro:
    """A macro, in all files.

    Attributes:
      values: repr of the values, by the gin file that sets them.
      comments: comments after the values, by gin file.
      fields: the (class, field) pairs that it is bound to.
    """

    values: dict[str, str] = dataclasses.field(default_factory=dict)
    comments: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: list[tuple[type, str]] = dataclasses.field(default_factory=list)

    def home(self) -> str:
        """Returns the folder with the default value."""
        folders = {file.split('/')[0] for file in self.values}
        return next(folder for folder in FOLDERS if folder in folders)

    def default(self) -> dict[str, str]:
        """Returns the default values by file; all other files override them."""
        bases = {file: value for file, value in self.values.items() if file in BASES}
        return bases or {file: value for file, value in self.values.items() if file.startswith(self.home() + '/')}

    def meaning(self) -> str:
        """Returns the docstring of the first documented field, or else the comment after the default, or ''."""
        texts = [_documented(kind, field) for kind, field in self.fields]
        texts += [self.comments[file] for file in self.default() if file in self.comments]
        return next(filter(None, texts), '')

    def kinds(self) -> str:
        """Returns the allowed values, from the annotations of the fields."""
        parts = [part for kind, field in self.fields for part in _kind(_annotation(kind, field)).split(' or ')]
        return ' or '.join(dict.fromkeys(parts))


def macros() -> dict[str, Macro]:
    """Returns all macros that gin/ sets, by name."""
    by_name: dict[str, Macro] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / 'gin' / folder).glob('*.gin')):
            _read(path, by_name)
    return {name: macro for name, macro in sorted(by_name.items()) if macro.values}


def page() -> str:
    """Returns the text of the page."""
    sections: dict[str, list[str]] = {folder: [] for folder in FOLDERS}
    names: dict[str, str] = {}
    for name, macro in macros().items():
        meaning = macro.meaning()
        first = names.setdefault(meaning, name)
        if '<br>' in meaning and first != name:  # show a list of values only once
            meaning = f'as `{first}`'
        sections[macro.home()].append(_row(name, macro, meaning))
    parts = [HEADER]
    for folder, rows in sections.items():
        lines = [f'## {folder}', '', FOLDERS[folder], '']
        if folder in LISTED:
            lines += ['| file | what it is |', '|---|---|', *_files(folder), '']
        if rows:
            lines += ['| macro | default | values | meaning | elsewhere |', '|---|---|---|---|---|', *rows, '']
        parts.append('\n'.join(lines))
    return '\n'.join(parts)


def _files(folder: str) -> list[str]:
    """Returns a row for each file of a folder: its name and the first sentence of its first comment."""
    rows = []
    for path in sorted((ROOT / 'gin' / folder).glob('*.gin')):
        comment = re.match(r'(?:# ?.*\n)+', path.read_text(encoding='utf-8'))[0]
        paragraph = ' '.join(re.sub(r'^# ?', '', comment, flags=re.MULTILINE).partition('\n\n')[0].split())
        rows.append(f'| `{folder}/{path.name}` | {re.split(r"[.:] +(?=[A-Z])", paragraph)[0].rstrip(".:")} |')
    return rows


def _read(path: pathlib.Path, by_name: dict[str, Macro]) -> None:
    """Adds the macros of one file."""
    file, text = str(path.relative_to(ROOT / 'gin')), path.read_text(encoding='utf-8')
    lines, modules = text.splitlines(), {}
    for statement in _statements(text):
        if isinstance(statement, config_parser.ImportStatement):
            modules[statement.bound_name()] = statement.module
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        if not statement.arg_name:
            macro = by_name.setdefault(statement.selector, Macro())
            macro.values[file] = repr(statement.value)
            if comment := re.search(r'  # (.*)$', lines[statement.location.line_num - 1]):
                macro.comments[file] = comment[1]
        elif isinstance(statement.value, Reference) and statement.value.startswith('%'):
            module, _, kind = statement.selector.partition('.')
            field = (getattr(importlib.import_module(modules[module]), kind), statement.arg_name)
            fields = by_name.setdefault(statement.value[1:], Macro()).fields
            if field not in fields:
                fields.append(field)


def _statements(text: str) -> Iterator[typing.Any]:
    parser = config_parser.ConfigParser(text, _Delegate())
    while (statement := parser.parse_statement()) is not None:
        yield statement


def _annotation(kind: type, field: str) -> typing.Any:
    return typing.get_type_hints(kind)[field]


def _documented(kind: type, field: str) -> str:
    """Returns the docstring of a dataclass's field without the macro's name; for an enum also the comments of its members."""
    # Fields may be inherited, and gin sets the fields of all routers through `MoEConfig`.
    kinds = ROUTERS.values() if kind is MoEConfig else (kind,)
    documented = dict.fromkeys(each for kind in kinds for each in kind.__mro__ if dataclasses.is_dataclass(each))
    docstrings = '\n'.join(each.__doc__ and inspect.getdoc(each) for each in documented)
    entries = re.findall(r'^( *)([a-z_0-9, ]+): ?(.*(?:\n\1 +.*)*)', docstrings, re.MULTILINE)
    text = next((text for _, names, text in entries if field in names.split(', ')), '')
    plain = re.sub(r'\s*\[[A-Z_0-9, ]+\]', '', ' '.join(text.split())).strip(' .')
    readers = [router for router, each in ROUTERS.items() if field in settings(each)]
    if kind is MoEConfig and field != 'router' and readers != [*ROUTERS]:
        plain += f'; read by the router{"s" * (len(readers) > 1)} {", ".join(readers)}'
    values = _annotation(kind, field)
    if isinstance(values, type) and issubclass(values, enum.Enum):
        title = (inspect.getdoc(values) or '').split('\n')[0].rstrip('.')
        note = re.sub(r'^.*see `[\w.]+`;? ?', '', plain)
        members = re.findall(r"^ +\w+ = ('\w+')(?:  # (.*))?$", inspect.getsource(values), re.MULTILINE)
        lines = [f'`{name}`: {text}' if text else f'`{name}`' for name, text in members]
        return '<br>'.join([f'{title} ({note})' if note else title, *lines])
    return plain


def _kind(annotation: typing.Any) -> str:
    """Describes a type in words."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return ' or '.join(dict.fromkeys(_kind(part) for part in typing.get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return 'one of'
    if typing.get_origin(annotation) is typing.Literal:
        return ' or '.join(f'`{value!r}`' for value in typing.get_args(annotation))
    if origin := typing.get_origin(annotation):
        inner = [_kind(part) for part in typing.get_args(annotation) if part is not Ellipsis]
        if issubclass(origin, Mapping):
            return f'map of {" to ".join(inner)}'
        return f'list of {" or ".join(dict.fromkeys(inner))}'
    names = {bool: 'true or false', int: 'whole number', float: 'number', str: 'string', type(None): 'None'}
    return names.get(annotation, f'`{annotation.__name__}`')


def _row(name: str, macro: Macro, meaning: str) -> str:
    default = macro.default()
    rest = {
        file: value for file, value in macro.values.items() if file not in default and value not in default.values()
    }
    if len(set(default.values())) > 3:
        shown = 'each file its own'
    elif list(default) in (['models/t5_1_1.gin'], ['models/vit.gin']):
        shown = _by_value(default)
    elif len(set(default.values())) == 1:
        shown = _value(next(iter(default.values())))
    else:
        shown = _by_value(default)
    cells = (f'`{name}`', shown, macro.kinds(), meaning, _by_value(rest))
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def _by_value(values: Mapping[str, str]) -> str:
    """Lists each value with the files that set it."""
    files: dict[str, list[str]] = {}
    for file, value in values.items():
        files.setdefault(value, []).append(file.removesuffix('.gin'))
    if len(files) > 6:
        return 'files of their own'
    return '; '.join(f'{_value(value)} in {", ".join(names)}' for value, names in files.items())


def _value(value: str) -> str:
    return 'required' if value == '%gin.REQUIRED' else f'`{value}`'


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
    print(f'wrote {PAGE}')
