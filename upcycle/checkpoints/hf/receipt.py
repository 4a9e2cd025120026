"""The receipt of a surgery in a Hugging Face folder, and its SHA-256 in the header of each file of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import files, warning
from upcycle.checkpoints import json_files

FILE = 'upcycle_receipt.json'
NOTE = 'upcycle_receipt'  # in the headers
_ADDED = 'added'


def write(folder: epath.Path, receipt: Mapping[str, Any], added: Sequence[str]) -> str:
    """Writes a receipt; returns its SHA-256.

    Args:
      folder: the folder.
      receipt: see `surgery.receipt`.
      added: leaves that the format needs and the receipt does not know, such as biases of 0.
    """
    text = json.dumps({**receipt, **({_ADDED: sorted(added)} if added else {})}, indent=1)
    (folder / FILE).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: epath.Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """Returns `{'receipt': receipt}` if the files of weights were written with the receipt of the folder, else {}.

    A receipt that does not know all leaves is not returned, because it cannot be compared with them.
    """
    file = folder / FILE
    files.require_file(file)
    if NOTE not in notes or not file.exists():
        return {}
    if hashlib.sha256(file.read_bytes()).hexdigest() != notes[NOTE]:
        warning.once(f'{file} is not the receipt that the weights were written with: it is ignored.')
        return {}
    receipt = json_files.read_json(file)
    return {} if _ADDED in receipt else {'receipt': receipt}
