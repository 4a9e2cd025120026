"""Checks that several checkpoints, of which one model is made, are of one base model."""

from collections.abc import Sequence
from typing import Any

from upcycle import schema, warning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.hf import companions
from upcycle.errors import UserError
from upcycle.models import identify


def require_one_base(readers: Sequence[Reader]) -> None:
    """Compares the functions, sizes and tokenizers of checkpoints with those of the first.

    Warns of differences in what only the first decides, such as the ids of special tokens and the chat template.

    Raises:
      UserError: they differ; the message names the fields and the checkpoint.
    """
    first, *others = readers
    for other in others:
        here, there = (_sizes(reader) | identify.facts_of(reader.metadata) for reader in (first, other))
        differing = [
            f'{name} is {schema.shown(there.get(name))} there and {schema.shown(value)} in {first.path}'
            for name, value in here.items()
            if there.get(name, value) != value
        ]
        if differing:
            raise _refusal(other, '; '.join(differing))
        folders = [companions.of(reader.path, reader.format) for reader in (first, other)]
        if None not in folders and (names := companions.tokenizer_differences(*folders)):
            raise _refusal(other, f'its tokenizer differs from that of {first.path} in {", ".join(names)}')
        if names := [*_kept_differently(first, other), *companions.other_differences(*folders)]:
            warning.once(
                f'{other.path} differs from {first.path} in {", ".join(names)}: those of {first.path} are written.'
            )


def _sizes(reader: Reader) -> dict[str, Any]:
    """Returns the fields of a model's configuration that its leaves tell."""
    config = identify.dense_model(str(reader.path), reader.leaves(), identify.facts_of(reader.metadata)).config
    return {name: getattr(config, name) for name in schema.required(type(config))}


def _kept_differently(first: Reader, other: Reader) -> list[str]:
    kept, others = (reader.metadata.get('kept', {}) for reader in (first, other))
    return [name for name in kept | others if kept.get(name) != others.get(name)]


def _refusal(reader: Reader, reason: str) -> UserError:
    return UserError(f'{reader.path} is not of the same base model ({reason}): name checkpoints of one base model.')
