"""Token shards: flat files of tokens with the ends of the documents, memory-mapped, behind one index.

A folder holds `index.json` and, per shard of a split,
  train-00000.tokens  little-endian uint16 or uint32, one document after the other, without BOS and EOS
  train-00000.ends    int64: the number of tokens up to the end of each document
  train-00000.loss    uint8, of conversations only: 1 for tokens that the assistant writes
Rows of training begin anywhere in a document, so the reader needs tokens by position, and documents only by their ends. A
format of records, such as array_record, would read and decode whole documents to find a row.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from upcycle import files, folders
from upcycle.data.causal.tokenizers import Identity
from upcycle.errors import UserError, one_line

INDEX = 'index.json'
TOKENIZER = 'tokenizer'  # the folder with the tokenizer's files
SPLITS = ('train', 'validation')
_VERSION = 1
SHARD_TOKENS = 2**31


class Arrays(NamedTuple):
    """The documents of a shard.

    Attributes:
      tokens: [n].
      ends: int64 [documents]: number of tokens up to the end of each document.
      loss: uint8 [n], 1 for tokens to learn; None: all.
    """

    tokens: np.ndarray
    ends: np.ndarray
    loss: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a split, in the order of training without shuffling.

    Attributes:
      shards: their arrays.
      num_bytes: of the documents' text, in UTF-8.
      sha256: of the content, for fingerprints.
      chat: whether documents are conversations, which a template has ended.
    """

    shards: Sequence[Arrays]
    num_bytes: int
    sha256: str
    chat: bool = False

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return sum(len(shard.ends) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without BOS and EOS."""
        return sum(len(shard.tokens) for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Folder:
    """An open folder of token shards.

    Attributes:
      tokenizer: the identity of the tokenizer.
      corpora: by split.
      path: of the folder.
    """

    tokenizer: Identity
    corpora: Mapping[str, Corpus]
    path: pathlib.Path


def open_folder(path: str) -> Folder:
    """Opens a folder that `upcycle tokenize` has written. Nothing is read but the index.

    Raises:
      UserError: it is not such a folder, or a file in it is damaged.
    """
    if files.is_remote(path):
        raise UserError(
            f'TOKENS_DIR = {path} is in a bucket, which cannot be memory-mapped: copy it to a disk, or mount it.'
        )
    folder = pathlib.Path(path).expanduser()
    if not (folder / INDEX).is_file():
        part = folders.part_of_a_model(folder)
        found = f'has no {INDEX}' if part is None else f'is the folder of a model or a run (it has {part})'
        raise UserError(f'TOKENS_DIR = {path} {found}: name a folder that `upcycle tokenize` has written.')
    try:
        index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
        if (index['format'], index['version']) != (folders.TOKENS, _VERSION):
            raise UserError(
                f'TOKENS_DIR = {path} is of version {index["version"]} of its format, and this version of upcycle reads '
                f'{_VERSION}: tokenise again.'
            )
        tokenizer = Identity(**index['tokenizer'])
        corpora = {split: _corpus(folder, tokenizer, index['chat'], index['splits'][split]) for split in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.damaged(folder / INDEX, one_line(error)) from error
    return Folder(tokenizer, corpora, folder)


def _corpus(folder: pathlib.Path, tokenizer: Identity, chat: bool, split: Mapping[str, Any]) -> Corpus:
    kinds = [('tokens', tokenizer.dtype), ('ends', np.dtype('<i8'))] + [('loss', np.dtype('u1'))] * chat
    shards = []
    for shard in split['shards']:
        arrays = []
        for suffix, dtype in kinds:
            file = folder / f'{shard["name"]}.{suffix}'
            count = shard['documents' if suffix == 'ends' else 'tokens']
            size = file.stat().st_size if file.is_file() else -1
            if size != count * dtype.itemsize:
                found = 'it is missing' if size < 0 else f'it has {size:,} bytes instead of {count * dtype.itemsize:,}'
                raise files.damaged(file, found)
            arrays.append(np.memmap(file, dtype, 'r', shape=(count,)))
        shards.append(Arrays(*arrays))
    digest = hashlib.sha256(''.join(shard['sha256'] for shard in split['shards']).encode())
    return Corpus(shards, split['bytes'], digest.hexdigest(), chat)


class Written(NamedTuple):
    """Documents of one split, ready to append.

    Attributes:
      tokens: the bytes of their tokens.
      lengths: tokens of each.
      loss: the bytes of the loss mask; b'' without one.
      num_bytes: of their text.
    """

    tokens: bytes
    lengths: np.ndarray
    loss: bytes
    num_bytes: int


class SplitWriter:
    """Appends documents to the shards of a split. `state` describes what is on disk after `sync`.

    Args:
      folder: of the shards.
      split: its name.
      dtype: of the tokens.
      chat: whether there is a loss mask.
      state: of an interrupted writer, to which the files are cut back; None: a new one.
    """

    def __init__(self, folder: pathlib.Path, split: str, dtype: np.dtype, chat: bool, state: Any = None):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._sizes = {'tokens': dtype.itemsize, 'ends': 8} | ({'loss': 1} if chat else {})
        self._files: dict[str, BinaryIO] = {}
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in state or ()]
        known = {self._path(shard, suffix) for shard in self.shards for suffix in self._sizes}
        for file in folder.glob(f'{split}-*'):
            if file not in known:
                file.unlink()
        if self.shards:
            self._open(self.shards[-1])

    def append(self, documents: Written) -> None:
        """Appends documents, to a new shard if the last one is full."""
        if not len(documents.lengths):
            return
        if not self.shards or self.shards[-1]['tokens'] >= SHARD_TOKENS:
            self._close()
            name = f'{self._split}-{len(self.shards):05d}'
            self.shards.append({'name': name, 'documents': 0, 'tokens': 0, 'bytes': 0})
            self._open(self.shards[-1])
        shard = self.shards[-1]
        ends = shard['tokens'] + np.cumsum(documents.lengths, dtype='<i8')
        parts = {'tokens': documents.tokens, 'ends': ends.tobytes(), 'loss': documents.loss}
        for suffix, file in self._files.items():
            file.write(parts[suffix])
        shard['documents'] += len(ends)
        shard['tokens'] = int(ends[-1])
        shard['bytes'] += documents.num_bytes

    def pop(self, num_bytes: Callable[[np.ndarray], int]) -> Written | None:
        """Removes the last document and returns it, if its shard has another one. The files keep it until `close`.

        Args:
          num_bytes: returns the bytes of text of tokens.
        """
        shard = self.shards[-1]
        if shard['documents'] < 2:
            return None
        self.sync()
        first, last = map(int, np.fromfile(self._path(shard, 'ends'), '<i8', 2, offset=8 * (shard['documents'] - 2)))
        content = {'loss': b''}
        for suffix in self._files.keys() - {'ends'}:
            size = self._sizes[suffix]
            with self._path(shard, suffix).open('rb') as file:
                file.seek(first * size)
                content[suffix] = file.read((last - first) * size)
        size = num_bytes(np.frombuffer(content['tokens'], self._dtype))
        shard |= {'documents': shard['documents'] - 1, 'tokens': first, 'bytes': shard['bytes'] - size}
        return Written(content['tokens'], np.array([last - first]), content['loss'], size)

    def sync(self) -> None:
        """Waits until everything is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Cuts the last shard to its documents, and closes the files."""
        if self.shards:
            self._close()
            self._open(self.shards[-1])
            self._close()

    def _path(self, shard: Mapping[str, Any], suffix: str) -> pathlib.Path:
        return self._folder / f'{shard["name"]}.{suffix}'

    def _open(self, shard: Mapping[str, Any]) -> None:
        for suffix, size in self._sizes.items():
            file = self._path(shard, suffix).open('ab')
            file.truncate(shard['documents' if suffix == 'ends' else 'tokens'] * size)
            self._files[suffix] = file

    def _close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()
        self._files = {}


def write_index(
    folder: pathlib.Path, tokenizer: Identity, chat: bool, splits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Hashes the shards and writes the index, which makes the folder readable; returns its content."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL

        def hashed(shard: Mapping[str, Any]) -> dict[str, Any]:
            return {**shard, 'sha256': _sha256(folder, shard['name'], chat)}

        described = {split: list(pool.map(hashed, shards)) for split, shards in splits.items()}
    index = {
        'format': folders.TOKENS,
        'version': _VERSION,
        'chat': chat,
        'tokenizer': dataclasses.asdict(tokenizer),
        'splits': {
            split: {key: sum(s[key] for s in shards) for key in ('documents', 'tokens', 'bytes')} | {'shards': shards}
            for split, shards in described.items()
        },
    }
    files.replace_text(folder / INDEX, json.dumps(index, indent=1) + '\n')
    return index


def _sha256(folder: pathlib.Path, name: str, chat: bool) -> str:
    digest = hashlib.sha256()
    for suffix in ('tokens', 'ends', *(['loss'] if chat else [])):
        with (folder / f'{name}.{suffix}').open('rb') as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
