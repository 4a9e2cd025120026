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
from upcycle.checkpoints.hf import engines
from upcycle.checkpoints.hf.architecture import SAME, Architecture, Entry, Part, Shapes
from upcycle.checkpoints.hf.reader import HuggingFaceReader
from upcycle.checkpoints.hf.sources import CONFIG
from upcycle.errors import UserError
from upcycle.formats import ANY_FOLDER, FolderRequest

_PARAMS = 'params/'


class HuggingFaceWriter(staging.StagedWriter):
    """Writes a model as safetensors and `config.json`.

    A leaf that corresponds to several tensors, such as experts, is written tensor by tensor, and a leaf that is not transposed,
    such as an embedding, part by part. Parts of other leaves are put together first.

    Args:
      path: of the folder.
      leaves: all leaves that will be written.
      metadata: of our checkpoint, as far as it describes the model: `facts` or `model`, `model_type`.
      request: the layout, and the engines that must compute it.
      shard_bytes: see `safetensors.FilesWriter`.
    """

    def __init__(
        self,
        path: epath.Path,
        leaves: writing.Leaves,
        metadata: Mapping[str, Any],
        request: FolderRequest = ANY_FOLDER,
        shard_bytes: int = safetensors.SHARD_BYTES,
    ):
        super().__init__(path, leaves)
        shapes = {
            name.removeprefix(_PARAMS): leaf.shape for name, leaf in self._leaves.items() if name.startswith(_PARAMS)
        }
        architecture = hf.of_leaves(shapes, metadata, request.layout)
        if architecture is None:
            raise UserError(f'these leaves cannot be stored as huggingface, which only holds {hf.TITLES} models.')
        self._architecture = architecture
        self._sizes = architecture.sizes_for(shapes, metadata)
        self._table = _entries(architecture, self._sizes, shapes, self._leaves)
        self._dtype = max(self._leaves.values(), key=lambda leaf: leaf.size).dtype
        self._constants = {
            f'{_PARAMS}{name}': np.broadcast_to(np.asarray(value, self._dtype), shape)
            for name, (shape, value) in architecture.constants(self._sizes).items()
        }
        tensors = _tensors(self._table, self._leaves | self._constants)
        config = architecture.config(self._sizes, metadata)
        if request.layout not in (None, config['model_type']):
            raise UserError(f'--layout={request.layout} cannot store this model, which is a {config["model_type"]}.')
        engines.report(engines.engine_limits(config['model_type'], config), request.engines, self.path)
        self._request = request
        self._step: int | None = None
        self._unfinished: dict[str, np.ndarray] = {}
        self._folder = self._stage(outputs.Kind.NEW_FOLDER)
        self._files = safetensors.FilesWriter(self._folder, tensors, shard_bytes)

    def write(self, name: str, region: writing.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        if name == 'step':
            self._step = int(value)
            return
        engines.check_value(name, value, self._request.engines, self.path)
        entry = self._table[name]
        if entry.is_stack:
            pieces = entry.pieces[region[0]] if region else entry.pieces
            for piece, row in zip(pieces, value, strict=True):
                self._write(name, piece, entry.turn.to_theirs(row))
        elif entry.turn is SAME and not entry.parts:
            with writing.not_refused(self._folder, name):
                self._files.write(entry.every_name[0], value, region)
        elif (whole := self._put_together(name, region, value)) is not None:
            self._write(name, entry.pieces[0], entry.turn.to_theirs(whole))

    def _put_together(self, name: str, region: writing.Region, value: np.ndarray) -> np.ndarray | None:
        """Collects the parts of a leaf; returns the whole leaf after the last part, None before."""
        if region == writing.WHOLE:
            return value
        leaf = self._leaves[name]
        if name not in self._unfinished:
            self._unfinished[name] = np.empty(leaf.shape, leaf.dtype)
        self._unfinished[name][region] = value
        return self._unfinished.pop(name) if region[0].stop == leaf.shape[0] else None

    def _write(self, name: str, piece: tuple[str, Part | None], value: np.ndarray) -> None:
        theirs, part = piece
        with writing.not_refused(self._folder, name):
            self._files.write(theirs, value, writing.WHOLE if part is None else part.region)

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._folder):
            for name, value in self._constants.items():
                self.write(name, writing.WHOLE, value)
            step = {} if self._step is None else {'step': str(self._step)}
            self._files.finish({'format': 'pt', **self._architecture.notes(self._sizes), **step})
            config = self._architecture.config(self._sizes, metadata) | {'torch_dtype': self._dtype.name}
            (self._folder / CONFIG).write_text(json.dumps(config, indent=1))
        self._publish(check, HuggingFaceReader(self._folder), last=self._files.last)

    def _close_files(self) -> None:
        self._files.close()


def _entries(
    architecture: Architecture, sizes: Mapping[str, Any], shapes: Shapes, leaves: writing.Leaves
) -> dict[str, Entry]:
    """Returns the table entry of each leaf except the step, and of the constants.

    Raises:
      UserError: the format has no place for a leaf.
    """
    ours = {f'{_PARAMS}{name}': entry for name, entry in architecture.table(sizes, shapes).items()}
    added = [f'{_PARAMS}{name}' for name in architecture.constants(sizes)]
    # Parameters first: an option leaves the optimizer state out.
    for name in sorted(leaves, key=lambda name: name.startswith('opt_state/')):
        if name == 'step' or name in ours:
            continue
        if writing.EXPERT in name.split('/'):
            raise UserError(
                f'{name} cannot be stored as huggingface, which has no MoE of {architecture.title}: export the MoE as '
                "upcycle, t5x_legacy or t5x_orbax, or make it dense first with DENSE_OPERATOR = 'average'."
            )
        raise writing.no_counterpart(name, 'huggingface', f'{hf.TITLES} models')
    architecture.validate(shapes)
    return {name: ours[name] for name in (*leaves, *added) if name != 'step'}


def _tensors(table: Mapping[str, Entry], leaves: writing.Leaves) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each tensor.

    Raises:
      UserError: leaves that are parts of one tensor differ in dtype.
    """
    tensors: dict[str, jax.ShapeDtypeStruct] = {}
    for name, entry in table.items():
        leaf = leaves[name]
        shape = leaf.shape[1:] if entry.is_stack else leaf.shape
        # A broadcast array has the shape but takes no memory.
        theirs = entry.turn.to_theirs(np.broadcast_to(np.int8(0), shape)).shape
        for each, part in entry.pieces:
            tensor = jax.ShapeDtypeStruct(theirs if part is None else part.shape, leaf.dtype)
            if tensors.setdefault(each, tensor) != tensor:
                raise UserError(
                    f'{name} is {leaf.dtype}, and other leaves that huggingface stores in {each} are '
                    f'{tensors[each].dtype}: give them one type with --dtype.'
                )
    return tensors
