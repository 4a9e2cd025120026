"""The commands that work on a configured run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from upcycle import configuration, cost, partitioning
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.surgery.plan import Plan
from upcycle.train import loop
from upcycle.train.describe import describe
from upcycle.train.state import Layout, check_start, layout, make_plan
from upcycle.train.step import TrainState


def train(gin_files: Sequence[str], bindings: Mapping[str, str], name: str = 'train') -> TrainState:
    """`upcycle train`: says what was resolved, then trains.

    Raises:
      UserError: before anything is written, where the configuration, the folder or the checkpoint do not fit.
    """
    run = configuration.load(gin_files, bindings)
    identity = configuration.resolved()
    fixed = ('total_steps',) if run.learning_rate.falls_towards_the_end else ()
    configuration.claim(run.model_dir, identity, fixed=fixed, write=False)
    mesh = loop.check(run)
    where = layout(run, mesh)
    # A run that has a checkpoint of its own needs the dense one no longer.
    if run.initial_checkpoint_path is not None and not os.path.isdir(os.path.join(run.model_dir, 'checkpoints')):
        reader = open_checkpoint(run.initial_checkpoint_path)
        make_plan(run, where, reader)
        check_start(run, reader.step if run.dense_step is None else run.dense_step)
    elif run.initial_checkpoint_path is None:
        check_start(run, 0)
    # The first use of the data finds what is wrong with it.
    run.train_data.fingerprint()
    if jax.process_index() == 0:
        print(describe(run, where, mesh), flush=True)
        configuration.claim(run.model_dir, identity, fixed=fixed)
    return loop.train(run, name)


def plan(gin_files: Sequence[str], bindings: Mapping[str, str], *, as_json: bool = False) -> None:
    """`upcycle plan`: the table of the surgery, parameters and bytes before and after, memory on a device."""
    run = configuration.load(gin_files, bindings)
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    mesh = partitioning.make_mesh(run.mesh_shape, run.num_experts)
    where = layout(run, mesh)
    reader = open_checkpoint(run.initial_checkpoint_path)
    what = make_plan(run, where, reader)
    facts = _facts(where, what, reader.leaves()) | {'from': str(reader.path), 'format': reader.format}
    if as_json:
        rows = [_row(row, where) for row in what.rows]
        print(json.dumps({**facts, 'rows': rows, 'dropped': dict(what.dropped)}, indent=1))
        return
    _print_table(what, where)
    for name, reason in what.dropped.items():
        print(f'dropped  {name}  because {reason}')
    print(describe(run, where, mesh))
    print('  '.join(f'{name}: {value}' for name, value in facts.items()))


def compile_(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    topology: str,
    *,
    num_slices: int = 1,
    utilization: float = 0.4,
    as_json: bool = False,
    hlo: str | None = None,
) -> None:
    """`upcycle compile`: the TPU compiler's account of a run's step."""
    from upcycle import compile as aot

    if not 0 < utilization <= 1:
        raise UserError(f'--utilization={utilization:g} must lie in (0, 1].')
    # Neither is read, and a run needs both.
    named = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000', **bindings}
    run = configuration.load(gin_files, named)
    account, text = aot.compile_run(run, topology, num_slices=num_slices)
    if hlo is not None:
        with open(hlo, 'w', encoding='utf-8') as file:
            file.write(text)
    if as_json:
        print(json.dumps(aot.as_json(account, run, utilization), indent=1))
        return
    print(aot.show(account, run, utilization))


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
    from rich.console import Console
    from rich.table import Table

    table = Table('target', 'from', 'action', 'shape', 'dtype', 'sharding', box=None, pad_edge=False)
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
    Console(width=None if Console().is_terminal else 220).print(table)
