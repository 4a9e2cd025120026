"""Tables on the terminal, by rich: nothing is cut off, and text is not interpreted as markup."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table


def console(width: int | None = None) -> Console:
    """Returns a console that prints text literally, including '[seed=1]' and ':x:'.

    Args:
      width: in characters, if standard output is not a terminal; None: rich's default.
    """
    return Console(width=None if Console().is_terminal else width, markup=False, emoji=False)


def table(*headers: str, **style: Any) -> Table:
    """Returns an empty table without lines whose columns wrap long text."""
    return Table(*(Column(header, overflow='fold') for header in headers), box=None, pad_edge=False, **style)
