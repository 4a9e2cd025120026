"""The package from Python: models, plans and surgery in memory, and the commands as functions. `docs/api.md` shows them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding

from upcycle import configuration, gin_files, partitioning, trees, warning
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.checkpoints.arrays import WEIGHT_DTYPES
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.memory import MemoryReader
from upcycle.checkpoints.several import SeveralReader, readers_of
from upcycle.commands import convert as convert_command
from upcycle.commands import train as train_command
from upcycle.conversion import CHECKED_BYTES, CHECKED_TOKENS
from upcycle.cost import num_bytes
from upcycle.errors import UserError
from upcycle.foreign import MoERule, PathRules, State, plan_foreign, upcycle_foreign
from upcycle.formats import FORMATS
from upcycle.in_memory import as_key, carry_out, check_surgery, receipt_of
from upcycle.models import Model, Params, identify
from upcycle.surgery.operators import Start
from upcycle.surgery.place import execute
from upcycle.surgery.plan import PARAMS, Action, Plan, Surgery, mlp_of, within_mlp
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.receipt import check_function, check_layer, reported
from upcycle.training.source_model import SourceModel
from upcycle.training.state import boxed_shapes, check_facts
from upcycle.training.step import TrainState
from upcycle.transfer import with_dtype

__all__ = ['MoERule', 'PathRules', 'Plan', 'State', 'Surgery', 'convert', 'load', 'plan', 'sparse', 'train', 'upcycle']

Leaves = dict[str, jax.ShapeDtypeStruct]
Path = str | os.PathLike[str]
_PATHS = (str, os.PathLike)


def load(
    path: Path, *, mesh: Mesh | None = None, dtype: str | None = None, model: Model | None = None
) -> tuple[Model, Params]:
    """A model and its parameters, from a checkpoint of any format that is read.

    Leaf by leaf: each device reads its part, and a process holds no more than one leaf apart from the result.

    Args:
      path: a run folder or step of ours, a T5X checkpoint, a Hugging Face folder, or an `.npz`; `gs://` works. The format and
        the family are found, not named.
      mesh: where the parameters lie, of axes named `data`, `expert` and `model` (see `partitioning.make_mesh`); an axis may be
        missing. None: one device.
      dtype: of parameters and activations, 'float32', 'bfloat16' or 'float16'; routers stay float32. None: float32.
      model: what the checkpoint holds. Only needed for MoE layers of other programs, whose checkpoints do not say how they route.

    Returns:
      The model, and its parameters as nested dicts of arrays. `model.logits(params, batch)` is its function.

    Raises:
      UserError: nothing readable is there, it is no whole model of a family that we know, or is not `model`.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UserError(f'dtype={dtype!r} must be one of {", ".join(WEIGHT_DTYPES)}.')
    _check_mesh(mesh)
    reader = _opened(path)
    stored = {name: leaf for name, leaf in reader.leaves().items() if name.startswith(PARAMS)}
    found = (_model_in(reader, stored) if model is None else _expected(model, reader, stored)).with_dtype(
        dtype or 'float32'
    )
    spec = Surgery(operator=None)
    check_facts(found, reader, spec)
    wanted, axes = _leaves_of(found, mesh)
    # Backbones have no head.
    missing = tuple(f'{PARAMS}{part}/' for part in found.lacking if not any(_below(part, name) for name in stored))
    wanted = {name: with_dtype(name, leaf, dtype) for name, leaf in wanted.items() if not name.startswith(missing)}
    surgery_plan = plan_surgery(stored, wanted, spec, axes)
    flat = execute(surgery_plan, reader.read, _shardings(wanted), new={})
    return found, unflatten_dict(flat, sep='/')['params']


def sparse(model: Model, *files: str, **macros: Any) -> Model:
    """A model with the MoE layers of its family's recipe, `gin/moe/FAMILY.gin`.

    Args:
      model: a dense model, such as `load` returns.
      *files: further gin files, such as 'recipes/soft_moe.gin'.
      **macros: bindings, such as NUM_EXPERTS=8; docs/macros.md lists them.

    Returns:
      The same model but for what recipe, files and macros set. The configuration that gin holds is replaced.

    Raises:
      UserError: a macro is unknown, is of another type, or does not suit the model.
    """
    kind, prefix = type(model.config), f'models/{model.family}_'
    base = min(name for name in gin_files.shipped() if name.startswith(prefix))
    # Which layers are sparse, and how wide an expert is, depends on the sizes.
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
    """The fields of a configured dataclass that differ, or that one of the macros sets."""
    values = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    return {
        name: value
        for name, value in values.items()
        if value != getattr(before, name)
        or {configuration.name_of(type(after), name), f'{type(after).__name__}.{name}'} & {*macros}
    }


def plan(dense: Any, sparse: Model | PathRules, surgery: Surgery | None = None) -> Plan:
    """What becomes of every leaf, from names and shapes alone.

    Args:
      dense: what to start from: the path of a checkpoint, of which only metadata is read; a model; or parameters, nested dicts of
        arrays or of their shapes. A list of several for the operator 'branches'. For a model that is not ours, parameters or a
        `State`.
      sparse: the model to make, such as `sparse(dense)` returns; or the rules for a model that is not ours.
      surgery: how; None: `Surgery()`, copies of the dense MLPs.

    Returns:
      A row for each leaf of the sparse model, and the leaves that are dropped, with reasons.

    Raises:
      UserError: a leaf has no source, two, or one of another shape; or a dense leaf would be lost.
    """
    surgery = Surgery() if surgery is None else surgery
    if isinstance(sparse, PathRules):
        return plan_foreign(dense, sparse, surgery)
    wanted, axes = _leaves_of(_our_model(sparse), None)
    return _plan(_reader(dense), sparse, surgery, wanted, axes)


def upcycle(
    params: Any,
    sparse: Model | PathRules,
    surgery: Surgery | None = None,
    *,
    key: Any,
    mesh: Mesh | None = None,
    batch: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Makes an MoE of a dense model in memory, leaf by leaf. It is the surgery of `upcycle convert` and `upcycle train`.

    Args:
      params: what to start from, as `plan` takes it, but for a model, which has no numbers. Arrays on
        devices are copied, so that the result can be donated.
      sparse: the model to make, or the rules for a model that is not ours.
      surgery: how; None: `Surgery()`. Its `seed` is not used.
      key: of everything random: a key of `jax.random`, or a whole number. `jax.random.key(n)` gives the bytes that
        UPCYCLE_SEED = n gives.
      mesh: where the result lies. Axes named `expert` and `model` split experts and widths; of a model that is not ours other
        leaves lie as their sources do, if these lie on the same mesh, and are whole otherwise. None: one device.
      batch: on which the sparse model is compared with the dense one. None: each MoE layer of ours is compared with its MLP on
        seeded normal activations; a model that is not ours is not compared.

    Returns:
      The parameters in float32, for a model that is not ours in the types and the kind of tree that they had, or a `State`. And
      the receipt, as JSON: what was made of what, with hashes, and how far the two functions are apart.

    Raises:
      UserError: see `plan`; or a number is NaN or infinite.
    """
    surgery = Surgery() if surgery is None else surgery
    key = as_key(key)
    _check_mesh(mesh)
    if isinstance(sparse, PathRules):
        return upcycle_foreign(params, sparse, surgery, key=key, mesh=mesh, batch=batch)
    check_surgery(surgery, has_state=False, has_hidden=batch is not None, way_out='give a batch')
    leaves, axes = _leaves_of(_our_model(sparse), mesh)
    reader = _reader(params)
    surgery_plan = _plan(reader, sparse, surgery, leaves, axes)
    source = SourceModel(sparse, surgery_plan, reader, leaves)

    def hidden(target: Mapping[str, jax.Array], mlp: str) -> Any:
        return source.hidden_states(batch, target, mlp)

    with partitioning.use(next(iter(leaves.values())).sharding.mesh):
        done = carry_out(surgery_plan, reader, _shardings(leaves), key, hidden=hidden)
        receipt = receipt_of(surgery_plan, reader, key, done)
        flat, made = done.leaves, unflatten_dict(done.leaves, sep='/')['params']
        if batch is None:
            layers = _check_layers(surgery_plan, sparse, reader, flat)
            no_batch = 'not compared: no batch was given'
            receipt['function_check'] = {'whole_model': no_batch, 'layers': layers, 'activations': 'seeded normal'}
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
    """Writes the MoE checkpoint that a run would start from, streamed to disk, as `upcycle convert` does.

    Args:
      gin_files: of the sparse model: one of models/, then one of moe/.
      source: the dense checkpoint; several for the operator 'branches'.
      target: where the new checkpoint will be.
      format: of the new checkpoint, one of `formats.FORMATS`.
      dtype: of the parameters; None: float32.
      optimizer_state: False: leave the optimizer's state out.
      verify: read everything back and compare it by hash.
      **bindings: such as NUM_EXPERTS=8.

    Returns:
      The path of the new checkpoint.

    Raises:
      UserError: before anything is written, where plan, format or space do not fit; later where the source is damaged.
    """
    if format not in FORMATS:
        raise UserError(f'format={format!r} is not one of {", ".join(FORMATS)}.')
    warning.forget()
    paths = [os.fspath(path) for path in ([source] if isinstance(source, _PATHS) else source)]
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
    """One run, as `upcycle train` does: pretraining, continuation, upcycling or fine-tuning, by its gin files.

    Args:
      gin_files: in the order models, moe, tasks, runs.
      **bindings: such as TRAIN_STEPS=1000; MODEL_DIR says where everything is written. Parameters of gin go in a dict:
        `**{'MoEConfig.min_capacity': 8}`.

    Returns:
      The state after the last step.

    Raises:
      UserError: before anything is written, where the configuration, the folder or the checkpoint do not fit.
      Preempted: the run was asked to stop, and has saved its state.
    """
    warning.forget()
    return train_command.run(gin_files, _bindings(bindings))


def _bindings(values: Mapping[str, Any]) -> dict[str, str]:
    """Bindings as the command line has them: text."""
    return {name: os.fspath(value) if isinstance(value, _PATHS) else repr(value) for name, value in values.items()}


def _check_mesh(mesh: Any) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise UserError(f'mesh = {mesh!r} must be a jax.sharding.Mesh, such as partitioning.make_mesh makes.')


def _opened(path: Path) -> Reader:
    reader = open_checkpoint(path)
    require_whole(str(reader.path))
    return reader


def _reader(source: Any) -> Reader:
    """A checkpoint, a model's shapes, parameters in memory, or several of them."""
    if isinstance(source, _PATHS):
        return _opened(source)
    if isinstance(source, list | tuple):
        if not source:
            raise UserError('there is nothing to start from: the list of dense models is empty.')
        return _reader(source[0]) if len(source) == 1 else SeveralReader([_reader(one) for one in source])
    if isinstance(source, State):
        raise UserError(
            'the optimizer state of a model of ours is upcycled by `upcycle.convert` and `upcycle.train`: give parameters.'
        )
    if hasattr(source, 'smallest_batch'):
        return MemoryReader(_leaves_of(source, None)[0])
    return MemoryReader({f'{PARAMS}{name}': leaf for name, leaf in trees.Tree.of(source).leaves.items()})


def _our_model(model: Any) -> Model:
    if not hasattr(model, 'moe_layers'):
        raise UserError(f'sparse must be a model of ours or `PathRules`, not {type(model).__name__}.')
    return model


def _plan(
    reader: Reader, model: Model, surgery: Surgery, wanted: Leaves, axes: Mapping[str, tuple[str | None, ...]]
) -> Plan:
    if surgery.operator is not None and not model.moe_layers():
        raise UserError('the model to make has no MoE layers: `upcycle.sparse(model)` gives it those of the recipe.')
    for part in readers_of(reader):
        check_facts(model, part, surgery)
    stored = {name: leaf for name, leaf in reader.leaves().items() if name.startswith(PARAMS)}
    return plan_surgery(stored, wanted, surgery, axes, head=model.head, grids=model.grids)


def _model_in(reader: Reader, stored: Leaves) -> Model:
    """The model that a checkpoint holds.

    Raises:
      UserError: it has MoE layers and does not say how they route.
    """
    path = str(reader.path)
    dense = identify.check(path, stored, identify.facts_of(reader.metadata))
    if description := reader.metadata.get('model'):
        return dense.saved(description)
    if identify.moe_layers(stored):
        raise UserError(
            f'{path} has MoE layers and does not say how they route: give their model, as in '
            'load(path, model=upcycle.sparse(dense, NUM_EXPERTS=8)).'
        )
    return dense


def _expected(model: Model, reader: Reader, stored: Leaves) -> Model:
    """The model that the caller names, where it is of the family that the checkpoint holds."""
    family = identify.check(str(reader.path), stored, identify.facts_of(reader.metadata)).family
    if family != model.family:
        raise UserError(f'{reader.path} holds a model of the family {family!r}, and `model` is of {model.family!r}.')
    return model


def _leaves_of(model: Model, mesh: Mesh | None) -> tuple[Leaves, dict[str, tuple[str | None, ...]]]:
    """A model's parameters by their names in a checkpoint, with their shardings; and their logical axes."""
    if mesh is None:
        mesh = partitioning.make_mesh((1, 1, 1), None, jax.local_devices()[:1])
    if not {*mesh.axis_names} & {*partitioning.MESH_AXES}:
        raise UserError(
            f'mesh has the axes {", ".join(mesh.axis_names)}, and must have axes named {", ".join(partitioning.MESH_AXES)}: '
            'partitioning.make_mesh makes one.'
        )
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    boxed = boxed_shapes(model, tuple(sorted(model.smallest_batch().items())))
    logical = flatten_dict({'params': partitioning.logical_axes(boxed)}, sep='/')
    leaves = {}
    for name, leaf in flatten_dict({'params': partitioning.unbox(boxed)}, sep='/').items():
        spec = partitioning.mesh_axes(logical[name], leaf.shape, mesh)
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return leaves, {name: tuple(spec) for name, spec in logical.items()}


def _shardings(leaves: Leaves) -> dict[str, jax.sharding.Sharding]:
    return {name: leaf.sharding for name, leaf in leaves.items()}


def _below(part: str, name: str) -> bool:
    return name.startswith(f'{PARAMS}{part}/')


def _check_layers(
    surgery_plan: Plan, model: Model, reader: Reader, flat: Mapping[str, jax.Array]
) -> dict[str, dict[str, float]]:
    """Each MoE layer that was made of a dense MLP against it, as `upcycle convert` does."""
    if surgery_plan.spec.operator is None or surgery_plan.spec.operator.starts_from is not Start.DENSE:
        return {}
    checks = {}
    for path in model.moe_layers():
        mlp = f'{PARAMS}{path}'
        inside = {name.removeprefix(f'{mlp}/'): leaf for name, leaf in flat.items() if name.startswith(f'{mlp}/')}
        rows = [
            row
            for row in surgery_plan.rows
            if row.action is Action.EXPERTS and mlp_of(row.target) == mlp and row.sources
        ]
        routed = any(name.startswith('router/') for name in inside)
        if rows and routed and num_bytes(inside) <= CHECKED_BYTES:
            host = partitioning.whole_on_host
            dense = {within_mlp(row.target): host(reader.read(row.sources[0])) for row in rows}
            inside = {name: host(leaf) for name, leaf in inside.items()}
            # Outside the mesh, whose devices may be more than the routing groups of the checked tokens.
            with partitioning.on_one_device(jax.local_devices()[0]):
                checks[path] = dataclasses.asdict(check_layer(model, path, dense, inside, CHECKED_TOKENS))
    return checks
