"""Reads, splits, tokenises and hashes text files into one array of tokens, without TensorFlow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from upcycle.data.bad_records import BadRecordError, BadRecords
from upcycle.errors import UserError

VALIDATION_SHARE = 0.05


class Document(NamedTuple):
    """A file: its name relative to the corpus, its split and its content."""

    name: str
    split: str
    content: bytes


class Corpus(NamedTuple):
    """All documents of all splits, each followed by EOS, sorted by name.

    Attributes:
      tokens: uint16 (int32 for vocabularies of more than 65,536 ids), split after split.
      splits: (offset, number of tokens) of each split.
      sha256: hash of names, splits and contents.
    """

    tokens: np.ndarray
    splits: Mapping[str, tuple[int, int]]
    sha256: str


def split_by_hash(names: Iterable[str]) -> dict[str, str]:
    """Assigns each name to 'train' or 'validation' (about 5%) by its sha256, independently of the other names."""
    hashes = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in names}
    held_out = {name for name, value in hashes.items() if value < VALIDATION_SHARE * 2**256}
    if not held_out and len(hashes) > 1:
        held_out = {min(hashes, key=hashes.__getitem__)}
    return {name: 'validation' if name in held_out and len(hashes) > 1 else 'train' for name in hashes}


def relative_names(paths: Sequence[str]) -> list[str]:
    """The paths relative to the folder that they share."""
    folders = [path.split('/')[:-1] for path in paths]
    shared = len(os.path.commonprefix(folders))
    return ['/'.join(path.split('/')[shared:]) for path in paths]


def read_utf8(path: str, read: Callable[[str], bytes], bad_records: BadRecords) -> bytes:
    """Reads a text file and skips lines that are not UTF-8.

    Args:
      path: path of the file.
      read: returns the bytes of `path`.
      bad_records: counts the skipped lines.

    Raises:
      UserError: the file cannot be read, or has too many bad lines.
    """
    try:
        content = read(path)
    except Exception as error:  # local files raise OSError, remote ones TensorFlow's own errors
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}): repair it, or exclude it from the glob.'
        ) from None
    if _is_utf8(content):
        return content
    lines = []
    for number, line in enumerate(content.split(b'\n'), 1):
        if _is_utf8(line):
            lines.append(line)
        else:
            bad_records.leave_out(
                BadRecordError(
                    f'{path}, line {number} is not UTF-8: convert the file, exclude it from the glob, or raise MAX_BAD_RECORDS.'
                )
            )
    return b'\n'.join(lines)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _tokenise(content: bytes, vocabulary: Any) -> np.ndarray:
    """Token ids of one document, without EOS."""
    if type(vocabulary).__name__ == 'ByteVocabulary':
        specials = vocabulary.vocab_size - vocabulary.extra_ids - 256
        return np.frombuffer(content, np.uint8).astype(np.uint16) + np.uint16(specials)
    # Line by line: SentencePiece is slow and memory-hungry on one very long string, and drops line ends either way.
    lines = vocabulary.tokenizer.encode(content.decode().splitlines())
    return np.concatenate([np.asarray(line, np.int32) for line in lines] or [np.zeros(0, np.int32)])


def build_corpus(documents: Iterable[Document], vocabulary: Any) -> Corpus:
    """Tokenises documents into memory, at 2 bytes per token (2 bytes per byte of text for the byte vocabulary)."""
    dtype = np.uint16 if vocabulary.vocab_size <= 2**16 else np.int32
    digest = hashlib.sha256()
    parts: dict[str, list[np.ndarray]] = {'train': [], 'validation': []}
    for name, split, content in sorted(documents):
        digest.update(f'{split}\0{name}\0{hashlib.sha256(content).hexdigest()}\n'.encode())
        parts[split] += [_tokenise(content, vocabulary).astype(dtype), np.array([vocabulary.eos_id], dtype)]
    sizes = {split: sum(part.size for part in parts[split]) for split in parts}
    tokens = np.concatenate([part for split in parts for part in parts[split]] or [np.zeros(0, dtype)])
    return Corpus(
        tokens,
        {'train': (0, sizes['train']), 'validation': (sizes['train'], sizes['validation'])},
        digest.hexdigest(),
    )
