"""How different the experts of each MoE layer are."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from upcycle.data import DataSource
from upcycle.errors import UserError
from upcycle.evaluate import token_statistics
from upcycle.evaluate.protocol import Evaluator, Subject
from upcycle.models import Model, Params
from upcycle.moe.groups import layer_name
from upcycle.schema import Count


@dataclasses.dataclass(frozen=True)
class Diversity(Evaluator):
    """Cosines between experts, and which tokens of the first evaluation batch each of them gets.

    Attributes:
      period: training steps between evaluations [DIVERSITY_PERIOD].
    """

    period: Count
    name: ClassVar[str] = 'diversity'
    at_start: ClassVar[bool] = True
    of_checkpoints: ClassVar[bool] = False

    def check(self, model: Model, data: DataSource | None) -> None:
        """Raises UserError unless the model has experts."""
        if not model.moe_layers():
            raise UserError('DIVERSITY_PERIOD is set, but the model has no experts: remove it.')

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, Any]]:
        """See `diversity` and `token_statistics`."""
        cosines = compiled(subject.model.moe_layers())
        has_statistics = subject.data is not None and token_statistics.layers_of(subject.model)
        statistics = token_statistics.compiled(subject.model) if has_statistics else None

        def evaluate(params: Params) -> dict[str, Any]:
            metrics = jax.device_get(cosines(params))
            if statistics is not None:
                values = jax.device_get(statistics(params, next(subject.batches(self.name))))
                metrics |= token_statistics.in_words(values, subject.data)
            return metrics

        return evaluate


def compiled(paths: Sequence[str]) -> Callable[[Params], dict[str, jax.Array]]:
    """Compiles `diversity` of the MoE layers at these paths, as a function of the parameters."""
    return jax.jit(functools.partial(diversity, paths=tuple(paths)))


def diversity(params: Any, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Computes cosines between the experts of a layer and between the columns of its router. An expert is one vector.

    Args:
      params: nested dict.
      paths: of the MoE layers.

    Returns:
      For each layer `experts/LAYER/expert_cosine`, the mean over pairs, `.../expert_cosine_largest`, the most similar pair's,
      and `.../router_cosine`; without LAYER the means over layers. Copies have cosine 1.
    """
    by_layer: dict[str, dict[str, jax.Array]] = {}
    for path in paths:
        layer = functools.reduce(dict.__getitem__, path.split('/'), params)
        # Leaf by leaf, so that the devices gather at most one leaf of all experts at a time.
        gram_ExE = sum(_gram(leaf_ExN) for leaf_ExN in jax.tree.leaves(layer['expert']))
        mean, largest = _pairs(gram_ExE)
        values = by_layer[layer_name(path)] = {'expert_cosine': mean, 'expert_cosine_largest': largest}
        if 'router' in layer:
            kernel_DxN = layer['router']['router_weights']['w']['kernel']
            # Soft MoE has several columns per expert: they form one vector.
            values['router_cosine'], _ = _pairs(_gram(kernel_DxN.T.reshape(gram_ExE.shape[0], -1)))
    metrics = {f'experts/{layer}/{name}': value for layer, values in by_layer.items() for name, value in values.items()}
    for name in next(iter(by_layer.values())):
        metrics[f'experts/{name}'] = sum(values[name] for values in by_layer.values()) / len(by_layer)
    return metrics


def _gram(leaf_ExN: jax.Array) -> jax.Array:
    """Returns the inner products of the experts' slices of a leaf, (E, E)."""
    flat_ExN = leaf_ExN.reshape(leaf_ExN.shape[0], -1).astype(jnp.float32)
    return jnp.einsum('en,fn->ef', flat_ExN, flat_ExN, precision='highest')


def _pairs(gram_ExE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the largest cosine of two different experts."""
    E = gram_ExE.shape[0]
    norm_E = jnp.sqrt(jnp.maximum(jnp.diag(gram_ExE), 1e-30))
    cosine_ExE = gram_ExE / norm_E / norm_E[:, None]
    different_ExE = ~jnp.eye(E, dtype=bool)
    mean = jnp.where(different_ExE, cosine_ExE, 0.0).sum() / max(E * (E - 1), 1)
    return mean, jnp.where(different_ExE, cosine_ExE, -1.0).max()
