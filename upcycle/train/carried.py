"""Receipts of checkpoints that are MoEs already: compared with what is loaded, and completed by the first run that loads them."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from upcycle.checkpoints import Reader, open_checkpoints
from upcycle.checkpoints.several import readers_of
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import Model, Params
from upcycle.surgery.execute import sha256_of
from upcycle.surgery.plan import Action
from upcycle.surgery.receipt import check_function, mismatches
from upcycle.train.source import read_params, source_model


def source_of(reader: Reader, step: int | None) -> dict[str, Any]:
    """A receipt's account of the checkpoint; `path` is a list where there are several."""
    dtypes = {leaf.dtype.name for name, leaf in reader.leaves().items() if name.startswith('params/')}
    paths = [str(part.path) for part in readers_of(reader)]
    return {
        'path': paths if len(paths) > 1 else paths[0],
        'format': reader.format,
        'step': step,
        'dtype': '/'.join(sorted(dtypes)),
    }


def require_match(path: str, paper: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint holds other parameters than its receipt says."""
    if problems := mismatches(paper, leaves):
        raise DifferentLeaves(f'{path} does not match its receipt', problems)


@dataclasses.dataclass(frozen=True)
class Carried:
    """The receipt of a checkpoint that is an MoE already, on its way into the run that goes on with it."""

    path: str
    paper: dict[str, Any]

    @classmethod
    def of(cls, reader: Reader) -> 'Carried | None':
        """The receipt of a checkpoint, None where it has none.

        Raises:
          UserError: the checkpoint holds other leaves than its receipt says.
        """
        paper = reader.metadata.get('receipt')
        if paper is None:
            return None
        require_match(str(reader.path), paper, reader.leaves())
        return cls(str(reader.path), dict(paper))

    @property
    def untouched(self) -> bool:
        """Whether nothing has been trained since the surgery: a conversion that is loaded for the first time."""
        return self.paper['function_check'].get('whole_model') == 'pending'

    def compare(self, name: str, leaf: jax.Array | np.ndarray) -> None:
        """Raises UserError where a leaf that nothing has changed since the surgery is not what the receipt says."""
        row = next((row for row in self.paper['plan'] if row['target'] == name), None)
        source = self.paper['source']
        if not self.untouched or row is None or not row['sources'] or source.get('dtype') != row['dtype']:
            return
        expected = self.paper['sha256'].get(row['sources'][0])
        copies = row['action'] == Action.EXPERTS and self.paper['operator'] == 'copy'
        if expected is None or not (row['action'] == Action.KEEP or copies):
            return
        whole = leaf[0] if copies else leaf
        alike = not copies or bool((leaf == leaf[:1]).all())
        if not alike or sha256_of(row['sources'][0], whole) != expected:
            raise UserError(
                f'{name} of {self.path} is not what its receipt says it was made of: convert the checkpoint again.'
            )

    def complete(
        self,
        model: Model,
        params: Params,
        batch: Mapping[str, jax.Array],
        whole: jax.sharding.Sharding,
        *,
        new_head: bool = False,
    ) -> dict[str, Any]:
        """The receipt with the check of the whole model, which a conversion leaves to the first load, or why there is none.

        Args:
          model: the sparse model.
          params: of it.
          batch: to compare on.
          whole: a sharding that splits nothing, for the model that it was made of, which is read again if it is still there.
          new_head: the run's head is not the checkpoint's, so that the two models' losses say nothing of each other.
        """
        if not self.untouched:
            return self.paper
        try:
            if new_head:
                raise UserError('NEW_HEAD = True gives it another task.')
            reader = open_checkpoints(self.paper['source']['path'])
            source = source_model(model, self.paper['operator'], reader)
            if source is None:
                raise UserError(f'the metadata of {reader.path} does not describe its model.')
            flat = flatten_dict({'params': params}, sep='/')
            resized = {
                row['sources'][0]: flat[row['target']] for row in self.paper['plan'] if row['action'] == Action.RESIZE
            }
            source_params = read_params(reader, lambda name, leaf: whole, resized)
        except UserError as error:
            print(f'the whole model is not compared with its source: {error}', file=sys.stderr)
            # No longer pending: what is trained from here on is not what the surgery made.
            check = {**self.paper['function_check'], 'whole_model': f'not compared: {str(error).splitlines()[0]}'}
            return {**self.paper, 'function_check': check}
        return {**self.paper, 'function_check': check_function(model, source_params, params, batch, source)}
