"""The standard library's source code as bytes, for tests and the quickstart: no download, no shards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.data.causal.shards import SPLITS, Arrays, Corpus
from upcycle.data.causal.tokenizers import BYTES, ByteTokenizer, Identity, Tokenizer
from upcycle.data.stdlib_source import stdlib_documents


@dataclasses.dataclass(frozen=True)
class StdlibBytes:
    """The source code of the running Python's standard library, a document per file; about 5% of the files are held out.

    Each Python version is a different corpus.
    """

    weights = (1.0,)
    names = ('the standard library',)
    tokenizer_path = BYTES

    def identity(self) -> Identity:
        """The identity of the byte tokenizer."""
        return ByteTokenizer.identity

    def tokenizer(self) -> Tokenizer:
        """The byte tokenizer."""
        return ByteTokenizer()

    def corpora(self, split: str) -> Sequence[Corpus]:
        """The corpus of a split, read at first use."""
        return (_read()[split],)


@functools.cache
def _read() -> Mapping[str, Corpus]:
    corpora = {}
    documents = sorted(stdlib_documents())
    for split in SPLITS:
        contents = [document.content for document in documents if document.split == split and document.content]
        joined = b''.join(contents)
        ends = np.cumsum([len(content) for content in contents], dtype=np.int64)
        digest = hashlib.sha256(joined)
        digest.update(ends.astype('<i8').tobytes())
        tokens = np.frombuffer(joined, np.uint8)
        corpora[split] = Corpus([Arrays(tokens, ends)], len(joined), digest.hexdigest())
    return corpora
