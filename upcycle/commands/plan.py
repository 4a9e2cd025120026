"""`upcycle plan`: shows the surgery of a run from checkpoint metadata, without reading or writing weights."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import configuration, cost, run_config
from upcycle.errors import UserError
from upcycle.leaf_names import grouped, not_read
from upcycle.surgery.plan import Plan
from upcycle.training.describe import describe
from upcycle.training.preflight import preflight
from upcycle.training.state import Layout


def run(gin_files: Sequence[str], bindings: Mapping[str, str], *, as_json: bool = False) -> None:
    """`upcycle plan`: prints the table of the surgery, parameters and bytes before and after, and bytes per device.

    Raises:
      UserError: the run is wrong in a way that `train` would find before its first step.
    """
    run = run_config.as_it_began(configuration.load(gin_files, bindings))
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    start = preflight(run, configuration.resolved())
    # The plan is that of the first start, even if the run would resume from its own checkpoint.
    layout, reader, plan = start.layout, start.reader, start.plan
    facts = _facts(layout, plan, reader.leaves()) | {'from': str(reader.path), 'format': reader.format}
    if as_json:
        rows = [_row(row, layout) for row in plan.rows]
        print(json.dumps({**facts, 'rows': rows, 'dropped': dict(plan.dropped)}, indent=1))
        return
    _print_table(plan, layout)
    for line in not_read(reader.metadata):
        print(line)
    for line in grouped((f'dropped  {name}  because {reason}' for name, reason in plan.dropped.items()), None):
        print(line)
    print(describe(start))
    print('  '.join(f'{name}: {value}' for name, value in facts.items()))


def _facts(layout: Layout, plan: Plan, dense: Mapping[str, Any]) -> dict[str, Any]:
    params = {name: leaf for name, leaf in dense.items() if name.startswith('params/')}
    return {
        'parameters_before': cost.num_parameters(params),
        'parameters_after': cost.num_parameters(layout.abstract.params),
        'bytes_before': cost.num_bytes(dict(dense)),
        'bytes_after': cost.num_bytes(layout.abstract),
        'bytes_per_device': cost.bytes_per_device(layout.abstract),
        'leaves': len(plan.rows),
        'dropped_leaves': len(plan.dropped),
    }


def _row(row: Any, layout: Layout) -> dict[str, Any]:
    sharding = layout.flat()[row.target].sharding
    return {
        'target': row.target,
        'sources': list(row.sources),
        'action': str(row.action),
        'shape': list(row.shape),
        'dtype': str(row.dtype),
        'sharding': [axis if axis is None or isinstance(axis, str) else list(axis) for axis in sharding.spec],
        'elements_per_device': math.prod(sharding.shard_shape(row.shape)),
    }


def _print_table(plan: Plan, layout: Layout) -> None:
    from upcycle import tables

    table = tables.table('target', 'from', 'action', 'shape', 'dtype', 'sharding')
    for row in plan.rows:
        shown = _row(row, layout)
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
