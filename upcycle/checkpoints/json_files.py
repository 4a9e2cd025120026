"""JSON files of checkpoints: indexes, configurations and our metadata, checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import files, schema
from upcycle.errors import UserError

# Types of the entries of our metadata, all of which are optional.
_METADATA = {
    'family': str,
    'facts': Mapping[str, Any],
    'model': Mapping[str, Any],
    'cost': Mapping[str, float],
    'not_read': Mapping[str, str],
    'receipt': Mapping[str, Any] | None,
    'unfinished': Sequence[str],
    'kept': Mapping[str, Any],
    'model_type': str,
}
# Fields of config.json and generation_config.json that programs read as tokens.
TOKEN_IDS = {'bos_token_id': int, 'eos_token_id': int | Sequence[int], 'pad_token_id': int}


def read_json(file: epath.Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """Returns the JSON object in a file; `pairs`: `object_pairs_hook` of `json.loads`.

    Raises:
      UserError: the file is missing or damaged, or does not hold a JSON object.
    """
    files.require_file(file)
    try:
        content = parse(file.read_bytes(), pairs=pairs)
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror or error}): copy the checkpoint again.') from error
    except ValueError as error:
        raise files.damaged(file, error) from error
    if not isinstance(content, dict):
        raise files.damaged(file, f'{schema.shown(content)} is not a JSON object')
    return content


def read_settings(file: epath.Path) -> dict[str, Any]:
    """Returns the content of a generation_config.json or config.json; {} if there is none.

    Raises:
      UserError: it is damaged, or ids of tokens are not whole numbers.
    """
    content = read_json(file) if file.exists() else {}
    for name, kind in TOKEN_IDS.items():
        if (ids := content.get(name)) is not None and not schema.fits(ids, kind):
            raise UserError(f'{file}: {name} is {schema.shown(ids)}: it must be {schema.in_words(kind)}.')
    return content


class Twice(ValueError):  # noqa: N818  named after the mistake
    """A JSON object has a name twice."""


def parse(encoded: bytes, subject: str = 'it', pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses JSON.

    Args:
      encoded: in UTF-8.
      subject: what is parsed, for the message.
      pairs: `object_pairs_hook` of `json.loads`, which may raise `Twice`.

    Raises:
      ValueError: it is not JSON; the message says why, without a period.
    """
    try:
        return json.loads(encoded.decode(), object_pairs_hook=pairs)
    except Twice:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f'{subject} is not JSON from line {error.lineno}, column {error.colno} on') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{subject} is not UTF-8 text') from error
    except RecursionError as error:
        raise ValueError(f'{subject} is nested too deeply') from error
    except ValueError as error:  # Python limits the digits of a whole number
        raise ValueError(f'{subject} holds a number of too many digits') from error


def checked_metadata(file: str, metadata: Any) -> dict[str, Any]:
    """Returns our metadata after checking its types; raises UserError if one is wrong."""
    if not isinstance(metadata, dict):
        raise files.damaged(file, 'its metadata is not a JSON object')
    for name, kind in _METADATA.items():
        if name in metadata and not schema.fits(metadata[name], kind):
            raise files.damaged(file, f'{name} is {schema.shown(metadata[name])}')
    return metadata


def is_plain_name(name: Any) -> bool:
    """Whether a name in an index is a file name without a path."""
    return isinstance(name, str) and name not in ('', '.', '..') and not {'/', '\\', '\0'} & {*name}
