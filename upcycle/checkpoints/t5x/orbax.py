"""T5X's current layout: an Orbax item `state`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle.checkpoints import arrays, folder_writer, orbax_item
from upcycle.checkpoints.t5x.layout import T5XLayout
from upcycle.checkpoints.t5x.reader import T5XReader
from upcycle.checkpoints.t5x.tree import METADATA


class OrbaxReader(T5XReader):
    """A step that T5X saved through Orbax (its `use_orbax=True`); see `upcycle.checkpoints.Reader`."""

    format = 't5x_orbax'

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source] | None = None):
        super().__init__(path, orbax_item.orbax_arrays(path / 'state') if sources is None else sources)


class OrbaxLayout(T5XLayout):
    """The format that T5X writes by default today."""

    format = 't5x_orbax'
    state = 'state'
    reader = OrbaxReader

    def commit(self, writer: folder_writer.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """Writes placeholders, the index and the metadata."""
        placeholders = self.placeholders(writer)
        for future in [writer.put(keys, value) for keys, value in placeholders.items()]:
            future.result()
        shapes = {keys: writer.leaves[name].shape for name, keys in writer.keys.items()}
        shapes |= {keys: value.shape for keys, value in placeholders.items()}
        (writer.folder / self.state / orbax_item.ORBAX_INDEX).write_text(orbax_item.orbax_index(shapes, zarr3=False))
        (writer.folder / METADATA).write_text(json.dumps(dict(metadata)))
        orbax_item.mark_finished(writer.folder, (self.state,))
