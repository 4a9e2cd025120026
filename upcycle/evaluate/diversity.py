"""How far the experts of each MoE layer have come apart."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from upcycle.data import DataSource
from upcycle.errors import UserError
from upcycle.evaluate import token_statistics
from upcycle.evaluate.protocol import Subject
from upcycle.models import Model, Params
from upcycle.schema import Count


@dataclasses.dataclass(frozen=True)
class Diversity:
    """An evaluator (see `evaluate.protocol`): cosines between experts, and what each reads of the first evaluation batch.

    Attributes:
      period: steps between evaluations [DIVERSITY_PERIOD].
    """

    period: Count
    name: ClassVar[str] = 'diversity'
    at_start: ClassVar[bool] = True
    of_checkpoints: ClassVar[bool] = False

    def check(self, model: Model, data: DataSource | None) -> None:
        """Raises UserError unless the model has experts."""
        if not model.moe_layers():
            raise UserError('DIVERSITY_PERIOD is set, and the model has no experts: leave it at None.')

    def check_data(self, data: DataSource | None) -> None:
        """It was there when the run was built."""

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, Any]]:
        """See `diversity` and `token_statistics`."""
        cosines = compiled(subject.model.moe_layers())
        read = None
        if subject.data is not None and token_statistics.layers_of(subject.model):
            read = token_statistics.compiled(subject.model)

        def evaluate(params: Params) -> dict[str, Any]:
            found = jax.device_get(cosines(params))
            if read is not None:
                statistics = jax.device_get(read(params, next(subject.batches(self.name))))
                found |= token_statistics.in_words(statistics, subject.data)
            return found

        return evaluate


def compiled(paths: Sequence[str]) -> Callable[[Params], dict[str, jax.Array]]:
    """`diversity` of the MoE layers at these paths, ready to be called on parameters."""
    return jax.jit(functools.partial(diversity, paths=tuple(paths)))


def diversity(params: Any, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Cosines between the experts of a layer, all their parameters one vector, and between the columns of its router.

    Args:
      params: nested dict.
      paths: of the MoE layers.

    Returns:
      For each layer `experts/LAYER/expert_cosine`, the mean over pairs, `.../expert_cosine_largest`, of the most similar pair,
      and `.../router_cosine`; without LAYER the means over layers. Copies have 1.
    """
    by_layer: dict[str, dict[str, jax.Array]] = {}
    for path in paths:
        layer = functools.reduce(dict.__getitem__, path.split('/'), params)
        # Leaf by leaf, so that no more than one is gathered from the devices that share the experts.
        gram_ExE = sum(_gram(leaf_ExN) for leaf_ExN in jax.tree.leaves(layer['expert']))
        mean, largest = _pairs(gram_ExE)
        values = by_layer[path.rpartition('/')[0]] = {'expert_cosine': mean, 'expert_cosine_largest': largest}
        if 'router' in layer:
            kernel_DxN = layer['router']['router_weights']['w']['kernel']
            # Soft MoE has several columns an expert: theirs are one vector.
            values['router_cosine'], _ = _pairs(_gram(kernel_DxN.T.reshape(gram_ExE.shape[0], -1)))
    found = {f'experts/{layer}/{name}': value for layer, values in by_layer.items() for name, value in values.items()}
    for name in next(iter(by_layer.values())):
        found[f'experts/{name}'] = sum(values[name] for values in by_layer.values()) / len(by_layer)
    return found


def _gram(leaf_ExN: jax.Array) -> jax.Array:
    """Inner products of the experts' parts of a leaf, (E, E)."""
    flat_ExN = leaf_ExN.reshape(leaf_ExN.shape[0], -1).astype(jnp.float32)
    return jnp.einsum('en,fn->ef', flat_ExN, flat_ExN, precision='highest')


def _pairs(gram_ExE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and largest cosine of two different ones."""
    E = gram_ExE.shape[0]
    norm_E = jnp.sqrt(jnp.maximum(jnp.diag(gram_ExE), 1e-30))
    cosine_ExE = gram_ExE / norm_E / norm_E[:, None]
    different_ExE = ~jnp.eye(E, dtype=bool)
    mean = jnp.where(different_ExE, cosine_ExE, 0.0).sum() / max(E * (E - 1), 1)
    return mean, jnp.where(different_ExE, cosine_ExE, -1.0).max()
