"""Sparse upcycling: turns a trained dense Transformer into a Mixture-of-Experts model and continues its training.

Importing the package is cheap. The functions and types of `upcycle.api` are attributes of the package, imported at first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.api import MoERule, PathRules, Plan, State, Surgery, convert, load, plan, sparse, train, upcycle

__version__ = '0.1.0'
# No module or package in this folder may have one of these names: importing it would replace the function.
__all__ = ['MoERule', 'PathRules', 'Plan', 'State', 'Surgery', 'convert', 'load', 'plan', 'sparse', 'train', 'upcycle']


def __getattr__(name: str) -> Any:
    """Imports an attribute that `upcycle.api` defines (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from upcycle import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The names of the module, including those not imported yet."""
    return sorted({*globals(), *__all__})
