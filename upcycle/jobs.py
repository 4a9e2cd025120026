"""The commands that work on a configured run."""

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from upcycle import configuration, cost, files, outputs, partitioning
from upcycle.checkpoints import open_checkpoint, open_checkpoints
from upcycle.checkpoints.integrity import require_whole
from upcycle.errors import UserError, writing_to
from upcycle.evaluate.protocol import Subject
from upcycle.gin_files import require_data
from upcycle.leaf_names import grouped, not_read
from upcycle.metrics import counted, plain
from upcycle.surgery.plan import Plan
from upcycle.train import lock, loop
from upcycle.train.describe import describe
from upcycle.train.preflight import preflight
from upcycle.train.state import Layout, check_start, layout, make_plan, params_from
from upcycle.train.step import TrainState

FEW_SHOT = 'runs/few_shot.gin'
TASK_METRICS = 'runs/task_metrics.gin'


def train(
    gin_files: Sequence[str], bindings: Mapping[str, str], name: str = 'train', profile_steps: range = loop.NO_STEPS
) -> TrainState:
    """`upcycle train`: says what was resolved, then trains; see `loop.train`.

    Raises:
      UserError: before anything is written, where the configuration, the folder or the checkpoint do not fit.
    """
    run = configuration.as_it_began(configuration.load(gin_files, bindings))
    identity = configuration.resolved()
    if profile_steps and profile_steps[-1] > run.total_steps:
        raise UserError(
            f'--profile_steps ends at step {profile_steps[-1]}, after TRAIN_STEPS = {run.total_steps}: name earlier ones.'
        )
    start = preflight(run, identity)
    if jax.process_index() == 0:
        print(describe(run, start.where, start.mesh), flush=True)
    with files.patient(), lock.held(run.model_dir) as still_ours:
        if jax.process_index() == 0:
            with writing_to(run.model_dir):
                configuration.claim(run, identity)
        return loop.train(run, name, profile_steps, still_ours)


def plan(gin_files: Sequence[str], bindings: Mapping[str, str], *, as_json: bool = False) -> None:
    """`upcycle plan`: the table of the surgery, parameters and bytes before and after, memory on a device.

    Raises:
      UserError: `train` would refuse the run before its first step.
    """
    run = configuration.as_it_began(configuration.load(gin_files, bindings))
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    start = preflight(run, configuration.resolved())
    mesh, where = start.mesh, start.where
    # A run that would resume from its own checkpoint is planned as at its first start.
    reader = start.reader or open_checkpoints(run.initial_checkpoint_path)
    what = start.surgery or make_plan(run, where, reader)
    facts = _facts(where, what, reader.leaves()) | {'from': str(reader.path), 'format': reader.format}
    if as_json:
        rows = [_row(row, where) for row in what.rows]
        print(json.dumps({**facts, 'rows': rows, 'dropped': dict(what.dropped)}, indent=1))
        return
    _print_table(what, where)
    for line in not_read(reader.metadata):
        print(line)
    for line in grouped((f'dropped  {name}  because {reason}' for name, reason in what.dropped.items()), None):
        print(line)
    print(describe(run, where, mesh))
    print('  '.join(f'{name}: {value}' for name, value in facts.items()))


def evaluate(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    checkpoint: str,
    *,
    as_json: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """`upcycle eval`: metrics of a checkpoint on the evaluation data, with FEW_SHOT its probes, with TASK_METRICS its answers.

    Args:
      gin_files: none: the configuration of the run whose folder `checkpoint` is, or lies in, where that is no program. Whoever
        trusts one that is, names it first.
      bindings: of the command line.
      checkpoint: any that `open_checkpoint` reads.
      as_json: print JSON and no table.
      out: a file for the JSON as well.

    Returns:
      What the JSON holds.

    Raises:
      UserError: the configuration or the checkpoint do not fit.
    """
    if out is not None:
        outputs.check('--out', out, outputs.Kind.FILE)
    reader = open_checkpoint(checkpoint)
    require_whole(reader.path)
    named = dict(bindings)
    if all(file in (FEW_SHOT, TASK_METRICS) for file in gin_files):
        with _config_of(checkpoint) as config:
            run = configuration.load([config, *gin_files], named)
    else:
        if os.path.basename(gin_files[0]) != configuration.CONFIG:
            # Neither says anything about the weights, and a run needs both.
            unused = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000000'}
            named = {**unused, 'INITIAL_CHECKPOINT_PATH': checkpoint, **bindings}
        run = configuration.load(gin_files, named)
    if run.eval_data is None:
        raise UserError('EVAL_DATASET is None: name a task, such as --gin_file=tasks/mnist5k.gin.')
    for evaluator in run.evaluators:
        evaluator.check_data(run.eval_data)
    mesh = loop.check(run)
    with partitioning.use(mesh):
        where = layout(run, mesh)
        params, operator = params_from(run, where, reader)
        if operator is not None:
            print(f'the checkpoint is dense, the model is not: upcycled by {operator!r}', file=sys.stderr)
        subject = Subject(run.model, run.eval_data, partitioning.batch_sharding(mesh), counted)
        metrics = {
            evaluator.name: evaluator.prepare(subject)(params)
            for evaluator in run.evaluators
            if evaluator.of_checkpoints
        }
    result = {
        'checkpoint': str(reader.path),
        'format': reader.format,
        'step': reader.step if 'step' in reader.leaves() else None,
        'family': run.model.family,
        'operator': operator,
        'data': run.eval_data.fingerprint(),
        'metrics': {split: {name: plain(value) for name, value in of.items()} for split, of in metrics.items()},
    }
    if jax.process_index() == 0:
        text = json.dumps(result, indent=1)
        if out is not None:
            outputs.write('--out', out, text + '\n')
        print(text if as_json else _metrics_table(result))
    return result


@contextlib.contextmanager
def _config_of(checkpoint: str) -> Iterator[str]:
    """The configuration of the run that a checkpoint's path belongs to: a file that gin can read, which knows no buckets.

    Raises:
      UserError: there is none, or it is more than data.
    """
    path = files.absolute(checkpoint)
    for config in (folder / configuration.CONFIG for folder in (path, path.parent, path.parent.parent)):
        if not config.is_file():
            continue
        if not files.is_remote(config):
            require_data(os.fspath(config))
            yield os.fspath(config)
            return
        with tempfile.NamedTemporaryFile('w', suffix='.gin', encoding='utf-8') as copy:
            copy.write(config.read_text())
            copy.flush()
            require_data(copy.name, shown=os.fspath(config))
            yield copy.name
        return
    raise UserError(
        f'{checkpoint} lies in no run folder of ours, so say what model and data it is of: --gin_file=models/..., '
        '--gin_file=tasks/..., --gin_file=runs/eval.gin.'
    )


def _metrics_table(result: Mapping[str, Any]) -> str:
    """A line for every number; lists and the layers' own metrics stay in the JSON."""
    lines = [f'{result["checkpoint"]}  format: {result["format"]}  step: {result["step"]}']
    for split, metrics in result['metrics'].items():
        for name, value in metrics.items():
            if not isinstance(value, list) and (split == 'tasks' or name.count('/') < 2):
                lines.append(f'{split:<12}{name:<32}{value:.6g}')
    return '\n'.join(lines)


def convert(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    target: str,
    format: str,
    *,
    dtype: str | None = None,
    optimizer_state: bool = True,
    verify: bool = False,
) -> str:
    """`upcycle convert`: the checkpoint that a run would start from, made on the host and streamed to disk."""
    from upcycle import convert as offline

    files = list(gin_files)
    # The surgery is that of a run, and a model and its MoE layers need no other part of one.
    folders = [os.path.basename(os.path.dirname(file)) for file in files]
    if 'runs' not in folders:
        # Operators and recipes change what a run says.
        later = [i for i, folder in enumerate(folders) if folder in ('surgery', 'recipes')]
        files.insert(min(later, default=len(files)), 'runs/convert.gin')
    run = configuration.load(files, {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1', **bindings})
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    # What is named of a run that is to train the result.
    if run.train_data is not None:
        loop.check_batches(run, partitioning.make_mesh((1, 1, 1), run.num_experts, jax.local_devices()[:1]))
    if 'TRAIN_STEPS' in bindings:
        step = open_checkpoints(run.initial_checkpoint_path).step if run.dense_step is None else run.dense_step
        if step is not None:
            check_start(run, step)
    return offline.convert(run, target, format, dtype=dtype, optimizer_state=optimizer_state, verify=verify)


def compile_(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    topology: str,
    *,
    num_slices: int = 1,
    utilization: float = 0.4,
    as_json: bool = False,
    out: str | None = None,
    hlo: str | None = None,
) -> None:
    """`upcycle compile`: the TPU compiler's account of a run's step."""
    for name, path in (('--out', out), ('--hlo', hlo)):
        if path is not None:
            outputs.check(name, path, outputs.Kind.FILE)
    from upcycle import compile as aot

    if not 0 < utilization <= 1:
        raise UserError(f'--utilization={utilization:g} must lie in (0, 1].')
    # Neither is read, and a run needs both.
    named = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000', **bindings}
    run = configuration.load(gin_files, named)
    account, text = aot.compile_run(run, topology, num_slices=num_slices)
    if hlo is not None:
        outputs.write('--hlo', hlo, text)
    found = json.dumps(aot.as_json(account, run, utilization), indent=1)
    if out is not None:
        outputs.write('--out', out, found + '\n')
    print(found if as_json else aot.show(account, run, utilization))


def _facts(where: Layout, what: Plan, dense: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: leaf for name, leaf in dense.items() if name.startswith('params/')}
    return {
        'parameters_before': cost.num_parameters(params),
        'parameters_after': cost.num_parameters(where.abstract.params),
        'bytes_before': cost.num_bytes(dict(dense)),
        'bytes_after': cost.num_bytes(where.abstract),
        'bytes_per_device': cost.bytes_per_device(where.abstract),
        'leaves': len(what.rows),
        'dropped_leaves': len(what.dropped),
    }


def _row(row: Any, where: Layout) -> dict[str, Any]:
    sharding = where.flat()[row.target].sharding
    return {
        'target': row.target,
        'sources': list(row.sources),
        'action': str(row.action),
        'shape': list(row.shape),
        'dtype': str(row.dtype),
        'sharding': [axis if axis is None or isinstance(axis, str) else list(axis) for axis in sharding.spec],
        'elements_per_device': math.prod(sharding.shard_shape(row.shape)),
    }


def _print_table(what: Plan, where: Layout) -> None:
    from upcycle import tables

    table = tables.table('target', 'from', 'action', 'shape', 'dtype', 'sharding')
    for row in what.rows:
        shown = _row(row, where)
        source = ', '.join(shown['sources'])
        table.add_row(
            shown['target'],
            'same' if source == shown['target'] else source or '-',
            shown['action'],
            str(tuple(shown['shape'])),
            shown['dtype'],
            str(tuple(shown['sharding'])),
        )
    tables.console(220).print(table)
