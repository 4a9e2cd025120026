"""`upcycle generate`: continues or answers prompts with a checkpoint."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import api, files, lengths, partitioning, platforms
from upcycle.checkpoints import open_checkpoint
from upcycle.data.causal.prompts import Prompts, Text, folders_of, require_tokenizer, stop_tokens
from upcycle.errors import UserError, one_line
from upcycle.models import Model, generation, identify
from upcycle.models.generation import Sampling

_SHOWN = 60  # characters of a prompt, above its text


def run(
    source: str,
    prompts: Sequence[str] = (),
    *,
    prompts_file: str | None = None,
    chat: bool = False,
    tokenizer: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = 'float32',
    batch_size: int = 8,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """`upcycle generate`: prints what a model says after each prompt; one prompt's text appears token by token.

    Args:
      source: a run folder or any checkpoint.
      prompts: the prompts. None and no `prompts_file`: one, the whole standard input.
      prompts_file: file of prompts, one per line.
      chat: a prompt is a user's message, given to the model by its chat template.
      tokenizer: its path, or 'bytes'; None: the checkpoint's.
      max_new_tokens: the most tokens of a text.
      temperature, top_k, top_p: see `generation.Sampling`.
      seed: of the draws.
      dtype: of parameters and activations.
      batch_size: the most prompts at a time.
      as_json: print a JSON object for each prompt instead.

    Returns:
      The JSON objects: `prompt`, `text`, `tokens` and `ended`, False if the text was cut at `max_new_tokens`.

    Raises:
      UserError: an option, the checkpoint or the tokenizer is wrong.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError('--max_new_tokens and --batch_size must be at least 1.')
    if not 0 <= seed < 2**32:
        raise UserError(f'--seed={seed} must be a whole number from 0 to 2**32 - 1.')
    Sampling(temperature, top_k, top_p)  # refuses before anything is read
    written = _written(prompts, prompts_file)
    reader = open_checkpoint(source)
    kind = identify.dense_model(str(reader.path), reader.leaves(), identify.facts_of(reader.metadata))
    generation.require_text(kind)
    reads = Prompts(require_tokenizer(reader, tokenizer), chat=chat, ended=kind.prompts == 'answered')
    tokens = [_encoded(reads, prompt, number, kind) for number, prompt in enumerate(written, 1)]
    length = max(map(len, tokens))
    total = length + max_new_tokens
    lengths.warn(reader, total, f'a prompt and --max_new_tokens are {total} tokens', 'lower --max_new_tokens')
    sampling = Sampling(temperature, top_k, top_p, stop_tokens(folders_of(reader), reads.tokenizer))
    # Parameters are split over `model`, whose size need not divide the number of prompts.
    mesh = partitioning.make_mesh((1, 1, len(platforms.devices())), None)
    model, params = api.load(source, mesh=mesh, dtype=dtype)
    alone = len(written) == 1
    results: list[dict[str, Any]] = []
    for first in range(0, len(written), batch_size):
        rows = slice(first, first + batch_size)
        batch = _padded(tokens[rows], length)
        texts = [Text(reads.tokenizer, prompt) for prompt in tokens[rows]]
        with partitioning.use(mesh):
            key = jax.random.fold_in(jax.random.key(seed), first)
            steps = generation.stream(model, params, *batch, sampling, max_new_tokens, key)
            ended = _write(steps, texts, sampling.eos_ids, live=alone and not as_json)
        for prompt, text, end in zip(written[rows], texts, ended, strict=True):
            results.append({'prompt': prompt, 'text': text.text, 'tokens': text.tokens, 'ended': end})
            if as_json:
                print(json.dumps(results[-1]), flush=True)
            elif not alone:
                print(f'--- {len(results)}: {_beginning(prompt)}\n{text.text}', flush=True)
    return results


def _write(
    steps: Iterable[tuple[np.ndarray, np.ndarray]], texts: Sequence[Text], eos_ids: Sequence[int], *, live: bool
) -> list[bool]:
    """Adds generated tokens to their texts, and returns which of these have ended; `live` prints the only one meanwhile."""
    ended = [False] * len(texts)
    for token_B, real_B in steps:
        for row in np.flatnonzero(real_B):
            token = int(token_B[row])
            ended[row] = token in eos_ids
            if not ended[row]:
                _print(texts[row].add(token), live)
    for text in texts:
        _print(text.end(), live)
    _print('\n', live)
    return ended


def _print(piece: str, live: bool) -> None:
    if live:
        print(piece, end='', flush=True)


def _written(prompts: Sequence[str], prompts_file: str | None) -> list[str]:
    """Returns the prompts of the options or of standard input.

    Raises:
      UserError: there are none, or they are named twice.
    """
    if prompts and prompts_file is not None:
        raise UserError('--prompt and --prompts_file both name prompts: remove one of them.')
    if prompts:
        return list(prompts)
    try:
        if prompts_file is not None:
            lines = files.absolute(prompts_file).read_text(encoding='utf-8').splitlines()
            found = [line for line in lines if line.strip()]
            if not found:
                raise UserError(f'--prompts_file={prompts_file} is empty: write a prompt on each line.')
            return found
        if sys.stdin.isatty():
            raise UserError('there is no prompt: name one with --prompt, or pipe it in.')
        text = sys.stdin.read().removesuffix('\n')
        text.encode()  # fails if the bytes were not UTF-8
        return [text]
    except (OSError, ValueError) as error:
        place = 'standard input' if prompts_file is None else f'--prompts_file={prompts_file}'
        raise UserError(f'{place} cannot be read ({one_line(error)}): give it UTF-8 text.') from error


def _encoded(reads: Prompts, prompt: str, number: int, model: Model) -> list[int]:
    """Returns the tokens of a prompt.

    Raises:
      UserError: it is empty, not text, or not of the model's vocabulary.
    """
    try:
        tokens = reads.encode(prompt)
    except UnicodeEncodeError as error:  # of bytes on the command line
        raise UserError(f'prompt {number} is not UTF-8 ({one_line(error)}): write it again.') from error
    if not prompt or not tokens:
        raise UserError(f'prompt {number} is empty: write at least one character.')
    if max(tokens) >= model.config.vocab_size:
        raise UserError(
            f'prompt {number} has the token {max(tokens)}, and the model only {model.config.vocab_size} tokens: name its own '
            'tokenizer with --tokenizer.'
        )
    return tokens


def _padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask, (B, length). One length for all batches is one program."""
    tokens, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, True
    return tokens, mask


def _beginning(prompt: str) -> str:
    line = prompt.split('\n')[0]
    return line if line == prompt and len(line) <= _SHOWN else f'{line[:_SHOWN]}...'
