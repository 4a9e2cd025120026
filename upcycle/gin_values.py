"""What gin holds after files and bindings were read: macros, references, and the configurables that building a run calls."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import schema
from upcycle.training.run import Run

# Of a macro that nothing sets.
UNSET = object()
ROOT = f'{Run.__module__}.{Run.__name__}'


def is_reference(value: Any) -> bool:
    return isinstance(value, gin.config.ConfigurableReference)


def macro_of(value: Any) -> str | None:
    """The name of the macro that a value refers to."""
    if is_reference(value) and value.selector == 'gin.macro':
        return value.scoped_selector.removesuffix('/gin.macro')
    return None


def innermost(value: Any) -> str | None:
    """The macro that a chain of them ends in; None where the value is no macro."""
    chain: list[str] = []
    while (macro := macro_of(value)) and macro not in chain:
        chain.append(macro)
        value = macro_value(macro)
    return chain[-1] if chain else None


def bindings_of(scopes: Sequence[str], target: Any) -> dict[str, Any]:
    """Bindings of a configurable in a scope, those of the outer scopes included."""
    with gin.config_scope('/'.join(scopes) or None):
        return dict(gin.get_bindings(target, resolve_references=False))


def references(value: Any, within: tuple[str, ...] = ()) -> Iterator[Any]:
    """The references inside a value, looked for through containers and macros; `within`: the macros around it."""
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
    """What a macro is set to, or `UNSET`."""
    return gin.get_bindings(f'{name}/gin.macro', resolve_references=False).get('value', UNSET)


def reachable() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The configurables that building a `Run` calls: scoped full names, classes or functions, and bindings."""
    seen: set[str] = set()
    root = gin.get_bindings(Run, resolve_references=False)
    yield ROOT, Run, dict(root)
    waiting = [value for item in root.values() for value in references(item)]
    while waiting:
        reference = waiting.pop()
        if macro_of(reference) or reference.scoped_selector in seen:
            continue
        seen.add(reference.scoped_selector)
        target = reference.configurable.wrapped
        bindings = bindings_of(reference.scopes, target)
        yield full_name(reference.scopes, target), target, bindings
        waiting += [value for item in bindings.values() for value in references(item)]


def full_name(scopes: Sequence[str], target: Any) -> str:
    return '/'.join([*scopes, f'{target.__module__}.{target.__qualname__}'])


def show(value: Any) -> str:
    if macro := macro_of(value):
        return show(macro_value(macro))
    if is_reference(value):
        return f'@{full_name(value.scopes, value.configurable.wrapped)}' + ('()' if value.evaluate else '')
    return schema.written(value, show)


def set_macros() -> set[str]:
    """The names of all macros that are set."""
    return {scope for scope, selector in gin.config._CONFIG if selector == 'gin.macro'}
