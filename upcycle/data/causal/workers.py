"""Turns chunks of records into tokens, in this process or in others."""

from __future__ import annotations

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from upcycle.data.bad_records import BadRecordError
from upcycle.data.causal import chat, documents
from upcycle.data.causal.documents import Chunk, Fields, Record
from upcycle.data.causal.shards import SPLITS, Written
from upcycle.data.causal.tokenizers import BYTES, COPIED, chat_template_of, open_tokenizer, place_of, special_tokens
from upcycle.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """How to tokenise; the same for all chunks.

    Attributes:
      tokenizer: what `open_tokenizer` takes.
      fields: how records become documents.
      validation: share of the documents in the split 'validation', chosen by the hashes of their contents.
      chat_template: file of the chat template; None: the tokenizer folder's.
    """

    tokenizer: str
    fields: Fields
    validation: float
    chat_template: str | None = None

    def open(self) -> Tokenise:
        """Opens tokenizer and template.

        Raises:
          UserError: they cannot be used.
        """
        return Tokenise(self)


class Tokenised(NamedTuple):
    """A chunk in tokens.

    Attributes:
      splits: its documents.
      bad: messages of the records that were left out.
      bytes_read: of the file, up to the chunk's end.
    """

    splits: Mapping[str, Written]
    bad: list[str]
    bytes_read: int


class Tokenise:
    """Tokenises chunks of a job; see `Job.open`."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer = open_tokenizer(job.tokenizer)
        path = place_of(job.tokenizer)
        self._folder = path if path.is_dir() else path.parent
        self.template_source: str | None = None
        self._template = self._open_template() if job.fields.chat else None

    def _open_template(self) -> chat.ChatTemplate:
        job = self.job
        template = chat_template_of(self._folder)
        if job.chat_template is not None:
            try:
                template = pathlib.Path(job.chat_template).read_text(encoding='utf-8')
            except (OSError, ValueError) as error:
                raise UserError(
                    f'--chat_template={job.chat_template} cannot be read ({error}): name another file.'
                ) from error
        if template is None:
            raise UserError(
                f'--tokenizer={job.tokenizer} has no chat template: name a file with one by --chat_template.'
            )
        self.template_source = template
        return chat.ChatTemplate(template, job.chat_template or str(self._folder), special_tokens(self._folder))

    def copy_files(self, target: pathlib.Path) -> None:
        """Copies the tokenizer's files, with the chat template that was used, to a new folder."""
        target.mkdir(exist_ok=True)
        if self.job.tokenizer == BYTES:
            return
        for name in COPIED:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, target / name)
        if self.job.chat_template is not None:
            shutil.copyfile(self.job.chat_template, target / 'chat_template.jinja')

    def __call__(self, chunk: Chunk) -> Tokenised:
        """Tokenises a chunk. Documents without tokens are left out."""
        bad: list[str] = []
        texts: list[str] = []
        encoded: list[Sequence[np.ndarray | None]] = []
        for record in chunk.records:
            try:
                if isinstance(record.content, bytes) and not chunk.is_json:
                    record = documents.utf8(record, lambda error: bad.append(str(error)))
                content = documents.parse(record, self.job.fields, is_json=chunk.is_json)
                if self._template is not None:
                    content, *arrays = self._conversation(record, content)
                    encoded.append(arrays)
                texts.append(content)
            except BadRecordError as error:
                bad.append(str(error))
        if self._template is None:
            encoded = [(ids, None) for ids in self.tokenizer.encode(texts)]
        parts: dict[str, list[tuple[str, np.ndarray, np.ndarray | None]]] = {split: [] for split in SPLITS}
        for text, (ids, loss) in zip(texts, encoded, strict=True):
            held_out = chunk.validation or _share_of(text) < self.job.validation
            if len(ids):
                parts['validation' if held_out else 'train'].append((text, ids, loss))
        return Tokenised({split: _written(documents) for split, documents in parts.items()}, bad, chunk.bytes_read)

    def _conversation(self, record: Record, content: Any) -> tuple[str, np.ndarray, np.ndarray]:
        if problem := chat.check_messages(content.get('messages')):
            raise BadRecordError(f'{record} {problem}: correct it, or raise --max_bad_records.')
        try:
            return chat.encode_chat(self.tokenizer, self._template, content['messages'], content.get('tools'))
        except chat.UndefinedSpans as error:
            raise UserError(f'{record}: {error}') from error
        except (chat.RefusedChat, UnicodeEncodeError) as error:
            raise BadRecordError(f'{record}: {error}: correct it, or raise --max_bad_records.') from error


def _share_of(text: str) -> float:
    """The hash of a text in [0, 1), so that a text and its copies are in one split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64


def _written(documents: list[tuple[str, np.ndarray, np.ndarray | None]]) -> Written:
    return Written(
        b''.join(ids.tobytes() for _, ids, _ in documents),
        np.array([len(ids) for _, ids, _ in documents], np.int64),
        b''.join(loss.tobytes() for _, _, loss in documents if loss is not None),
        sum(len(text.encode()) for text, _, _ in documents),
    )


@contextlib.contextmanager
def tokenising(tokenise: Tokenise, workers: int) -> Iterator[Callable[[Iterable[Chunk]], Iterator[Tokenised]]]:
    """Yields a function that tokenises chunks in parallel, in their order.

    Args:
      tokenise: the job, opened.
      workers: number of processes; 1: this one.
    """
    if workers == 1:
        yield lambda chunks: map(tokenise, chunks)
        return
    # Processes share nothing: a forked one would inherit locks of threads.
    context = multiprocessing.get_context('spawn')
    job = dataclasses.replace(tokenise.job, tokenizer=str(place_of(tokenise.job.tokenizer)))
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (job,))

    def in_order(chunks: Iterable[Chunk]) -> Iterator[Tokenised]:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield in_order
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            'a process of `upcycle tokenize` was killed, as when memory is short: repeat the command, which continues, with '
            'fewer --workers.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_tokenise: Tokenise


def _begin(job: Job) -> None:
    """Prepares a process, which ends with its parent and leaves interrupts to it."""
    global _tokenise
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenise = job.open()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(chunk: Chunk) -> Tokenised:
    return _tokenise(chunk)
