"""Which ids stand for the spans that span corruption takes out: a property of the vocabulary that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from upcycle.data import tensorflow_quiet
from upcycle.errors import UserError

if TYPE_CHECKING:
    import seqio

Sentinels = str | int | Sequence[int] | None
# ByT5's: the bytes beyond ASCII, from the last one down.
BYT5 = tuple(range(3 + 255, 3 + 127, -1))
# Kinds that are added on top of a vocabulary, and how many; None: as the task says.
_ADDED = {'t5': None, 'umt5': 300}
# The first two that published checkpoints were trained with.
TRAINED_WITH = {'byt5': BYT5[:2], 'mt5': (250_099, 250_098), 'umt5': (256_299, 256_298)}
_COUNT = 100  # that a single first id stands for
_SPECIAL_IDS = 3  # padding, EOS, unknown


def counted_down(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """T5's: the ids added on top of a vocabulary, from the last one down."""
    return tuple(range(vocabulary.vocab_size - 1, vocabulary.vocab_size - 1 - vocabulary.extra_ids, -1))


def vocabulary_with(model: str | None, kind: Sentinels, extra_ids: int) -> tuple[seqio.Vocabulary, tuple[int, ...]]:
    """A vocabulary and its sentinels, in the order in which spans take them.

    T5 adds `<extra_id_99>` ... `<extra_id_0>` on top of its pieces, and umT5 300 of them on top of its 256,000. mT5's own
    file holds them as pieces, and multilingual_t5 adds none. ByT5 adds none to its bytes either, and counts down from the
    last byte, id 258.

    Args:
        model: path of a SentencePiece model; None: bytes.
        kind: SENTINELS, see `TextFiles`.
        extra_ids: ids that T5's way adds.

    Raises:
        UserError: the file cannot be used, or has no such sentinels.
    """
    seqio = tensorflow_quiet.seqio()
    pieces = () if model is None else _pieces(seqio.SentencePieceVocabulary(model), model)
    if model is None and kind == 'mt5':
        raise UserError("SENTINELS = 'mt5' are pieces of mT5's own file: bind SENTENCEPIECE_MODEL to its spiece.model.")
    if model is None and kind == 'umt5':
        raise UserError("SENTINELS = 'umt5' are ids above umT5's pieces: bind SENTENCEPIECE_MODEL to its spiece.model.")
    if model is not None and kind == 'byt5':
        raise UserError(
            f"SENTINELS = 'byt5' are bytes, and SENTENCEPIECE_MODEL = {model!r} is set: bind one of them only."
        )
    if kind == 'mt5' and not pieces:
        raise UserError(
            f"SENTINELS = 'mt5' are pieces of the model file, and {model} has no piece <extra_id_0>: bind 't5', or their ids."
        )
    if kind in _ADDED and pieces:
        raise UserError(
            f'SENTINELS = {kind!r} adds sentinels, and {model} holds some (<extra_id_0> is id {pieces[0]}): leave SENTINELS out.'
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
    """Ids of the pieces <extra_id_0>, <extra_id_1>, ... of a model file, which must have T5's special ids."""
    try:
        tokenizer = vocabulary.tokenizer
        pad, eos, unknown = tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()
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
    found: list[int] = []
    while True:
        # mT5 writes them as words, after a space.
        names = (f'<extra_id_{len(found)}>', f'▁<extra_id_{len(found)}>')
        ids = [i for i in map(tokenizer.piece_to_id, names) if i != unknown]
        if not ids:
            return tuple(found)
        found.append(ids[0])


def _given(kind: int | Sequence[int]) -> tuple[int, ...]:
    """Ids that were bound: all of them, or the first of a hundred that count down."""
    ids = tuple(range(kind, max(kind - _COUNT, _SPECIAL_IDS - 1), -1)) if isinstance(kind, int) else tuple(kind)
    if not ids or min(ids) < _SPECIAL_IDS or len(set(ids)) < len(ids):
        raise UserError(
            f'SENTINELS = {kind!r} must be different ids of at least {_SPECIAL_IDS}, in the order of their use.'
        )
    return ids


def require_unused(sentinels: Sequence[int], tokens: np.ndarray) -> None:
    """Raises UserError where a text holds ids that are to stand for what was taken out of it."""
    if not sentinels or not tokens.size or min(sentinels) > tokens.max():
        return
    found = np.flatnonzero(np.isin(np.asarray(sentinels, tokens.dtype), tokens))
    if found.size:
        raise UserError(
            f'the text holds the id {sentinels[found[0]]}, which is sentinel {found[0]} of the {len(sentinels)} that '
            "TASK_FEATURE_LENGTHS needs: take it out of the text, shorten 'inputs', or bind SENTINELS to other ids."
        )
