"""Training a subset of the parameters: routers, experts, MoE layers, or those that a pattern matches."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle import schema
from upcycle.errors import UserError
from upcycle.schema import Count

ALL, MOE = 'all', 'moe_layers'
# Names of patterns.
PATTERNS = {'routers': r'(^|/)(router|shared_gate)/', 'experts': r'(^|/)(expert|shared)/'}


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Which parameters are trained. Gin macros in brackets.

    Attributes:
      names: 'all'; 'routers', with the gates of shared experts; 'experts', with shared ones; 'moe_layers' (both); or a regular
        expression, searched in each parameter's path [TRAINABLE].
      steps: number of steps after which all parameters are trained; None: never [TRAINABLE_STEPS].
    """

    names: str = ALL
    steps: Count | None = None

    def __post_init__(self):
        schema.validate(self, {'names': 'TRAINABLE', 'steps': 'TRAINABLE_STEPS'})
        try:
            re.compile(self.names)
        except re.error as error:
            raise UserError(f'TRAINABLE = {self.names!r} is not a regular expression: {error}.') from error
        if self.steps is not None and self.names == ALL:
            raise UserError("TRAINABLE_STEPS has no effect with TRAINABLE = 'all': remove one of them.")

    def frozen(self, params: Any, moe_layers: Iterable[str], start_step: int) -> 'Frozen':
        """Returns the frozen parameters.

        Args:
          params: nested dict, abstract or concrete.
          moe_layers: paths of the MoE layers.
          start_step: first step of the run.

        Raises:
          UserError: no parameter would be trained.
        """
        paths = list(flatten_dict(params, sep='/'))
        if self.names == ALL:
            return Frozen()
        if self.names == MOE:
            layers = tuple(f'{layer}/' for layer in moe_layers)
            trained = [path for path in paths if path.startswith(layers)]
        else:
            pattern = PATTERNS.get(self.names, self.names)
            trained = [path for path in paths if re.search(pattern, path)]
        if not trained:
            raise UserError(f'TRAINABLE = {self.names!r} matches no parameter of the model: nothing would be trained.')
        return Frozen(frozenset(paths) - frozenset(trained), None if self.steps is None else start_step + self.steps)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Frozen parameters.

    Attributes:
      paths: of the parameters.
      until: the step from which they are trained; None: never.
    """

    paths: frozenset[str] = frozenset()
    until: int | None = None

    def stop(self, grads: Any, step: jax.Array) -> Any:
        """Sets their gradients to 0, so that they do not count in the gradient's norm or its clipping."""
        flat = flatten_dict(grads, sep='/')
        stopped = {
            path: self._hold(jnp.zeros_like(flat[path]), flat[path], step) for path in flat if path in self.paths
        }
        return unflatten_dict(flat | stopped, sep='/') if stopped else grads

    def restore(self, old: Any, new: Any, step: jax.Array) -> Any:
        """Undoes updates of them and of their optimizer state: momentum and decay also update without a gradient."""
        before, after = flatten_dict(old, sep='/'), flatten_dict(new, sep='/')
        names = [path for path in after if path in self.paths or _parameter(path) in self.paths]
        restored = {path: self._hold(before[path], after[path], step) for path in names}
        return unflatten_dict(after | restored, sep='/') if restored else new

    def _hold(self, held: jax.Array, free: jax.Array, step: jax.Array) -> jax.Array:
        return held if self.until is None else jnp.where(step < self.until, held, free)


def _parameter(path: str) -> str:
    """Returns the parameter that a leaf of the optimizer state belongs to."""
    return path.removeprefix('param_states/').rpartition('/')[0]


NOTHING = Frozen()
