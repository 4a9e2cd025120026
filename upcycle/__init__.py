"""Sparse upcycling: a trained dense Transformer becomes a Mixture-of-Experts model and trains on.

Importing the package is cheap; everything heavy is imported by the module that needs it. The functions and types of `upcycle.api`
are attributes of the package, and imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.api import (
        MoERule,
        PathRules,
        Plan,
        State,
        Surgery,
        convert,
        load,
        plan,
        sparse,
        train,
        upcycle,
    )

__version__ = '0.1.0'
# No module or package in this folder may have one of these names: its import would take the function's place.
__all__ = [
    'MoERule',
    'PathRules',
    'Plan',
    'State',
    'Surgery',
    'convert',
    'load',
    'plan',
    'sparse',
    'train',
    'upcycle',
]


def __getattr__(name: str) -> Any:
    """An attribute that `upcycle.api` defines (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from upcycle import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The names of the module, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
