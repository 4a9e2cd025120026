"""The Python API: models, plans and surgery in memory, and the commands as functions. See `docs/api.md`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from upcycle import configuration, gin_files, partitioning, trees, warning
from upcycle.api_arguments import (
    PATHS,
    as_surgery,
    check_batch,
    check_files,
    check_mesh,
    check_outside_jit,
    is_model,
    require,
    require_model,
    require_numbers,
)
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.checkpoints.arrays import WEIGHT_DTYPES
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.memory import MemoryReader
from upcycle.checkpoints.several import SeveralReader, readers_of
from upcycle.commands import convert as convert_command
from upcycle.commands import train as train_command
from upcycle.errors import UserError
from upcycle.foreign import MoERule, PathRules, State, plan_foreign, upcycle_foreign
from upcycle.formats import FORMATS
from upcycle.in_memory import as_key, auto_mesh, carry_out, check_experts, check_layers, check_surgery
from upcycle.models import Model, Params, identify
from upcycle.surgery.place import execute
from upcycle.surgery.plan import PARAMS, Axes, Plan, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.receipt import check_function, reported
from upcycle.training.run import warn_without_gradient
from upcycle.training.source_model import SourceModel
from upcycle.training.state import boxed_shapes, check_facts
from upcycle.training.step import TrainState
from upcycle.transfer import with_dtype

__all__ = ['MoERule', 'PathRules', 'Plan', 'State', 'Surgery', 'convert', 'load', 'plan', 'sparse', 'train', 'upcycle']

Leaves = dict[str, jax.ShapeDtypeStruct]
Path = str | os.PathLike[str]


def load(
    path: Path, *, mesh: Mesh | None = None, dtype: str | None = None, model: Model | None = None
) -> tuple[Model, Params]:
    """Loads a model and its parameters from a checkpoint of any readable format.

    Reads leaf by leaf: each device gets its part, and a process holds at most one leaf besides the result.

    Args:
      path: a run folder or step of ours, a T5X checkpoint, a Hugging Face folder, or an `.npz`; `gs://` works. The format and
        the family are detected.
      mesh: mesh of the parameters, with axes among `data`, `expert` and `model` (see `partitioning.make_mesh`). None: one
        device.
      dtype: type of parameters and activations, 'float32', 'bfloat16' or 'float16'; routers stay float32. None: float32.
      model: the model in the checkpoint. Only needed for MoE checkpoints of other programs, which do not describe their routing.

    Returns:
      The model, and its parameters as nested dicts of arrays. Call it with `model.logits(params, batch)`.

    Raises:
      UserError: the path has no readable checkpoint, or not a complete model of a known family, or another model than `model`.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UserError(f'dtype={dtype!r} must be one of {", ".join(WEIGHT_DTYPES)}.')
    check_outside_jit('load')
    check_mesh(mesh)
    require('path', path, PATHS, 'the path of a checkpoint')
    if model is not None:
        require_model('model', model)
    reader = _opened(path)
    stored = {name: leaf for name, leaf in reader.leaves().items() if name.startswith(PARAMS)}
    model = _model_in(reader, stored) if model is None else _expected(model, reader, stored)
    model = model.with_dtype(dtype or 'float32')
    surgery = Surgery(operator=None)
    check_facts(model, reader, surgery)
    leaves, axes = _leaves_of(model, mesh)
    # Backbones have no head.
    parts = [f'{PARAMS}{part}/' for part in model.lacking]
    missing = tuple(part for part in parts if not any(name.startswith(part) for name in stored))
    leaves = {name: with_dtype(name, leaf, dtype) for name, leaf in leaves.items() if not name.startswith(missing)}
    flat = execute(plan_surgery(stored, leaves, surgery, axes), reader.read, _shardings(leaves), new={})
    return model, unflatten_dict(flat, sep='/')['params']


def sparse(model: Model, *files: str, **macros: Any) -> Model:
    """Adds the MoE layers of the family's recipe, `gin/moe/FAMILY.gin`, to a model.

    Replaces gin's current configuration.

    Args:
      model: a dense model, such as `load` returns.
      *files: further gin files, such as 'recipes/soft_moe.gin'.
      **macros: bindings, such as NUM_EXPERTS=8; docs/macros.md lists them.

    Returns:
      The model with the settings of the recipe, the files and the macros.

    Raises:
      UserError: a macro is unknown, has another type, or does not suit the model.
    """
    require_model('model', model)
    check_files('files', files)
    kind, prefix = type(model.config), f'models/{model.family}_'
    base = min(name for name in gin_files.shipped() if name.startswith(prefix))
    # The sparse layers and the width of an expert depend on the sizes.
    sizes = {
        f'{kind.__name__}.{field.name}': repr(getattr(model.config, field.name))
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
    }
    no_data = dict.fromkeys(('TRAIN_DATASET', 'EVAL_DATASET'), 'None')
    before = configuration.load_model([base, 'runs/pretrain.gin'], sizes | no_data).model
    recipe = [base, f'moe/{model.family}.gin', 'runs/convert.gin', *files]
    after = configuration.load_model(recipe, {**sizes, **_bindings(macros)}).model
    config = dataclasses.replace(model.config, **_changes(before.config, after.config, macros))
    return dataclasses.replace(model, **{**_changes(before, after, macros), 'config': config})


def _changes(before: Any, after: Any, macros: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ or that a macro sets."""
    values = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    return {
        name: value
        for name, value in values.items()
        if value != getattr(before, name)
        or {configuration.name_of(type(after), name), f'{type(after).__name__}.{name}'} & {*macros}
    }


def plan(dense: Any, sparse: Model | PathRules, surgery: Surgery | None = None) -> Plan:
    """Plans the surgery from leaf names and shapes.

    Args:
      dense: the source: the path of a checkpoint, of which only metadata is read; a model; or parameters, nested dicts of arrays
        or of their shapes. A list of several for the operator 'branches'. For a foreign model, parameters or a `State`.
      sparse: the target model, such as `sparse(dense)` returns; or the rules for a foreign model.
      surgery: the specification; None: `Surgery()`, copies of the dense MLPs.

    Returns:
      The plan: one row per leaf of the sparse model, and the dropped leaves with reasons.

    Raises:
      UserError: a leaf has no source, two sources, or one of another shape; or a dense leaf is unused.
    """
    surgery = as_surgery(surgery)
    if isinstance(sparse, PathRules):
        return plan_foreign(dense, sparse, surgery)
    require_model('sparse', sparse, ', or `PathRules`')
    leaves, axes = _leaves_of(sparse, None)
    return _plan(_reader(dense), sparse, surgery, leaves, axes)


def upcycle(
    params: Any,
    sparse: Model | PathRules,
    surgery: Surgery | None = None,
    *,
    key: Any,
    mesh: Mesh | None = None,
    batch: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Upcycles a dense model to an MoE in memory, leaf by leaf, with the surgery of `upcycle convert` and `upcycle train`.

    Args:
      params: the source, as for `plan`, except that a model is not accepted. Arrays on devices are copied, so that the result
        can be donated.
      sparse: the target model, or the rules for a foreign model.
      surgery: the specification; None: `Surgery()`. Its `seed` is not used.
      key: random key of `jax.random`, or an integer below 2**32. `jax.random.key(n)` gives the same bytes as UPCYCLE_SEED = n.
      mesh: mesh of the result. Axes named `expert` and `model` shard experts and widths. For a foreign model, other leaves keep
        the sharding of their sources if these are on the same mesh, and are replicated otherwise. None: one device.
      batch: batch on which the sparse model is compared with the dense one. None: each MoE layer of our models is compared with
        its MLP on seeded normal activations; a foreign model is not compared.

    Returns:
      The parameters and the receipt as JSON: plan, hashes, and the difference between the two functions. The parameters are
      float32; those of a foreign model keep their types and kind of tree, and are in a `State` if one was given.

    Raises:
      UserError: see `plan`; a leaf contains NaN, infinity or a number that needs 64 bits; the model cannot read the batch; or
        experts do not divide among the mesh's `expert` axis.
    """
    check_outside_jit('upcycle')
    surgery = as_surgery(surgery)
    key = as_key(key)
    check_mesh(mesh)
    require_numbers(params)
    if isinstance(sparse, PathRules):
        if mesh is not None:
            check_experts(mesh, (rule.num_experts for rule in sparse.moe))
        return upcycle_foreign(params, sparse, surgery, key=key, mesh=mesh, batch=batch)
    check_surgery(surgery, has_state=False, has_hidden=batch is not None, way_out='pass a batch')
    require_model('sparse', sparse, ', or `PathRules`')
    leaves, axes = _leaves_of(sparse, mesh)
    if batch is not None:
        check_batch(sparse, leaves, batch)
    warn_without_gradient(sparse)
    reader = _reader(params)
    surgery_plan = _plan(reader, sparse, surgery, leaves, axes)
    source = SourceModel(sparse, surgery_plan, reader, leaves)

    def hidden(target: Mapping[str, jax.Array], mlp: str) -> Any:
        return source.hidden_states(batch, target, mlp)

    with partitioning.use(next(iter(leaves.values())).sharding.mesh):
        flat, receipt = carry_out(surgery_plan, reader, _shardings(leaves), key, hidden=hidden)
        made = unflatten_dict(flat, sep='/')['params']
        if batch is None:
            layers = check_layers(surgery_plan, sparse, reader, flat)
            whole = 'not compared: no batch was given'
            receipt['function_check'] = {'whole_model': whole, 'layers': layers, 'activations': 'seeded normal'}
        else:
            receipt['function_check'] = reported(
                lambda: check_function(sparse, source.params(flat), made, batch, source.model)
            )
    return made, receipt


def convert(
    gin_files: Sequence[str],
    source: Path | Sequence[Path],
    target: Path,
    *,
    format: str = 'upcycle',
    dtype: str | None = None,
    optimizer_state: bool = True,
    verify: bool = False,
    **bindings: Any,
) -> str:
    """Writes the initial MoE checkpoint of a run to disk, streamed, as `upcycle convert` does.

    Args:
      gin_files: gin files of the sparse model: one of models/, then one of moe/.
      source: path of the dense checkpoint; several for the operator 'branches'.
      target: path of the new checkpoint.
      format: format of the new checkpoint, one of `formats.FORMATS`.
      dtype: type of the parameters; None: float32.
      optimizer_state: False: omit the optimizer state.
      verify: read everything back and compare it by hash.
      **bindings: bindings, such as NUM_EXPERTS=8.

    Returns:
      The path of the new checkpoint.

    Raises:
      UserError: before anything is written, if plan, format or space do not fit; later, if the source is damaged.
    """
    if format not in FORMATS:
        raise UserError(f'format={format!r} is not one of {", ".join(FORMATS)}.')
    check_files('gin_files', gin_files)
    sources = source if isinstance(source, list | tuple) else [source]
    if not sources:
        raise UserError('source is an empty list: name at least one checkpoint.')
    for each in sources:
        require('source', each, PATHS, 'the path of a checkpoint, or a list of several')
    require('target', target, PATHS, 'the path of the new checkpoint')
    warning.forget()
    paths = [os.fspath(path) for path in sources]
    named = {'INITIAL_CHECKPOINT_PATH': paths[0] if len(paths) == 1 else repr(tuple(paths))}
    return convert_command.run(
        gin_files,
        _bindings(bindings) | named,
        os.fspath(target),
        format,
        dtype=dtype,
        optimizer_state=optimizer_state,
        verify=verify,
    )


def train(gin_files: Sequence[str], **bindings: Any) -> TrainState:
    """Trains as `upcycle train` does: pretraining, continuation, upcycling or fine-tuning.

    Args:
      gin_files: gin files in the order models, moe, tasks, runs.
      **bindings: bindings, such as TRAIN_STEPS=1000; MODEL_DIR is the output folder. Pass gin parameters in a dict:
        `**{'MoEConfig.min_capacity': 8}`.

    Returns:
      The state after the last step.

    Raises:
      UserError: before anything is written, if the configuration, the folder or the checkpoint does not fit.
      Preempted: the run was asked to stop and has saved its state.
    """
    check_files('gin_files', gin_files)
    warning.forget()
    return train_command.run(gin_files, _bindings(bindings))


def _bindings(values: Mapping[str, Any]) -> dict[str, str]:
    """Converts bindings to text, as on the command line."""
    return {name: os.fspath(value) if isinstance(value, PATHS) else repr(value) for name, value in values.items()}


def _opened(path: Path) -> Reader:
    reader = open_checkpoint(path)
    require_whole(str(reader.path))
    return reader


def _reader(source: Any) -> Reader:
    """Returns a reader of a checkpoint, a model's shapes, parameters in memory, or a list of these."""
    if isinstance(source, PATHS):
        return _opened(source)
    if isinstance(source, list | tuple):
        if not source:
            raise UserError('the list of dense models is empty: pass at least one.')
        return _reader(source[0]) if len(source) == 1 else SeveralReader([_reader(each) for each in source])
    if isinstance(source, State):
        raise UserError(
            'the optimizer state of our models is upcycled only by `upcycle.convert` and `upcycle.train`: pass the parameters.'
        )
    if is_model(source):
        return MemoryReader(_leaves_of(source, None)[0])
    leaves = trees.Tree.of(source).leaves
    if any(name.startswith(PARAMS) for name in leaves):
        raise UserError("the parameters are in a dict with the key 'params': pass params['params'].")
    return MemoryReader({f'{PARAMS}{name}': leaf for name, leaf in leaves.items()})


def _plan(reader: Reader, model: Model, surgery: Surgery, leaves: Leaves, axes: Axes) -> Plan:
    if surgery.operator is not None and not model.moe_layers():
        raise UserError('the target model has no MoE layers: add those of the recipe with `upcycle.sparse(model)`.')
    for part in readers_of(reader):
        check_facts(model, part, surgery)
    stored = {name: leaf for name, leaf in reader.leaves().items() if name.startswith(PARAMS)}
    return plan_surgery(stored, leaves, surgery, axes, head=model.head, grids=model.grids)


def _model_in(reader: Reader, stored: Leaves) -> Model:
    """Identifies the model in a checkpoint.

    Raises:
      UserError: it has MoE layers and does not describe their routing.
    """
    path = str(reader.path)
    dense = identify.check(path, stored, identify.facts_of(reader.metadata))
    if description := reader.metadata.get('model'):
        return dense.saved(description)
    if identify.moe_layers(stored):
        raise UserError(
            f'{path} has MoE layers and does not describe their routing: pass the model, as in '
            'load(path, model=upcycle.sparse(dense, NUM_EXPERTS=8)).'
        )
    return dense


def _expected(model: Model, reader: Reader, stored: Leaves) -> Model:
    """Returns the caller's model if the checkpoint is of the same family."""
    family = identify.check(str(reader.path), stored, identify.facts_of(reader.metadata)).family
    if family != model.family:
        raise UserError(f'{reader.path} contains a model of the family {family!r}, and `model` is of {model.family!r}.')
    return model


def _leaves_of(model: Model, mesh: Mesh | None) -> tuple[Leaves, Axes]:
    """Returns a model's parameters with shardings, and their logical axes, by their names in a checkpoint."""
    if mesh is None:
        mesh = partitioning.make_mesh((1, 1, 1), None, jax.local_devices()[:1])
    if not {*mesh.axis_names} & {*partitioning.MESH_AXES}:
        raise UserError(
            f'mesh has the axes {", ".join(mesh.axis_names)}, but must have axes named {", ".join(partitioning.MESH_AXES)}: '
            'use partitioning.make_mesh.'
        )
    check_experts(mesh, (moe.num_experts for moe in model.moe_layers().values()))
    mesh = auto_mesh(mesh)
    boxed = boxed_shapes(model, tuple(sorted(model.smallest_batch().items())))
    logical = flatten_dict({'params': partitioning.logical_axes(boxed)}, sep='/')
    leaves = {}
    for name, leaf in flatten_dict({'params': partitioning.unbox(boxed)}, sep='/').items():
        spec = partitioning.mesh_axes(logical[name], leaf.shape, mesh)
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return leaves, {name: tuple(spec) for name, spec in logical.items()}


def _shardings(leaves: Leaves) -> dict[str, jax.sharding.Sharding]:
    return {name: leaf.sharding for name, leaf in leaves.items()}
