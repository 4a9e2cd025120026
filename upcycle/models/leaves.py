"""Sizes of a model from the names and shapes of its parameters."""

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def mlp_width(shapes: Shapes, pattern: str) -> int:
    """F, of a dense MLP if there is one, since experts may be narrower.

    Args:
      shapes: of the parameters.
      pattern: of the names of the MLPs' last kernels, in which a group matches `expert/`.

    Raises:
      KeyError: there is no such kernel.
    """
    found = {match[1]: shapes[name] for name in shapes if (match := re.search(pattern, name))}
    return (found.get(None) or found.get('expert/') or shapes[pattern])[-2]


def count_layers(shapes: Shapes, pattern: str) -> int:
    """The number of layers.

    Args:
      shapes: of the parameters.
      pattern: of the names of a layer's parameters, in which a group matches its number.

    Raises:
      ValueError: a layer has no parameter.
    """
    found = {match[1] for name in shapes if (match := re.match(pattern, name))}
    expected = {str(i) for i in range(len(found))}
    if found != expected:
        raise ValueError(f'a layer between 0 and {max(found - expected, key=len)}')
    return len(found)
