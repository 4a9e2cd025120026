"""Receipts of upcycled checkpoints, compared with the loaded leaves and completed by the first run that loads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from upcycle import hosts
from upcycle.checkpoints import Reader, open_checkpoints
from upcycle.checkpoints.several import readers_of
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import Model, Params
from upcycle.surgery.fingerprint import sha256_of
from upcycle.surgery.plan import Action
from upcycle.surgery.receipt import check_function, mismatches, reported
from upcycle.training.source_model import source_model, unread_params


def source_of(reader: Reader, step: int | None) -> dict[str, Any]:
    """Describes the source checkpoint for a receipt; `path` is a list if there are several."""
    dtypes = {leaf.dtype.name for name, leaf in reader.leaves().items() if name.startswith('params/')}
    paths = [str(part.path) for part in readers_of(reader)]
    return {
        'path': paths if len(paths) > 1 else paths[0],
        'format': reader.format,
        'step': step,
        'dtype': '/'.join(sorted(dtypes)),
    }


def require_match(path: str, receipt: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint's leaves do not match its receipt."""
    if problems := mismatches(receipt, leaves):
        raise DifferentLeaves(f'{path} does not match its receipt', problems)


@dataclasses.dataclass(frozen=True)
class ReceiptOfStart:
    """The receipt of the MoE checkpoint that a run starts from."""

    path: str
    receipt: dict[str, Any]

    @classmethod
    def of(cls, reader: Reader) -> 'ReceiptOfStart | None':
        """Returns the receipt of a checkpoint, or None.

        Raises:
          UserError: the checkpoint's leaves do not match its receipt.
        """
        receipt = reader.metadata.get('receipt')
        if receipt is None:
            return None
        require_match(str(reader.path), receipt, reader.leaves())
        return cls(str(reader.path), dict(receipt))

    @property
    def untouched(self) -> bool:
        """Whether the checkpoint is a conversion that is loaded for the first time: untrained since its surgery."""
        return self.receipt['function_check'].get('whole_model') == 'pending'

    def comparable(self) -> frozenset[str]:
        """Returns the leaves that are unchanged since the surgery and whose hash is in the receipt."""
        source = self.receipt['source']
        return frozenset(
            row['target']
            for row in (self.receipt['plan'] if self.untouched else ())
            if row['sources']
            and source.get('dtype') == row['dtype']
            and row['sources'][0] in self.receipt['sha256']
            and (row['action'] == Action.KEEP or self._copies(row))
        )

    def compare(self, name: str, leaf: np.ndarray) -> None:
        """Raises UserError if a `comparable` leaf does not match the receipt."""
        row = next(row for row in self.receipt['plan'] if row['target'] == name)
        copies = self._copies(row)
        whole = leaf[0] if copies else leaf
        alike = not copies or bool((leaf == leaf[:1]).all())
        if not alike or sha256_of(row['sources'][0], whole) != self.receipt['sha256'][row['sources'][0]]:
            raise UserError(
                f'{name} of {self.path} does not match the hash in its receipt: convert the checkpoint again.'
            )

    def _copies(self, row: Mapping[str, Any]) -> bool:
        return row['action'] == Action.EXPERTS and self.receipt['operator'] == 'copy'

    def complete(
        self,
        model: Model,
        params: Params,
        batch: Mapping[str, jax.Array],
        leaves: Mapping[str, jax.ShapeDtypeStruct],
        *,
        new_head: bool = False,
    ) -> dict[str, Any]:
        """Returns the receipt with the check of the whole model, or why there is none, if a conversion left it pending.

        Args:
          model: the sparse model.
          params: of the sparse model.
          batch: to compare the two models on.
          leaves: of the run, with their shardings; the source model is read again, if it still exists, with the same shardings.
          new_head: the run's head is not the checkpoint's, so that the losses of the two models cannot be compared.
        """
        if not self.untouched:
            return self.receipt

        def check() -> dict[str, Any]:
            if new_head:
                raise UserError('NEW_HEAD = True gives the model another task.')
            flat = flatten_dict({'params': params}, sep='/')
            resized = {
                row['sources'][0]: flat[row['target']] for row in self.receipt['plan'] if row['action'] == Action.RESIZE
            }

            def opened() -> tuple[Params, Model]:
                reader = open_checkpoints(self.receipt['source']['path'])
                return unread_params(reader, leaves, resized), source_model(model, self.receipt['operator'], reader)

            # The source may be on the disk of one process only; the processes compare together or not at all.
            source_params, source = hosts.together(opened)
            return check_function(model, source_params, params, batch, source)

        result = reported(check)
        if isinstance(result.get('whole_model'), str):
            # Keeps the conversion's checks of single layers.
            result = {**self.receipt['function_check'], 'whole_model': result['whole_model']}
        return {**self.receipt, 'function_check': result}
