"""The reader of GGUF files: a Hugging Face folder without a folder."""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from etils import epath

from upcycle.checkpoints.gguf import container, models, tokenizer
from upcycle.checkpoints.hf import sources
from upcycle.checkpoints.hf.config import checked_config
from upcycle.checkpoints.hf.reader import HuggingFaceReader

SUFFIX = '.gguf'


class GgufReader(HuggingFaceReader):
    """A lazy view of a model of llama.cpp, dequantised; see `upcycle.checkpoints.Reader`.

    Args:
      path: the file; of a split model, its first.

    Raises:
      UserError: the file is damaged, the model is not supported, or the library `gguf` is not installed.
    """

    format = 'gguf'

    def __init__(self, path: epath.Path):
        content, stored = models.describe(path, *container.read_file(path))
        config, architecture = checked_config(path / sources.CONFIG, content)
        self._open(path, config, architecture, stored, {})


@functools.cache
def unpacked(path: str) -> pathlib.Path:
    """Returns a folder with the tokenizer and configuration of a file, which lasts as long as this process.

    Raises:
      UserError: see `GgufReader` and `tokenizer.rebuild`.
    """
    file = epath.Path(path)
    metadata, tensors = container.read_file(file)
    contents = tokenizer.rebuild(file, metadata)
    config, _ = models.describe(file, metadata, tensors)
    folder = pathlib.Path(tempfile.mkdtemp(prefix='upcycle_gguf_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, text in {**contents, sources.CONFIG: json.dumps(config, indent=1)}.items():
        (folder / name).write_text(text, encoding='utf-8')
    return folder
