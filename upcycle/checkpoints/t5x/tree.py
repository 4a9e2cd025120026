"""Names in T5X's tree and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

METADATA = 'upcycle.json'  # family, receipt, ...: ours, next to the index
ADAFACTOR_SLOTS = ('m', 'v', 'v_row', 'v_col')
PARAM_STATES = 'opt_state/param_states/'


def our_names(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Returns our names of T5X's leaf: two for the step, one for others."""
    match keys:
        case ('target', *rest):
            return ('/'.join(['params', *rest]),)
        case ('state', 'step'):
            return ('step', 'opt_state/count')
        case ('state', *rest):
            return ('/'.join(['opt_state', *rest]),)
        case _:
            return ('/'.join(keys),)


def their_keys(name: str) -> tuple[str, ...]:
    """Returns the keys of our leaf in T5X's tree."""
    top, *rest = name.split('/')
    return {'params': ('target',), 'opt_state': ('state',), 'step': ('state', 'step')}[top] + tuple(rest)


def swapped_statistics(leaves: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the factored statistics of experts, as pairs (v_row, v_col), whose names T5X swaps.

    Both are means over one axis of a kernel. T5X and we name those of a matrix by the size of the axis. For experts T5X goes by
    meaning: `v_row` belongs to the model width even if it is the larger axis.
    """
    swapped = []
    for name, leaf in leaves.items():
        match = re.fullmatch(r'params/(.*/expert/(wi|wi_\d|wo)/kernel)', name)
        row, column = (f'{PARAM_STATES}{match[1]}/{slot}' if match else '' for slot in ('v_row', 'v_col'))
        if row in leaves and column in leaves:
            width_axis = 1 if match[2] == 'wo' else 0
            if int(np.argsort(leaf.shape[1:])[-2]) != width_axis:
                swapped.append((row, column))
    return swapped
