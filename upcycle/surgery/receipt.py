"""The receipt of a surgery: what was made from what, and whether the function survived, as JSON beside the checkpoint."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

import upcycle
from upcycle.models import Model, Params
from upcycle.models.activations import forward_and_activations
from upcycle.moe.routing import covered_tokens
from upcycle.streamed import streamed
from upcycle.surgery.operators import Lineage, Start
from upcycle.surgery.plan import Action, Plan, Row
from upcycle.surgery.router_init import INHERITED


def make_receipt(
    plan: Plan, *, source: Mapping[str, Any], hashes: Mapping[str, str], lineages: Mapping[str, Lineage]
) -> dict[str, Any]:
    """The receipt before the function check.

    Args:
      plan: that was carried out.
      source: path, format and step of the dense checkpoint.
      hashes: sha256 of each leaf that was read.
      lineages: of each MLP, what its experts were made of; said where they differ in that.
    """
    spec = plan.spec
    several = spec.operator is not None and spec.operator.starts_from is not Start.DENSE
    from_router = {'router_noise': spec.router_noise} if spec.router_init in INHERITED else {}
    return {
        'tool': f'upcycle {upcycle.__version__}',
        'source': dict(source),
        'operator': spec.made_by.name,
        'operator_options': dataclasses.asdict(spec.made_by),
        'router_init': f'{spec.router_init}({spec.router_stddev})',
        **from_router,
        'optimizer_state': str(spec.optimizer_state),
        'seed': spec.seed,
        **(
            {'lineage': {mlp: [list(made_of) for made_of in lineage] for mlp, lineage in lineages.items()}}
            if several
            else {}
        ),
        'plan': [_as_json(row) for row in plan.rows],
        'dropped': dict(plan.dropped),
        'sha256': dict(hashes),
        'function_check': {'whole_model': 'pending', 'layers': 'pending'},
    }


def _as_json(row: Row) -> dict[str, Any]:
    return {
        'target': row.target,
        'sources': list(row.sources),
        'action': str(row.action),
        'shape': list(row.shape),
        'dtype': str(jnp.dtype(row.dtype)),
    }


def carried_on(receipt: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The receipt of a checkpoint that a run goes on with by a plan that makes no experts: a new head, other positions, router
    state that a recipe adds. The other rows stay."""
    made = {row['target']: row for row in receipt['plan']}
    rows = [
        made[row.target] if row.action is Action.KEEP and row.target in made else _as_json(row) for row in plan.rows
    ]
    return {**receipt, 'plan': rows}


def mismatches(receipt: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's parameters differ from those that its receipt says were made: names and shapes."""
    try:
        made = {row['target']: tuple(row['shape']) for row in receipt['plan'] if row['target'].startswith('params/')}
    except (KeyError, TypeError, AttributeError) as error:
        return [f'the receipt is damaged ({error!r})']
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
    """One MoE layer against the dense MLP it came from, on the dense model's own activations; or, where it grew out of a smaller
    MoE layer, against that, with 1 for w.

    Attributes:
      covered: share of the real tokens that some expert took.
      max_abs_difference_covered: largest |MoE - w * MLP| over covered tokens, where w is the token's sum of combine weights, that
        of shared experts included; with normalised weights w is 1, so this is the distance to the dense MLP.
      max_abs_on_uncovered: the same over uncovered tokens, where w is 0 unless an expert is shared.
      ratio: |MoE| / |MLP| over covered tokens (norms); about the mean sum of weights.
      dense_rms: root mean square of the dense MLP's output, to read the differences against.
      gap: |MoE - MLP| / |MLP| over all real tokens (norms).
    """

    covered: float
    max_abs_difference_covered: float
    max_abs_on_uncovered: float
    ratio: float
    dense_rms: float
    gap: float


def reported(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A function check, or why there is none: it is a report, and whatever goes wrong in it ends no run."""
    try:
        return check()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '') or type(error).__name__
        print(f'the model is not compared with its source: {reason}', file=sys.stderr, flush=True)
        # No longer pending: what is trained from here on is not what the surgery made.
        return dict.fromkeys(('whole_model', 'layers'), f'not compared: {reason}')


def check_function(
    model: Model,
    dense_params: Params,
    sparse_params: Params,
    batch: Mapping[str, jax.Array],
    source: Model | None = None,
) -> dict[str, Any]:
    """Layer by layer, and as a whole: does the upcycled model compute what the one does that it was made of?

    Beyond one layer uncovered tokens reach covered ones through attention, so the whole model's gap is a report, not a test.

    Args:
      model: the sparse model.
      dense_params: of the source: arrays, or `streamed.Unread`, of which devices hold one layer's at a time.
      sparse_params: of `model`.
      batch: any batch; evaluation capacity is used.
      source: None: `model.dense()`; or a model with fewer experts, or any other one.

    Returns:
      {'layers': {path: LayerCheck as a dict}, 'whole_model': {...}}.
    """
    loss, source_results, compare = function_checks(model, model.dense() if source is None else source)
    layers, whole = {}, {}
    for name, value in streamed(source_results, dense_params, batch):
        if name == LOSS:
            whole['dense_loss'] = float(value)
        else:
            values = compare(name, _below(sparse_params, name), *value)
            layers[name] = dataclasses.asdict(LayerCheck(*(float(value) for value in values)))
        # Else this layer's activations would be held while the next one's are computed.
        del value
    whole['sparse_loss'] = float(loss(sparse_params, batch))
    whole['loss_gap'] = whole['sparse_loss'] - whole['dense_loss']
    return {'layers': layers, 'whole_model': whole}


LOSS = 'loss'


def function_checks(model: Model, source: Model) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The programs of `check_function`.

    Returns:
      The loss of the model, (parameters, batch) -> scalar; to be streamed, from the source's parameters and the batch to its loss
      and the activations of its MLPs at the paths of the model's MoE layers; and (path, the MoE layer's parameters, activations)
      -> the values of `LayerCheck`.
    """
    layers = model.moe_layers()

    def mean(sums: Mapping[str, jax.Array]) -> jax.Array:
        return (sums['loss'] - sums['z_loss']) / jnp.maximum(sums['weight'], 1e-9)

    @jax.jit
    def loss(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        return mean(model.forward(params, batch, None, training=False, num_microbatches=1)[0])

    def source_results(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        sums, activations = forward_and_activations(source, params, batch, tuple(layers))
        return {LOSS: mean(sums), **activations}

    @functools.partial(jax.jit, static_argnums=0)
    def compare_kind(path: str, *arguments: Any) -> tuple[jax.Array, ...]:
        return _compare(model.moe_module(path), *arguments, of_mlp=not source.moe_layers())

    return loss, source_results, lambda path, *arguments: compare_kind(_first_alike(model, path), *arguments)


def _first_alike(model: Model, path: str) -> str:
    """The first MoE layer of the same kind, whose program this one can share."""
    layers = model.moe_layers()
    return next(other for other in layers if layers[other] == layers[path])


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
    width = next(leaf.shape[0] for name, leaf in sparse.items() if name.startswith('router/') and leaf.ndim == 2)
    mlp_dim = next(size for leaf in dense.values() if leaf.ndim == 2 for size in _without(leaf.shape, width))
    sizes = (num_tokens, width, mlp_dim)
    kind = _first_alike(model, path)
    values = _check_layer(model, kind, sizes, unflatten_dict(dense, sep='/'), unflatten_dict(sparse, sep='/'))
    return LayerCheck(*(float(value) for value in values))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _check_layer(model: Model, path: str, sizes: tuple[int, int, int], dense: Params, sparse: Params):
    num_tokens, width, mlp_dim = sizes
    layer = model.with_dtype('float32').moe_module(path)
    layer = layer.clone(config=dataclasses.replace(layer.config, group_size=num_tokens, groups_multiple_of=1))
    mlp = layer.expert(**{**layer.expert_arguments, 'mlp_dim': mlp_dim})
    dense = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense)
    x_BxLxD = jax.random.normal(jax.random.key(0), (1, num_tokens, width), jnp.float32)
    y_BxLxD = mlp.apply({'params': dense}, x_BxLxD, False)
    return _compare(layer, sparse, x_BxLxD, y_BxLxD, jnp.ones(x_BxLxD.shape[:2], bool), of_mlp=True)


def _without(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A matrix's other axis."""
    return shape[1:] if shape[0] == size else shape[:1]


def _below(params: Params, path: str) -> Params:
    for segment in path.split('/'):
        params = params[segment]
    return params


def _compare(layer: nn.Module, params: Params, x_BxLxD, y_BxLxD, real_BxL, *, of_mlp: bool) -> tuple[jax.Array, ...]:
    moe_BxLxD, written = layer.apply({'params': params}, x_BxLxD, real_BxL, training=False, mutable=['intermediates'])
    (routing,) = written['intermediates']['routing']
    (weight_BxL,) = written['intermediates']['token_weight']
    S = real_BxL.size // routing[0].shape[0]
    covered_BxL = covered_tokens(routing, S).reshape(real_BxL.shape) & real_BxL
    uncovered_BxL = real_BxL & ~covered_BxL
    moe_BxLxD, y_BxLxD = moe_BxLxD.astype(jnp.float32), y_BxLxD.astype(jnp.float32)

    def largest(difference_BxLxD, where_BxL):
        return jnp.max(jnp.abs(difference_BxLxD) * where_BxL[..., None])

    def norm(z_BxLxD, where_BxL):
        return jnp.sqrt(jnp.sum(jnp.square(z_BxLxD * where_BxL[..., None])))

    # The output of an MoE layer is weighted already.
    difference_BxLxD = moe_BxLxD - (weight_BxL[..., None] if of_mlp else 1.0) * y_BxLxD
    return (
        covered_BxL.sum() / jnp.maximum(real_BxL.sum(), 1),
        largest(difference_BxLxD, covered_BxL),
        largest(difference_BxLxD, uncovered_BxL),
        norm(moe_BxLxD, covered_BxL) / jnp.maximum(norm(y_BxLxD, covered_BxL), 1e-30),
        jnp.sqrt(jnp.mean(jnp.square(y_BxLxD))),
        norm(moe_BxLxD - y_BxLxD, real_BxL) / jnp.maximum(norm(y_BxLxD, real_BxL), 1e-30),
    )
