"""The writer of Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import upcycle
from upcycle import outputs
from upcycle.checkpoints import hf, safetensors, staging, writing
from upcycle.checkpoints.direct import BLOCK
from upcycle.checkpoints.hf import companions, engines, receipt
from upcycle.checkpoints.hf.architecture import SAME, Architecture, Entry, Part, Shapes
from upcycle.checkpoints.hf.reader import HuggingFaceReader
from upcycle.checkpoints.hf.sources import CONFIG
from upcycle.errors import UserError
from upcycle.formats import ANY_FOLDER, FolderRequest

_PARAMS = 'params/'


class HuggingFaceWriter(staging.StagedWriter):
    """Writes a model as safetensors and `config.json`.

    A leaf that corresponds to several tensors, or parts of tensors, such as experts, is written one by one, and a leaf that is
    not transposed, such as an embedding, part by part; other leaves are written whole. On a disk, the same command continues an
    interrupted write.

    Args:
      path: of the folder.
      leaves: all leaves that will be written.
      metadata: of our checkpoint, as far as it describes the model: `facts` or `model`, `model_type`.
      identity: see `checkpoints.create_checkpoint`.
      request: the layout, and the engines that must compute it.
      shard_bytes: see `safetensors.FilesWriter`.
    """

    def __init__(
        self,
        path: epath.Path,
        leaves: writing.Leaves,
        metadata: Mapping[str, Any],
        identity: Mapping[str, Any],
        request: FolderRequest = ANY_FOLDER,
        shard_bytes: int = safetensors.SHARD_BYTES,
    ):
        super().__init__(path, leaves)
        shapes = {
            name.removeprefix(_PARAMS): leaf.shape for name, leaf in self._leaves.items() if name.startswith(_PARAMS)
        }
        if request.equal_experts:
            metadata = hf.with_equal_experts(shapes, metadata)
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
        places = json.dumps([BLOCK, *((name, each.dtype.name, list(each.shape)) for name, each in tensors.items())])
        identity = {**identity, 'tensors': hashlib.sha256(places.encode()).hexdigest(), 'layout': config['model_type']}
        self._folder = self._stage(outputs.Kind.NEW_FOLDER, identity)
        self._files = safetensors.FilesWriter(self._folder, tensors, shard_bytes)
        for name, start in self._staging.done:
            entry, leaf = self._table[name], self._leaves[name]
            size = leaf.size * leaf.dtype.itemsize // len(self.parts(name))
            pieces = entry.pieces if entry.copies else [entry.pieces[start if entry.is_stack else 0]]
            for theirs, _ in pieces:
                self._files.assume_written(theirs, size)

    def size_of(self, name: str) -> int:
        """See `staging.StagedWriter`."""
        entry = self._table.get(name)
        return super().size_of(name) * (len(entry.pieces) if entry is not None and entry.copies else 1)

    def parts(self, name: str) -> Sequence[writing.Region]:
        """See `writing.Writer`."""
        entry, leaf = self._table.get(name), self._leaves[name]
        if entry is not None and entry.is_stack:
            return [(slice(row, row + 1),) for row in range(leaf.shape[0])]
        in_place = entry is not None and entry.turn is SAME and not entry.parts and not entry.copies
        return writing.parts(name, leaf) if in_place else [writing.WHOLE]

    def write(self, name: str, region: writing.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        if name == 'step':
            self._step = int(value)
            return
        engines.check_value(name, value, self._request.engines, self.path)
        entry, start = self._table[name], writing.start_of(region)
        if entry.is_stack:
            for index, row in enumerate(value, start):
                self._write(name, entry.pieces[index], entry.turn.to_theirs(row))
                self._note(name, index)
        elif region == writing.WHOLE:
            theirs = entry.turn.to_theirs(value)
            for piece in entry.pieces:  # several of copies only
                self._write(name, piece, theirs)
            self._note(name, 0)
        else:
            with writing.not_refused(self._folder, name):
                self._files.write(entry.every_name[0], value, region)
            self._note(name, start)

    def _note(self, name: str, start: int) -> None:
        if name in self._leaves:  # constants are written at the end
            self._staging.add((name, start))

    def _write(self, name: str, piece: tuple[str, Part | None], value: np.ndarray) -> None:
        theirs, part = piece
        with writing.not_refused(self._folder, name):
            self._files.write(theirs, value, writing.WHOLE if part is None else part.region)

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._folder):
            for name, value in self._constants.items():
                self.write(name, writing.WHOLE, value)
            companions.copy(metadata.get(companions.KEY), self._folder)
            self._files.finish(self._notes(metadata.get('receipt')))
            config = self._architecture.config(self._sizes, metadata) | {'torch_dtype': self._dtype.name}
            (self._folder / CONFIG).write_text(json.dumps(config, indent=1))
        reader = HuggingFaceReader(self._folder)
        self._publish(lambda written: check(_AsGiven(written, self._copied())), reader, last=self._files.last)

    def _copied(self) -> dict[str, str]:
        """Returns the leaf of experts in which each leaf is that was written as copies."""
        names = [name for name, entry in self._table.items() if entry.copies]
        return {name: '/'.join([*name.split('/')[:-2], writing.EXPERT, *name.split('/')[-2:]]) for name in names}

    def _notes(self, content: Mapping[str, Any] | None) -> dict[str, str]:
        """Writes the receipt, if there is one; returns the notes in the headers."""
        notes = {'format': 'pt', 'upcycle': upcycle.__version__, **self._architecture.notes(self._sizes)}
        if self._step is not None:
            notes['step'] = str(self._step)
        if content is not None:
            content = {**content, **({'equal_experts': copied} if (copied := sorted(self._copied())) else {})}
            notes[receipt.NOTE] = receipt.write(self._folder, content, added=[*self._constants])
        return notes

    def _close_files(self) -> None:
        self._files.close()


class _AsGiven:
    """What was written, with leaves that were written as copies under their own names.

    Args:
      reader: of the folder.
      copied: see `HuggingFaceWriter._copied`.
    """

    def __init__(self, reader: HuggingFaceReader, copied: Mapping[str, str]):
        self._reader, self._copied_in = reader, copied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, name: str, *, region: writing.Region = ()) -> np.ndarray:
        """Reads a leaf; of copies the first that differs from another, if there is one."""
        if name not in self._copied_in:
            return self._reader.read(name, region=region)
        stack = self._copied_in[name]
        first, *others = (
            self._reader.read(stack, region=(slice(e, e + 1),))[0] for e in range(self._reader.leaves()[stack].shape[0])
        )
        return next((copy for copy in others if copy.tobytes() != first.tobytes()), first)


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
