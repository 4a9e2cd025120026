"""The `DataSource` of decoder-only models: packed documents, shuffled, mixed, and read by index."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from upcycle import warning
from upcycle.data import JSON, WHOLE, Share
from upcycle.data.causal.packing import Rows, Specials, Stream
from upcycle.data.causal.shards import SPLITS, TOKENIZER, Corpus, Folder, open_folder
from upcycle.data.causal.tokenizers import BYTES, Identity, Tokenizer, open_tokenizer
from upcycle.errors import UserError
from upcycle.schema import Count, Positive, Whole

if TYPE_CHECKING:
    import grain
    import jax

Batch = dict[str, np.ndarray]
_HASHED_ROWS = 8


class Source(Protocol):
    """Tokenised documents, of one or several corpora with one tokenizer."""

    weights: Sequence[float]
    names: Sequence[str]

    def identity(self) -> Identity:
        """The identity of the tokenizer."""

    @property
    def tokenizer_path(self) -> str:
        """The folder with the tokenizer's files, or 'bytes'."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    def corpora(self, split: str) -> Sequence[Corpus]:
        """The corpora of a split."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """Folders that `upcycle tokenize` has written.

    Attributes:
      folders: a folder, or several to mix [TOKENS_DIR].
      mixture: share of the rows of each folder; they need not add up to 1. None: equal shares [TOKENS_MIXTURE].
    """

    folders: str | Sequence[str]
    mixture: Sequence[Positive] | None = None

    def __post_init__(self):
        if not self.names:
            raise UserError('TOKENS_DIR names no folder: name one that `upcycle tokenize` has written.')
        if self.mixture is not None and len(self.mixture) != len(self.names):
            raise UserError(
                f'TOKENS_MIXTURE has {len(self.mixture)} shares and TOKENS_DIR {len(self.names)} folders: give each one a share.'
            )

    @property
    def names(self) -> Sequence[str]:
        """The folders."""
        return (self.folders,) if isinstance(self.folders, str) else tuple(self.folders)

    @property
    def weights(self) -> Sequence[float]:
        """The share of each folder."""
        return (1.0,) * len(self.names) if self.mixture is None else tuple(self.mixture)

    def identity(self) -> Identity:
        """The identity of the tokenizer of all folders."""
        return self._open[0].tokenizer

    @property
    def tokenizer_path(self) -> str:
        """The folder with the tokenizer's files, within that of the shards, or 'bytes'."""
        first = self._open[0]
        return BYTES if first.tokenizer.kind == BYTES else str(first.path / TOKENIZER)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return open_tokenizer(self.tokenizer_path)

    def corpora(self, split: str) -> Sequence[Corpus]:
        """The corpora of a split."""
        return [folder.corpora[split] for folder in self._open]

    @functools.cached_property
    def _open(self) -> Sequence[Folder]:
        opened = [open_folder(name) for name in self.names]
        for folder in opened[1:]:
            if folder.tokenizer != opened[0].tokenizer:
                raise UserError(
                    f'{folder.path} and {opened[0].path} were tokenised by different tokenizers: tokenise one of them again.'
                )
        return opened


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A `DataSource` of packed documents for a decoder-only model.

    Documents are packed in the order of the corpus, and rows are shuffled. The segments of a row do not see each other; the
    positions of each begin at 0.

    Attributes:
      source: the documents.
      sequence_length: positions per row [SEQUENCE_LENGTH].
      split: 'train' or 'validation'.
      batch_size: rows of a global batch.
      seed: seed of the order of rows.
      packing: 'split' cuts the documents, joined, into full rows; a document that is cut continues in another row as a separate
        document. 'whole' cuts only documents longer than a row, and pads rows; for conversations [PACKING].
      add_bos: whether BOS begins a document. None: as the tokenizer does, and not for conversations [ADD_BOS].
      add_eos: whether EOS is the target after the last token of a document. None: if the tokenizer has one, and not for
        conversations [ADD_EOS].
      shuffle: draw an order of rows in every epoch; with `repeat` and `split` also another cut of the documents.
      repeat: True: endless. False: one pass, whose last batch is padded.
      num_batches: maximum number of batches, for a bounded evaluation.
    """

    source: Source
    sequence_length: Count
    split: str
    batch_size: Count
    seed: Whole = 0
    packing: Literal['split', 'whole'] = 'split'
    add_bos: bool | None = None
    add_eos: bool | None = None
    shuffle: bool = True
    repeat: bool = True
    num_batches: Count | None = None

    @property
    def vocabulary_size(self) -> int:
        """Number of ids: the minimum size of the embedding."""
        return self.source.identity().vocabulary_size

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the documents."""
        return self.source.tokenizer()

    def token_text(self, token: int) -> str:
        """Formats a token for display."""
        return self.tokenizer.decode([token]) or f'<{token}>'

    def target_bytes(self, batch: Mapping[str, jax.Array]) -> jax.Array | None:
        """Counts the bytes of text of a batch's targets; special tokens have none. Traceable by `jax.jit`.

        Returns:
          A float32 scalar; None if the tokenizer cannot be read.
        """
        import jax.numpy as jnp

        if self._token_bytes is None:
            return None
        bytes_V = jnp.asarray(self._token_bytes, jnp.float32)
        bytes_BxL = bytes_V[batch['targets']]
        bos_id = self._rows[0].stream.specials.bos_id
        if bos_id is not None:
            # The tokenizer may put a space in front of a document, which the text does not have.
            space = max(float(self._token_bytes[self.tokenizer.encode(['a'])[0]].sum()) - 1.0, 0.0)
            bytes_BxL -= jnp.where(batch['tokens'] == bos_id, space, 0.0)
        return (bytes_BxL * batch['loss_weights']).sum()

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray | None:
        try:
            return self.tokenizer.token_bytes()
        except UserError as error:  # rows do not need the tokenizer
            warning.once(f'bits_per_byte is not computed: {error}')
            return None

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes [B, L] of a global batch. `mask` is False at padding, and there only if there can be some."""
        names = ('tokens', 'targets', 'segment_ids', 'loss_weights', *(['mask'] if self._padded else []))
        types = {'loss_weights': np.float32, 'mask': np.bool_}
        shape = (self.batch_size, self.sequence_length)
        return {name: (shape, np.dtype(types.get(name, np.int32))) for name in names}

    def fingerprint(self) -> dict[str, JSON]:
        """The identity of the data, with hashes of the documents and of the first rows."""
        settings = ('sequence_length', 'split', 'batch_size', 'seed', 'packing', 'shuffle', 'repeat')
        identity: dict[str, JSON] = {'source': 'tokens', 'tokenizer': dataclasses.asdict(self.source.identity())}
        identity['corpora'] = [
            {'sha256': rows.stream.corpus.sha256, 'weight': float(weight), **rows.stream.specials._asdict()}
            for rows, weight in zip(self._rows, self.source.weights, strict=True)
        ]
        identity |= {name: getattr(self, name) for name in settings}
        return identity | {'first_rows_sha256': self._first_rows_sha256}

    def promise(self) -> str:
        """Which determinism holds."""
        return (
            f'Global batch b of the split {self.split!r} is a pure function of (seed {self.seed}, b), for any number of hosts '
            'and any start; documents are packed before rows are dealt to hosts.'
        )

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Yields a reader's rows of global batches `start`, `start + 1`, ...; see `DataSource.batches`.

        Raises:
          UserError: the batch size is not divisible by the parts, or the data cannot be read.
        """
        from upcycle.data.causal import pipeline

        own = [*itertools.chain.from_iterable(share.rows(self.batch_size))]
        stop = self.num_batches
        if not self.repeat:
            whole = -(-len(self.rows) // self.batch_size)
            stop = whole if stop is None else min(whole, stop)
        return map(self._with_mask, pipeline.batches(self.rows, self.batch_size, own, start, stop))

    @functools.cached_property
    def rows(self) -> grain.MapDataset:
        """The rows, a grain dataset with random access; see `packing.Stream.read`.

        Raises:
          UserError: the split is unknown or has too few tokens.
        """
        from upcycle.data.causal import pipeline

        return pipeline.dataset(self._rows, self.source.weights, self.seed, shuffle=self.shuffle, repeat=self.repeat)

    @property
    def _padded(self) -> bool:
        return self.packing == 'whole' or not self.repeat

    def _with_mask(self, batch: Batch) -> Batch:
        return batch | {'mask': batch['segment_ids'] > 0} if self._padded else batch

    @functools.cached_property
    def _rows(self) -> Sequence[Rows]:
        if self.split not in SPLITS:
            raise UserError(f"Tokens.split = {self.split!r} is unknown: set it to 'train' or 'validation'.")
        whole = self.packing == 'whole'
        found = []
        for name, corpus in zip(self.source.names, self.source.corpora(self.split), strict=True):
            rows = Rows(
                Stream(corpus, self._specials(corpus)), self.sequence_length, whole=whole, cover=not self.repeat
            )
            if not corpus.num_documents:
                raise UserError(
                    f'{name} has no document in the split {self.split!r}: tokenise it with a larger --validation, or with '
                    '--validation_from.'
                )
            if not len(rows):
                raise UserError(
                    f'{name} has {len(rows.stream):,} tokens in the split {self.split!r}, fewer than SEQUENCE_LENGTH = '
                    f"{self.sequence_length}: give it more text, shorten SEQUENCE_LENGTH, or set PACKING = 'whole'."
                )
            if corpus.chat and not whole:
                warning.once(
                    f"{name} holds conversations, and PACKING = 'split' cuts them anywhere, so that answers lose their "
                    "questions: set PACKING = 'whole'."
                )
            found.append(rows)
        return found

    def _specials(self, corpus: Corpus) -> Specials:
        tokenizer = self.source.identity()

        def chosen(wanted: bool | None, default: bool, token: int | None, name: str) -> int | None:
            if wanted and token is None:
                raise UserError(
                    f'ADD_{name} = True, but the tokenizer has no {name}: set it to False, or name another tokenizer.'
                )
            return token if (default and not corpus.chat if wanted is None else wanted) else None

        return Specials(
            chosen(self.add_bos, tokenizer.adds_bos, tokenizer.bos_id, 'BOS'),
            chosen(self.add_eos, True, tokenizer.eos_id, 'EOS'),
        )

    @functools.cached_property
    def _first_rows_sha256(self) -> str:
        """Detects anything that changes the rows, such as another order of shuffling of another grain."""
        digest = hashlib.sha256()
        for i in range(min(_HASHED_ROWS, len(self.rows))):
            row: Any = self.rows[i]
            for name in sorted(row):
                digest.update(np.ascontiguousarray(row[name], '<i4').tobytes())
        return digest.hexdigest()
