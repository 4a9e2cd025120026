"""Shortens lists of leaves in messages: one line for similar layers, and no more lines than fit a screen."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The first number in a name is that of the layer: STACK/layers_3/mlp/wi_0/kernel, STACK.block.3.layer.0.
_LAYER = re.compile(r'(?<=[_.])\d+(?=[/.])')
_NAME = re.compile(r"[^\s,:;()'\"]*[/.][^\s,:;()'\"]*")


def pattern(text: str) -> str:
    """Replaces the layer number in each leaf name of a text by `*`."""
    return _NAME.sub(lambda name: _LAYER.sub('*', name[0], count=1), text)


def grouped(lines: Iterable[str], most: int | None = 16) -> list[str]:
    """Merges lines that differ only in the layer number, and appends their count.

    Args:
      lines: sentences or names.
      most: the maximum number of lines; an additional last line counts the rest. None: no limit.
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
    """Lists the arrays that the reader with this metadata does not read, and why."""
    return grouped(f'not read  {name}: {reason}' for name, reason in metadata.get('not_read', {}).items())


def left_out(reasons: Mapping[str, str]) -> list[str]:
    """Lists the leaves that a format does not store, and why."""
    return grouped((f'left out  {name}: {reason}' for name, reason in reasons.items()), None)
