"""The writer of Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from upcycle import outputs
from upcycle.checkpoints import hf, safetensors, staging, writing
from upcycle.checkpoints.hf.architecture import Architecture, Entry, Shapes
from upcycle.checkpoints.hf.reader import HuggingFaceReader
from upcycle.checkpoints.hf.sources import CONFIG
from upcycle.errors import UserError

_PARAMS = 'params/'


class HuggingFaceWriter(staging.StagedWriter):
    """Writes a model as safetensors and `config.json`.

    A leaf that corresponds to several tensors, such as experts, is written tensor by tensor. Parts of other leaves are put
    together first, because the tensor may be transposed.
    """

    def __init__(self, path: epath.Path, leaves: writing.Leaves, shard_bytes: int = safetensors.SHARD_BYTES):
        super().__init__(path, leaves)
        shapes = {
            name.removeprefix(_PARAMS): leaf.shape for name, leaf in self._leaves.items() if name.startswith(_PARAMS)
        }
        architecture = hf.of_leaves(shapes)
        if architecture is None:
            raise UserError(f'these leaves cannot be stored as huggingface, which only holds {hf.TITLES} models.')
        self._architecture = architecture
        self._sizes = architecture.config_sizes(shapes)
        self._table = _entries(architecture, self._sizes, shapes, self._leaves)
        tensors = {
            theirs: tensor
            for name, entry in self._table.items()
            for theirs, tensor in _tensors(entry, self._leaves[name]).items()
        }
        self._step: int | None = None
        self._unfinished: dict[str, np.ndarray] = {}
        self._folder = self._stage(outputs.Kind.NEW_FOLDER)
        self._files = safetensors.FilesWriter(self._folder, tensors, shard_bytes)

    def write(self, name: str, region: writing.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        if name == 'step':
            self._step = int(value)
            return
        entry = self._table[name]
        if entry.is_stack:
            names = entry.every_name[region[0]] if region else entry.every_name
            for theirs, row in zip(names, value, strict=True):
                self._write(name, theirs, entry.turn.to_theirs(row))
        elif (whole := self._put_together(name, region, value)) is not None:
            self._write(name, entry.names, entry.turn.to_theirs(whole))

    def _put_together(self, name: str, region: writing.Region, value: np.ndarray) -> np.ndarray | None:
        """Collects the parts of a leaf; returns the whole leaf after the last part, None before."""
        if region == writing.WHOLE:
            return value
        leaf = self._leaves[name]
        if name not in self._unfinished:
            self._unfinished[name] = np.empty(leaf.shape, leaf.dtype)
        self._unfinished[name][region] = value
        return self._unfinished.pop(name) if region[0].stop == leaf.shape[0] else None

    def _write(self, name: str, theirs: str, value: np.ndarray) -> None:
        with writing.not_refused(self._folder, name):
            self._files.write(theirs, value)

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._folder):
            self._files.finish({'format': 'pt'} | ({} if self._step is None else {'step': str(self._step)}))
            config = self._architecture.config(self._sizes, metadata)
            (self._folder / CONFIG).write_text(json.dumps(config, indent=1))
        self._publish(check, HuggingFaceReader(self._folder), last=self._files.last)

    def _close_files(self) -> None:
        self._files.close()


def _entries(
    architecture: Architecture, sizes: Mapping[str, Any], shapes: Shapes, leaves: writing.Leaves
) -> dict[str, Entry]:
    """Returns the table entry of each leaf except the step.

    Raises:
      UserError: the format has no place for a leaf.
    """
    ours = {f'{_PARAMS}{name}': entry for name, entry in architecture.table(sizes, shapes).items()}
    # Parameters first: an option leaves the optimizer state out.
    for name in sorted(leaves, key=lambda name: name.startswith('opt_state/')):
        if name == 'step' or name in ours:
            continue
        if writing.EXPERT in name.split('/'):
            raise UserError(
                f'{name} cannot be stored as huggingface, which has no MoE of {architecture.title}: export the MoE as '
                "upcycle, t5x_legacy or t5x_orbax, or make it dense first with DENSE_OPERATOR = 'average'."
            )
        raise writing.no_counterpart(name, 'huggingface', f'dense {hf.TITLES} models')
    architecture.validate(shapes)
    return {name: ours[name] for name in leaves if name != 'step'}


def _tensors(entry: Entry, leaf: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each tensor of a leaf."""
    shape = leaf.shape[1:] if entry.is_stack else leaf.shape
    # A broadcast array has the shape but takes no memory.
    theirs = entry.turn.to_theirs(np.broadcast_to(np.int8(0), shape)).shape
    return dict.fromkeys(entry.every_name, jax.ShapeDtypeStruct(theirs, leaf.dtype))
