"""The tensors of decoder-only folders: their names and sizes, a head that is the embedding, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from upcycle import warning
from upcycle.checkpoints import views
from upcycle.checkpoints.hf.architecture import LINEAR, Entry, Tensors
from upcycle.checkpoints.hf.sources import CONFIG, are_equal, by_table
from upcycle.errors import UserError

HEAD = 'lm_head.weight'
EMBEDDING = 'model.embed_tokens.weight'
# Names of the norms by placement: (theirs, ours).
NORMS = {
    'pre': (
        ('input_layernorm', 'pre_self_attention_layer_norm'),
        ('post_attention_layernorm', 'pre_mlp_layer_norm'),
    ),
    'post': (
        ('post_attention_layernorm', 'post_self_attention_layer_norm'),
        ('post_feedforward_layernorm', 'post_mlp_layer_norm'),
    ),
    'both': (
        ('input_layernorm', 'pre_self_attention_layer_norm'),
        ('post_attention_layernorm', 'post_self_attention_layer_norm'),
        ('pre_feedforward_layernorm', 'pre_mlp_layer_norm'),
        ('post_feedforward_layernorm', 'post_mlp_layer_norm'),
    ),
}


class Leaf(NamedTuple):
    """One of our leaves: its tensors, and the names of its sizes in `DecoderOnly.dimensions`."""

    entry: Entry
    sizes: tuple[str, ...]


def linear(ours: str, theirs: str, sizes: tuple[str, str], *, bias: bool) -> dict[str, Leaf]:
    """Returns the leaves of a linear layer; `sizes`: of the inputs and the outputs."""
    leaves = {f'{ours}/kernel': Leaf(Entry(f'{theirs}.weight', LINEAR), sizes)}
    return leaves | ({f'{ours}/bias': Leaf(Entry(f'{theirs}.bias'), sizes[1:])} if bias else {})


def with_head(folder: epath.Path, tied: bool, stored: dict[str, Any]) -> tuple[Tensors, bool]:
    """Returns the tensors without a head that equals the embedding, and whether the model is tied, as transformers 5 decides."""
    if tied and HEAD in stored:
        head = stored.pop(HEAD)
        embedding = stored.setdefault(EMBEDDING, head)
        if not are_equal(embedding, head):
            warning.once(
                f'{folder}: tie_word_embeddings of {CONFIG} is true, but {HEAD} is not the embedding: the head is read, as in '
                'transformers 5.'
            )
            return stored | {HEAD: head}, False
    return stored, tied


def read(
    folder: epath.Path, stored: Tensors, leaves: Mapping[str, Leaf], dimensions: Mapping[str, int]
) -> dict[str, views.Lazy]:
    """Returns our arrays by their names below `params/`.

    Raises:
      UserError: a tensor is missing, unknown, not of floating-point numbers, or has another shape than config.json asks for.
    """
    sources = by_table(folder, stored, {name: leaf.entry for name, leaf in leaves.items()})
    named = dict.fromkeys(theirs for leaf in leaves.values() for theirs in leaf.entry.every_name)
    if missing := [theirs for theirs in named if theirs not in stored]:
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        tie = ', or set tie_word_embeddings to true if it equals the embedding' if missing == [HEAD] else ''
        raise UserError(f'{folder} has no {missing[0]}{more}, which {CONFIG} asks for: copy the checkpoint again{tie}.')
    for theirs in named:
        if not jax.dtypes.issubdtype(stored[theirs].dtype, np.floating):
            raise UserError(
                f'{theirs} of {folder} has the type {stored[theirs].dtype}, as in a quantised model: use the original model.'
            )
    for name, source in sources.items():
        entry, sizes = leaves[name]
        expected = tuple(dimensions[size] for size in sizes)
        if source.shape != expected:
            theirs = entry.every_name[0]
            wanted = entry.turn.to_theirs(np.broadcast_to(np.int8(0), expected[entry.is_stack :])).shape
            same_rank = len(source.shape) == len(expected)
            wrong = [size for i, size in enumerate(sizes) if not same_rank or source.shape[i] != expected[i]]
            listing = ', '.join(f'{size} = {dimensions[size]}' for size in dict.fromkeys(wrong))
            raise UserError(
                f'{theirs} of {folder} has the shape {list(stored[theirs].shape)}, but {CONFIG} asks for {list(wanted)} '
                f'({listing}).'
            )
    return sources
