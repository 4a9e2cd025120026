"""JSON files of checkpoints: indexes, configurations and our own metadata, checked as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.errors import UserError

# What our metadata holds, where it is there.
_METADATA = {
    'family': str,
    'facts': Mapping[str, Any],
    'model': Mapping[str, Any],
    'cost': Mapping[str, float],
    'not_read': Mapping[str, str],
    'receipt': Mapping[str, Any] | None,
    'unfinished': Sequence[str],
}


def read_json(file: epath.Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `pairs`: see `object_pairs_hook` of `json.loads`.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    try:
        found = json.loads(file.read_text(), object_pairs_hook=pairs)
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror or error}): copy the checkpoint again.') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is damaged ({error}): copy the checkpoint again.') from error
    if not isinstance(found, dict):
        raise UserError(
            f'{file} is damaged (it holds {schema.shown(found)} and no JSON object): copy the checkpoint again.'
        )
    return found


def checked_metadata(file: str, metadata: Any) -> dict[str, Any]:
    """Metadata of ours, after a look at what it is made of.

    Raises:
        UserError: it is damaged.
    """
    if not isinstance(metadata, dict):
        raise UserError(f'{file} is damaged (its metadata is no JSON object): copy the checkpoint again.')
    for name, kind in _METADATA.items():
        if name in metadata and not schema.fits(metadata[name], kind):
            raise UserError(
                f'{file} is damaged (its {name} is {schema.shown(metadata[name])}): copy the checkpoint again.'
            )
    return metadata


def is_plain_name(name: Any) -> bool:
    """Whether a name in an index is that of a file in the same folder: no path, and nothing above."""
    return isinstance(name, str) and name not in ('', '.', '..') and not {'/', '\\', '\0'} & {*name}
