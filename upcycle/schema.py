"""What a value may be, by the type that a configurable's signature gives it. Pure, and ignorant of gin.

The types in use are few: numbers, texts, switches, enums of texts, sequences, mappings, unions, classes and protocols. A bound is
part of a type, as in `Count`; what several values must be together is their class's own business, and so is a bound that it has a
better sentence for.
"""

import ast
import dataclasses
import enum
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

# JAX makes an int32 of a whole number, where a float is wanted too; everything that counts, sizes or seeds is one somewhere.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Bound:
    """Where a number lies, and that in words."""

    holds: Callable[[float], bool]
    words: str


Count = Annotated[int, Bound(lambda n: n >= 1, 'of at least 1')]
Whole = Annotated[int, Bound(lambda n: n >= 0, 'of at least 0')]
Depth = Annotated[int, Bound(lambda n: 1 <= n <= 1000, 'between 1 and 1000')]  # layers: each is traced
Positive = Annotated[float, Bound(lambda x: x > 0, 'above 0')]
Natural = Annotated[float, Bound(lambda x: x >= 0, 'of at least 0')]
Rate = Annotated[float, Bound(lambda x: 0 <= x < 1, 'in [0, 1)')]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, 'in [0, 1]')]


@dataclasses.dataclass(frozen=True)
class Made:
    """Stands for an object that is yet to be made, by the class that will make it; `called` False: for the class itself."""

    kind: Any
    called: bool = True


@functools.cache
def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a class or a function takes, with its types evaluated where that is possible."""
    source = target if not inspect.isclass(target) or dataclasses.is_dataclass(target) else target.__init__
    try:
        hints = typing.get_type_hints(source, include_extras=True)
    except (NameError, TypeError):  # a name that only type checkers import
        hints = {}
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(target).parameters.items()
    }


def required(target: Callable[..., Any]) -> list[str]:
    """The parameters that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters(target).items() if p.default is p.empty and p.kind in named]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, which may hold `Made` objects, is of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return fits(value, arguments[0]) and all(bound.holds(value) for bound in arguments[1:])
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is None or hint is type(None):
        return value is None
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, Made):
        return _is_a(value, hint)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint in (int, float) and isinstance(value, int):
        return abs(value) <= _LARGEST
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if inspect.isclass(hint) and issubclass(hint, enum.StrEnum):
        return isinstance(value, str) and value in set(hint)
    return inspect.isclass(hint) and not _is_protocol(hint) and isinstance(value, hint)


def misfits(values: Mapping[str, Any], target: Callable[..., Any], binding: Callable[[str], str]) -> Iterator[str]:
    """A sentence for each value that is not of its parameter's type.

    Args:
      values: by the names of parameters.
      target: a class or a function that takes them.
      binding: from the name of a parameter to what a user sets.
    """
    for name, value in values.items():
        hint = parameters(target)[name].annotation
        if not fits(value, hint):
            yield f'{binding(name)} = {shown(value)} must be {in_words(hint)}.'


def in_words(hint: Any) -> str:
    """What a type asks for, to follow 'must be'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    simple = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'True or False', type(None): 'None'}
    if origin is Annotated:
        return ' '.join([in_words(arguments[0]), *(bound.words for bound in arguments[1:])])
    if origin is typing.Literal:
        return f'one of {", ".join(map(str, arguments))}'
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(in_words(argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return f'a dictionary ({in_words(arguments[0])}: {in_words(arguments[1])})'
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f'{len(arguments)} values ({", ".join(map(in_words, arguments))})'
    if origin is not None and issubclass(origin, Sequence):
        return f'a list, each {in_words(arguments[0])}'
    if inspect.isclass(hint) and issubclass(hint, enum.StrEnum):
        return f'one of {", ".join(hint)}'
    return simple.get(hint) or f'a {getattr(hint, "__name__", hint)}, written @NAME()'


def written(value: Any, within: Callable[[Any], str] | None = None) -> str:
    """A value as a user writes it in a gin file: an enum's text, a type's name, a path's; never a `repr` of ours.

    Args:
      value: of a binding, a default or a field.
      within: writes what is inside containers; None: this function.
    """
    within = written if within is None else within
    if isinstance(value, Made):
        return f'@{value.kind.__name__}' + '()' * value.called
    if isinstance(value, enum.Enum):
        return within(value.value)
    if isinstance(value, list | tuple):
        inner = ', '.join(map(within, value))
        return f'[{inner}]' if isinstance(value, list) else f'({inner}{"," if len(value) == 1 else ""})'
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{within(key)}: {within(item)}' for key, item in value.items()) + '}'
    if isinstance(value, np.generic):
        return within(value.item())
    if isinstance(value, np.dtype):
        return repr(value.name)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if inspect.isclass(value):
        is_number = issubclass(value, np.generic) or isinstance(getattr(value, 'dtype', None), np.dtype)
        return repr(np.dtype(value).name) if is_number else f'@{value.__module__}.{value.__qualname__}'
    if dataclasses.is_dataclass(value):
        return f'@{type(value).__module__}.{type(value).__qualname__}()'
    if isinstance(value, int) and abs(value) > 10**100:
        return hex(value)  # which has no largest length
    return repr(value)


def shown(value: Any) -> str:
    """A value as it was written, shortened where it is long, for messages."""
    why = ''
    if isinstance(value, int) and not isinstance(value, enum.Enum) and abs(value) > _LARGEST:
        why = f' (beyond {_LARGEST}, the largest whole number)'
    text = written(value, shown)
    return (text if len(text) <= 120 else text[:117] + '...') + why


def same(written_before: str, written_now: str) -> bool:
    """Whether two texts of `written` are of the same value: 1 and 1.0 are, and so are a list and a tuple."""
    return written_before == written_now or _read(written_before) == _read(written_now)


def _read(text: str) -> Any:
    try:
        return _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # a reference


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return 'switch', value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _is_a(value: Made, hint: Any) -> bool:
    """Whether what will be made is of a class, or has what a protocol wants. What a function makes is not known before."""
    if not value.called:
        return not inspect.isclass(hint)
    if not inspect.isclass(value.kind):
        return True
    if not inspect.isclass(hint):
        return False
    if not _is_protocol(hint):
        return issubclass(value.kind, hint)
    wanted = {name for name in (*vars(hint), *getattr(hint, '__annotations__', {})) if not name.startswith('_')}
    has = {*dir(value.kind), *getattr(value.kind, '__dataclass_fields__', {})}
    return wanted <= has


def _is_protocol(hint: Any) -> bool:
    return getattr(hint, '_is_protocol', False)  # typing.is_protocol, from Python 3.13 on
