"""The user's own text files as a random-access span corruption task."""

from __future__ import annotations

import dataclasses
import functools
import glob
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upcycle.data import corpus, tensorflow_quiet
from upcycle.data.bad_records import BadRecords, checked_bound
from upcycle.errors import UserError
from upcycle.schema import Whole

if TYPE_CHECKING:
    import seqio


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """UTF-8 text files, one document a file, as the task `text_files_span_corruption`.

    train_files: a glob or several (`**` for any depth; `gs://` and the like too, without `**`).
    validation_files: the same for validation; where None, about 5% of the train files, chosen by the hashes of their names.
    vocabulary: path of a SentencePiece model (pad 0, EOS 1, as T5's); where None, bytes.
    extra_ids: sentinels that are added at the top of the vocabulary.
    max_bad_records: so many lines that are not UTF-8 are left out [MAX_BAD_RECORDS].
    """

    train_files: str | Sequence[str] | None
    validation_files: str | Sequence[str] | None = None
    vocabulary: str | None = None
    extra_ids: Whole = 100
    max_bad_records: Whole = 0

    def __post_init__(self):
        checked_bound(self.max_bad_records)

    def task(self) -> seqio.Task:
        """The seqio task; the files are read and tokenised, in memory, when its first example is asked for.

        It is not in seqio's registry. Where seqio must find it by name, add it there:
        `seqio.TaskRegistry.add_provider(task.name, task)`.

        Raises:
            UserError: if a glob matches nothing, a file is in both splits, or the vocabulary cannot be used.
        """
        files = _patterns(self.train_files), _patterns(self.validation_files)
        return _task(*files, self.vocabulary, self.extra_ids, self.max_bad_records)


def _patterns(globs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return globs if globs is None else (globs,) if isinstance(globs, str) else tuple(globs)


@functools.cache
def _task(
    train: tuple[str, ...] | None,
    validation: tuple[str, ...] | None,
    model: str | None,
    extra_ids: int,
    max_bad_records: int,
) -> seqio.Task:
    """One task, and one copy of its tokens, for equal `TextFiles`."""
    from upcycle.data import random_access

    vocabulary = _make_vocabulary(model, extra_ids)
    train_paths = _find_files(train, 'TRAIN_FILES')
    validation_paths = [] if validation is None else _find_files(validation, 'VALIDATION_FILES')
    for path in sorted(set(train_paths) & set(validation_paths)):
        raise UserError(f'{path} is matched by TRAIN_FILES and by VALIDATION_FILES: take it out of one of them.')

    def read() -> corpus.Corpus:
        documents = _documents(train_paths, validation_paths, BadRecords(max_bad_records))
        return corpus.build_corpus(documents, vocabulary)

    return random_access.span_corruption_task('text_files_span_corruption', read, vocabulary)


def _make_vocabulary(model: str | None, extra_ids: int) -> Any:
    """Bytes, or the SentencePiece model at `model`, which must have T5's special ids."""
    seqio = tensorflow_quiet.seqio()
    if model is None:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    vocabulary = seqio.SentencePieceVocabulary(model, extra_ids=extra_ids)
    try:
        pad, eos = vocabulary.tokenizer.pad_id(), vocabulary.tokenizer.eos_id()
    except Exception as error:  # TensorFlow's for a missing file, protobuf's for another format
        raise UserError(
            f'SENTENCEPIECE_MODEL = {model!r} cannot be loaded ({type(error).__name__}): bind it to a SentencePiece '
            'model file.'
        ) from None
    if (pad, eos) != (0, 1):
        raise UserError(
            f'SENTENCEPIECE_MODEL = {model!r} has pad id {pad} and EOS id {eos} where T5 has 0 and 1: train it with '
            '--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1.'
        )
    return vocabulary


def _find_files(patterns: Sequence[str] | None, binding: str) -> list[str]:
    """The files that the globs match, sorted, each once."""
    gfile = tensorflow_quiet.tensorflow().io.gfile
    if not patterns:
        raise UserError(f'{binding} is not bound: bind it to a glob of text files.')
    found: set[str] = set()
    for pattern in patterns:
        matches = gfile.glob(pattern) if '://' in pattern else glob.glob(pattern, recursive=True)
        files = [path for path in matches if not gfile.isdir(path)]
        if not files:
            raise UserError(f'{binding} = {pattern!r} matches no file: bind it to a glob that does.')
        found.update(files)
    return sorted(found)


def _documents(train: Sequence[str], validation: Sequence[str], bad_records: BadRecords) -> list[corpus.Document]:
    """All files, named relative to the folder they share, so that a moved folder is still the same corpus."""
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
