"""Queries of gin's configuration after files and bindings were read: macros, references, and the configurables of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import schema
from upcycle.training.run import Run

# The value of a macro that nothing sets.
UNSET = object()
ROOT = f'{Run.__module__}.{Run.__name__}'


def is_reference(value: Any) -> bool:
    return isinstance(value, gin.config.ConfigurableReference)


def macro_of(value: Any) -> str | None:
    """The name of the macro that a value refers to; None for other values."""
    if is_reference(value) and value.selector == 'gin.macro':
        return value.scoped_selector.removesuffix('/gin.macro')
    return None


def innermost(value: Any) -> str | None:
    """The last macro in a chain of macros that refer to each other; None if the value is not a macro."""
    chain: list[str] = []
    while (macro := macro_of(value)) and macro not in chain:
        chain.append(macro)
        value = macro_value(macro)
    return chain[-1] if chain else None


def bindings_of(scopes: Sequence[str], target: Any) -> dict[str, Any]:
    """The bindings of a configurable in a scope and its outer scopes, unresolved; {} for a class unknown to gin."""
    try:
        with gin.config_scope('/'.join(scopes) or None):
            return dict(gin.get_bindings(target, resolve_references=False))
    except ValueError:  # no gin file has named it
        return {}


def references(value: Any, within: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yields all references in a value, through containers and macros; `within`: the macros around it."""
    if macro := macro_of(value):
        yield value
        if macro not in within:
            yield from references(macro_value(macro), (*within, macro))
    elif is_reference(value):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(key, within)
            yield from references(item, within)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item, within)


def macro_value(name: str) -> Any:
    """The value of a macro, or `UNSET`."""
    return gin.get_bindings(f'{name}/gin.macro', resolve_references=False).get('value', UNSET)


def reachable() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields what building a `Run` calls: scoped full name, class or function, and bindings."""
    seen = {ROOT}
    waiting: list[tuple[Sequence[str], Any]] = [((), Run)]
    while waiting:
        scopes, target = waiting.pop()
        bindings = bindings_of(scopes, target)
        yield full_name(scopes, target), target, bindings
        for value in bindings.values():
            for reference in references(value):
                if not macro_of(reference) and reference.scoped_selector not in seen:
                    seen.add(reference.scoped_selector)
                    waiting.append((reference.scopes, reference.configurable.wrapped))


def full_name(scopes: Sequence[str], target: Any) -> str:
    return '/'.join([*scopes, f'{target.__module__}.{target.__qualname__}'])


def show(value: Any) -> str:
    """Formats a value with its macros replaced by their values, and its references by full names."""
    if macro := macro_of(value):
        return show(macro_value(macro))
    if is_reference(value):
        return f'@{full_name(value.scopes, value.configurable.wrapped)}' + ('()' if value.evaluate else '')
    return schema.written(value, show)


def set_macros() -> set[str]:
    """The names of all macros that are set."""
    return {scope for scope, selector in gin.config._CONFIG if selector == 'gin.macro'}
