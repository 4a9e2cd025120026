"""Reads documents from text files, JSON lines and Parquet files.

`read_chunks` only cuts files into records; `parse` decodes them, which other processes can do.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from upcycle import folders
from upcycle.data.bad_records import BadRecordError
from upcycle.errors import UserError, one_line
from upcycle.extras import require

_JSON = ('.jsonl', '.ndjson', '.json')
_PACKED = ('.gz', '.zst')
_BLOCK = 1 << 20
_ADVICE = 'correct it, leave the file out, or raise --max_bad_records'


class Record(NamedTuple):
    """A document as it lies in its file: its place for messages, and bytes, or a value of a Parquet column.

    Attributes:
      place: the file and the line or row, counted from 1, at which the record begins.
      content: of the record.
    """

    place: tuple[str, str, int]
    content: Any

    def __str__(self) -> str:
        file, unit, number = self.place
        return f'{file}, {unit} {number}'


class Chunk(NamedTuple):
    """Consecutive records of one file.

    Attributes:
      validation: whether the file is one of the validation files.
      is_json: whether the records are JSON objects.
      records: of the chunk.
      bytes_read: of the file on disk so far.
    """

    validation: bool
    is_json: bool
    records: list[Record]
    bytes_read: int


@dataclasses.dataclass(frozen=True)
class Fields:
    """How records become documents.

    Attributes:
      text_field: key of the text in a JSON object, or column of a Parquet file.
      chat: read conversations, from the key 'messages', instead of text.
      separator: what separates the documents of a text file. None: each file is a document.
    """

    text_field: str = 'text'
    chat: bool = False
    separator: str | None = None


def find_files(patterns: Sequence[str], option: str) -> list[str]:
    """Returns the files that globs and folders name, sorted, without duplicates; hidden files of folders are left out.

    Raises:
      UserError: a pattern names nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            _refuse_other_folders(expanded, option)
            files = [str(p) for p in pathlib.Path(expanded).rglob('[!.]*')]
        else:
            files = glob.glob(expanded, recursive=True) or [expanded]
        files = [file for file in files if os.path.isfile(file)]
        if not files:
            raise UserError(f'{option}={pattern} names no file: name a file, a folder or a glob.')
        found.update(map(os.path.abspath, files))
    return sorted(found)


def _refuse_other_folders(folder: str, option: str) -> None:
    """Raises UserError for a folder of token shards, or of a model."""
    if folders.holds_tokens(folder):
        raise UserError(f'{option}={folder} holds token shards already: name files or a folder of text.')
    if (part := folders.part_of_a_model(folder)) is not None:
        raise UserError(
            f'{option}={folder} is the folder of a model or a run (it has {part}): name files or a folder of text, and the model '
            'by --tokenizer.'
        )


def read_chunks(file: str, fields: Fields, size: int, *, validation: bool) -> Iterator[Chunk]:
    """Cuts a file into chunks of about `size` bytes, which only depend on the file.

    Raises:
      UserError: the file cannot be read, is cut off, or is of another kind.
    """
    kind = _kind(file)
    with _naming(file), open(file, 'rb') as raw:
        records, filled = [], 0
        for record in _records(file, kind, raw, fields):
            records.append(record)
            filled += len(record.content) if isinstance(record.content, bytes | str) else _BLOCK // 1024
            if filled >= size:
                yield Chunk(validation, kind == '.jsonl', records, raw.tell())
                records, filled = [], 0
        if records:
            yield Chunk(validation, kind == '.jsonl', records, os.path.getsize(file))


def parse(record: Record, fields: Fields, *, is_json: bool) -> Any:
    """Returns the text of a record, or with `fields.chat` its object.

    Raises:
      BadRecordError: it has none.
    """
    content = record.content
    if is_json:
        try:
            content = json.loads(content)
        except ValueError as error:  # of which UnicodeDecodeError is one
            raise BadRecordError(f'{record} is not JSON ({one_line(error)}): {_ADVICE}.') from None
        if not isinstance(content, dict):
            raise BadRecordError(f'{record} is not a JSON object: {_ADVICE}.')
    elif isinstance(content, bytes):
        return content.decode()
    if fields.chat:
        return content
    option = '--text_field'
    if is_json:
        option = '--chat' if 'messages' in content else option
        content = content.get(fields.text_field)
    if not isinstance(content, str):
        raise BadRecordError(f'{record} has no text {fields.text_field!r}: {_ADVICE}, or set {option}.')
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f'{record} has half of a surrogate pair, which is not a character: {_ADVICE}.') from None
    return content


def utf8(record: Record, leave_out: Callable[[BadRecordError], None]) -> Record:
    """Removes lines that are not UTF-8 from a record of a text file, each of which is a bad record."""
    try:
        record.content.decode()
        return record
    except UnicodeDecodeError:
        pass
    file, unit, first = record.place
    lines = []
    for number, line in enumerate(record.content.split(b'\n'), first):
        try:
            line.decode()
            lines.append(line)
        except UnicodeDecodeError:
            leave_out(BadRecordError(f'{file}, {unit} {number} is not UTF-8: {_ADVICE}.'))
    return Record(record.place, b'\n'.join(lines))


def _kind(file: str) -> str:
    """'.jsonl', '.parquet' or '' for text."""
    stem, suffix = os.path.splitext(file.lower())
    if suffix in _PACKED:
        suffix = os.path.splitext(stem)[1]
    return '.jsonl' if suffix in _JSON else suffix if suffix == '.parquet' else ''


class _naming:  # noqa: N801  a context manager
    """Turns errors of reading a file into one that names it."""

    def __init__(self, file: str):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        # OSError and EOFError come from files; zlib and Arrow have their own types.
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(
                f'{self._file} cannot be read ({one_line(error)}): copy it again, or leave it out.'
            ) from error


def _records(file: str, kind: str, raw: BinaryIO, fields: Fields) -> Iterator[Record]:
    if kind == '.parquet':
        yield from _parquet(file, raw, fields)
        return
    stream = _unpacked(file, raw)
    if kind == '.jsonl':
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Record((file, 'line', number), line)
        return
    if fields.chat:
        raise UserError(f'{file} is not a file of conversations: --chat reads JSON lines and Parquet.')
    if fields.separator is None:
        yield Record((file, 'line', 1), stream.read())
        return
    yield from _separated(file, stream, fields.separator.encode())


def _separated(file: str, stream: BinaryIO, separator: bytes) -> Iterator[Record]:
    """The documents between separators, read in blocks."""
    line, rest = 1, b''
    while block := stream.read(_BLOCK):
        *documents, rest = (rest + block).split(separator)
        for document in documents:
            yield Record((file, 'line', line), document)
            line += document.count(b'\n') + separator.count(b'\n')
    yield Record((file, 'line', line), rest)


def _unpacked(file: str, raw: BinaryIO) -> BinaryIO:
    if file.lower().endswith('.gz'):
        return gzip.open(raw)
    if file.lower().endswith('.zst'):
        arrow = require('pyarrow', file, 'data')
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw, mode='r'), 'zstd'), _BLOCK)
    return raw


def _parquet(file: str, raw: BinaryIO, fields: Fields) -> Iterator[Record]:
    parquet = require('pyarrow.parquet', file, 'data').ParquetFile(raw)
    names = parquet.schema_arrow.names
    columns = ['messages', *(['tools'] if 'tools' in names else [])] if fields.chat else [fields.text_field]
    if missing := [name for name in columns if name not in names]:
        raise UserError(
            f'{file} has no column {missing[0]!r} (it has {", ".join(names[:10])}): set --text_field, or name other files.'
        )
    number = 0
    for batch in parquet.iter_batches(1024, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield Record((file, 'row', number), row if fields.chat else row[fields.text_field])
