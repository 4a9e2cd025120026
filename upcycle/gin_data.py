"""Gin files that nobody has named: whether they do no more than describe a run."""

import dataclasses
import importlib
import inspect
import io
import re
from typing import Any, TextIO

import gin
from gin import config_parser
from upcycle import aliases
from upcycle.errors import UserError
from upcycle.gin_files import one_line

# The attribute of a dataclass, or of a function that makes some, that says which texts its fields may have in a file that nobody
# has named: a pattern for each field whose value can choose code that is imported or downloaded.
HARMLESS = 'harmless'
_OUR_MODULE = re.compile(r'upcycle(\.[a-z]\w*)+')


def require_data(path: str, shown: str | None = None) -> None:
    """Makes sure that a gin file does nothing but describe a run of ours, before it is read as one.

    A `config.gin` lies beside weights that may come from anywhere, and nobody has asked to run it. So it may import our own
    modules only, call our own dataclasses only, and give their fields only values that choose no foreign code: see
    `HARMLESS`.

    Args:
      path: of the file.
      shown: its path for the message, where that is a copy.

    Raises:
      UserError: it could do something else.
    """
    try:
        with open(path, encoding='utf-8') as file:
            reason = _more_than_data(file)
    except Exception as error:  # gin's parser and Python's tokenizer raise nearly every built-in type
        reason = one_line(error)
    if reason is not None:
        way_out = f'name it with --gin_file={path}' if shown is None else 'name a local copy with --gin_file'
        raise UserError(
            f'{shown or path} is not read unasked, because it is more than the description of a run ({reason}): look at it, and '
            f'if you trust whoever wrote it, {way_out}.'
        )


def bind(text: str, path: str) -> None:
    """Puts bindings that a run has stored into gin's configuration.

    Args:
      text: a gin file.
      path: of the file that it is a part of.

    Raises:
      UserError: it does not parse, or could do more than describe a run.
    """
    try:
        reason = _more_than_data(io.StringIO(text))
        if reason is None:
            gin.parse_config(text)
    except Exception as error:
        reason = one_line(error)
    if reason is not None:
        raise UserError(f'{path} holds defaults that are no data ({reason}): correct it, or name another MODEL_DIR.')


def _more_than_data(file: TextIO) -> str | None:
    """Why a gin file may do more than describe a run; None where it may not."""

    class Names(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
            selectors.append(scoped_configurable_name.rpartition('/')[2])
            return scoped_configurable_name

        def macro(self, macro_name: str) -> str:
            return macro_name

    selectors: list[str] = []
    reason = None
    for statement in config_parser.ConfigParser(file, Names()):
        reason = reason or _danger_of(statement, selectors)
    return reason


def _danger_of(statement: Any, selectors: list[str]) -> str | None:
    """Why a statement may do more than describe, None where it may not. `selectors`: references so far; they are taken."""
    if isinstance(statement, config_parser.ImportStatement):
        ours = _OUR_MODULE.fullmatch(statement.module) and not statement.alias
        return None if ours or statement.module.startswith('__gin__.') else f'it imports {statement.module}'
    if isinstance(statement, config_parser.IncludeStatement):
        return f'it includes {statement.filename}'
    if isinstance(statement, config_parser.BindingStatement):
        if not statement.arg_name:
            return f'it sets the macro {statement.selector}'
        selectors.append(statement.selector)
    else:
        selectors.append(statement.selector)
    foreign = next((selector for selector in selectors if _our_dataclass(selector) is None), None)
    selectors.clear()
    if foreign is not None:
        return f'it names {foreign}'
    if isinstance(statement, config_parser.BindingStatement):
        harmless = getattr(_our_dataclass(statement.selector), HARMLESS, {}).get(statement.arg_name)
        if harmless is not None and statement.value is not None and not harmless.fullmatch(str(statement.value)):
            return f'it sets {statement.arg_name} to {statement.value!r}, which may run code from elsewhere'
    return None


def _our_dataclass(selector: str) -> Any:
    """The dataclass of ours, or the function of ours that makes nothing else; None where it is neither."""
    module, _, name = aliases.current(selector).rpartition('.')
    if not _OUR_MODULE.fullmatch(module):
        return None
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    is_data = dataclasses.is_dataclass(kind) if inspect.isclass(kind) else hasattr(kind, HARMLESS)
    ours = is_data and kind.__module__.startswith('upcycle.')
    return kind if ours else None
