"""Prompts as tokens, and generated tokens as text, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from etils import epath

from upcycle import files
from upcycle.checkpoints import Reader, json_files
from upcycle.checkpoints.hf import companions
from upcycle.data.causal.chat import ChatTemplate
from upcycle.data.causal.tokenizers import (
    BYTES,
    TOKENIZERS,
    Tokenizer,
    chat_template_of,
    open_tokenizer,
    place_of,
    special_tokens,
)
from upcycle.errors import UserError

_CONTEXT = 8  # tokens of a prompt that its text is decoded with, since a token's text depends on those before it
_BROKEN = '\ufffd'  # what stands for a part of a character


class Prompts:
    """Encodes prompts as a model reads them.

    Args:
      tokenizer: a model's folder, a file of a tokenizer, or 'bytes'.
      chat: whether a prompt is a user's message, for the folder's chat template.
      ended: whether a prompt ends with the end token, as the prompts of models that answer do.

    Raises:
      UserError: the tokenizer cannot be read, or lacks what `chat` or `ended` needs.
    """

    def __init__(self, tokenizer: str | os.PathLike[str], *, chat: bool = False, ended: bool = False):
        self.tokenizer = open_tokenizer(tokenizer)
        self._template = _template(os.fspath(tokenizer)) if chat else None
        self._ended = ended
        if ended and (self.tokenizer.identity.eos_id is None or self.tokenizer.identity.kind == BYTES):
            raise UserError(
                f'--tokenizer={os.fspath(tokenizer)} has not the ids of this model, whose prompts end with an end token: name '
                'its own tokenizer.'
            )

    def encode(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt.

        Raises:
          UserError: the chat template refuses it.
        """
        identity = self.tokenizer.identity
        if self._template is not None:
            prompt = self._template.render([{'role': 'user', 'content': prompt}], prompt=True)
        tokens = self.tokenizer.encode([prompt])[0].tolist()
        if self._template is None and identity.adds_bos:  # templates write it
            tokens.insert(0, identity.bos_id)
        return [*tokens, identity.eos_id] if self._ended else tokens


def _template(tokenizer: str) -> ChatTemplate:
    place = place_of(tokenizer)
    folder = place if place.is_dir() else place.parent
    source = None if tokenizer == BYTES else chat_template_of(folder)
    if source is None:
        raise UserError(f'{tokenizer} has no chat template: remove --chat, or name another --tokenizer.')
    return ChatTemplate(source, str(folder), special_tokens(folder))


class Text:
    """The text of generated tokens.

    Args:
      tokenizer: of the tokens.
      prompt: the tokens before them.

    Attributes:
      tokens: the tokens so far.
      text: their text so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._read = list(prompt[-_CONTEXT:])
        # Tokens before `_first` are not decoded again, those before `_shown` are part of the text.
        self._first, self._shown = 0, len(self._read)
        self.tokens: list[int] = []
        self.text = ''

    def add(self, token: int) -> str:
        """Adds a token; returns what follows the text, '' while a character is not complete."""
        self.tokens.append(token)
        self._read.append(token)
        return self._advance(whole=True)

    def end(self) -> str:
        """Returns the rest of the text after the last token."""
        return self._advance(whole=False)

    def _advance(self, *, whole: bool) -> str:
        before = self._tokenizer.decode(self._read[self._first : self._shown])
        after = self._tokenizer.decode(self._read[self._first :])
        if len(after) <= len(before) or (whole and after.endswith(_BROKEN)):
            return ''
        self._first, self._shown = self._shown, len(self._read)
        self.text += after[len(before) :]
        return after[len(before) :]


def folders_of(reader: Reader) -> list[epath.Path]:
    """Returns where files of a model may lie: next to its weights; of a run, also what it has from its source."""
    path = files.absolute(reader.path)
    if reader.format == 'gguf':
        return [epath.Path(companions.of(str(path), reader.format))]
    if reader.format != 'upcycle':
        return [path.parent if path.is_file() else path]
    found = companions.of(str(path), reader.format)
    return [*([] if found is None else [epath.Path(found)]), path.parent.parent]


def tokenizer_of(reader: Reader) -> str | None:
    """Returns the path of a checkpoint's tokenizer, or 'bytes'; None if it has none."""
    for folder in folders_of(reader):
        if not files.is_remote(folder) and any((folder / name).is_file() for name in TOKENIZERS):
            return str(folder)
    data = getattr(reader, 'data', {}).get('fingerprint', {})
    return BYTES if data.get('tokenizer', {}).get('kind') == BYTES else None


def require_tokenizer(reader: Reader, given: str | None) -> str:
    """Returns the path of the tokenizer, or 'bytes'.

    Raises:
      UserError: neither the options nor the checkpoint name one.
    """
    found = tokenizer_of(reader) if given is None else given
    if found is None:
        raise UserError(f'{reader.path} has no tokenizer: name one with --tokenizer.')
    return found


def stop_tokens(folders: Iterable[epath.Path], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a text: those of generation_config.json, else of config.json, and the tokenizer's.

    Raises:
      UserError: a file is damaged.
    """
    found = {tokenizer.identity.eos_id}
    for folder in folders:
        for name in ('generation_config.json', 'config.json'):
            ids = json_files.read_settings(folder / name).get('eos_token_id')
            if ids is not None:
                found |= set(ids) if isinstance(ids, list) else {ids}
                break
    return tuple(sorted(found - {None}))
