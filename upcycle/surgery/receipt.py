"""The receipt of a surgery: what was made from what, and whether the function survived, as JSON beside the checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

import upcycle
from upcycle.models import Model, Params
from upcycle.moe.router import covered_tokens, token_sums
from upcycle.surgery.plan import Plan


def receipt(plan: Plan, *, source: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """The receipt before the function check.

    Args:
      plan: that was carried out.
      source: path, format and step of the dense checkpoint.
      hashes: sha256 of each leaf that was read.
    """
    spec = plan.spec
    return {
        'tool': f'upcycle {upcycle.__version__}',
        'source': dict(source),
        'operator': spec.operator.name,
        'operator_options': dataclasses.asdict(spec.operator),
        'router_init': f'{spec.router_init}({spec.router_stddev})',
        'optimizer_state': str(spec.optimizer_state),
        'seed': spec.seed,
        'plan': [
            {
                'target': row.target,
                'sources': list(row.sources),
                'action': str(row.action),
                'shape': list(row.shape),
                'dtype': str(jnp.dtype(row.dtype)),
            }
            for row in plan.rows
        ],
        'dropped': dict(plan.dropped),
        'sha256': dict(hashes),
        'function_check': {'whole_model': 'pending', 'layers': 'pending'},
    }


def mismatches(paper: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's parameters differ from those that its receipt says were made: names and shapes."""
    made = {row['target']: tuple(row['shape']) for row in paper['plan'] if row['target'].startswith('params/')}
    stored = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name.startswith('params/')}
    return [
        *(f'{name} {made[name]} is in the receipt only' for name in made if name not in stored),
        *(f'{name} {stored[name]} is in the checkpoint only' for name in stored if name not in made),
        *(
            f'{name} is {made[name]} in the receipt and {stored[name]} in the checkpoint'
            for name in made
            if name in stored and stored[name] != made[name]
        ),
    ]


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One MoE layer against the dense MLP it came from, on the dense model's own activations.

    Attributes:
      covered: share of the real tokens that some expert took.
      max_abs_difference_covered: largest |MoE - w * MLP| over covered tokens, where w is the token's sum of combine weights;
        with normalised weights w is 1, so this is the distance to the dense MLP.
      max_abs_on_uncovered: largest |MoE| over uncovered tokens.
      ratio: |MoE| / |MLP| over covered tokens (norms); about the mean sum of weights.
      dense_rms: root mean square of the dense MLP's output, to read the differences against.
    """

    covered: float
    max_abs_difference_covered: float
    max_abs_on_uncovered: float
    ratio: float
    dense_rms: float


def check_function(
    model: Model, dense_params: Params, sparse_params: Params, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Layer by layer, and as a whole: does the upcycled model compute what the dense one does?

    Beyond one layer uncovered tokens reach covered ones through attention, so the whole model's gap is a report, not a test.

    Args:
      model: the sparse model.
      dense_params: of `model.dense()`.
      sparse_params: of `model`.
      batch: any batch; evaluation capacity is used.

    Returns:
      {'layers': {path: LayerCheck as a dict}, 'whole_model': {...}}.
    """
    dense = model.dense()

    @jax.jit
    def layers(dense_params, sparse_params, batch):
        io = model.mlp_activations(dense_params, batch, tuple(model.moe_layers()))
        return {path: _compare(model.moe_module(path), _below(sparse_params, path), *io[path]) for path in io}

    @jax.jit
    def losses(dense_params, sparse_params, batch):
        out = {}
        for name, which, params in (('dense', dense, dense_params), ('sparse', model, sparse_params)):
            sums, _, _ = which.forward(params, batch, None, training=False, num_microbatches=1)
            out[f'{name}_loss'] = (sums['loss'] - sums['z_loss']) / jnp.maximum(sums['weight'], 1e-9)
        return out

    whole = {name: float(value) for name, value in losses(dense_params, sparse_params, batch).items()}
    whole['loss_gap'] = whole['sparse_loss'] - whole['dense_loss']
    checked = layers(dense_params, sparse_params, batch)
    return {
        'layers': {
            path: dataclasses.asdict(LayerCheck(*(float(value) for value in values)))
            for path, values in checked.items()
        },
        'whole_model': whole,
    }


def check_layer(
    model: Model, path: str, dense: Mapping[str, jax.Array], sparse: Mapping[str, jax.Array], num_tokens: int
) -> LayerCheck:
    """One MoE layer on its own, on seeded normal activations in float32.

    Args:
      model: the sparse model.
      path: of the layer.
      dense: leaves of the dense MLP by their names within it: 'wi_0/kernel'.
      sparse: leaves of the layer by theirs: 'expert/wi_0/kernel', 'router/router_weights/w/kernel'.
      num_tokens: of the activations, all in one group.
    """
    layers = model.moe_layers()
    # Layers of one kind share a program.
    alike = next(other for other in layers if layers[other] == layers[path])
    width = next(leaf.shape[0] for name, leaf in sparse.items() if name.startswith('router/') and leaf.ndim == 2)
    mlp_dim = next(size for leaf in dense.values() if leaf.ndim == 2 for size in _without(leaf.shape, width))
    sizes = (num_tokens, width, mlp_dim)
    values = _check_layer(model, alike, sizes, unflatten_dict(dense, sep='/'), unflatten_dict(sparse, sep='/'))
    return LayerCheck(*(float(value) for value in values))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _check_layer(model: Model, path: str, sizes: tuple[int, int, int], dense: Params, sparse: Params):
    num_tokens, width, mlp_dim = sizes
    exact = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype='float32'))
    layer = exact.moe_module(path)
    layer = layer.clone(config=dataclasses.replace(layer.config, group_size=num_tokens, groups_multiple_of=1))
    mlp = layer.expert(**{**layer.expert_arguments, 'mlp_dim': mlp_dim})
    dense = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense)
    x_BxLxD = jax.random.normal(jax.random.key(0), (1, num_tokens, width), jnp.float32)
    y_BxLxD = mlp.apply({'params': dense}, x_BxLxD, False)
    return _compare(layer, sparse, x_BxLxD, y_BxLxD, jnp.ones(x_BxLxD.shape[:2], bool))


def _without(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A matrix's other axis."""
    return shape[1:] if shape[0] == size else shape[:1]


def _below(params: Params, path: str) -> Params:
    for segment in path.split('/'):
        params = params[segment]
    return params


def _compare(layer: nn.Module, params: Params, x_BxLxD, y_BxLxD, real_BxL) -> tuple[jax.Array, ...]:
    moe_BxLxD, written = layer.apply({'params': params}, x_BxLxD, real_BxL, training=False, mutable=['intermediates'])
    (routing,) = written['intermediates']['routing']
    S = real_BxL.size // routing[0].shape[0]
    covered_BxL = covered_tokens(routing, S).reshape(real_BxL.shape) & real_BxL
    weight_BxL = token_sums(routing, S).reshape(real_BxL.shape)
    uncovered_BxL = real_BxL & ~covered_BxL
    moe_BxLxD, y_BxLxD = moe_BxLxD.astype(jnp.float32), y_BxLxD.astype(jnp.float32)

    def largest(difference_BxLxD, where_BxL):
        return jnp.max(jnp.abs(difference_BxLxD) * where_BxL[..., None])

    def norm(z_BxLxD):
        return jnp.sqrt(jnp.sum(jnp.square(z_BxLxD * covered_BxL[..., None])))

    return (
        covered_BxL.sum() / jnp.maximum(real_BxL.sum(), 1),
        largest(moe_BxLxD - weight_BxL[..., None] * y_BxLxD, covered_BxL),
        largest(moe_BxLxD, uncovered_BxL),
        norm(moe_BxLxD) / jnp.maximum(norm(y_BxLxD), 1e-30),
        jnp.sqrt(jnp.mean(jnp.square(y_BxLxD))),
    )
