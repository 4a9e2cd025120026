"""Sliding windows in config.json: `sliding_window`, and `layer_types` or the fields that it replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.facts import Facts, chosen, indices
from upcycle.errors import UserError

SLIDING, FULL = 'sliding_attention', 'full_attention'
FIELDS = {'sliding_window': schema.Count, 'layer_types': Sequence[str]}


def of_all_layers(file: epath.Path, config: Config) -> Facts:
    """Returns the facts of a model all of whose layers have the window, if there is one.

    Raises:
      UserError: `layer_types`, which such an architecture ignores, says otherwise.
    """
    window = config.get('sliding_window')
    every = range(config['num_hidden_layers']) if window is not None else ()
    if 'layer_types' in config and _typed(file, config) != list(every):
        raise UserError(
            f'{file}: layer_types differs from sliding_window = {window}, which our {config["model_type"]} has in all layers.'
        )
    return {'window': window, 'window_layers': chosen(every, config['num_hidden_layers'])}


def of_some_layers(file: epath.Path, config: Config, window: int | None, implied: Iterable[int]) -> Facts:
    """Returns the facts of a model with `layer_types`.

    Args:
      file: for messages.
      config: the fields of the file.
      window: None if the configuration has none, or does not use it.
      implied: the layers with the window if the file has no `layer_types`.

    Raises:
      UserError: a type of layer is unknown, or there are layers with the window but no window.
    """
    layers = _typed(file, config) if 'layer_types' in config else list(implied)
    if layers and window is None:
        raise UserError(f'{file}: {SLIDING} is the type of layer {layers[0]}, but there is no sliding_window in use.')
    return {'window': window, 'window_layers': chosen(layers, config['num_hidden_layers'])}


def _typed(file: epath.Path, config: Config) -> list[int]:
    """Returns the layers with the window by `layer_types`."""
    types, depth = config['layer_types'], config['num_hidden_layers']
    if len(types) != depth:
        raise UserError(f'{file}: layer_types has {len(types)} entries, but num_hidden_layers is {depth}.')
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(
            f'{file}: layer_types has {schema.shown(unknown[0])}: our {config["model_type"]} supports {SLIDING} and {FULL} only.'
        )
    return [i for i, kind in enumerate(types) if kind == SLIDING]


def layers_of(facts: Facts) -> list[int]:
    """Returns the layers with the window."""
    return [] if facts['window'] is None else indices(facts['window_layers'], facts['num_layers'])


def spell_types(facts: Facts) -> dict[str, Any]:
    """Returns `layer_types`."""
    layers = layers_of(facts)
    return {'layer_types': [SLIDING if i in layers else FULL for i in range(facts['num_layers'])]}
