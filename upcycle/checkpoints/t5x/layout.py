"""The base of both layouts of T5X for writing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from upcycle.checkpoints import folder_writer, writing
from upcycle.checkpoints.t5x import tree
from upcycle.errors import UserError


class T5XLayout(folder_writer.Layout):
    """T5X's tree, written part by part; see `folder_writer.Layout`."""

    state = ''

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """T5X reads the step from the folder's name."""
        return path if path.name == f'checkpoint_{step}' else path / f'checkpoint_{step}'

    def place(self, leaves: writing.Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """See `folder_writer.Layout`."""
        _validate(leaves, self.format)
        unused = {
            'rng': 'T5X takes the random key from its configuration',
            'opt_state/count': "T5X uses the step as Adafactor's clock",
        }
        left_out = {name: reason for name, reason in unused.items() if name in leaves}
        renamed = dict(
            pair for row, column in tree.swapped_statistics(leaves) for pair in ((row, column), (column, row))
        )
        return {name: tree.their_keys(renamed.get(name, name)) for name in leaves if name not in left_out}, left_out

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """T5X reads zarr 2, which has no checksums, so gzip at level 0 adds one."""
        metadata = {'shape': list(leaf.shape), 'chunks': chunks, 'compressor': {'id': 'gzip', 'level': 0}}
        return {'driver': 'zarr', 'metadata': metadata}

    def placeholders(self, writer: folder_writer.FolderWriter) -> dict[tuple[str, ...], np.ndarray]:
        """Returns the unused slots of Adafactor, which hold one zero in T5X."""
        states = {keys[:-1] for keys in writer.keys.values() if keys[:2] == ('state', 'param_states')}
        used = set(writer.keys.values())
        return {
            (*keys, slot): np.zeros(1, np.float32)
            for keys in sorted(states)
            for slot in tree.ADAFACTOR_SLOTS
            if (*keys, slot) not in used
        }


def _validate(leaves: writing.Leaves, format: str) -> None:
    """Raises UserError for a leaf that T5X has no place for."""
    if 'step' not in leaves:
        raise UserError(f'{format} needs the step, which the source does not record: give --step.')
    for name in leaves:
        segments = name.split('/')
        is_param = segments[0] == 'params' and segments[1:2] in (['encoder'], ['decoder'], ['token_embedder'])
        is_state = name.startswith(tree.PARAM_STATES) and segments[-1] in tree.ADAFACTOR_SLOTS
        if not is_param and not is_state and name not in ('step', 'rng', 'opt_state/count'):
            raise writing.no_counterpart(name, format, 'T5 models and Adafactor state')
    _validate_state(leaves, format)


def _validate_state(leaves: writing.Leaves, format: str) -> None:
    """Raises UserError unless the optimizer state is that of T5X's Adafactor."""
    owners: dict[str, set[str]] = {}
    for name in leaves:
        if name.startswith(tree.PARAM_STATES):
            owner, _, slot = name.removeprefix(tree.PARAM_STATES).rpartition('/')
            owners.setdefault(owner, set()).add(slot)
    for owner, slots in owners.items():
        way_out = 'leave the optimizer state out with --optimizer_state=none'
        if not ({'v'} <= slots or {'v_row', 'v_col'} <= slots):
            raise UserError(
                f"{tree.PARAM_STATES}{owner} holds {', '.join(sorted(slots))}, which is not Adafactor's state: {way_out}."
            )
        if writing.EXPERT in owner.split('/') and 'v' in slots and len(leaves[f'params/{owner}'].shape) > 2:
            raise UserError(
                f'{tree.PARAM_STATES}{owner}/v cannot be stored as {format}, because T5X always factors the statistics of '
                f'experts: train with expert_min_dim_size_to_factor = 1, or {way_out}.'
            )
