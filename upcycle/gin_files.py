"""Reads gin files and command-line bindings statement by statement, so that one mistake does not hide the next.

gin's parser and registry do the work. A gin file may import and call any Python function, so it is as much a program as a script:
only files that the user names are read so. A file that comes with a checkpoint must first pass `gin_data.require_data`.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config_parser
from upcycle import aliases
from upcycle.errors import one_line, without_password
from upcycle.models.registry import FAMILIES

PACKAGE = pathlib.Path(__file__).resolve().parent
# For each folder of gin files, the folders whose files must come before its own, because its files override them.
FOLLOWS = {
    'moe': ('models',),
    'optimizers': ('models',),
    'tasks': ('models', 'moe'),
    'runs': ('models', 'moe', 'tasks'),
    'recipes': ('models', 'moe', 'tasks', 'runs'),
    'surgery': ('models', 'moe', 'tasks', 'runs'),
}
# The file that stands for the model of a checkpoint: `from_checkpoint.model_as_gin` writes its content.
FROM_CHECKPOINT = 'models/from_checkpoint.gin'
BASE = 'base.gin'  # files of this name are only included by others of their folder
UNKNOWN = object()  # a reference that could not be resolved; a mistake already tells of it
_DEFINITION = re.compile(r'^([A-Za-z_]\w*) = ', re.MULTILINE)
_VALUE = re.compile(r'^([A-Za-z_]\w*) = (.+?)(?:  #.*)?$', re.MULTILINE)
_MACRO = re.compile(r'%([A-Za-z_]\w*)')
# A macro or a parameter, with scopes, such as train/synthetic.SyntheticText.seed.
_NAME = re.compile(r'[A-Za-z_][\w./]*')


@dataclasses.dataclass
class Parsed:
    """The result of reading gin files and bindings.

    Attributes:
      mistakes: one sentence each.
      warnings: one sentence each.
      files: all files read, included ones too, by the names that referred to them.
      bound: names on the command line that were bound.
      macros: for each macro in a file, the file and line that set it last.
      used: macros that something refers to, even if that was overridden later.
      model: content of `FROM_CHECKPOINT`; None: not known yet.
      needs_model: whether that file was read.
    """

    mistakes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    bound: list[str] = dataclasses.field(default_factory=list)
    macros: dict[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    model: str | None = None
    needs_model: bool = False


def search_paths() -> list[str]:
    """Folders in which gin files are looked up: the working folder, then ours, with and without `gin/` in front."""
    return [os.getcwd(), str(_gin_folder().parent), str(_gin_folder())]


def read(files: Sequence[str], bindings: Mapping[str, str], model: str | None = None) -> Parsed:
    """Replaces gin's configuration by that of files and then bindings, as far as they are valid.

    Args:
      files: a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is neither a Python literal nor a gin reference is a string.
      model: content of `FROM_CHECKPOINT`.
    """
    gin.clear_config(clear_constants=True)
    parsed, order = Parsed(model=model), _Order()
    for file in files:
        order.begin(file)
        _read_file(parsed, order, file, f'--gin_file={file}', ())
    for name, value in bindings.items():
        label = f'--gin.{name}={value}'
        before = len(parsed.mistakes)
        if without_password(value) != value:
            parsed.mistakes.append(
                f'{without_password(label)} holds a password, which would be written into config.gin: keep it in the environment.'
            )
        elif not _NAME.fullmatch(name):
            parsed.mistakes.append(
                f'{label} binds {name!r}, which is not a name: write --gin.NAME=VALUE without spaces.'
            )
        else:
            _Source(parsed, order, label, ()).read(f'{name} = {literal(value)}')
        if len(parsed.mistakes) == before:
            parsed.bound.append(name)
    order.check(bindings, parsed)
    return parsed


def shipped() -> dict[str, str]:
    """The text of our gin files, by name below gin/."""
    folder = _gin_folder()
    return {str(path.relative_to(folder)): path.read_text('utf-8') for path in sorted(folder.rglob('*.gin'))}


def recipe_values() -> dict[str, set[str]]:
    """The values of each macro in our files of moe/ and surgery/, which serve every router, as gin source."""
    values: dict[str, set[str]] = {}
    for name, text in shipped().items():
        if name.startswith(('moe/', 'surgery/')):
            for macro, value in _VALUE.findall(text):
                values.setdefault(macro, set()).add(value)
    return values


def of_another_family(files: Iterable[str], family: str) -> Iterator[str]:
    """Yields a mistake for each file of ours whose name, such as moe/FAMILY.gin, names another model family."""
    ours = shipped()
    for name in dict.fromkeys('/'.join(pathlib.PurePath(file).parts[-2:]) for file in files):
        folder, _, stem = name.removesuffix('.gin').rpartition('/')
        words = stem.split('_')
        others = [word for word in words if word in FAMILIES and word != family]
        if name not in ours or not others or family in words:
            continue
        of_this_family = '_'.join(family if word in others else word for word in words)
        of_every_family = '_'.join(word for word in words if word not in others)
        candidates = (f'{folder}/{stem}.gin' for stem in (of_this_family, of_every_family))
        instead = next((file for file in candidates if file in ours), None)
        hint = 'remove it' if instead is None else f'name {instead} instead'
        yield f'{name} is for models of the family {others[0]}, and MODEL is of the family {family}: {hint}.'


def definers(macro: str) -> list[str]:
    """Our files that set a macro; for a base file, the files that include it."""
    ours = shipped()
    setting = re.compile(rf'^{re.escape(macro)} = (?!%gin.REQUIRED|None)', re.MULTILINE)
    files = {name for name, text in ours.items() if setting.search(text)}
    bases = {name for name in files if pathlib.PurePath(name).name == BASE}
    including = {name for name, text in ours.items() if any(f"include '{base}'" in text for base in bases)}
    return sorted((files | including) - bases)


def known_macros() -> set[str]:
    """All macros in our gin files."""
    return macros_of(shipped().values())


def macros_of(texts: Iterable[str]) -> set[str]:
    """The macros that gin sources set or use."""
    return {name for text in texts for pattern in (_DEFINITION, _MACRO) for name in pattern.findall(text)}


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)', or '' if no known name is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f' (did you mean {close[0]}?)' if close else ''


def literal(text: str) -> str:
    """A command-line value as gin source."""
    if text.startswith(('@', '%')):
        return text
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return repr(text)
    return text


def _gin_folder() -> pathlib.Path:
    # A wheel has our files inside the package; next to an installed package, `gin` is gin-config's code.
    return PACKAGE / 'gin' if (PACKAGE / 'gin').is_dir() else PACKAGE.parent / 'gin'


def _find(name: str) -> str | None:
    """The path of a gin file; None if it does not exist."""
    return next(filter(os.path.isfile, (os.path.join(folder, name) for folder in search_paths())), None)


def _read_file(parsed: Parsed, order: '_Order', name: str, label: str, within: tuple[str, ...]) -> None:
    """Reads a file and what it includes.

    Args:
      parsed: the result, which is extended.
      order: told of each binding.
      name: of the file.
      label: its name in messages.
      within: paths of the files that include it.
    """
    path = _find(name)
    if path is None:
        if any(os.path.isdir(os.path.join(folder, name)) for folder in search_paths()):
            parsed.mistakes.append(f'{label} is a folder: name a file in it.')
        else:
            looked = ', '.join(dict.fromkeys(search_paths()))
            parsed.mistakes.append(f'{label} does not exist{nearest(name, shipped())}: looked in {looked}.')
        return
    if path in within:
        parsed.mistakes.append(f'{label} includes itself.')
        return
    parsed.files.append(name)
    if os.path.samefile(path, _gin_folder() / FROM_CHECKPOINT):
        parsed.needs_model = True
        if parsed.model is not None:
            _Source(parsed, order, name, (*within, path)).read(parsed.model)
            return
    try:
        text = pathlib.Path(path).read_text('utf-8')
    except (OSError, ValueError) as error:
        parsed.mistakes.append(f'{label} cannot be read: {one_line(error)}.')
    else:
        _Source(parsed, order, name, (*within, path)).read(text)


class _Order:
    """Finds files of the command line in an order in which one undoes another."""

    def __init__(self) -> None:
        self._file = ''
        # For each binding, the file that set it last, itself or through an include.
        self._setters: dict[str, str] = {}
        # For a file and one that replaces bindings of it, against the order: these bindings.
        self._overridden: dict[tuple[str, str], list[str]] = {}
        # The files that are shipped with this package.
        self._ours: set[str] = set()

    def begin(self, file: str) -> None:
        """Begins a file of the command line."""
        self._file = file
        path = _find(file)
        if path is not None and pathlib.Path(path).resolve().is_relative_to(_gin_folder().resolve()):
            self._ours.add(file)

    def note(self, binding: str) -> None:
        """Notes a binding of the current file or of a file that it includes."""
        before, now = self._setters.get(binding, ''), self._file
        in_wrong_order = _folder(now) in FOLLOWS.get(_folder(before), ())
        in_order = _folder(before) in FOLLOWS.get(_folder(now), ())
        if in_wrong_order or (before and before not in self._ours and now in self._ours and not in_order):
            self._overridden.setdefault((before, now), []).append(binding)
        self._setters[binding] = now

    def check(self, bindings: Mapping[str, str], parsed: Parsed) -> None:
        """Adds a mistake for two files in the wrong order if that matters; for a user's file before one of ours, a warning."""
        for (first, second), names in self._overridden.items():
            if not (lost := [name for name in names if name not in bindings]):
                continue
            if _folder(second) in FOLLOWS.get(_folder(first), ()):
                parsed.mistakes.append(
                    f'{first} comes before {second}, which overrides its {lost[0]}: name the files in the order models, moe, '
                    'tasks, runs, and then those of recipes and surgery.'
                )
            else:
                replaced = lost[0] if len(lost) == 1 else f'{lost[0]} and {len(lost) - 1} more'
                parsed.warnings.append(
                    f'{second} comes after {first} and replaces its {replaced}: name {first} last to use its values.'
                )


class _Delegate(gin.config.ParserDelegate):
    """Makes references gin's, or `UNKNOWN`."""

    def __init__(self, source: '_Source'):
        super().__init__()
        self._source = source

    def macro(self, name: str) -> Any:
        self._source.parsed.used.add(name)
        return super().macro(name)

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        scoped_selector = aliases.current(scoped_selector)
        self._source.look_at_token()
        if self._source.configurable(scoped_selector.rpartition('/')[2]) is None:
            return UNKNOWN
        return super().configurable_reference(scoped_selector, evaluate)


class _Source:
    """One gin source, whose mistakes are collected statement by statement.

    Args:
      parsed: the result, which is extended.
      order: told of each binding of a file.
      label: the source's name in messages.
      within: its path, after those of the files that include it; () for a binding of the command line.
    """

    def __init__(self, parsed: Parsed, order: _Order, label: str, within: tuple[str, ...]) -> None:
        self.parsed = parsed
        self._order = order
        self._label = self._place = label
        self._within = within

    def read(self, text: str) -> None:
        """Puts what the text binds into gin's configuration."""
        unknown: set[str] = set()
        with gin.config._parse_scope() as self._context:
            for statement in map(_with_current_names, self._statements(text)):
                self._move(statement.location.line_num)
                if isinstance(statement, config_parser.ImportStatement):
                    self._import(statement)
                elif isinstance(statement, config_parser.IncludeStatement):
                    label = f'{self._place}: {statement.filename}'
                    _read_file(self.parsed, self._order, statement.filename, label, self._within)
                elif statement.selector not in unknown:
                    is_binding = isinstance(statement, config_parser.BindingStatement)
                    is_macro = is_binding and not statement.arg_name
                    if not is_macro and self.configurable(statement.selector) is None:
                        unknown.add(statement.selector)
                    elif is_binding:
                        self._bind(statement)

    def look_at_token(self) -> None:
        """Moves to the line of the current token: gin parses a whole block before it returns the first statement."""
        self._move(self._parser._current_location().line_num)

    def _move(self, line: int) -> None:
        if self._within:
            self._place = f'{self._label}, line {line}'

    def configurable(self, selector: str) -> Any:
        """What a selector refers to in the current file; notes a mistake and returns None if it is unknown."""
        try:
            if target := self._context.get_configurable(selector):
                return target
        except Exception:  # noqa: S110 gin raises nearly every built-in type, for names and for what they name
            pass
        known = {name.rpartition('/')[2] for _, name in gin.config._CONFIG} | set(self._names_here())
        self._note(f'{self._place}: {selector} is unknown{nearest(selector, known)}.')
        return None

    def _statements(self, text: str) -> Iterator[Any]:
        try:
            self._parser = config_parser.ConfigParser(io.StringIO(text), _Delegate(self))
            yield from self._parser
        except Exception as error:  # from the parser and from Python's tokenizer alike
            line = getattr(error, 'lineno', None)
            location = f'{self._label}, line {line}' if line and '\n' in text else self._label
            reason = getattr(error, 'msg', None) or one_line(error)
            self._note(f'{location} does not parse ({reason}): fix its syntax.')

    def _import(self, statement: config_parser.ImportStatement) -> None:
        try:
            self._context.process_import(statement)
        except Exception as error:  # whatever the module raises
            hint = nearest(statement.module, (name for name in sys.modules if name.startswith('upcycle.')))
            self._note(f'{self._place}: {statement.module} cannot be imported{hint}: {one_line(error)}.')

    def _bind(self, statement: config_parser.BindingStatement) -> None:
        scope, selector, name, value, _ = statement
        scoped = f'{scope}/{selector}' if scope else selector
        if self._within:
            self._order.note(f'{scoped}.{name}' if name else scoped)
        if not name:
            gin.bind_parameter((scoped, 'gin.macro', 'value'), value)
            if self._within:
                self.parsed.macros[scoped] = self._place
            return
        try:
            gin.bind_parameter((scope, selector, name), value)
        except ValueError:
            target = self._context.get_configurable(selector).wrapped
            known = inspect.signature(target).parameters
            self._note(f'{self._place}: {selector} has no parameter {name}{nearest(name, known)}.')

    def _names_here(self) -> Iterator[str]:
        """The classes that the file's imports bring, as the file would name them."""
        for alias, module in self._context._symbol_table.items():
            for name, value in vars(module).items():
                is_configurable = inspect.isclass(value) or hasattr(value, 'harmless')
                if is_configurable and value.__module__.startswith('upcycle.'):
                    yield f'{alias}.{name}'

    def _note(self, mistake: str) -> None:
        self.parsed.mistakes.append(mistake)


def _with_current_names(statement: Any) -> Any:
    """Translates a statement to the names of this version; see `aliases`."""
    if isinstance(statement, config_parser.IncludeStatement):
        return statement
    if not isinstance(statement, config_parser.ImportStatement):
        return statement._replace(selector=aliases.current(statement.selector))
    module = aliases.current(statement.module)
    if module != statement.module and statement.is_from:  # later statements use the name that it was imported by
        statement = statement._replace(alias=statement.bound_name())
    return statement._replace(module=module)


def _folder(file: str) -> str:
    return pathlib.PurePath(file).parent.name
