"""Checks of gin files that the user has not named: such a file may only describe a run."""

import dataclasses
import importlib
import inspect
import io
import re
from typing import Any, TextIO

import gin
from gin import config_parser
from upcycle import aliases
from upcycle.errors import UserError, one_line

# The attribute of a dataclass, or of a function that returns one, with a pattern for each field whose value can select code to
# import or download. In an untrusted file such a field may only have values that match its pattern.
HARMLESS = 'harmless'
_OUR_MODULE = re.compile(r'upcycle(\.[a-z]\w*)+')


def require_data(path: str, shown: str | None = None) -> None:
    """Refuses a gin file that does more than describe a run of ours. Call it before the file is read as one.

    A `config.gin` comes with weights from anywhere, and the user has not asked to run it. So it may import only our modules, call
    only our dataclasses, and give their fields only values that select no foreign code; see `HARMLESS`.

    Args:
      path: the file.
      shown: its path for the message, if `path` is a copy.

    Raises:
      UserError: the file could do something else.
    """
    try:
        with open(path, encoding='utf-8') as file:
            reason = _more_than_data(file)
    except Exception as error:  # gin's parser and Python's tokenizer raise nearly every built-in type
        reason = one_line(error)
    if reason is not None:
        way_out = f'name it with --gin_file={path}' if shown is None else 'name a local copy with --gin_file'
        raise UserError(
            f'{shown or path} does more than describe a run ({reason}), so it is not read automatically: inspect it, and if you '
            f'trust its author, {way_out}.'
        )


def bind(text: str, path: str) -> None:
    """Adds bindings that a run has stored to gin's configuration.

    Args:
      text: gin source.
      path: the file that it is a part of.

    Raises:
      UserError: the text does not parse, or could do more than describe a run.
    """
    try:
        reason = _more_than_data(io.StringIO(text))
        if reason is None:
            gin.parse_config(text)
    except Exception as error:
        reason = one_line(error)
    if reason is not None:
        raise UserError(f'{path} holds defaults that are not plain data ({reason}): fix it, or name another MODEL_DIR.')


def _more_than_data(file: TextIO) -> str | None:
    """Why a gin file may do more than describe a run; None if it does not."""

    class Names(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
            selectors.append(scoped_configurable_name.rpartition('/')[2])
            return scoped_configurable_name

        def macro(self, macro_name: str) -> str:
            return macro_name

    # What the statement being parsed refers to.
    selectors: list[str] = []
    reason = None
    for statement in config_parser.ConfigParser(file, Names()):  # all of them: a later one may not parse
        reason = reason or _danger_of(statement, selectors)
        selectors.clear()
    return reason


def _danger_of(statement: Any, selectors: list[str]) -> str | None:
    """Why a statement, which refers to `selectors`, may do more than describe a run; None if it does not."""
    if isinstance(statement, config_parser.ImportStatement):
        ours = _OUR_MODULE.fullmatch(statement.module) and not statement.alias
        return None if ours or statement.module.startswith('__gin__.') else f'it imports {statement.module}'
    if isinstance(statement, config_parser.IncludeStatement):
        return f'it includes {statement.filename}'
    is_binding = isinstance(statement, config_parser.BindingStatement)
    if is_binding and not statement.arg_name:
        return f'it sets the macro {statement.selector}'
    for selector in (*selectors, statement.selector):
        if _our_dataclass(selector) is None:
            return f'it names {selector}'
    if is_binding:
        harmless = getattr(_our_dataclass(statement.selector), HARMLESS, {}).get(statement.arg_name)
        if harmless is not None and statement.value is not None and not harmless.fullmatch(str(statement.value)):
            return f'it sets {statement.arg_name} to {statement.value!r}, which may run foreign code'
    return None


def _our_dataclass(selector: str) -> Any:
    """A dataclass of ours, or a function of ours that only returns one; None for anything else."""
    module, _, name = aliases.current(selector).rpartition('.')
    if not _OUR_MODULE.fullmatch(module):
        return None
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    is_data = dataclasses.is_dataclass(kind) if inspect.isclass(kind) else hasattr(kind, HARMLESS)
    return kind if is_data and kind.__module__.startswith('upcycle.') else None
