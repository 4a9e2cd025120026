"""The tokenizer in a GGUF file as the files of a Hugging Face folder.

Matched: `src/llama-vocab.cpp` of llama.cpp of October 2026, whose tokens they give, except that Qwen2's text is normalised to NFC
first, as in its own tokenizer.json, and that special tokens in a text are always read as such.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from upcycle import files, schema
from upcycle.errors import UserError, one_line

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of tokens
_SPACE = '▁'
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|'
    r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|'
    r'\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts a text into words.

    Attributes:
      pattern: regular expression of a word; None: GPT-2's.
      single_digits: whether digits are cut apart first.
      whole_words: whether a word of the vocabulary is a token whatever the merges are.
      adds_bos: whether BOS begins a text if the metadata do not say.
      nfc: whether text is normalised first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False


_LLAMA3 = PreTokenizer(_WORDS % r'\p{N}{1,3}', whole_words=True, adds_bos=True)
_QWEN2 = PreTokenizer(_WORDS % r'\p{N}', nfc=True)
PRE_TOKENIZERS = {
    'gpt-2': PreTokenizer(),
    **dict.fromkeys(('smollm', 'starcoder', 'refact', 'command-r'), PreTokenizer(single_digits=True)),
    **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'pixtral'), _LLAMA3),
    **dict.fromkeys(('smaug-bpe', 'dbrx'), dataclasses.replace(_LLAMA3, whole_words=False, adds_bos=False)),
    **dict.fromkeys(('qwen2', 'deepseek-r1-qwen'), _QWEN2),
    'tekken': PreTokenizer(_TEKKEN, whole_words=True, adds_bos=True),
}


class _Vocabulary:
    """The tokens of the metadata.

    Raises:
      UserError: a list is missing, or has the wrong length or type.
    """

    def __init__(self, file: epath.Path, metadata: Mapping[str, Any]):
        self.file, self._metadata = file, metadata
        self.tokens: Sequence[str] = self.listed('tokens', list)
        self.types = [int(kind) for kind in self.listed('token_type', None, [_NORMAL] * len(self.tokens))]
        if len(self.types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise files.damaged(file, f'{len(set(self.tokens))} tokens have {len(self.types)} types')

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f'tokenizer.ggml.{key}', default)

    def listed(self, key: str, kind: type | None, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is None or (kind is not None and not isinstance(value, kind)) or not hasattr(value, '__len__'):
            raise UserError(f'{self.file} has no list tokenizer.ggml.{key}: use the folder of the original model.')
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default))

    def ids(self, *types: int) -> dict[str, int]:
        """Returns the ids of the tokens of some types."""
        return {token: i for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind in types}

    def special(self) -> dict[str, str]:
        """Returns the special tokens by transformers' names."""
        keys = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad', 'seperator': 'sep', 'mask': 'mask'}
        found = {}
        for theirs, ours in keys.items():
            number = self.get(f'{theirs}_token_id')
            if number is None:
                continue
            if not schema.fits(number, schema.Whole) or number >= len(self.tokens):
                raise files.damaged(self.file, f'tokenizer.ggml.{theirs}_token_id is {schema.shown(number)}')
            found[f'{ours}_token'] = self.tokens[number]
        return found


def rebuild(file: epath.Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the contents of `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` by their names.

    A file may have no tokenizer.

    Args:
      file: for messages.
      metadata: see `container.read_file`.

    Raises:
      UserError: the kind of tokenizer or its pre-tokenizer is not known, or its tokens are damaged.
    """
    try:
        return _rebuild(file, metadata)
    except UserError:
        raise
    except Exception as error:  # the library raises plain exceptions, as damaged lists do
        raise UserError(f'the tokenizer of {file} cannot be built ({one_line(error)}): copy the file again.') from error


def _rebuild(file: epath.Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    kind = metadata.get('tokenizer.ggml.model', 'none')
    if kind in ('none', 'no_vocab'):
        return {}
    vocabulary = _Vocabulary(file, metadata)
    if kind == 'gpt2':
        tokenizer, adds_bos = _byte_level(vocabulary)
    elif kind == 'llama':
        tokenizer, adds_bos = _sentence_piece(vocabulary), True
    else:
        raise UserError(
            f'{file} has the tokenizer.ggml.model {schema.shown(kind)}: only gpt2 and llama are known: use the folder of the '
            'original model.'
        )
    special = vocabulary.special()
    adds_bos = vocabulary.flag('add_bos_token', adds_bos)
    _add_special(tokenizer, vocabulary, special, adds_bos)
    configured = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        'add_bos_token': adds_bos,
        'add_eos_token': vocabulary.flag('add_eos_token', False),
        **special,
        **_templates(metadata),
    }
    return {
        'tokenizer.json': tokenizer.to_str(),
        'tokenizer_config.json': json.dumps(configured, indent=1, ensure_ascii=False),
        'generation_config.json': json.dumps(_generation(vocabulary), indent=1),
    }


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns the tokenizer of a byte-level BPE, and whether it adds BOS unless the metadata say otherwise."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get('pre')
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f'{vocabulary.file} has the pre-tokenizer {schema.shown(name)} (tokenizer.ggml.pre), whose rules are not known: use '
            f'the folder of the original model. Known are {", ".join(PRE_TOKENIZERS)}.'
        )
    kind = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(' ')) for merge in vocabulary.listed('merges', list)]
    ids = vocabulary.ids(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=kind.whole_words))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if kind.single_digits else []
    if kind.pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(kind.pattern), 'isolated'))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.adds_bos


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a SentencePiece model, which merges the pair of tokens whose union has the highest score."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = vocabulary.listed('scores', None)
    normal = vocabulary.ids(_NORMAL)
    ids = vocabulary.ids(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    merges = []
    for token in sorted(normal, key=lambda token: -scores[normal[token]]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    unknown = next(iter(vocabulary.ids(_UNKNOWN)), None)
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(vocabulary.ids(_BYTE)))
    tokenizer = tokenizers.Tokenizer(model)
    prefixed = vocabulary.flag('add_space_prefix', True)
    replaced = normalizers.Replace(' ', _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if prefixed else replaced
    steps = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(' ', 1, 0)] if prefixed else [])])
    return tokenizer


def _add_special(
    tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, special: Mapping[str, str], adds_bos: bool
) -> None:
    """Makes control tokens special, adds those that the user defined, and BOS and EOS where the tokenizer adds them."""
    from tokenizers import AddedToken, processors

    for kind, is_special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        tokenizer.add_tokens(
            [AddedToken(token, special=is_special, normalized=False) for token in vocabulary.ids(kind)]
        )
    ends = [adds_bos and special.get('bos_token'), vocabulary.flag('add_eos_token', False) and special.get('eos_token')]
    if any(ends):
        bos, eos = (end or '' for end in ends)
        template = f'{bos} $A {eos}'.strip()
        ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
        tokenizer.post_processor = processors.TemplateProcessing(template, f'{template} $B {eos}'.strip(), ids)


def _templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the field with the chat template, or the templates if there are several."""
    template, names = metadata.get('tokenizer.chat_template'), metadata.get('tokenizer.chat_templates', ())
    if not names:
        return {} if template is None else {'chat_template': template}
    named = {name: metadata.get(f'tokenizer.chat_template.{name}') for name in names}
    named = {'default': template, **named}
    return {'chat_template': [{'name': name, 'template': text} for name, text in named.items() if text is not None]}


def _generation(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Returns the settings for generation: the tokens that begin and end a text."""
    ends = [vocabulary.get(f'{name}_token_id') for name in ('eos', 'eot', 'eom')]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    found = {
        'bos_token_id': vocabulary.get('bos_token_id'),
        'eos_token_id': ends if len(ends) > 1 else next(iter(ends), None),
        'pad_token_id': vocabulary.get('padding_token_id'),
    }
    return {name: value for name, value in found.items() if value is not None}
