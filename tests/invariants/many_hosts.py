"""Four processes with two devices each: the meshes and device orders that they are tried in; see `devices.py`.

    results = many_hosts.call(function, *arguments, order='interleaved')

Every process imports the function by its name, so it must be one of a module, and what it returns must be picklable.
"""

import unittest.mock
from collections.abc import Callable
from typing import Any

import jax

from tests.invariants.devices import processes
from upcycle import platforms

# Processes, and devices of each.
LAYOUT = (4, 2)
# (data, expert, model). But for the last, `model` crosses processes in at least one order.
MESHES = ((1, 2, 4), (2, 2, 2), (1, 1, 8), (4, 2, 1))
# Positions in the list of all devices, which is sorted by process. A mesh takes its devices in this order.
ORDERS = {
    'by process': (0, 1, 2, 3, 4, 5, 6, 7),
    # A process's two devices lie half the mesh apart, as where the axes of a TPU's torus cross hosts.
    'interleaved': (0, 2, 4, 6, 1, 3, 5, 7),
    # The last process first.
    'reversed': (7, 6, 5, 4, 3, 2, 1, 0),
    # Two processes share what they hold on mesh (2, 2, 2), and the other two hold one part each.
    'uneven': (0, 2, 1, 3, 4, 5, 6, 7),
}


def call(function: Callable[..., Any], *arguments: Any, order: str = 'by process', **named: Any) -> list[Any]:
    """Calls a function in all processes, whose meshes take the devices in that order, and returns what each returned."""
    return processes(*LAYOUT).call(_in_order, order, function, arguments, named)


def _in_order(order: str, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Called in a process."""
    devices = jax.devices()
    with unittest.mock.patch.object(platforms, 'devices', lambda: [devices[i] for i in ORDERS[order]]):
        return function(*arguments, **named)
