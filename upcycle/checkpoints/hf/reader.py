"""The reader of Hugging Face folders."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle.checkpoints import arrays, safetensors
from upcycle.checkpoints.hf import receipt, sources
from upcycle.checkpoints.hf.architecture import NOTES, Architecture, Config, Tensors
from upcycle.checkpoints.hf.config import read_config
from upcycle.checkpoints.hf.folder import refuse_adapter, which_file
from upcycle.errors import UserError


class HuggingFaceReader(arrays.ArrayReader):
    """A lazy view of a folder of safetensors; see `upcycle.checkpoints.Reader`.

    Args:
      path: the folder, or a file in it.

    Raises:
      UserError: the files are incomplete or damaged, or the architecture is not supported.
    """

    format = 'huggingface'

    def __init__(self, path: epath.Path):
        folder = path if path.is_dir() else path.parent
        refuse_adapter(path, [path.name])
        if not (folder / sources.CONFIG).exists():
            raise UserError(
                f"{folder} has no {sources.CONFIG}: copy the model's there; transformers' save_pretrained writes one."
            )
        config, architecture = read_config(folder / sources.CONFIG)
        file = which_file(folder, None if path == folder else path.name, config.get('transformers_weights'))
        stored, notes = safetensors.read_files(file)
        self._open(folder, config, architecture, stored, notes)

    def _open(
        self, folder: epath.Path, config: Config, architecture: Architecture, stored: Tensors, notes: Mapping[str, str]
    ) -> None:
        """Maps tensors to our leaves.

        Args:
          folder: of the model, or its file.
          config, architecture: see `config.checked_config`.
          stored: the tensors by their names on the hub.
          notes: of the headers of the files.
        """
        self._config, self._architecture = config, architecture
        stored = sources.renamed(folder, stored, self._architecture)
        self._left_out = self._architecture.left_out(stored)
        stored = {name: tensor for name, tensor in stored.items() if name not in self._left_out}
        sources.require_depth(folder, self._architecture, self._config, stored)
        ours, self._described = self._architecture.read(folder, self._config | {NOTES: notes}, stored)
        sources.require_sizes(folder, self._architecture, self._config, ours)
        self._architecture.check_inputs(folder, self._config)
        named: dict[str, arrays.Source] = {f'params/{name}': source for name, source in ours.items()}
        step = notes.get('step', '')
        if re.fullmatch('[0-9]{1,10}', step) and int(step) < 2**31:
            named['step'] = np.asarray(int(step), np.int32)
        self._notes = notes
        super().__init__(folder, named)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The family, what the configuration tells of the model, the tensors that are not read, and the receipt."""
        return {
            'family': self._architecture.family,
            'model_type': self._config['model_type'],
            **self._described,
            **({'not_read': self._left_out} if self._left_out else {}),
            **receipt.read(epath.Path(self.path), self._notes),
        }
