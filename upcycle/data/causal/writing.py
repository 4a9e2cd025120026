"""`upcycle tokenize`: writes token shards in parallel. A killed write continues where it was."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import files, outputs
from upcycle.checkpoints.staging import Claim, give_name, make_folders
from upcycle.data.bad_records import BadRecordError, BadRecords
from upcycle.data.causal import documents, shards
from upcycle.data.causal.documents import Chunk
from upcycle.data.causal.shards import SPLITS, SplitWriter
from upcycle.data.causal.workers import Job, Tokenise, Tokenised, tokenising
from upcycle.errors import UserError, writing_to
from upcycle.progress import Progress

CHUNK_BYTES = 4 << 20  # of text that a process gets at a time
_STATE = 'state.json'
_SECONDS_BETWEEN_SYNCS = 10.0
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files to read.

    Attributes:
      train: files whose documents go to both splits, by the job's share.
      validation: files whose documents all go to the split 'validation'.
    """

    train: Sequence[str]
    validation: Sequence[str] = ()

    @classmethod
    def find(cls, train: Sequence[str], validation: Sequence[str]) -> Inputs:
        """Finds the files.

        Raises:
          UserError: a pattern names nothing, or a file is in both lists.
        """
        inputs = cls(documents.find_files(train, '--from'), documents.find_files(validation, '--validation_from'))
        for file in sorted({*inputs.train} & {*inputs.validation}):
            raise UserError(f'{file} is named by --from and by --validation_from: remove it from one of them.')
        return inputs

    def identity(self) -> list[tuple[str, int]]:
        """Names and sizes of all files."""
        return [(file, os.path.getsize(file)) for file in (*self.train, *self.validation)]

    def chunks(self, fields: documents.Fields) -> Iterator[tuple[int, Chunk]]:
        """Yields all chunks, each with the bytes of the files before its own."""
        before = 0
        for file in (*self.train, *self.validation):
            validation = file in self.validation
            for chunk in documents.read_chunks(file, fields, CHUNK_BYTES, validation=validation):
                yield before, chunk
            before += os.path.getsize(file)


def write(inputs: Inputs, job: Job, target: str, *, workers: int = 1, max_bad_records: int = 0) -> dict[str, Any]:
    """Tokenises files into a folder of shards; the same files give the same bytes for any number of processes.

    Args:
      inputs: the files.
      job: tokenizer and kind of documents.
      target: the folder, which must not exist.
      workers: number of processes.
      max_bad_records: number of records that may be left out.

    Returns:
      The content of the index.

    Raises:
      UserError: an input, the tokenizer or the target cannot be used; there are no documents.
    """
    final = outputs.check('--to', target, outputs.Kind.NEW_FOLDER, local=True)
    tokenise = job.open()  # before anything is written
    made = make_folders(final.parent)
    place = final.parent / f'{final.name}{outputs.STAGING[1]}'
    with writing_to(final.parent, 'name another --to'):
        claim = Claim(place, final, outputs.Kind.NEW_FOLDER)
        try:
            folder = _Folder(pathlib.Path(place), _identity(inputs, tokenise), tokenise)
            try:
                _fill(folder, inputs, tokenise, workers, BadRecords(max_bad_records, '--max_bad_records'))
                index = folder.finish(hold_out=job.validation > 0 and not inputs.validation)
            except UserError:
                if not folder.num_tokens:  # nothing to continue
                    place.rmtree()
                    for parent in made:
                        parent.rmdir()
                raise
            give_name(place, final, outputs.Kind.NEW_FOLDER)
        finally:
            claim.release()
    return index


def _identity(inputs: Inputs, tokenise: Tokenise) -> str:
    settings = dataclasses.asdict(tokenise.job) | {
        'tokenizer': dataclasses.asdict(tokenise.tokenizer.identity),
        'chat_template': tokenise.template_source,
    }
    return json.dumps([settings, inputs.identity(), CHUNK_BYTES], sort_keys=True)


def _fill(folder: _Folder, inputs: Inputs, tokenise: Tokenise, workers: int, bad: BadRecords) -> None:
    """Tokenises the chunks that the folder lacks."""
    total = sum(size for _, size in inputs.identity())
    for text in folder.bad:
        bad.leave_out(BadRecordError(text))
    before: list[int] = []

    def missing() -> Iterator[Chunk]:
        for number, (earlier, chunk) in enumerate(inputs.chunks(tokenise.job.fields)):
            if number >= folder.done:
                before.append(earlier)
                yield chunk

    with Progress('tokenize', 'MB', total / _MB) as progress, tokenising(tokenise, workers) as work:
        for tokenised in work(missing()):
            for text in tokenised.bad:
                bad.leave_out(BadRecordError(text))
            folder.append(tokenised)
            progress.show((before.pop(0) + tokenised.bytes_read) / _MB, f'{folder.num_tokens:,} tokens')


class _Folder:
    """The folder that is written, and how far it is.

    Args:
      path: existing folder.
      identity: of the write.
      tokenise: the job, opened.

    Attributes:
      done: number of chunks that it holds.
      bad: messages of bad records so far.

    Raises:
      UserError: it holds another interrupted write.
    """

    def __init__(self, path: pathlib.Path, identity: str, tokenise: Tokenise):
        self._path, self._identity, self._tokenise = path, identity, tokenise
        self._chat, self._tokenizer = tokenise.job.fields.chat, tokenise.tokenizer.identity
        state: Mapping[str, Any] = {'done': 0, 'bad': [], 'splits': {}}
        file = path / _STATE
        if file.exists():
            state = json.loads(file.read_text())
            if state['identity'] != identity:
                raise UserError(
                    f'{path} holds an interrupted write of other files or settings: repeat that command, delete the folder, or '
                    'name another --to.'
                )
        self.done, self.bad = state['done'], list(state['bad'])
        self._writers = {
            split: SplitWriter(path, split, self._tokenizer.dtype, self._chat, state['splits'].get(split))
            for split in SPLITS
        }
        self._synced = time.monotonic()
        self._sync()

    @property
    def num_tokens(self) -> int:
        """Tokens so far, of all splits."""
        return sum(shard['tokens'] for writer in self._writers.values() for shard in writer.shards)

    def append(self, tokenised: Tokenised) -> None:
        """Appends the documents of the next chunk."""
        for split, written in tokenised.splits.items():
            self._writers[split].append(written)
        self.bad += tokenised.bad
        self.done += 1
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._sync()

    def finish(self, *, hold_out: bool) -> dict[str, Any]:
        """Completes the folder; returns the content of its index.

        Args:
          hold_out: whether to hold out the last document if no other is.

        Raises:
          UserError: it has no document.
        """
        tokenise = self._tokenise
        train, validation = (self._writers[split] for split in SPLITS)
        if not train.shards:
            raise UserError('no document has a token: name other files with --from.')
        if hold_out and not validation.shards:
            held_out = train.pop(lambda ids: len(tokenise.tokenizer.decode(ids).encode()))
            if held_out is not None:
                validation.append(held_out)
                self._sync()
        for writer in self._writers.values():
            writer.close()
        tokenise.copy_files(self._path / shards.TOKENIZER)
        splits = {split: writer.shards for split, writer in self._writers.items()}
        index = shards.write_index(self._path, self._tokenizer, self._chat, splits)
        (self._path / _STATE).unlink()
        return index

    def _sync(self) -> None:
        """Records what is on disk, from which the same command continues."""
        for writer in self._writers.values():
            writer.sync()
        splits = {split: writer.shards for split, writer in self._writers.items()}
        state = {'identity': self._identity, 'done': self.done, 'bad': self.bad, 'splits': splits}
        files.replace_text(epath.Path(self._path / _STATE), json.dumps(state))
        self._synced = time.monotonic()
