"""Making a run of the bindings that gin holds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import gin_files, schema
from upcycle.errors import MissingData, UserError, mistakes_of
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
)
from upcycle.training.run import ModelRun, Run


class Builder:
    """Makes what the bindings describe, from the leaves up, and goes on where something is wrong, so that every mistake is found.

    Args:
      root: what is made of the bindings of `Run`, whose other fields are passed over.

    Attributes:
      mistakes: a sentence each.
    """

    def __init__(self, root: type[ModelRun]) -> None:
        self._root = root
        self.mistakes: list[str] = []
        self.missing_data: list[str] = []  # of these, those of data that is not here
        self._made: dict[str, Any] = {}
        self._under_way: list[str] = []

    def made(self) -> Iterator[Any]:
        """Everything that could be made."""
        return (value for value in self._made.values() if value is not UNKNOWN)

    def made_by(self, name: str) -> Any:
        """What a configurable made, by its scoped full name; None where it made nothing."""
        made = self._made.get(name)
        return None if made is UNKNOWN else made

    def make(self, scopes: Sequence[str], target: Any) -> Any:
        """What a configurable makes of its bindings, once for each scope; `UNKNOWN` where a mistake is in the way."""
        name = full_name(scopes, target)
        if name in self._under_way:
            return self._mistake(f'@{name} needs itself: bind something else.')
        if name not in self._made:
            self._under_way.append(name)
            self._made[name] = self._make(scopes, target)
            self._under_way.pop()
        return self._made[name]

    def _make(self, scopes: Sequence[str], target: Any) -> Any:
        before = len(self.mistakes)
        name = '/'.join([*scopes, target.__qualname__])
        bindings = bindings_of(scopes, target)
        if target is Run and self._root is not Run:
            target = self._root
            fields = schema.parameters(target)
            optional = fields.keys() - schema.required(target)
            bindings = {
                key: value
                for key, value in bindings.items()
                if key in fields and not (key in optional and self._is_left_open(value))
            }
        arguments = {key: self._argument(f'{name}.{key}', value, target, key) for key, value in bindings.items()}
        for key in schema.required(target):
            if key not in arguments:
                self._mistake(f'{name}.{key} is not set: bind it.')
        broken = len(self.mistakes) > before or any(value is UNKNOWN for value in arguments.values())
        for value in bindings.values():
            self._refuse_inherited(scopes, value)
        if broken:
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
            self._mistake(f'@{name} cannot be made: {" ".join(str(error).split()) or type(error).__name__}.')
        return UNKNOWN

    def _argument(self, name: str, value: Any, target: Any, key: str) -> Any:
        """A parameter's value, its references made. A mistake names the macro that was set, where there is one."""
        if (macro := innermost(value)) is not None:
            name, value = macro, macro_value(macro)
        if not self._is_set(name, value):
            return UNKNOWN
        hint = schema.parameters(target)[key].annotation if key in schema.parameters(target) else Any
        outline = self._each(value, self._outline)
        if outline is UNKNOWN:
            return UNKNOWN
        if not schema.fits(outline, hint):
            return self._mistake(f'{name} = {schema.shown(outline)} must be {schema.in_words(hint)}.')
        return self._each(value, self._call)

    def _is_left_open(self, value: Any) -> bool:
        """Whether a value is a macro that the gin files leave to the command line."""
        macro = innermost(value)
        return _is_required(value if macro is None else macro_value(macro))

    def _is_set(self, name: str, value: Any) -> bool:
        if macro_of(value):
            self._mistake(f'{name} is set to itself: give it a value.')
        elif value is UNSET:
            self._mistake(_not_set(name))
        elif _is_required(value):
            self._mistake(f'{name} is not set: this run needs it, so give it with --gin.{name}=...')
        else:
            return value is not UNKNOWN  # of which a mistake tells already
        return False

    def _each(self, value: Any, of_reference: Any) -> Any:
        """A value with its references replaced; `UNKNOWN` where one of them is."""
        if is_reference(value):
            return of_reference(value)
        if isinstance(value, Mapping):
            items = [(self._each(key, of_reference), self._each(item, of_reference)) for key, item in value.items()]
            return UNKNOWN if any(UNKNOWN in (key, item) for key, item in items) else dict(items)
        if isinstance(value, list | tuple):
            made = [self._each(item, of_reference) for item in value]
            return UNKNOWN if any(item is UNKNOWN for item in made) else type(value)(made)
        return value

    def _outline(self, reference: Any) -> Any:
        """A reference as a type sees it, nothing made."""
        if macro_of(reference):
            macro = innermost(reference)
            value = macro_value(macro)
            return self._each(value, self._outline) if self._is_set(macro, value) else UNKNOWN
        return schema.Made(reference.configurable.wrapped, reference.evaluate)

    def _call(self, reference: Any) -> Any:
        if macro := innermost(reference):
            return self._each(macro_value(macro), self._call)
        target = reference.configurable.wrapped
        return self.make(reference.scopes, target) if reference.evaluate else reference.scoped_configurable_fn

    def _refuse_inherited(self, scopes: Sequence[str], value: Any) -> None:
        """gin would let a reference without a scope inherit that of whoever calls it, which `resolved` would not show."""
        for reference in references(value):
            target = None if macro_of(reference) or reference.scopes else reference.configurable.wrapped
            if target and scopes and bindings_of(scopes, target) != bindings_of((), target):
                inner = f'{"/".join(scopes)}/{target.__qualname__}'
                self._mistake(f'@{target.__qualname__}() has bindings as {inner}: write @{inner}() where it is used.')

    def _mistake(self, sentence: str) -> Any:
        self.mistakes.append(sentence)
        return UNKNOWN


def _is_required(value: Any) -> bool:
    return is_reference(value) and value.scoped_selector == 'gin.REQUIRED/gin.constant'


def _not_set(macro: str) -> str:
    """Where a missing macro could come from: a misspelt one, or a file of ours that sets it."""
    files = gin_files.definers(macro)
    # A name that our files know is what was meant, and a similar one may be a macro of its own.
    own = gin_files.macros_of(gin_files.shipped().values()) if files else set()
    if similar := nearest(macro, set_macros() - own):
        return f'{macro} is not set{similar}: correct the name, or give --gin.{macro}=...'
    if not files:
        return f'{macro} is not set: give --gin.{macro}=...'
    folders = ' or '.join(dict.fromkeys(file.partition('/')[0] + '/' for file in files))
    choice = files[0] if len(files) == 1 else f'{files[0]} (or another file of {folders} that sets it)'
    return f'{macro} is not set: add --gin_file={choice}, or give --gin.{macro}=...'
