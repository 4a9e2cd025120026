"""The layout of a run's state, its first state from scratch, and the plan of its surgery."""

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from upcycle import partitioning, schema, warning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.several import readers_of
from upcycle.data import DataSource
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import BatchSpec, Model, identify
from upcycle.models.differences import Difference, differences
from upcycle.moe import state as moe_state
from upcycle.progress import Progress
from upcycle.surgery.place import execute
from upcycle.surgery.plan import EXPERT, Plan, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.training.branches import require_one_base
from upcycle.training.run import ModelRun, Run
from upcycle.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and shardings of a run's state, computed without allocating anything.

    Attributes:
      abstract: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
      batch_axes: the number of leading stack axes (experts) of each parameter that has a gradient.
      logical_axes: of each parameter, by its name in a checkpoint.
    """

    abstract: TrainState
    batch_axes: Any
    logical_axes: Mapping[str, tuple[str | None, ...]]

    def flat(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the leaves by their names in a checkpoint."""
        return flatten_dict(as_dict(self.abstract), sep='/')

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def data_of(run: ModelRun) -> DataSource:
    """Returns the training data of a run.

    Raises:
      UserError: the run has none.
    """
    if run.train_data is None:
        raise UserError('TRAIN_DATASET is None: name a task, such as --gin_file=tasks/stdlib_span_corruption.gin.')
    return run.train_data


def make_layout(run: ModelRun, mesh: Mesh, batch_spec: BatchSpec | None = None) -> Layout:
    """Computes the layout of a run's state on a mesh; `batch_spec` replaces that of the training data."""
    spec = data_of(run).batch_spec() if batch_spec is None else batch_spec
    boxed = boxed_shapes(run.model, tuple(sorted(spec.items())))
    axes = partitioning.batch_axes(boxed)
    params = partitioning.unbox(boxed)
    specs = partitioning.param_specs(boxed, mesh, over_data=run.parameters_over_data)
    # Optimizers do not update the routers' state.
    trained, trained_specs, axes = (moe_state.split(tree)[0] for tree in (params, specs, axes))
    opt_state = jax.eval_shape(functools.partial(run.optimizer.init, batch_axes=axes), trained)
    opt_specs = run.optimizer.state_specs(trained, trained_specs, axes)

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    whole = PartitionSpec()
    logical = flatten_dict({'params': partitioning.logical_axes(boxed)}, sep='/')
    return Layout(
        TrainState(
            step=place(jax.ShapeDtypeStruct((), jnp.int32), whole),
            params=jax.tree.map(place, params, specs),
            opt_state=jax.tree.map(place, opt_state, opt_specs),
            rng=place(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), whole),
        ),
        axes,
        {name: tuple(spec) for name, spec in logical.items()},
    )


@functools.lru_cache(maxsize=16)
def boxed_shapes(model: Model, batch_spec: tuple[tuple[str, Any], ...]) -> Any:
    """Returns shapes of a model's parameters, boxed with their logical axes. Cached: tracing a deep stack takes seconds."""
    return jax.eval_shape(lambda key: model.init(key, dict(batch_spec)), jax.random.key(0))


def as_dict(state: TrainState) -> dict[str, Any]:
    """Returns the state as plain dicts, as checkpoints need it."""
    return {'step': state.step, 'params': state.params, 'opt_state': state.opt_state, 'rng': state.rng}


def from_scratch(run: Run, layout: Layout) -> TrainState:
    """Initialises a run's state, each leaf directly on its devices."""
    return initializer(run, layout)(jax.random.key(run.seed))


def initializer(run: Run, layout: Layout) -> Callable[[jax.Array], TrainState]:
    """Returns a jitted function from a key to the first state of a run from scratch."""

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = partitioning.unbox(run.model.init(init_key, run.train_data.batch_spec()))
        opt_state = run.optimizer.init(moe_state.split(params)[0], layout.batch_axes)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(run_key))

    return jax.jit(init, out_shardings=layout.shardings)


def make_plan(run: ModelRun, layout: Layout, reader: Reader, wanted: Mapping[str, Any] | None = None) -> Plan:
    """Plans a run's surgery from the checkpoint's metadata: for all leaves, or for those in `wanted`."""
    if run.surgery is None:
        raise UserError(
            f'INITIAL_CHECKPOINT_PATH = {schema.shown(run.initial_checkpoint_path)} is set, but SURGERY is None: use '
            'runs/continue_dense.gin, or runs/upcycle.gin with a file of moe/.'
        )
    leaves = dict(reader.leaves())
    # Each of several checkpoints has its own step.
    steps = dict.fromkeys('step' + name[name.index('@') :] if '@' in name else 'step' for name in leaves)
    if missing := [step for step in steps if step not in leaves]:
        first_step(run, reader)
        leaves |= dict.fromkeys(missing, jax.ShapeDtypeStruct((), jnp.int32))
    check_source(run, reader, run.surgery)
    if run.surgery.operator is not None and not run.model.moe_layers():
        raise UserError(
            f'EXPERT_OPERATOR is set, but the model has no MoE layers: include moe/{run.model.family}.gin, or use '
            'runs/continue_dense.gin.'
        )
    with in_gin_words(run.model, reader):
        return plan_surgery(
            leaves,
            layout.flat() if wanted is None else wanted,
            run.surgery,
            layout.logical_axes,
            head=run.model.head,
            grids=run.model.grids,
        )


def first_step(run: ModelRun, reader: Reader) -> int:
    """Returns the step at which a run starts: DENSE_STEP, else the checkpoint's, else 0 if the schedule allows that.

    Raises:
      UserError: the step is unknown, and the schedule needs it.
    """
    if run.dense_step is not None:
        return run.dense_step
    if reader.step is not None:
        return reader.step
    if not run.learning_rate.can_begin_at_0:
        raise UserError(
            f'{reader.path} does not hold the number of steps that the dense model was trained for: set DENSE_STEP, which the '
            'learning-rate schedule needs.'
        )
    warning.once(f'{reader.path} does not tell its step: the run, and its learning-rate schedule, start at step 0.')
    return 0


@contextlib.contextmanager
def in_gin_words(model: Model, reader: Reader) -> Iterator[None]:
    """Adds the gin bindings that would make a model fit the checkpoint to errors about their differences.

    Raises:
      DifferentLeaves: with these bindings, from the first of several checkpoints.
    """
    try:
        yield
    except DifferentLeaves as error:
        part = readers_of(reader)[0]
        sizes = differences(model, part.path, part.leaves(), identify.facts_of(part.metadata), error.problems)
        raise DifferentLeaves(error.heading, error.problems, _in_words(sizes)) from None


def _in_words(sizes: Sequence[Difference], others: Sequence[Difference] = ()) -> list[str]:
    """Returns a line per size that differs, and a line of bindings that fit, including those of `others`."""
    # Imported here, since configuration imports this module.
    from upcycle.configuration import name_of

    named = [(name_of(each.kind, each.field), in_gin(each.here), in_gin(each.there)) for each in (*others, *sizes)]
    lines = [f'{name} is {here} here and {there} in the checkpoint' for name, here, there in named[len(others) :]]
    if lines:
        fits = (shlex.quote(f'--gin.{name}={there}') for name, _, there in named)
        lines.append(f'bindings that fit: {" ".join(fits)}')
    return lines


def in_gin(value: Any) -> str:
    """Returns a value as it is written after --gin.NAME=."""
    return str(value) if isinstance(value, str) else repr(value)


def check_source(run: ModelRun, reader: Reader, surgery: Surgery) -> None:
    """Compares the metadata of checkpoints with the run that loads them. Called at every load.

    Raises:
      UserError: a checkpoint computes another function than the model, or was trained with other sentinels than the data's.
    """
    require_one_base(readers_of(reader))
    for part in readers_of(reader):
        check_facts(run.model, part, surgery)
        for data in (run.train_data, run.eval_data):
            if (check := getattr(data, 'check_sentinels', None)) is not None:
                check(part.path, part.metadata.get('sentinels'))


def sentinels_of(run: Run, metadata: Mapping[str, Any]) -> str | Sequence[int] | None:
    """Returns the sentinels that a run trains with, for `check_source`: the bound ones, else those of its checkpoint."""
    bound = getattr(run.train_data, 'bound_sentinels', None)
    return (None if bound is None else bound()) or metadata.get('sentinels')


def check_facts(model: Model, reader: Reader, surgery: Surgery) -> None:
    """Raises UserError if a checkpoint computes another function than the model, in ways that shapes do not show."""
    changed = () if surgery.dense_operator is None else surgery.dense_operator.changes
    family = reader.metadata.get('family', model.family)
    if family != model.family:
        raise UserError(
            f'{reader.path} holds a model of the family {family}, but the gin files describe one of the family {model.family}.'
        )
    facts = identify.facts_in(reader.path, reader.leaves()) | identify.facts_of(reader.metadata)
    try:
        identify.require_function(reader.path, model, facts, changed)
    except UserError as error:
        if surgery.dense_operator is not None:  # it may change sizes
            raise
        differing = differences(model, reader.path, reader.leaves(), facts, ())
        sizes = [each for each in differing if each.field not in facts]
        others = [
            Difference(type(model.config), name, getattr(model.config, name), there)
            for name, there in identify.different_function(model, facts, changed).items()
        ]
        raise UserError('\n  '.join([str(error), *_in_words(sizes, others)])) from None


def check_start(run: ModelRun, step: int) -> None:
    """Raises UserError if a run that starts at `step` has no steps left, or fewer than its schedule needs.

    Prints a warning if the run ends before its warm-up does.
    """
    if step >= run.total_steps:
        raise UserError(
            f"TRAIN_STEPS = {run.total_steps} counts from the dense run's first step, and the checkpoint "
            f'{run.initial_checkpoint_path} is at step {step}: raise TRAIN_STEPS.'
        )
    run.learning_rate.schedule(step, run.total_steps)
    if run.learning_rate.ends_in_warmup(run.total_steps):
        warning.once(
            f'the warm-up of WARMUP_STEPS = {run.learning_rate.warmup_steps} steps is not shorter than TRAIN_STEPS = '
            f'{run.total_steps}, so the learning rate never reaches its peak: lower WARMUP_STEPS.'
        )


def params_from(run: ModelRun, layout: Layout, reader: Reader) -> tuple[Any, str | None]:
    """Loads a checkpoint's parameters for the run's model.

    Args:
      run: if its model is sparse and the checkpoint dense, its `surgery` is applied.
      layout: of the run's state.
      reader: of the checkpoint.

    Returns:
      The parameters, and the expert operator, or None if no surgery was applied.

    Raises:
      UserError: the checkpoint does not fit.
    """
    wanted = {name: leaf for name, leaf in layout.flat().items() if name.startswith('params/')}
    stored = {name: leaf for name, leaf in reader.leaves().items() if name.startswith('params/')}
    expands = any(f'/{EXPERT}/' in name for name in wanted) and not any(f'/{EXPERT}/' in name for name in stored)
    if expands and (run.surgery is None or run.surgery.operator is None):
        raise UserError(
            f'{reader.path} is dense and the model is sparse: remove the MoE layers, or add a surgery, such as that of '
            'runs/upcycle.gin, to evaluate the upcycled model.'
        )
    spec = run.surgery if expands else Surgery(operator=None)
    check_source(run, reader, spec)
    shardings = {name: leaf.sharding for name, leaf in wanted.items()}
    with in_gin_words(run.model, reader):
        plan = plan_surgery(stored, wanted, spec, layout.logical_axes, grids=run.model.grids)
    with Progress('loading', 'leaf', len(plan.rows)) as progress:
        flat = execute(plan, reader.read, shardings, new={}, progress=progress.show)
    return unflatten_dict(flat, sep='/')['params'], None if spec.operator is None else str(spec.operator)
