"""`upcycle tokenize`: writes the token shards that language models train on."""

import json
import os
from collections.abc import Sequence
from typing import Any

from upcycle import warning
from upcycle.data.causal import writing
from upcycle.data.causal.documents import Fields
from upcycle.data.causal.workers import Job
from upcycle.errors import UserError

_NOTHING_HELD_OUT = (
    'no document is held out for validation: name files to hold out with --validation_from, or cut a file of text into '
    'documents with --separator.'
)


def run(
    source: Sequence[str],
    tokenizer: str,
    target: str,
    *,
    text_field: str = 'text',
    separator: str | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    validation: float = 0.01,
    validation_from: Sequence[str] = (),
    workers: int | None = None,
    max_bad_records: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """`upcycle tokenize`: tokenises files into a folder of shards, and prints how many documents and tokens it has.

    Args:
      source: files, folders or globs: text, JSON lines (also .gz and .zst), Parquet.
      tokenizer: a folder or file, or 'bytes'; see `tokenizers.open_tokenizer`.
      target: the new folder.
      text_field: of JSON objects, or the column of Parquet files.
      separator: between the documents of a text file, in which `\\n` is a line end. None: a document per file.
      chat: read conversations, from the field 'messages', and mark the assistant's tokens as those to learn.
      chat_template: a file; None: the tokenizer folder's template.
      validation: share of the documents to hold out, by the hashes of their contents.
      validation_from: files to hold out instead.
      workers: number of processes; None: one per core.
      max_bad_records: number of records that may be left out.
      as_json: print JSON.

    Returns:
      The printed figures.

    Raises:
      UserError: an option or a file cannot be used.
    """
    if not 0 <= validation < 1:
        raise UserError(f'--validation={validation:g} must lie in [0, 1).')
    if workers is not None and workers < 1:
        raise UserError(f'--workers={workers} must be at least 1.')
    if max_bad_records < 0:
        raise UserError(f'--max_bad_records={max_bad_records} must be at least 0.')
    if separator == '':
        raise UserError("--separator is empty: name what separates documents, such as '\\n\\n', or leave it out.")
    if chat_template is not None and not chat:
        raise UserError('--chat_template is for conversations: add --chat.')
    inputs = writing.Inputs.find(source, validation_from)
    lines = None if separator is None else separator.replace('\\n', '\n')
    job = Job(tokenizer, Fields(text_field, chat, lines), 0.0 if validation_from else validation, chat_template)
    workers = _cores() if workers is None else workers
    index = writing.write(inputs, job, target, workers=workers, max_bad_records=max_bad_records)
    if not index['splits']['validation']['documents'] and (validation or validation_from):
        warning.once(_NOTHING_HELD_OUT)
    figures = {name: _figures(split) for name, split in index['splits'].items()}
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        for name, split in figures.items():
            ratio = split['bytes_per_token']
            more = '' if ratio is None else f', {ratio:.2f} bytes per token'
            print(f'{name:<12}{split["documents"]:,} documents, {split["tokens"]:,} tokens{more}')
        print(f'wrote {target}')
    return figures


def _figures(split: dict[str, Any]) -> dict[str, Any]:
    tokens = split['tokens']
    return {
        'documents': split['documents'],
        'tokens': tokens,
        'bytes_per_token': split['bytes'] / tokens if tokens else None,
    }


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
