"""The writer of Hugging Face folders."""

from __future__ import annotations

import json
import math
import os
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


class HuggingFaceWriter:
    """A model as safetensors and `config.json`; see `writing.Writer`. A cut write begins again.

    A leaf that is several tensors there, such as experts, is written one by one as its rows come. Parts of another large leaf are
    put together first, because it may lie transposed there.
    """

    def __init__(self, path: epath.Path, leaves: writing.Leaves, shard_bytes: int = safetensors.SHARD_BYTES):
        self.path = os.fspath(path)
        self.left_out = {'rng': 'Hugging Face models have no random key'} if 'rng' in leaves else {}
        self._leaves = {name: leaf for name, leaf in leaves.items() if name not in self.left_out}
        shapes = {
            name.removeprefix(_PARAMS): leaf.shape for name, leaf in self._leaves.items() if name.startswith(_PARAMS)
        }
        self._architecture = _architecture_of(shapes)
        self._sizes = self._architecture.config_sizes(shapes)
        self._table = _entries(self._architecture, self._sizes, shapes, self._leaves)
        tensors = {
            theirs: tensor
            for name, entry in self._table.items()
            for theirs, tensor in _tensors(entry, self._leaves[name]).items()
        }
        self._step: int | None = None
        self._unfinished: dict[str, np.ndarray] = {}
        self._finished = False
        size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        self._staging = staging.Staging(path, outputs.Kind.NEW_FOLDER, size)
        self._folder = self._staging.path
        self._files = safetensors.FilesWriter(self._folder, tensors, shard_bytes)

    def todo(self) -> dict[str, list[writing.Region]]:
        """See `writing.Writer`; parts come in this order."""
        return {name: list(writing.parts(name, leaf)) for name, leaf in self._leaves.items()}

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
        """The whole leaf, once its last part is there."""
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
        check(HuggingFaceReader(self._folder))
        self._staging.publish(last=self._files.last)
        self._finished = True

    def close(self) -> None:
        """See `writing.Writer`."""
        if not self._finished:
            self.discard()

    def discard(self) -> None:
        """See `writing.Writer`."""
        self._files.close()
        self._staging.discard()
        self._finished = True


def _architecture_of(shapes: Shapes) -> Architecture:
    architecture = hf.of_leaves(shapes)
    if architecture is None:
        raise UserError(f'huggingface holds {hf.TITLES} models, and these leaves are of none.')
    return architecture


def _entries(
    architecture: Architecture, sizes: Mapping[str, Any], shapes: Shapes, leaves: writing.Leaves
) -> dict[str, Entry]:
    """What each of our leaves is there, but the step.

    Raises:
        UserError: a leaf has no counterpart.
    """
    ours = {f'{_PARAMS}{name}': entry for name, entry in architecture.table(sizes, shapes).items()}
    # What no option leaves out comes first.
    for name in sorted(leaves, key=lambda name: name.startswith('opt_state/')):
        if name == 'step' or name in ours:
            continue
        if writing.EXPERT in name.split('/'):
            raise UserError(
                f'{name} has no counterpart in huggingface, which holds no MoE of {architecture.title}: export the MoE as '
                "upcycle, t5x_legacy or t5x_orbax, or make it dense first with DENSE_OPERATOR = 'average'."
            )
        way_out = ': leave the optimizer state out with --optimizer_state=none' if name.startswith('opt_state/') else ''
        raise UserError(f'{name} has no counterpart in huggingface, which holds dense {hf.TITLES} models{way_out}.')
    architecture.validate(shapes)
    return {name: ours[name] for name in leaves if name != 'step'}


def _tensors(entry: Entry, leaf: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each tensor of a leaf."""
    shape = leaf.shape[1:] if entry.is_stack else leaf.shape
    # Strides of zero: the shape of the result without its numbers.
    theirs = entry.turn.to_theirs(np.broadcast_to(np.int8(0), shape)).shape
    return dict.fromkeys(entry.every_name, jax.ShapeDtypeStruct(theirs, leaf.dtype))
