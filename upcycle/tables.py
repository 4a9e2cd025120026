"""Tables and lines on the terminal: nothing is cut off, and no text is taken for markup."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table


def console(width: int | None = None) -> Console:
    """What is printed on, as it is written, '[seed=1]' and ':x:' included.

    Args:
      width: in characters, where it is no terminal; None: Rich's.
    """
    return Console(width=None if Console().is_terminal else width, markup=False, emoji=False)


def table(*headers: str, **style: Any) -> Table:
    """An empty table without lines, whose columns wrap what is wider than they are."""
    return Table(*(Column(header, overflow='fold') for header in headers), box=None, pad_edge=False, **style)
