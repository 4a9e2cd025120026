"""Builds a run from the bindings in gin's configuration."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import gin_files, schema
from upcycle.errors import MissingData, UserError, mistakes_of, one_line
from upcycle.gin_files import UNKNOWN, nearest
from upcycle.gin_values import (
    UNSET,
    bindings_of,
    full_name,
    innermost,
    is_reference,
    macro_of,
    macro_value,
    references,
    set_macros,
    show,
)
from upcycle.training.run import ModelRun, Run


class Builder:
    """Builds configurables from the leaves up, and continues after a mistake, so that it finds all of them.

    Args:
      root: the class to build from the bindings of `Run`; bindings of other fields are ignored.

    Attributes:
      mistakes: one sentence each.
      missing_data: those of the mistakes that are about data that is not on this machine.
    """

    def __init__(self, root: type[ModelRun]) -> None:
        self._root = root
        self.mistakes: list[str] = []
        self.missing_data: list[str] = []
        # By scoped full name; `UNKNOWN` after a mistake.
        self._built: dict[str, Any] = {}
        self._under_way: list[str] = []

    def built(self) -> Iterator[Any]:
        """All objects built."""
        return (value for value in self._built.values() if value is not UNKNOWN)

    def built_by(self, name: str) -> Any:
        """The object that a configurable built, by its scoped full name; None if there is none."""
        built = self._built.get(name)
        return None if built is UNKNOWN else built

    def make(self, scopes: Sequence[str], target: Any) -> Any:
        """Calls a configurable with its bindings, once per scope; returns `UNKNOWN` after a mistake."""
        name = full_name(scopes, target)
        if name in self._under_way:
            return self._mistake(f'@{name} refers to itself: bind something else.')
        if name not in self._built:
            self._under_way.append(name)
            self._built[name] = self._make(scopes, target)
            self._under_way.pop()
        return self._built[name]

    def _make(self, scopes: Sequence[str], target: Any) -> Any:
        name = '/'.join([*scopes, target.__qualname__])
        bindings = bindings_of(scopes, target)
        if target is Run and self._root is not Run:
            target = self._root
            fields = schema.parameters(target)
            optional = fields.keys() - schema.required(target)
            bindings = {
                key: value
                for key, value in bindings.items()
                if key in fields and not (key in optional and self._is_required_macro(value))
            }
        for value in bindings.values():
            self._refuse_inherited_scopes(scopes, value)
        before = len(self.mistakes)
        arguments = {key: self._argument(f'{name}.{key}', value, target, key) for key, value in bindings.items()}
        for key in schema.required(target):
            if key not in arguments:
                self._mistake(f'{name}.{key} is not set: bind it.')
        if len(self.mistakes) > before or any(value is UNKNOWN for value in arguments.values()):
            return UNKNOWN
        try:
            with gin.config_scope('/'.join(scopes) or None):
                return target(**arguments)
        except UserError as error:
            self.mistakes += mistakes_of(error)
            if isinstance(error, MissingData):
                self.missing_data.append(str(error))
        except Exception as error:
            if target.__module__.startswith('upcycle.'):
                raise
            self._mistake(f'@{name} cannot be built: {one_line(error)}.')
        return UNKNOWN

    def _argument(self, name: str, value: Any, target: Any, key: str) -> Any:
        """Checks a binding and builds its references; a mistake names the macro that the user set, if there is one."""
        if (macro := innermost(value)) is not None:
            name, value = macro, macro_value(macro)
        if not self._is_set(name, value):
            return UNKNOWN
        parameter = schema.parameters(target).get(key)
        hint = Any if parameter is None else parameter.annotation
        built = self._build(value)
        if built is not UNKNOWN and not schema.fits(built, hint):
            text = show(value) if any(references(value)) else schema.shown(value)
            return self._mistake(f'{name} = {text} must be {schema.in_words(hint)}.')
        return built

    def _is_required_macro(self, value: Any) -> bool:
        """Whether the gin files leave a value to the command line."""
        macro = innermost(value)
        return _is_required(value if macro is None else macro_value(macro))

    def _is_set(self, name: str, value: Any) -> bool:
        if macro_of(value):
            self._mistake(f'{name} refers to itself: give it a value.')
        elif value is UNSET:
            self._mistake(_not_set(name))
        elif _is_required(value):
            self._mistake(f'{name} is not set: this run needs it, so give it with --gin.{name}=...')
        else:
            return value is not UNKNOWN  # of which a mistake already tells
        return False

    def _build(self, value: Any) -> Any:
        """Replaces the references in a value by what they refer to; returns `UNKNOWN` if one cannot be built."""
        if macro := innermost(value):
            value = macro_value(macro)
            return self._build(value) if self._is_set(macro, value) else UNKNOWN
        if is_reference(value):
            target = value.configurable.wrapped
            return self.make(value.scopes, target) if value.evaluate else value.scoped_configurable_fn
        if isinstance(value, Mapping):
            pairs = [(self._build(key), self._build(item)) for key, item in value.items()]
            return UNKNOWN if any(UNKNOWN in pair for pair in pairs) else dict(pairs)
        if isinstance(value, list | tuple):
            items = [self._build(item) for item in value]
            return UNKNOWN if any(item is UNKNOWN for item in items) else type(value)(items)
        return value

    def _refuse_inherited_scopes(self, scopes: Sequence[str], value: Any) -> None:
        """In gin a reference without a scope inherits its caller's scope, which `resolved` would not show."""
        for reference in references(value):
            target = None if macro_of(reference) or reference.scopes else reference.configurable.wrapped
            if target and scopes and bindings_of(scopes, target) != bindings_of((), target):
                inner = f'{"/".join(scopes)}/{target.__qualname__}'
                self._mistake(f'@{target.__qualname__}() has bindings as {inner}: refer to it as @{inner}().')

    def _mistake(self, sentence: str) -> Any:
        self.mistakes.append(sentence)
        return UNKNOWN


def _is_required(value: Any) -> bool:
    return is_reference(value) and value.scoped_selector == 'gin.REQUIRED/gin.constant'


def _not_set(macro: str) -> str:
    """Says that a macro is not set, and where it could come from: a misspelt macro, or a file of ours that sets it."""
    files = gin_files.definers(macro)
    # If our files know the name, it is right, and a similar name that they know is another macro.
    ours = gin_files.known_macros() if files else set()
    if similar := nearest(macro, set_macros() - ours):
        return f'{macro} is not set{similar}: fix its name, or give --gin.{macro}=...'
    if not files:
        return f'{macro} is not set: give --gin.{macro}=...'
    folders = ' or '.join(dict.fromkeys(file.partition('/')[0] + '/' for file in files))
    choice = files[0] if len(files) == 1 else f'{files[0]} (or another file of {folders} that sets it)'
    return f'{macro} is not set: add --gin_file={choice}, or give --gin.{macro}=...'
