"""The receipt of a surgery, saved as JSON with the checkpoint: sources, options, and the function check."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
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
    plan: Plan,
    *,
    source: Mapping[str, Any],
    hashes: Mapping[str, str],
    lineages: Mapping[str, Lineage],
    prompts: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Makes the receipt, with the function check pending.

    Args:
      plan: the executed plan.
      source: path, format and step of the dense checkpoint.
      hashes: sha256 of each leaf that was read.
      lineages: the lineage of each MLP; recorded if there is more than one source MLP.
      prompts: path and sha256 of the experts' files of prompts.
    """
    spec = plan.spec
    optional: dict[str, Any] = {}
    if spec.router_init in INHERITED:
        optional['router_noise'] = spec.router_noise
    if prompts:
        optional['router_prompts'] = [dict(file) for file in prompts]
    if spec.operator is not None and spec.operator.starts_from is not Start.DENSE:
        optional['lineage'] = {mlp: [list(parents) for parents in lineage] for mlp, lineage in lineages.items()}
    return {
        'tool': f'upcycle {upcycle.__version__}',
        'source': dict(source),
        'operator': spec.made_by.name,
        'operator_options': dataclasses.asdict(spec.made_by),
        'router_init': f'{spec.router_init}({spec.router_stddev})',
        'optimizer_state': str(spec.optimizer_state),
        'seed': spec.seed,
        **optional,
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
    """Updates the receipt of a checkpoint for a run whose plan makes no experts.

    Rows change for a new head, resized positions and added router state; all others are kept.
    """
    made = {row['target']: row for row in receipt['plan']}
    rows = [
        made[row.target] if row.action is Action.KEEP and row.target in made else _as_json(row) for row in plan.rows
    ]
    return {**receipt, 'plan': rows}


def mismatches(receipt: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """Lists the differences in names and shapes between a checkpoint's parameters and its receipt."""
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
    """Comparison of an MoE layer with its source on the dense model's activations.

    The source is the dense MLP, or the smaller MoE layer that it grew from, with w = 1.

    Attributes:
      covered: fraction of real tokens that at least one expert takes.
      max_abs_difference_covered: largest |MoE - w * MLP| over covered tokens. w is the token's sum of combine weights, shared
        experts included; with normalised weights w is 1, and this is the distance to the dense MLP.
      max_abs_on_uncovered: the same over uncovered tokens, where w is 0 unless an expert is shared.
      ratio: |MoE| / |MLP| over covered tokens (norms), about the mean of w.
      dense_rms: root mean square of the dense MLP's output, as a scale for the differences.
      gap: |MoE - MLP| / |MLP| over all real tokens (norms).
    """

    covered: float
    max_abs_difference_covered: float
    max_abs_on_uncovered: float
    ratio: float
    dense_rms: float
    gap: float


def reported(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of a function check, or why it failed. A failing check never stops a run."""
    try:
        return check()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '') or type(error).__name__
        print(f'the model is not compared with its source: {reason}', file=sys.stderr, flush=True)
        # Not pending any more: training now changes what the surgery made.
        return dict.fromkeys(('whole_model', 'layers'), f'not compared: {reason}')


def check_function(
    model: Model,
    dense_params: Params,
    sparse_params: Params,
    batch: Mapping[str, jax.Array],
    source: Model | None = None,
) -> dict[str, Any]:
    """Compares the upcycled model with its source, layer by layer and as a whole.

    Across layers, uncovered tokens influence covered ones through attention, so the gap of the whole model is only reported.

    Args:
      model: the sparse model.
      dense_params: parameters of the source: arrays, or `streamed.Unread`, which devices hold one layer at a time.
      sparse_params: parameters of `model`.
      batch: any batch; evaluation capacity is used.
      source: the source model, which may have experts; None: `model.dense()`.

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
        # Free this layer's activations before the next ones are computed.
        del value
    whole['sparse_loss'] = float(loss(sparse_params, batch))
    whole['loss_gap'] = whole['sparse_loss'] - whole['dense_loss']
    return {'layers': layers, 'whole_model': whole}


LOSS = 'loss'


def function_checks(model: Model, source: Model) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Builds the programs of `check_function`.

    Returns:
      loss: (model parameters, batch) -> loss.
      source_results: (source parameters, batch) -> loss and the activations of its MLPs at the model's MoE layers; for streaming.
      compare: (path, parameters of the MoE layer, activations) -> the values of `LayerCheck`.
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
    """Path of the first MoE layer of the same kind, so that layers share compiled programs."""
    layers = model.moe_layers()
    return next(other for other in layers if layers[other] == layers[path])


def check_layer(
    model: Model, path: str, dense: Mapping[str, jax.Array], sparse: Mapping[str, jax.Array], num_tokens: int
) -> LayerCheck:
    """Compares one MoE layer with its dense MLP on seeded normal activations in float32.

    Args:
      model: the sparse model.
      path: path of the layer.
      dense: leaves of the dense MLP by name within it, such as 'wi_0/kernel'.
      sparse: leaves of the layer by name within it: 'expert/wi_0/kernel', 'router/router_weights/w/kernel'.
      num_tokens: number of tokens, all in one group.
    """
    values = _check_layer(*_arguments(model, path, dense, sparse, num_tokens))
    return LayerCheck(*(float(value) for value in values))


def compile_check(
    model: Model,
    path: str,
    dense: Mapping[str, jax.ShapeDtypeStruct],
    sparse: Mapping[str, jax.ShapeDtypeStruct],
    num_tokens: int,
) -> None:
    """Compiles `check_layer` for leaves of these shapes, so that the first call is as quick as later ones."""
    _check_layer.lower(*_arguments(model, path, dense, sparse, num_tokens)).compile()


def _arguments(
    model: Model, path: str, dense: Mapping[str, Any], sparse: Mapping[str, Any], num_tokens: int
) -> tuple[Any, ...]:
    width = next(leaf.shape[0] for name, leaf in sparse.items() if name.startswith('router/') and len(leaf.shape) == 2)
    kernel = next(leaf.shape for leaf in dense.values() if len(leaf.shape) == 2)
    mlp_dim = kernel[1] if kernel[0] == width else kernel[0]
    return model, _first_alike(model, path), (num_tokens, width, mlp_dim), dict(dense), dict(sparse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _check_layer(
    model: Model,
    path: str,
    sizes: tuple[int, int, int],
    dense: Mapping[str, jax.Array],
    sparse: Mapping[str, jax.Array],
):
    num_tokens, width, mlp_dim = sizes
    layer = model.with_dtype('float32').moe_module(path)
    layer = layer.clone(config=dataclasses.replace(layer.config, group_size=num_tokens, groups_multiple_of=1))
    mlp = layer.expert(**{**layer.expert_arguments, 'mlp_dim': mlp_dim})
    sparse = unflatten_dict(dict(sparse), sep='/')
    dense = unflatten_dict({name: leaf.astype(jnp.float32) for name, leaf in dense.items()}, sep='/')
    x_BxLxD = jax.random.normal(jax.random.key(0), (1, num_tokens, width), jnp.float32)
    y_BxLxD = mlp.apply({'params': dense}, x_BxLxD, False)
    return _compare(layer, sparse, x_BxLxD, y_BxLxD, jnp.ones(x_BxLxD.shape[:2], bool), of_mlp=True)


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

    # The output of an MoE layer is already weighted.
    difference_BxLxD = moe_BxLxD - (weight_BxL[..., None] if of_mlp else 1.0) * y_BxLxD
    return (
        covered_BxL.sum() / jnp.maximum(real_BxL.sum(), 1),
        largest(difference_BxLxD, covered_BxL),
        largest(difference_BxLxD, uncovered_BxL),
        norm(moe_BxLxD, covered_BxL) / jnp.maximum(norm(y_BxLxD, covered_BxL), 1e-30),
        jnp.sqrt(jnp.mean(jnp.square(y_BxLxD))),
        norm(moe_BxLxD - y_BxLxD, real_BxL) / jnp.maximum(norm(y_BxLxD, real_BxL), 1e-30),
    )
