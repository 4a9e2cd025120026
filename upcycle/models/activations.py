"""Inputs and outputs of the MLPs of a model of any family."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from upcycle.models import Model, Params

# Input and output of an MLP or MoE layer, both (B, L, D), and which tokens are real, bool (B, L).
Activations = tuple[jax.Array, jax.Array, jax.Array]


def forward_and_activations(
    model: Model, params: Params, batch: Mapping[str, jax.Array], paths: tuple[str, ...]
) -> tuple[dict[str, jax.Array], dict[str, Activations]]:
    """Runs one forward pass at evaluation.

    Args:
      model: of any family.
      params: of the model.
      batch: features of the model.
      paths: of MLPs or MoE layers ('encoder/layers_1/mlp').

    Returns:
      The sums over targets of `models.Model.forward`, and the activations of each path.
    """
    unrolled = _unrolled(model)
    with _recording(paths) as seen:
        sums, _, _ = unrolled.forward(params, batch, None, training=False, num_microbatches=1)
    real = model.real_tokens(batch, paths)
    return sums, {path: (*seen[path], real[path]) for path in paths}


def prompt_activations(
    model: Model, params: Params, tokens_BxL: jax.Array, mask_BxL: jax.Array, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Returns the inputs (B, L, D) of MLPs or MoE layers on prompts.

    Args:
      model: of a family whose `prompts` are continued.
      params: of the model.
      tokens_BxL: prompts.
      mask_BxL: False at padding.
      paths: see `forward_and_activations`.
    """
    unrolled = _unrolled(model)
    with _recording(paths) as seen:
        unrolled.logits(params, {'tokens': tokens_BxL, 'mask': mask_BxL})
    return {path: seen[path][0] for path in paths}


def _unrolled(model: Model) -> Model:
    """Returns the model without loops over layers, whose layers have no names."""
    compiled = {'scan_layers': False, 'remat': 'none'}
    fields = {field.name for field in dataclasses.fields(model.config)}
    config = dataclasses.replace(model.config, **{name: compiled[name] for name in compiled.keys() & fields})
    return dataclasses.replace(model, config=config)


@contextlib.contextmanager
def _recording(paths: tuple[str, ...]) -> Iterator[dict[str, tuple[jax.Array, jax.Array]]]:
    """Yields a dictionary that is filled with the first input and the output of the modules at some paths."""
    seen: dict[str, tuple[jax.Array, jax.Array]] = {}

    def record(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        y = call(*arguments, **named)
        path = '/'.join(context.module.path)
        if context.method_name == '__call__' and path in paths:
            seen[path] = arguments[0], y
        return y

    with nn.intercept_methods(record):
        yield seen
