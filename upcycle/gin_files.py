"""Reading gin files and bindings of the command line: statement by statement, so that one mistake does not hide the next.

gin's own parser and registry do the work. A gin file may import and call any Python function: it is as much a program as a
script, and only files that the user names are read so. What lies beside a checkpoint has to pass `gin_data.require_data` first.
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
from upcycle.errors import without_password
from upcycle.models.registry import FAMILIES

PACKAGE = pathlib.Path(__file__).resolve().parent
# Folders of gin files, and those whose files they are named after, since they override them.
FOLLOWS = {
    'moe': ('models',),
    'optimizers': ('models',),
    'tasks': ('models', 'moe'),
    'runs': ('models', 'moe', 'tasks'),
    'recipes': ('models', 'moe', 'tasks', 'runs'),
    'surgery': ('models', 'moe', 'tasks', 'runs'),
}
# The name of files that only others of their folder include.
BASE = 'base.gin'
# A reference that could not be resolved, of which a mistake already tells.
UNKNOWN = object()
_DEFINITION = re.compile(r'^([A-Za-z_]\w*) = ', re.MULTILINE)
_VALUE = re.compile(r'^([A-Za-z_]\w*) = (.+?)(?:  #.*)?$', re.MULTILINE)
_MACRO = re.compile(r'%([A-Za-z_]\w*)')
# Of a macro or a parameter, with scopes: train/synthetic.SyntheticText.seed.
_NAME = re.compile(r'[A-Za-z_][\w./]*')


@dataclasses.dataclass
class Found:
    """What reading has brought up.

    Attributes:
      mistakes: a sentence each.
      warnings: a sentence each.
      files: the files, with those that they include, by the names they were called by.
      bound: names on the command line that were understood.
      macros: where each macro of a file was last set.
      used: macros that something refers to, even where that was overridden later.
    """

    mistakes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    bound: list[str] = dataclasses.field(default_factory=list)
    macros: dict[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)


def search_paths() -> list[str]:
    """Where gin files are looked for: here, then the checkout or the installed package, with and without `gin/` in front."""
    return [os.getcwd(), str(_gin_folder().parent), str(_gin_folder())]


def read(files: Sequence[str], bindings: Mapping[str, str]) -> Found:
    """Puts files and then bindings into gin's configuration, in place of what it held.

    Args:
      files: a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is no Python literal and no gin reference is a string.

    Returns:
      What went wrong, and what was read. Everything that could be understood is in gin's configuration.
    """
    gin.clear_config(clear_constants=True)
    reader = _Reader()
    for file in files:
        reader.file(file, f'--gin_file={file}', ())
    for name, value in bindings.items():
        label = f'--gin.{name}={value}'
        if without_password(value) != value:
            reader.found.mistakes.append(
                f'{without_password(label)} holds a password, which would be written into config.gin: keep it in the environment.'
            )
            continue
        if not _NAME.fullmatch(name):
            reader.found.mistakes.append(
                f'{label} binds {name!r}, which is not a name: write --gin.NAME=VALUE without spaces.'
            )
            continue
        before = len(reader.found.mistakes)
        with gin.config._parse_scope() as context:
            reader.statements(f'{name} = {literal(value)}', label, context, ())
        if len(reader.found.mistakes) == before:
            reader.found.bound.append(name)
    reader.found.mistakes += reader.wrong_order(bindings)
    return reader.found


def shipped() -> dict[str, str]:
    """Our own gin files: their text by their names below gin/."""
    folder = _gin_folder()
    return {str(path.relative_to(folder)): path.read_text('utf-8') for path in sorted(folder.rglob('*.gin'))}


def recipe_values() -> dict[str, set[str]]:
    """The values that our files of moe/ and surgery/, which serve every router, give each macro, as they are written there."""
    found: dict[str, set[str]] = {}
    for name, text in shipped().items():
        if name.startswith(('moe/', 'surgery/')):
            for macro, value in _VALUE.findall(text):
                found.setdefault(macro, set()).add(value)
    return found


def of_another_family(files: Iterable[str], family: str) -> Iterator[str]:
    """What is wrong with files of ours that name another family of models in their own names, as moe/FAMILY.gin does."""
    ours = shipped()
    for name in dict.fromkeys('/'.join(pathlib.PurePath(file).parts[-2:]) for file in files):
        folder, _, stem = name.removesuffix('.gin').rpartition('/')
        words = stem.split('_')
        others = [word for word in words if word in FAMILIES and word != family]
        if name not in ours or not others or family in words:
            continue
        instead = (
            '_'.join(family if word in others else word for word in words),
            '_'.join(word for word in words if word not in others),
        )
        found = next((other for stem in instead if (other := f'{folder}/{stem}.gin') in ours), None)
        hint = 'leave it out' if found is None else f'name {found} instead'
        yield f'{name} is for models of the family {others[0]}, and MODEL is of the family {family}: {hint}.'


def definers(macro: str) -> list[str]:
    """Which of our files set a macro to something; for one that is only there to be included, those that include it."""
    ours = shipped()
    found = [
        name
        for name, text in ours.items()
        if re.search(rf'^{re.escape(macro)} = (?!%gin.REQUIRED|None)', text, re.MULTILINE)
    ]
    bases = [name for name in found if pathlib.PurePath(name).name == BASE]
    including = [name for name, text in ours.items() if any(f"include '{base}'" in text for base in bases)]
    return sorted({*found, *including} - {*bases})


def macros_of(texts: Iterable[str]) -> set[str]:
    """The macros that texts set or use."""
    return {name for text in texts for pattern in (_DEFINITION, _MACRO) for name in pattern.findall(text)}


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)', or nothing where no known name is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f' (did you mean {close[0]}?)' if close else ''


def _gin_folder() -> pathlib.Path:
    # In a wheel our files are inside the package; beside an installed package, `gin` is gin-config's own code.
    return PACKAGE / 'gin' if (PACKAGE / 'gin').is_dir() else PACKAGE.parent / 'gin'


def literal(text: str) -> str:
    """A command-line value as gin source."""
    if text.startswith(('@', '%')):
        return text
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return repr(text)
    return text


class _Delegate(gin.config.ParserDelegate):
    """References become gin's own, or `UNKNOWN`."""

    def __init__(self, reader: '_Reader'):
        super().__init__()
        self._reader = reader

    def macro(self, name: str) -> Any:
        self._reader.found.used.add(name)
        return super().macro(name)

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        self._reader.look_at_token()
        if self._reader.configurable(aliases.current(scoped_selector.rpartition('/')[2])) is None:
            return UNKNOWN
        return super().configurable_reference(aliases.current(scoped_selector), evaluate)


class _Reader:
    """Reads one statement after the other and notes what is wrong with each."""

    def __init__(self) -> None:
        self.found = Found()
        self._label = self._place = ''
        self._in_file = False
        self._parser: Any = None
        self._context: Any = None
        self._named = ''
        # By which file of the command line a binding was last set; and which was overridden by a file that it should follow.
        self._setters: dict[str, str] = {}
        self._overridden: dict[tuple[str, str], list[str]] = {}
        # Files of the command line that are shipped with this package.
        self._ours: set[str] = set()

    def wrong_order(self, bindings: Mapping[str, str]) -> Iterator[str]:
        """Of two files in the wrong order, where that changes anything. A user's file before one of ours is only a warning."""
        for (first, second), names in self._overridden.items():
            if not (found := [name for name in names if name not in bindings]):
                continue
            if _folder(second) in FOLLOWS.get(_folder(first), ()):
                yield (
                    f'{first} stands before {second}, which sets {found[0]} again: name the files in the order models, moe, '
                    'tasks, runs, and then those of recipes and surgery.'
                )
                continue
            replaced = found[0] if len(found) == 1 else f'{found[0]} and {len(found) - 1} more'
            self.found.warnings.append(
                f'{second} comes after {first} and replaces its {replaced}: name {first} last to use its values.'
            )

    def file(self, name: str, label: str, within: tuple[str, ...]) -> None:
        """A file and what it includes; `within`: the files that it is included by."""
        path = next((p for p in (os.path.join(folder, name) for folder in search_paths()) if os.path.isfile(p)), None)
        if path is None:
            looked = ', '.join(dict.fromkeys(search_paths()))
            if any(os.path.isdir(os.path.join(folder, name)) for folder in search_paths()):
                self._note(f'{label} is a folder: name a file in it.')
            else:
                self._note(f'{label} does not exist{nearest(name, shipped())}: looked in {looked}.')
            return
        if path in within:
            self._note(f'{label} includes itself.')
            return
        self.found.files.append(name)
        if not within:
            self._named = name
            if pathlib.Path(path).resolve().is_relative_to(_gin_folder().resolve()):
                self._ours.add(name)
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read()
        except (OSError, ValueError) as error:
            self._note(f'{label} cannot be read: {one_line(error)}.')
            return
        with gin.config._parse_scope() as context:
            self.statements(text, name, context, (*within, path))

    def statements(self, text: str, label: str, context: Any, within: tuple[str, ...]) -> None:
        """A text's statements; `label`: what to call it in messages."""
        outer = self._label, self._place, self._in_file, self._parser, self._context
        self._label, self._place, self._in_file, self._context = label, label, bool(within), context
        unknown: set[str] = set()
        for statement in map(_with_current_names, self._parsed(text, label)):
            self._place = f'{label}, line {statement.location.line_num}' if within else label
            if isinstance(statement, config_parser.ImportStatement):
                self._import(statement)
            elif isinstance(statement, config_parser.IncludeStatement):
                self.file(statement.filename, f'{self._place}: {statement.filename}', within)
            elif statement.selector not in unknown:
                is_macro = isinstance(statement, config_parser.BindingStatement) and not statement.arg_name
                if not is_macro and self.configurable(statement.selector) is None:
                    unknown.add(statement.selector)
                elif isinstance(statement, config_parser.BindingStatement):
                    self._bind(statement)
        self._label, self._place, self._in_file, self._parser, self._context = outer

    def look_at_token(self) -> None:
        """Notes the line of what is being parsed: gin parses all of a block before it gives its first statement."""
        if self._in_file:
            self._place = f'{self._label}, line {self._parser._current_location().line_num}'

    def configurable(self, selector: str) -> Any:
        """What a selector stands for in the file that is being read, None where it stands for nothing."""
        try:
            if found := self._context.get_configurable(selector):
                return found
        except Exception:  # noqa: S110 gin raises nearly every built-in type, for names and for what they name
            pass
        known = {name.rpartition('/')[2] for _, name in gin.config._CONFIG} | set(self._names_here())
        self._note(f'{self._place}: {selector} is not known{nearest(selector, known)}.')
        return None

    def _parsed(self, text: str, label: str) -> Iterator[Any]:
        try:
            self._parser = config_parser.ConfigParser(io.StringIO(text), _Delegate(self))
            yield from self._parser
        except Exception as error:  # from the parser and from Python's tokenizer alike
            line = getattr(error, 'lineno', None)
            location = f'{label}, line {line}' if line and '\n' in text else label
            reason = getattr(error, 'msg', None) or one_line(error)
            self._note(f'{location} does not parse ({reason}): correct it.')

    def _import(self, statement: config_parser.ImportStatement) -> None:
        try:
            self._context.process_import(statement)
        except Exception as error:  # whatever the module raises
            hint = nearest(statement.module, (name for name in sys.modules if name.startswith('upcycle.')))
            self._note(f'{self._place}: {statement.module} cannot be imported{hint}: {one_line(error)}.')

    def _bind(self, statement: config_parser.BindingStatement) -> None:
        scope, selector, name, value, _ = statement
        self._note_setter('.'.join(filter(None, ('/'.join(filter(None, (scope, selector))), name))))
        if not name:
            macro = f'{scope}/{selector}' if scope else selector
            gin.bind_parameter((macro, 'gin.macro', 'value'), value)
            if self._in_file:
                self.found.macros[macro] = self._place
            return
        try:
            gin.bind_parameter((scope, selector, name), value)
        except ValueError:
            target = self._context.get_configurable(selector).wrapped
            known = inspect.signature(target).parameters
            self._note(f'{self._place}: {selector} has no parameter {name}{nearest(name, known)}.')

    def _note_setter(self, name: str) -> None:
        if not self._in_file:
            return
        before = self._setters.get(name, '')
        in_wrong_order = _folder(self._named) in FOLLOWS.get(_folder(before), ())
        in_order = _folder(before) in FOLLOWS.get(_folder(self._named), ())
        if in_wrong_order or (before and before not in self._ours and self._named in self._ours and not in_order):
            self._overridden.setdefault((before, self._named), []).append(name)
        self._setters[name] = self._named

    def _names_here(self) -> Iterator[str]:
        """The classes that the file's imports bring, as it may call them."""
        for alias, module in self._context._symbol_table.items():
            for name, value in vars(module).items():
                callable_here = inspect.isclass(value) or hasattr(value, 'harmless')
                if callable_here and value.__module__.startswith('upcycle.'):
                    yield f'{alias}.{name}'

    def _note(self, mistake: str) -> None:
        self.found.mistakes.append(mistake)


def _with_current_names(statement: Any) -> Any:
    """A statement as this version would write it; see `aliases`."""
    if isinstance(statement, config_parser.IncludeStatement):
        return statement
    if not isinstance(statement, config_parser.ImportStatement):
        return statement._replace(selector=aliases.current(statement.selector))
    module = aliases.current(statement.module)
    if module != statement.module and statement.is_from:  # what follows uses the name that it was imported by
        statement = statement._replace(alias=statement.bound_name())
    return statement._replace(module=module)


def _folder(file: str) -> str:
    return pathlib.PurePath(file).parent.name


def one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
