"""A random-access span corruption task on the user's text files."""

from __future__ import annotations

import dataclasses
import functools
import glob
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from upcycle.data import corpus, tensorflow_quiet
from upcycle.data.bad_records import BadRecords
from upcycle.data.sentinels import Sentinels, vocabulary_with
from upcycle.errors import UserError
from upcycle.schema import Count, Whole

if TYPE_CHECKING:
    import seqio


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """UTF-8 text files, one document per file, as the task `text_files_span_corruption`.

    Attributes:
      train_files: one or more globs of training files (`**` for any depth; `gs://` and other buckets without `**`).
      validation_files: globs of validation files. None: hold out about 5% of the training files, chosen by the hashes of their
        names.
      vocabulary: path of a SentencePiece model with T5's special ids (pad 0, EOS 1). None: bytes.
      extra_ids: number of sentinels to add on top of a vocabulary that has none.
      sentinels: ids that replace spans in span corruption. `t5`: `extra_ids` ids on top of the vocabulary, from the last one
        down; `umt5`: 300 of them. `mt5`: the pieces `<extra_id_0>`, `<extra_id_1>`, ... of the model file, as in mT5.
        `byt5`: 258, 257, ... for bytes without a model file. A list: these ids in this order. A number: this id and the 99
        below it. None: `mt5` if the model file has such pieces, else `t5` [SENTINELS].
      max_bad_records: number of lines that are not UTF-8 and may be skipped [MAX_BAD_RECORDS].
    """

    train_files: str | Sequence[str] | None
    validation_files: str | Sequence[str] | None = None
    vocabulary: str | None = None
    extra_ids: Whole = 100
    sentinels: Literal['t5', 'umt5', 'mt5', 'byt5'] | Count | Sequence[Count] | None = None
    max_bad_records: Whole = 0

    def task(self) -> seqio.Task:
        """Makes the seqio task. Files are read and tokenised in memory at the first example.

        The task is not registered. Register it with `seqio.TaskRegistry.add_provider(task.name, task)` if seqio must find it
        by name.

        Raises:
          UserError: a glob matches nothing, a file is in both splits, or the vocabulary cannot be used.
        """
        files = _patterns(self.train_files), _patterns(self.validation_files)
        sentinels = tuple(self.sentinels) if isinstance(self.sentinels, list) else self.sentinels
        return _task(*files, self.vocabulary, sentinels, self.extra_ids, self.max_bad_records)


def _patterns(globs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return globs if globs is None else (globs,) if isinstance(globs, str) else tuple(globs)


@functools.cache
def _task(
    train: tuple[str, ...] | None,
    validation: tuple[str, ...] | None,
    model: str | None,
    sentinels: Sentinels,
    extra_ids: int,
    max_bad_records: int,
) -> seqio.Task:
    """Makes one task, with one copy of its tokens, for equal `TextFiles`."""
    from upcycle.data import random_access

    vocabulary, ids = vocabulary_with(model, sentinels, extra_ids)
    train_paths = _find_files(train, 'TRAIN_FILES')
    validation_paths = [] if validation is None else _find_files(validation, 'VALIDATION_FILES')
    for path in sorted(set(train_paths) & set(validation_paths)):
        raise UserError(f'{path} is matched by TRAIN_FILES and by VALIDATION_FILES: remove it from one of them.')

    def read() -> corpus.Corpus:
        documents = _documents(train_paths, validation_paths, BadRecords(max_bad_records))
        return corpus.build_corpus(documents, vocabulary)

    return random_access.span_corruption_task('text_files_span_corruption', read, vocabulary, ids)


def _find_files(patterns: Sequence[str] | None, binding: str) -> list[str]:
    """The files that match the globs, sorted, without duplicates."""
    gfile = tensorflow_quiet.tensorflow().io.gfile
    if not patterns:
        raise UserError(f'{binding} is not set: set it to a glob of text files.')
    paths: set[str] = set()
    for pattern in patterns:
        matches = gfile.glob(pattern) if '://' in pattern else glob.glob(pattern, recursive=True)
        files = [path for path in matches if not gfile.isdir(path)]
        if not files:
            raise UserError(f'{binding} = {pattern!r} matches no file: set it to a glob that does.')
        paths.update(files)
    return sorted(paths)


def _documents(train: Sequence[str], validation: Sequence[str], bad_records: BadRecords) -> list[corpus.Document]:
    """Reads all files, named relative to their common folder, so that a moved folder is the same corpus."""
    gfile = tensorflow_quiet.tensorflow().io.gfile
    paths = [*train, *validation]
    names = dict(zip(paths, corpus.relative_names(paths), strict=True))
    splits = corpus.split_by_hash(names[path] for path in train)
    if validation:
        splits = {names[path]: 'validation' if path in set(validation) else 'train' for path in paths}

    def read(path: str) -> bytes:
        with gfile.GFile(path, 'rb') as file:
            return file.read()

    return [
        corpus.Document(name, splits[name], corpus.read_utf8(path, read, bad_records)) for path, name in names.items()
    ]
