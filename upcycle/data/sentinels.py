"""The sentinels, ids that replace spans in span corruption. They are part of the vocabulary that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from upcycle.data import tensorflow_quiet
from upcycle.errors import UserError

if TYPE_CHECKING:
    import seqio

Sentinels = str | int | Sequence[int] | None
# ByT5's: the non-ASCII bytes, from the last one down.
BYT5 = tuple(range(3 + 255, 3 + 127, -1))
# Kinds added on top of a vocabulary, and their number; None: `extra_ids` of the task.
_ADDED = {'t5': None, 'umt5': 300}
# The first two sentinels of published checkpoints.
TRAINED_WITH = {'byt5': BYT5[:2], 'mt5': (250_099, 250_098), 'umt5': (256_299, 256_298)}
_COUNT = 100  # number of sentinels given by a single first id
_SPECIAL_IDS = 3  # padding, EOS, unknown


def counted_down(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """T5's sentinels: the ids added on top of a vocabulary, from the last one down."""
    return tuple(range(vocabulary.vocab_size - 1, vocabulary.vocab_size - 1 - vocabulary.extra_ids, -1))


def vocabulary_with(model: str | None, kind: Sentinels, extra_ids: int) -> tuple[seqio.Vocabulary, tuple[int, ...]]:
    """Returns a vocabulary and its sentinels, in the order in which spans use them.

    T5 adds `<extra_id_99>` ... `<extra_id_0>` on top of its pieces, and umT5 adds 300 on top of its 256,000. mT5's model file
    contains them as pieces, and multilingual_t5 adds none. ByT5 adds none to its bytes and counts down from the last byte,
    id 258.

    Args:
      model: path of a SentencePiece model; None: bytes.
      kind: SENTINELS, see `TextFiles`.
      extra_ids: number of ids to add for 't5'.

    Raises:
      UserError: the file cannot be used, or lacks these sentinels.
    """
    seqio = tensorflow_quiet.seqio()
    pieces = () if model is None else _pieces(seqio.SentencePieceVocabulary(model), model)
    if model is None and kind == 'mt5':
        raise UserError(
            "SENTINELS = 'mt5' are pieces of mT5's model file: set SENTENCEPIECE_MODEL to its spiece.model."
        )
    if model is None and kind == 'umt5':
        raise UserError("SENTINELS = 'umt5' are ids above umT5's pieces: set SENTENCEPIECE_MODEL to its spiece.model.")
    if model is not None and kind == 'byt5':
        raise UserError(
            f"SENTINELS = 'byt5' are bytes, and SENTENCEPIECE_MODEL = {model!r} is set: remove one of them."
        )
    if kind == 'mt5' and not pieces:
        raise UserError(
            f"SENTINELS = 'mt5' are pieces of the model file, and {model} has no piece <extra_id_0>: use 't5', or list the ids."
        )
    if kind in _ADDED and pieces:
        raise UserError(
            f'SENTINELS = {kind!r} adds sentinels, and {model} has some (<extra_id_0> is id {pieces[0]}): remove SENTINELS.'
        )
    adds = kind in _ADDED or (kind is None and not pieces)
    extra_ids = (_ADDED.get(kind) or extra_ids) if adds else 0
    vocabulary = (
        seqio.ByteVocabulary(extra_ids) if model is None else seqio.SentencePieceVocabulary(model, extra_ids=extra_ids)
    )
    if adds:
        return vocabulary, counted_down(vocabulary)
    if kind == 'byt5':
        return vocabulary, BYT5
    return vocabulary, pieces if kind in (None, 'mt5') else _given(kind)


def _pieces(vocabulary: seqio.Vocabulary, model: str) -> tuple[int, ...]:
    """Ids of the pieces <extra_id_0>, <extra_id_1>, ... of a model file.

    Raises:
      UserError: the file cannot be loaded, or its special ids are not T5's.
    """
    try:
        tokenizer = vocabulary.tokenizer
        pad, eos, unknown = tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()
    except Exception as error:  # a TensorFlow error if it is missing, a protobuf error for another format
        raise UserError(
            f'SENTENCEPIECE_MODEL = {model!r} cannot be loaded ({type(error).__name__}): set it to a SentencePiece '
            'model file.'
        ) from None
    if (pad, eos) != (0, 1):
        raise UserError(
            f'SENTENCEPIECE_MODEL = {model!r} has pad id {pad} and EOS id {eos} where T5 has 0 and 1: train it with '
            '--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1.'
        )
    pieces: list[int] = []
    while True:
        # mT5 writes them as words, after a space.
        names = (f'<extra_id_{len(pieces)}>', f'▁<extra_id_{len(pieces)}>')
        ids = [i for i in map(tokenizer.piece_to_id, names) if i != unknown]
        if not ids:
            return tuple(pieces)
        pieces.append(ids[0])


def _given(kind: int | Sequence[int]) -> tuple[int, ...]:
    """Ids from SENTINELS: a list, or the first of a hundred that count down."""
    ids = tuple(range(kind, max(kind - _COUNT, _SPECIAL_IDS - 1), -1)) if isinstance(kind, int) else tuple(kind)
    if not ids or min(ids) < _SPECIAL_IDS or len(set(ids)) < len(ids):
        raise UserError(
            f'SENTINELS = {kind!r} must be distinct ids of at least {_SPECIAL_IDS}, in the order of their use.'
        )
    return ids


def require_unused(sentinels: Sequence[int], tokens: np.ndarray) -> None:
    """Raises UserError if the text contains one of the sentinels."""
    if not sentinels or not tokens.size or min(sentinels) > tokens.max():
        return
    used = np.flatnonzero(np.isin(np.asarray(sentinels, tokens.dtype), tokens))
    if used.size:
        raise UserError(
            f'the text contains the id {sentinels[used[0]]}, which is sentinel {used[0]} of the {len(sentinels)} that '
            "TASK_FEATURE_LENGTHS needs: remove it from the text, shorten 'inputs', or set SENTINELS to other ids."
        )
