"""The model of a checkpoint as gin source, which stands in place of `gin/models/from_checkpoint.gin`.

The source is read after all files and bindings, because they name the checkpoint, and takes the place of that file when they are
read again. So `config.gin` holds every size, and a run with a `config.gin` resumes without the checkpoint that it started from.
"""

import os
from collections.abc import Mapping
from typing import Any

from upcycle import files, schema
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.gin_values import ROOT, bindings_of, full_name, macro_of, macro_value
from upcycle.models import Model, identify, registry
from upcycle.moe.config import MoEConfig, settings
from upcycle.training.run import Run

# Gin scope of the MoE layers of the checkpoint.
_SCOPE = 'checkpoint_'
_MOE = full_name((), MoEConfig)


def model_as_gin() -> str:
    """Returns gin source of the model of the run that gin's configuration describes.

    The model is that of the run in MODEL_DIR if there is one, else that of the first checkpoint at INITIAL_CHECKPOINT_PATH.

    Raises:
      UserError: neither exists, or the checkpoint cannot be read.
    """
    # Imported here, since it imports configuration.
    from upcycle import run_config

    folder = _bound('model_dir')
    if isinstance(folder, str) and folder:
        stored = run_config.stored(files.absolute(folder) / run_config.CONFIG)
        kind = _kind_of_run(stored)
        if kind is not None:
            return _source(kind, _of_run(kind, stored))
    path = _bound('initial_checkpoint_path')
    if isinstance(path, list | tuple) and path:
        path = path[0]
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f'INITIAL_CHECKPOINT_PATH is not set, and {FROM_CHECKPOINT} takes the model from there: set it, or name another file '
            'of models/.'
        )
    return _of_checkpoint(path)


def _bound(field: str) -> Any:
    """Returns the value that a field of the run is bound to, through macros."""
    value, seen = bindings_of((), Run).get(field), set()
    while (macro := macro_of(value)) and macro not in seen:
        seen.add(macro)
        value = macro_value(macro)
    return value


def _of_checkpoint(path: str | os.PathLike[str]) -> str:
    reader = open_checkpoint(path)
    model = identify.dense_model(str(reader.path), reader.leaves(), identify.facts_of(reader.metadata))
    description = reader.metadata.get('model')
    if description:
        model = model.saved(description)
    elif identify.moe_layers(reader.leaves()):
        raise UserError(
            f'{reader.path} has MoE layers and does not describe their routing: name the files of its model and MoE layers '
            f'instead of {FROM_CHECKPOINT}.'
        )
    config = full_name((), type(model.config))
    bindings = {f'{config}.{name}': schema.written(getattr(model.config, name)) for name in _told(type(model))}
    for field in model.moe_fields:
        moe = getattr(model.config, field)
        if moe is not None:
            scope = f'{_SCOPE}{field}/{_MOE}'
            bindings |= {
                f'{scope}.{name}': schema.written(getattr(moe, name))
                for name in ('router', *sorted(settings(type(moe))))
            }
            layers = f'{field}_layers'
            if hasattr(model.config, layers):
                bindings[layers.upper()] = schema.written(getattr(model.config, layers))
            factor = (description or {}).get('aux_loss_factor', type(model).aux_loss_factor)
            bindings['AUX_LOSS_FACTOR'] = schema.written(factor)
    return _source(type(model), bindings)


def _kind_of_run(stored: Mapping[str, str]) -> type[Model] | None:
    """Returns the family of the model in a run's bindings; None without a run, or if its model is not one of ours."""
    bound = stored.get(f'{ROOT}.model')
    return next((kind for kind in registry.families() if bound == f'@{full_name((), kind)}()'), None)


def _of_run(kind: type[Model], stored: Mapping[str, str]) -> dict[str, str]:
    config = full_name((), _config_of(kind))
    bindings = {name: stored[name] for field in _told(kind) if (name := f'{config}.{field}') in stored}
    for field in kind.moe_fields:
        scope = f'{_SCOPE}{field}/{_MOE}.'
        if moe := {name: value for name, value in stored.items() if name.startswith(scope)}:
            layers = f'{field}_layers'
            bindings |= moe
            if f'{config}.{layers}' in stored:
                bindings[layers.upper()] = stored[f'{config}.{layers}']
            bindings['AUX_LOSS_FACTOR'] = stored[f'{full_name((), kind)}.aux_loss_factor']
    return bindings


def _config_of(kind: type[Model]) -> type:
    return kind.__dataclass_fields__['config'].type


def _told(kind: type[Model]) -> tuple[str, ...]:
    """Returns the fields of a family's configuration that a checkpoint tells."""
    return tuple(dict.fromkeys((*schema.required(_config_of(kind)), *kind.facts, *kind.told)))


def _source(kind: type[Model], bindings: Mapping[str, str]) -> str:
    """Returns gin source of a model: the settings that checkpoints do not tell, then these bindings."""
    scopes = {field: f'{_SCOPE}{field}/{_MOE}' for field in kind.moe_fields}
    moe = {field: f'@{scope}()' for field, scope in scopes.items() if f'{scope}.router' in bindings}
    modules = {name.split('/')[-1].rsplit('.', 2)[0] for name in bindings if '.' in name}
    lines = ['from __gin__ import dynamic_registration', *(f'import {module}' for module in sorted(modules))]
    lines += ['', f"include '{kind.settings}'", '']
    lines += [f'{field.upper()} = {reference}' for field, reference in moe.items()]
    lines += [f'{name} = {value}' for name, value in bindings.items()]
    # Tasks may read the size of the vocabulary.
    lines += [f'NUM_EMBEDDINGS = {value}' for name, value in bindings.items() if name.endswith('.vocab_size')]
    return '\n'.join([*lines, ''])
