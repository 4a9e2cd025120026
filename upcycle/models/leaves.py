"""Reads sizes of a model from the names and shapes of its parameters."""

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def mlp_width(shapes: Shapes, pattern: str) -> int:
    """Returns F, that of a dense MLP if the model has one, since experts may be narrower.

    Args:
      shapes: of the parameters.
      pattern: regular expression for the MLPs' last kernels, with a group that matches `expert/`.

    Raises:
      KeyError: no kernel matches.
    """
    kernels = {match[1]: shapes[name] for name in shapes if (match := re.search(pattern, name))}
    return (kernels.get(None) or kernels.get('expert/') or shapes[pattern])[-2]


def count_layers(shapes: Shapes, pattern: str) -> int:
    """Counts the layers.

    Args:
      shapes: of the parameters.
      pattern: regular expression for a layer's parameters, with a group that matches its number.

    Raises:
      ValueError: a layer has no parameters.
    """
    numbers = {match[1] for name in shapes if (match := re.match(pattern, name))}
    expected = {str(i) for i in range(len(numbers))}
    if numbers != expected:
        raise ValueError(f'a layer between 0 and {max(numbers - expected, key=len)}')
    return len(numbers)
