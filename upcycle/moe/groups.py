"""Which layers are MoE layers, and how their tokens are divided into groups."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle.errors import UserError

if TYPE_CHECKING:
    from upcycle.moe.routers.base import MoE, Routed


def sparse_layers(spec: str | Sequence[int], num_layers: int, binding: str) -> tuple[int, ...]:
    """Returns the indices of the MoE layers.

    Args:
      spec: 'all', 'every_other' (1, 3, 5, ...: the paper's choice for language, flaxformer's MIXED layout with half of the layers
        sparse), 'last_half' (the paper's choice for vision), 'last_N' (the last N), 'none', or the indices themselves, 0-based.
      num_layers: of the stack.
      binding: the gin macro that holds `spec`, for the message.

    Raises:
      UserError: the word is unknown, or an index is out of range or repeated.
    """
    if isinstance(spec, str):
        named = {
            'every_other': tuple(range(1, num_layers, 2)),
            'last_half': tuple(range(num_layers))[num_layers - num_layers // 2 :],
            'all': tuple(range(num_layers)),
            'none': (),
        }
        if last := re.fullmatch(r'last_(\d+)', spec):
            count = int(last[1])
            if not 1 <= count <= num_layers:
                raise UserError(f'{binding} = {spec!r}, but the stack has {num_layers} layers.')
            return tuple(range(num_layers - count, num_layers))
        if spec not in named:
            raise UserError(
                f'{binding} = {spec!r} is not one of {", ".join(named)}, last_N or a list of layer indices.'
            )
        return named[spec]
    layers = tuple(spec)
    for layer in layers:
        if not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise UserError(
                f'{binding} names layer {layer!r}, but the stack has {num_layers} layers: indices go from 0 to {num_layers - 1}.'
            )
    if len(set(layers)) != len(layers):
        raise UserError(f'{binding} = {layers!r} names a layer twice.')
    return tuple(sorted(layers))


def moe_of_layers(
    moe: 'MoE | None', spec: str | Sequence[int], num_layers: int, binding: str
) -> tuple['MoE | None', ...]:
    """Returns the MoE of each layer of a stack, None for dense layers; see `sparse_layers`."""
    sparse = () if moe is None else sparse_layers(spec, num_layers, binding)
    return tuple(moe if i in sparse else None for i in range(num_layers))


def layer_name(path: str) -> str:
    """Returns the name of an MoE layer in metrics: its path without the MLP ('layers_1'); of attention experts the whole path."""
    return path if is_attention(path) else path.rpartition('/')[0]


def is_attention(path: str) -> bool:
    """Whether the MoE layer at this path is attention experts, whose module's name ends in `attention`."""
    return path.endswith('attention')


def num_groups(num_tokens: int, group_size: int, multiple_of: int = 1, unit: str = 'tokens') -> int:
    """Returns G: the smallest divisor of `num_tokens` that is >= num_tokens / group_size and a multiple of `multiple_of`.

    As flaxformer's `_num_groups`, except that the multiple is a binding instead of a property of the mesh.

    Raises:
      UserError: no such divisor exists.
    """
    if num_tokens % multiple_of:
        raise UserError(
            f'GROUPS_MULTIPLE_OF = {multiple_of} does not divide the {num_tokens} {unit} of a batch '
            f'(BATCH_SIZE{" x sequence length" if unit == "tokens" else ""}): change one of them.'
        )
    per_multiple = num_tokens // multiple_of
    at_least = -(-num_tokens // (group_size * multiple_of))
    small = [n for n in range(1, math.isqrt(per_multiple) + 1) if per_multiple % n == 0]
    return multiple_of * min(n for n in (*small, *(per_multiple // n for n in small)) if n >= at_least)


def microbatch_groups(config: 'Routed', rows: int, length: int) -> int:
    """Returns the number of groups in a microbatch of `rows` examples of `length` tokens. Groups are those of the whole batch.

    Groups of a dropless layer are only those over which the balance loss is a mean. They are whole examples, at least one of
    them, so that every length of an example and every mesh has groups.

    Raises:
      UserError: a microbatch would split a group.
    """
    microbatches = config.num_microbatches
    if config.dropless:
        examples = max(config.group_size // length, 1)
        whole = num_groups(rows * microbatches, examples, config.groups_multiple_of, 'examples')
    else:
        whole = num_groups(rows * length * microbatches, config.group_size, config.groups_multiple_of)
    if whole % microbatches:
        raise UserError(
            f'NUM_MICROBATCHES = {microbatches} would split a routing group, since the batch has {whole} groups of '
            f'{rows * length * microbatches // whole} tokens: set GROUPS_MULTIPLE_OF to a multiple of {microbatches}.'
        )
    return whole // microbatches


def check_groups(groups: int, shards: int) -> None:
    """Raises UserError unless the groups of a (micro)batch divide among the devices that share it."""
    if groups % shards:
        raise UserError(
            f'the {groups} routing groups of a batch do not divide among the {shards} devices of the data and expert axes of '
            f'MESH_SHAPE: set GROUPS_MULTIPLE_OF to a multiple of {shards} (this changes the groups and so the routing), or use '
            'fewer devices on these axes.'
        )
