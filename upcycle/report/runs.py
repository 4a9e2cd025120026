"""Reads run folders: the role of a run, its log, and its cost on each axis."""

import dataclasses
import enum
import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from upcycle import files
from upcycle.errors import UserError
from upcycle.log_lines import is_number, lines_of, parse_line, what_is_wrong

Record = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]


class Role(enum.Enum):
    """The role of a run in the paper's comparison."""

    DENSE = 'dense'
    DENSE_CONTINUATION = 'dense continuation'
    UPCYCLED = 'upcycled'
    SCRATCH = 'MoE from scratch'
    OTHER = 'other'


class Axis(enum.Enum):
    """A kind of cost; the value is the key of its running total in `metrics.jsonl`."""

    FLOPS = 'flops'
    STEPS = 'step'
    SECONDS = 'seconds'

    @property
    def word(self) -> str:
        return {Axis.FLOPS: 'FLOPs', Axis.STEPS: 'steps', Axis.SECONDS: 'seconds'}[self]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder. `records` are in the order of writing; `receipt` is None unless the run was upcycled."""

    name: str
    path: epath.Path
    role: Role
    records: tuple[Record, ...] = dataclasses.field(default=(), repr=False)
    receipt: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)

    def split(self, split: str) -> list[Record]:
        """Returns the lines of one split, sorted by step; if a step has two lines, the later one."""
        by_step = {r['step']: r for r in self.records if r.get('split') == split and 'step' in r}
        return [by_step[step] for step in sorted(by_step)]

    @functools.cached_property
    def start(self) -> dict[Axis, float]:
        """Step, FLOPs and seconds of the checkpoint that the run started from; 0 if it started from scratch."""
        keys = {Axis.FLOPS: 'sunk_flops', Axis.STEPS: 'start_step', Axis.SECONDS: 'sunk_seconds'}
        return {a: float(next((r[k] for r in self.records if r.get(k)), 0)) for a, k in keys.items()}

    @property
    def from_zero(self) -> bool:
        """Whether the run started from scratch, so that its own cost is its whole cost."""
        if self.role in (Role.DENSE, Role.SCRATCH):
            return True
        return self.role is Role.OTHER and not any(self.start.values())

    def cost(self, record: Record, axis: Axis) -> float:
        """Returns the steps, FLOPs or seconds from the start of the run to `record`; nan if not logged."""
        offset = self.start[axis] if axis is Axis.STEPS else 0.0
        return float(record.get(axis.value, math.nan)) - offset

    def curve(self, metric: str, axis: Axis, split: str = 'validation') -> Curve:
        """Returns (cost, metric) of every line of `split` in which both are finite numbers; cost as in `cost`."""
        points = [(self.cost(r, axis), r[metric]) for r in self.split(split) if is_number(r.get(metric))]
        array = np.array([p for p in points if math.isfinite(p[0])], float).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    @property
    def routed_layers(self) -> list[str]:
        """MoE layers with logged metrics, such as `STACK/layers_1`, sorted by stack and by the numbers in their names.

        Logs do not contain the order of the stacks; they are sorted in reverse alphabetical order.
        """
        match = [re.fullmatch(r'experts/(.+)/[^/]+', key) for record in self.records for key in record]
        layers = {m.group(1) for m in match if m}
        by_number = sorted(layers, key=lambda s: [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', s)])
        return sorted(by_number, key=stack_of, reverse=True)


def stack_of(layer: str) -> str:
    """Returns the stack of a layer: the first part of its path."""
    return layer.partition('/')[0]


def load_run(path: str | os.PathLike[str], role: Role | None = None, name: str | None = None) -> Run:
    """Reads a run folder.

    Args:
      path: folder with `metrics.jsonl`, and `receipt.json` if the run was upcycled.
      role: role of the run; None: inferred from the folder's name and the metrics.
      name: name in figures and tables; None: the folder's name, with spaces for underscores.

    Raises:
      UserError: there is no log, it has no complete line, or a line other than the last is damaged.
    """
    path = files.absolute(path)
    metrics = path / 'metrics.jsonl'
    if not metrics.is_file():
        raise UserError(f'{path} is not a run folder, because it has no metrics.jsonl: name the MODEL_DIR of a run.')
    records = _read_log(metrics)
    receipt = _read_receipt(path / 'receipt.json')
    # The name of a folder may not be UTF-8; a label must be.
    name = name or path.resolve().name.replace('_', ' ').encode(errors='backslashreplace').decode()
    run = Run(name, path, role or Role.OTHER, tuple(records), receipt)
    return run if role else dataclasses.replace(run, role=infer_role(run))


def _read_log(metrics: epath.Path) -> list[Record]:
    records = []
    # The last line of a run in progress may be cut off.
    for number, line in enumerate(lines_of(metrics.read_bytes())[:-1], 1):
        if not line.strip():
            continue
        if wrong := what_is_wrong(record := parse_line(line)):
            raise UserError(f'{metrics}, line {number}, {wrong}: remove that line, or run again.')
        records.append(record)
    if not records:
        raise UserError(f'{metrics} has no complete line yet: wait until the run has logged its first step.')
    return records


def _read_receipt(file: epath.Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        receipt = json.loads(file.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is not JSON ({error}): remove it, or convert again.') from error
    if not isinstance(receipt, dict):
        raise UserError(f'{file} is not a JSON object: remove it, or convert again.')
    return receipt


def infer_role(run: Run) -> Role:
    """Infers the role of a run from its folder's name, or else from its routers and whether it started from a checkpoint."""
    folder = run.path.resolve().name.lower()
    for word, role in (('scratch', Role.SCRATCH), ('upcycl', Role.UPCYCLED), ('contin', Role.DENSE_CONTINUATION)):
        if word in folder:
            return role
    sparse = run.receipt is not None or any(key.startswith('experts/') for r in run.records for key in r)
    if any(run.start.values()):
        return Role.UPCYCLED if sparse else Role.DENSE_CONTINUATION
    return Role.SCRATCH if sparse else Role.DENSE


def chain(legs: Sequence[Run]) -> Run:
    """Joins runs, each of which started where the previous one ended, into one run; their costs add up.

    Args:
      legs: the runs in order. Name, role and sunk cost are taken from the first, the receipt from the last.
    """
    first, *others = legs
    records = list(first.records)
    for leg in others:
        before = records[-1] if records else {}
        for record in leg.records:
            added = {key: record.get(key, 0.0) + before.get(key, 0.0) for key in ('flops', 'seconds')}
            start = {key: before[key] for key in ('start_step', 'sunk_flops', 'sunk_seconds') if key in before}
            records.append({**record, **added, **start})
    return dataclasses.replace(first, records=tuple(records), receipt=legs[-1].receipt)
