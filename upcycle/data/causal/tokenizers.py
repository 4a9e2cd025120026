"""Tokenizers of decoder-only models: `tokenizer.json`, SentencePiece models and bytes, behind one interface."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from upcycle import files, schema
from upcycle.checkpoints import json_files
from upcycle.errors import UserError, one_line
from upcycle.extras import require

BYTES = 'bytes'
"""The name of the tokenizer without a file."""
TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
# Files of a folder that belong to its tokenizer.
COPIED = (*TOKENIZERS, 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
_SPACE = '\u2581'  # SentencePiece's
_BYTE = re.compile('<0x[0-9A-F]{2}>')  # a token of a tokenizer that falls back to bytes


@dataclasses.dataclass(frozen=True)
class Identity:
    """What tells one tokenizer from another.

    Attributes:
      kind: 'tokenizer.json', 'tokenizer.model' or 'bytes'.
      sha256: of its file; None for bytes.
      vocabulary_size: ids are below it.
      bos_id: id that begins a document, if there is one.
      eos_id: id that ends a document, if there is one.
      adds_bos: whether the tokenizer begins each text with `bos_id`.
    """

    kind: str
    sha256: str | None
    vocabulary_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds all ids."""
        return np.dtype('<u2' if self.vocabulary_size <= 2**16 else '<u4')


class Tokenizer(Protocol):
    """Text to ids and back. No method adds BOS or EOS."""

    identity: Identity

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, of the type `identity.dtype`."""

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids [n] of a text and the range of characters [n, 2] of each."""

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Returns the text of ids, with or without special tokens."""

    def token_bytes(self) -> np.ndarray:
        """Returns how many bytes of text each id stands for, int32 [vocabulary]; 0 for special tokens."""


def place_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file or folder of a tokenizer: for a GGUF file, a folder of this process with its tokenizer.

    Raises:
      UserError: the GGUF file cannot be read, or its tokenizer is not known.
    """
    place = pathlib.Path(path).expanduser()
    if place.suffix != '.gguf' or not place.is_file():
        return place
    from upcycle.checkpoints.gguf import reader

    return reader.unpacked(os.path.abspath(place))


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      path: 'bytes'; a folder with `tokenizer.json` or `tokenizer.model`, such as a model's; one of these files, or a GGUF file.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if os.fspath(path) == BYTES:
        return ByteTokenizer()
    place = place_of(path)
    if place.is_dir():
        found = [place / name for name in TOKENIZERS if (place / name).exists()]
        if not found:
            raise UserError(
                f'--tokenizer={path} has neither {" nor ".join(TOKENIZERS)}: name a folder with one of them, or bytes.'
            )
        place = found[0]
    files.require_file(place)
    if not place.is_file():
        raise UserError(
            f'--tokenizer={path} does not exist: name a model folder, a tokenizer.json or .model, or bytes.'
        )
    try:
        return (JsonTokenizer if place.suffix == '.json' else SentencePieceTokenizer)(place)
    except UserError:
        raise
    except Exception as error:  # both libraries raise plain exceptions
        raise UserError(
            f'{place} cannot be read as a tokenizer ({one_line(error)}): name another --tokenizer.'
        ) from error


class ByteTokenizer:
    """The UTF-8 bytes of a text as ids 0 to 255, and 256 for EOS."""

    identity = Identity(BYTES, None, 257, eos_id=256)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8).astype(self.identity.dtype) for text in texts]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer`."""
        lengths = [len(character.encode()) for character in text]
        starts = np.repeat(np.arange(len(text)), lengths)
        return self.encode([text])[0], np.stack([starts, starts + 1], axis=1)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """See `Tokenizer`; broken characters are replaced, and other ids left out."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors='replace')

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        return (np.arange(self.identity.vocabulary_size) < 256).astype(np.int32)


class JsonTokenizer:
    """A `tokenizer.json`, by the library `tokenizers`, as transformers' fast tokenizers use it.

    Args:
      file: its path. The special ids are those of the files next to it.
    """

    def __init__(self, file: pathlib.Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        bos, eos = (_special(file.parent, name, vocabulary, size) for name in ('bos_token', 'eos_token'))
        plain, whole = (self._tokenizer.encode('a', add_special_tokens=special).ids for special in (False, True))
        adds_bos = bos is not None and whole[:1] == [bos] and plain[:1] != [bos]
        self.identity = Identity('tokenizer.json', _sha256(file), size, bos, eos, adds_bos)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.identity.dtype) for one in encoded]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer`."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, self.identity.dtype), np.array(encoded.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`. A byte-level token has a character per byte; any other, what it adds to the text of another token."""
        decoders = _types(json.loads(self._tokenizer.to_str())['decoder'])
        added = self._tokenizer.get_added_tokens_decoder()
        known = {i: text for text, i in self._tokenizer.get_vocab(with_added_tokens=True).items() if i not in added}
        sizes = {i: 0 if token.special else len(token.content.encode()) for i, token in added.items()}
        if 'ByteLevel' in decoders:
            sizes |= {i: len(text) for i, text in known.items()}
        else:
            bytes_ = {i for i, text in known.items() if 'ByteFallback' in decoders and _BYTE.fullmatch(text)}
            rest = [i for i in known if i not in bytes_]
            first = next((i for i in rest if self.decode([i]).strip()), None)
            before = [] if first is None else [first]
            texts = self._tokenizer.decode_batch([[*before, i] for i in rest])
            start = len(self.decode(before).encode())
            sizes |= dict.fromkeys(bytes_, 1)
            sizes |= {i: max(len(text.encode()) - start, 0) for i, text in zip(rest, texts, strict=True)}
        return np.array([sizes.get(i, 0) for i in range(self.identity.vocabulary_size)], np.int32)


class SentencePieceTokenizer:
    """A SentencePiece model, by the library `sentencepiece`.

    Args:
      file: its path. The special ids are the model's.
    """

    def __init__(self, file: pathlib.Path):
        library = require('sentencepiece', file.name, 'data')
        self._model = library.SentencePieceProcessor(model_file=os.fspath(file))
        bos, eos = (None if i < 0 else i for i in (self._model.bos_id(), self._model.eos_id()))
        adds_bos = bos is not None and bool(
            _read_json(file.with_name('tokenizer_config.json')).get('add_bos_token', True)
        )
        self.identity = Identity('tokenizer.model', _sha256(file), self._model.vocab_size(), bos, eos, adds_bos)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.array(ids, self.identity.dtype) for ids in self._model.encode(list(texts))]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Refused: a SentencePiece model does not read the special tokens in a text, which chat templates write.

        Raises:
          UserError: always.
        """
        raise UserError(
            'a chat template needs a tokenizer.json, which knows its special tokens: name another --tokenizer.'
        )

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """See `Tokenizer`; special tokens have no text."""
        return self._model.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        model = self._model

        def size(i: int) -> int:
            if model.is_control(i) or model.is_unknown(i):
                return 0
            return 1 if model.is_byte(i) else len(model.id_to_piece(i).replace(_SPACE, ' ').encode())

        return np.array([size(i) for i in range(self.identity.vocabulary_size)], np.int32)


def _types(decoder: Any) -> set[str]:
    """The types of a tokenizer.json's decoder, and of those that it is a sequence of."""
    if not isinstance(decoder, dict):
        return set()
    return {decoder.get('type', '')}.union(*map(_types, decoder.get('decoders', ())))


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file."""
    files.require_file(file)
    return json_files.read_json(epath.Path(file)) if file.exists() else {}


def special_tokens(folder: pathlib.Path) -> dict[str, str]:
    """The special tokens of a model folder by their names, such as 'eos_token'.

    Raises:
      UserError: a file is damaged.
    """
    found: dict[str, str] = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        for key, value in _read_json(folder / name).items():
            text = value.get('content') if isinstance(value, dict) else value
            if key.endswith('_token') and isinstance(text, str):
                found[key] = text
            elif key in ('bos_token', 'eos_token') and value is not None:
                raise UserError(f'{folder / name}: {key} is {schema.shown(value)}: it must be a token.')
    return found


def chat_template_of(folder: pathlib.Path) -> str | None:
    """The chat template of a model folder, if it has one; of several named ones, the default.

    Raises:
      UserError: it is not a text, or there is no template where one is named.
    """
    file = folder / 'chat_template.jinja'
    files.require_file(file)
    if file.is_file():
        try:
            return file.read_text(encoding='utf-8')
        except (OSError, ValueError) as error:
            raise UserError(f'{file} cannot be read ({one_line(error)}): copy it again.') from error
    template = _read_json(folder / 'tokenizer_config.json').get('chat_template')
    if isinstance(template, list) and all(schema.fits(each, Mapping[str, str]) for each in template):
        named = {each.get('name'): each.get('template') for each in template}
        if None not in {*named, *named.values()}:
            return named.get('default')
    elif template is None or isinstance(template, str):
        return template
    raise UserError(
        f'{folder / "tokenizer_config.json"}: chat_template is {schema.shown(template)}: it must be a string, or a list of named '
        'templates.'
    )


def _special(folder: pathlib.Path, name: str, vocabulary: Mapping[str, int], size: int) -> int | None:
    """The id of a special token by the files of a folder; a model's config.json is asked last.

    Raises:
      UserError: a file is damaged, or the tokenizer does not have the token.
    """
    token = special_tokens(folder).get(name)
    number = None if token is None else vocabulary.get(token)
    if number is None:
        number = json_files.read_settings(epath.Path(folder / 'config.json')).get(f'{name}_id')
        number = number[0] if isinstance(number, list) and number else number
        token = token if number is None else number
        number = number if isinstance(number, int) and number >= 0 else None
    if (number is None and isinstance(token, str)) or (number is not None and number >= size):
        raise UserError(
            f'{folder} has the {name} {schema.shown(token)}, which is not one of its {size} tokens: copy the tokenizer and '
            'config.json of one model.'
        )
    return number
