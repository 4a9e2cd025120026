"""Compares the tokenizer of token shards with that of the checkpoint that is trained or evaluated on them."""

from typing import Any

from upcycle import warning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.hf import companions
from upcycle.data.causal.prompts import tokenizer_of
from upcycle.data.causal.tokenizers import BYTES

_SHOWN = 3  # differences


def warn(reader: Reader, data: Any) -> None:
    """Warns if the ids of a data source's tokens are not those of a checkpoint's tokenizer.

    Args:
      reader: of the checkpoint, or of the first of several; nothing is compared if it has no tokenizer.
      data: a data source; only token shards are compared.
    """
    theirs = getattr(getattr(data, 'source', None), 'tokenizer_path', None)
    own = None if theirs is None else tokenizer_of(reader)
    if own is None or own == theirs:
        return
    if BYTES in (own, theirs):
        differing = [f'one reads {BYTES}']
    else:
        differing = companions.tokenizer_differences(own, theirs)
    if differing:
        more = ', ...' if len(differing) > _SHOWN else ''
        warning.once(
            f'the tokens were made by another tokenizer than that of {reader.path} ({", ".join(differing[:_SHOWN])}{more}), so '
            'the model does not know their meaning: repeat `upcycle tokenize` with --tokenizer of the model.'
        )
