"""Checks values against the types in a configurable's signature. Pure, and independent of gin.

Supported types: numbers, strings, booleans, string enums, sequences, mappings, unions, classes and protocols. A type may have a
bound, as `Count` has. Each class checks relations between its fields itself, and bounds that deserve a more specific message.
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
from typing import Annotated, Any, Literal

import numpy as np

from upcycle.errors import refuse

# Every whole number, whether it counts, sizes or seeds, becomes an int32 in JAX; so does one that is given for a float.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound of a number, as a predicate and in words."""

    holds: Callable[[float], bool]
    words: str


Count = Annotated[int, Bound(lambda n: n >= 1, 'of at least 1')]
Whole = Annotated[int, Bound(lambda n: n >= 0, 'of at least 0')]
Depth = Annotated[int, Bound(lambda n: 1 <= n <= 1000, 'between 1 and 1000')]  # layers: each is traced
Positive = Annotated[float, Bound(lambda x: x > 0, 'above 0')]
Natural = Annotated[float, Bound(lambda x: x >= 0, 'of at least 0')]
Rate = Annotated[float, Bound(lambda x: 0 <= x < 1, 'in [0, 1)')]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, 'in [0, 1]')]
FloatType = Literal['float32', 'bfloat16', 'float16']


@functools.cache
def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class or function, with evaluated annotations; `Any` for those that cannot be evaluated."""
    source = target if not inspect.isclass(target) or dataclasses.is_dataclass(target) else target.__init__
    try:
        hints = typing.get_type_hints(source, include_extras=True)
    except (NameError, TypeError):  # an annotation imported for type checkers only
        hints = {}
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(target).parameters.items()
    }


def required(target: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters(target).items() if p.default is p.empty and p.kind in named]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; of a protocol, if it has its members."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return fits(value, arguments[0]) and all(bound.holds(value) for bound in arguments[1:])
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint in (int, float) and isinstance(value, int):
        return abs(value) <= _LARGEST
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if inspect.isclass(hint) and issubclass(hint, enum.StrEnum):
        return isinstance(value, str) and value in set(hint)
    if getattr(hint, '_is_protocol', False):  # Python 3.13: typing.is_protocol
        members = {name for name in (*vars(hint), *inspect.get_annotations(hint)) if not name.startswith('_')}
        return not inspect.isclass(value) and members <= {*dir(value)}
    kind = origin or hint
    return inspect.isclass(kind) and isinstance(value, kind)


def misfits(values: Mapping[str, Any], target: Callable[..., Any], binding: Callable[[str], str]) -> Iterator[str]:
    """Yields a sentence for each value that is not of its parameter's type.

    Args:
      values: by parameter name.
      target: the class or function that takes them.
      binding: maps a parameter name to the name that the user sets.
    """
    for name, value in values.items():
        hint = parameters(target)[name].annotation
        if not fits(value, hint):
            yield f'{binding(name)} = {shown(value)} must be {in_words(hint)}.'


def validate(instance: Any, macros: Mapping[str, str]) -> None:
    """Checks the fields of a frozen dataclass against their types; call it in `__post_init__`.

    Replaces strings by the enum members that they name, and lists by tuples, so that the instance is hashable.

    Args:
      macros: the macros of fields whose macro is not the field's name in capitals, for messages.

    Raises:
      UserError: one field is not of its type.
      UserErrors: several fields are not.
    """
    kinds = parameters(type(instance))
    values = {name: getattr(instance, name) for name in kinds}
    refuse(misfits(values, type(instance), lambda field: macros.get(field, field.upper())))
    for name, value in values.items():
        hint = kinds[name].annotation
        if isinstance(value, list):
            object.__setattr__(instance, name, tuple(value))
        elif inspect.isclass(hint) and issubclass(hint, enum.StrEnum):
            object.__setattr__(instance, name, hint(value))


def in_words(hint: Any) -> str:
    """Describes a type, to follow 'must be'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    simple = {
        Any: 'any value',
        int: 'a whole number',
        float: 'a number',
        str: 'a string',
        bool: 'True or False',
        type(None): 'None',
    }
    if origin is Annotated:
        return ' '.join([in_words(arguments[0]), *(bound.words for bound in arguments[1:])])
    if origin is typing.Literal:
        return f'one of {", ".join(map(str, arguments))}' if len(arguments) > 1 else repr(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(in_words(argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return f'a dictionary ({in_words(arguments[0])}: {in_words(arguments[1])})'
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f'{len(arguments)} values ({", ".join(map(in_words, arguments))})'
    if origin is not None and issubclass(origin, Sequence):
        return f'a list, each item {in_words(arguments[0])}'
    if inspect.isclass(hint) and issubclass(hint, enum.StrEnum):
        return f'one of {", ".join(hint)}'
    return simple.get(hint) or f'an object of type {getattr(hint, "__name__", hint)} (@NAME())'


def written(value: Any, within: Callable[[Any], str] | None = None) -> str:
    """Formats a value as a user writes it in a gin file: enums, types and paths as strings, objects as references.

    Args:
      value: a binding, default or field.
      within: formats the items of containers; None: this function.
    """
    within = written if within is None else within
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
        return hex(value)  # Python limits the length of decimal strings only
    return repr(value)


def shown(value: Any) -> str:
    """Formats a value for a message: as `written`, cut to 120 characters."""
    text = written(value, shown)
    text = text if len(text) <= 120 else text[:117] + '...'
    too_large = isinstance(value, int) and abs(value) > _LARGEST
    return f'{text} (beyond {_LARGEST}, the largest whole number)' if too_large else text


def same(written_before: str, written_now: str) -> bool:
    """Whether two results of `written` denote equal values; 1 equals 1.0, and a list equals a tuple."""
    return written_before == written_now or _parsed(written_before) == _parsed(written_now)


def _parsed(text: str) -> Any:
    try:
        return _comparable(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # a reference


def _comparable(value: Any) -> Any:
    if isinstance(value, bool):
        return bool, value  # True does not equal 1
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return {_comparable(key): _comparable(item) for key, item in value.items()}
    return value
