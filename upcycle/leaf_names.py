"""Long lists of leaves in messages: alike layers on one line, and no more than fits a screen."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The first number of a name is the layer's: STACK/layers_3/mlp/wi_0/kernel, STACK.block.3.layer.0.
_LAYER = re.compile(r'(?<=[_.])\d+(?=[/.])')
_NAME = re.compile(r"[^\s,:;()'\"]*[/.][^\s,:;()'\"]*")


def pattern(text: str) -> str:
    """A text with a `*` for the number of the layer in every name of a leaf."""
    return _NAME.sub(lambda name: _LAYER.sub('*', name[0], count=1), text)


def grouped(lines: Iterable[str], most: int | None = 16) -> list[str]:
    """Lines about leaves, those of alike layers as one with their number.

    Args:
      lines: a sentence or a name each.
      most: how many to give; a last one says how many more there are. None: all.
    """
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(pattern(line), []).append(line)
    shown = [
        members[0] if len(members) == 1 else f'{name} ({len(members)} of them)' for name, members in groups.items()
    ]
    if most is None or len(shown) <= most:
        return shown
    left = sum(map(len, list(groups.values())[most:]))
    return [*shown[:most], f'and {left} more']


def not_read(metadata: Mapping[str, Any]) -> list[str]:
    """Lines that say which arrays of a checkpoint are not read, and why.

    Args:
      metadata: of the checkpoint's reader.
    """
    return grouped(f'not read  {name}  because it is {reason}' for name, reason in metadata.get('not_read', {}).items())
