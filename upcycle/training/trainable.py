"""Training a part of the parameters: routers first, MoE layers only, or whatever a pattern matches."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle.errors import UserError

ALL, ROUTERS, MOE = 'all', 'routers', 'moe_layers'


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained, and for how long nothing else. Gin macros in brackets.

    Attributes:
      names: 'all'; 'routers'; 'moe_layers', the routers and experts; or a regular expression, found somewhere in a parameter's
        path [TRAINABLE].
      steps: after so many steps of the run everything is trained; None: never [TRAINABLE_STEPS].
    """

    names: str = ALL
    steps: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.names)
        except (re.error, TypeError) as error:
            raise UserError(f'TRAINABLE = {self.names!r} is no regular expression: {error}.') from error
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise UserError(f'TRAINABLE_STEPS = {self.steps!r} must be a whole number of at least 1, or None.')
        if self.steps is not None and self.names == ALL:
            raise UserError(
                "TRAINABLE_STEPS says when TRAINABLE ends, and TRAINABLE = 'all' has no end: leave one out."
            )

    def frozen(self, params: Any, moe_layers: Iterable[str], start_step: int) -> 'Frozen':
        """What is held still.

        Args:
          params: nested dict, abstract or not.
          moe_layers: paths of the MoE layers.
          start_step: of the run.

        Raises:
          UserError: nothing would be trained.
        """
        paths = list(flatten_dict(params, sep='/'))
        if self.names == ALL:
            return Frozen()
        if self.names == MOE:
            layers = tuple(f'{layer}/' for layer in moe_layers)
            trained = [path for path in paths if path.startswith(layers)]
        else:
            pattern = r'(^|/)router/' if self.names == ROUTERS else self.names
            trained = [path for path in paths if re.search(pattern, path)]
        if not trained:
            raise UserError(f'TRAINABLE = {self.names!r} names no parameter of the model: nothing would be trained.')
        return Frozen(frozenset(paths) - frozenset(trained), None if self.steps is None else start_step + self.steps)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that are held still.

    Attributes:
      paths: of the parameters.
      until: the step at which they are let go; None: never.
    """

    paths: frozenset[str] = frozenset()
    until: int | None = None

    def stop(self, grads: Any, step: jax.Array) -> Any:
        """Their gradients become 0, so that they count neither in a norm nor in what is clipped by one."""
        flat = flatten_dict(grads, sep='/')
        stopped = {
            path: self._hold(jnp.zeros_like(flat[path]), flat[path], step) for path in flat if path in self.paths
        }
        return unflatten_dict(flat | stopped, sep='/') if stopped else grads

    def restore(self, old: Any, new: Any, step: jax.Array) -> Any:
        """Undoes the update of them or of their optimizer's states: no gradient is not no update, with momentum or decay."""
        before, after = flatten_dict(old, sep='/'), flatten_dict(new, sep='/')
        names = [path for path in after if path in self.paths or _parameter(path) in self.paths]
        restored = {path: self._hold(before[path], after[path], step) for path in names}
        return unflatten_dict(after | restored, sep='/') if restored else new

    def _hold(self, held: jax.Array, free: jax.Array, step: jax.Array) -> jax.Array:
        return held if self.until is None else jnp.where(step < self.until, held, free)


def _parameter(path: str) -> str:
    """The parameter that a leaf of the optimizer's state belongs to."""
    return path.removeprefix('param_states/').rpartition('/')[0]


NOTHING = Frozen()
