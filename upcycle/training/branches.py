"""Checks that several checkpoints, of which one model is made, are of one base model."""

from collections.abc import Sequence

from upcycle import schema
from upcycle.checkpoints import Reader
from upcycle.checkpoints.hf import companions
from upcycle.errors import UserError
from upcycle.models import identify


def require_one_base(readers: Sequence[Reader]) -> None:
    """Compares the functions and the tokenizers of checkpoints with those of the first. Shapes are compared by the plan.

    Raises:
      UserError: they differ; the message names the fields and the checkpoint.
    """
    first, *others = readers
    for other in others:
        here, there = (identify.facts_of(reader.metadata) for reader in (first, other))
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


def _refusal(reader: Reader, reason: str) -> UserError:
    return UserError(f'{reader.path} is not of the same base model ({reason}): name checkpoints of one base model.')
