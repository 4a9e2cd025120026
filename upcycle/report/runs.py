"""Run folders as the report reads them: the role of a run, what it logged, and its cost on each axis."""

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
    """The part of a run in the paper's comparison."""

    DENSE = 'dense'
    DENSE_CONTINUATION = 'dense continuation'
    UPCYCLED = 'upcycled'
    SCRATCH = 'MoE from scratch'
    OTHER = 'other'


class Axis(enum.Enum):
    """A cost, and the key of its cumulative value in `metrics.jsonl`."""

    FLOPS = 'flops'
    STEPS = 'step'
    SECONDS = 'seconds'

    @property
    def word(self) -> str:
        return {Axis.FLOPS: 'FLOPs', Axis.STEPS: 'steps', Axis.SECONDS: 'seconds'}[self]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder, read. `records` are in order of writing; `receipt` is None unless the run was upcycled."""

    name: str
    path: epath.Path
    role: Role
    records: tuple[Record, ...] = dataclasses.field(default=(), repr=False)
    receipt: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)

    def split(self, split: str) -> list[Record]:
        """The lines of one split, by step; of two lines at one step the later written counts."""
        by_step = {r['step']: r for r in self.records if r.get('split') == split and 'step' in r}
        return [by_step[step] for step in sorted(by_step)]

    @functools.cached_property
    def start(self) -> dict[Axis, float]:
        """Step, FLOPs and seconds of the checkpoint that the run started from; zeros when it started from nothing."""
        keys = {Axis.FLOPS: 'sunk_flops', Axis.STEPS: 'start_step', Axis.SECONDS: 'sunk_seconds'}
        return {a: float(next((r[k] for r in self.records if r.get(k)), 0)) for a, k in keys.items()}

    @property
    def from_zero(self) -> bool:
        """Whether the run started from nothing, so that its own cost is its whole cost."""
        if self.role in (Role.DENSE, Role.SCRATCH):
            return True
        return self.role is Role.OTHER and not any(self.start.values())

    def cost(self, record: Record, axis: Axis) -> float:
        """The cost of this run at `record`: steps, FLOPs or seconds since its start; nan if not logged."""
        offset = self.start[axis] if axis is Axis.STEPS else 0.0
        return float(record.get(axis.value, math.nan)) - offset

    def curve(self, metric: str, axis: Axis, split: str = 'validation') -> Curve:
        """(cost, metric) of every line of `split` that holds both as finite numbers; cost as in `cost`."""
        points = [(self.cost(r, axis), r[metric]) for r in self.split(split) if is_number(r.get(metric))]
        array = np.array([p for p in points if math.isfinite(p[0])], float).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    @property
    def routed_layers(self) -> list[str]:
        """MoE layers with metrics of their own, such as `STACK/layers_1`: stack by stack, by the numbers in their names.

        Logs do not say in which order a model has its stacks; here it is the reverse of the alphabet's.
        """
        match = [re.fullmatch(r'experts/(.+)/[^/]+', key) for record in self.records for key in record]
        layers = {m.group(1) for m in match if m}
        by_number = sorted(layers, key=lambda s: [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', s)])
        return sorted(by_number, key=stack_of, reverse=True)


def stack_of(layer: str) -> str:
    """The stack that a layer belongs to: the first part of its path."""
    return layer.partition('/')[0]


def load_run(path: str | os.PathLike[str], role: Role | None = None, name: str | None = None) -> Run:
    """Reads a run folder.

    Args:
      path: folder with `metrics.jsonl` and perhaps `receipt.json`.
      role: of the run; inferred from the folder's name and its metrics when None.
      name: in figures and tables; the folder's name, with spaces for underscores, when None.

    Raises:
      UserError: no metrics, no complete line in them, or a broken line that is not the last.
    """
    path = files.absolute(path)
    metrics = path / 'metrics.jsonl'
    if not metrics.is_file():
        raise UserError(f'{path} is not a run folder: it has no metrics.jsonl; give the MODEL_DIR of a run.')
    records = _read_log(metrics)
    receipt = _read_receipt(path / 'receipt.json')
    # A folder's name need not be UTF-8, and a label must be.
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
        raise UserError(f'{metrics} holds no complete line yet; wait for the run to log its first step.')
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
    """The role of a run: by its folder's name, else by whether it has routers and started from a checkpoint."""
    folder = run.path.resolve().name.lower()
    for word, role in (('scratch', Role.SCRATCH), ('upcycl', Role.UPCYCLED), ('contin', Role.DENSE_CONTINUATION)):
        if word in folder:
            return role
    sparse = run.receipt is not None or any(key.startswith('experts/') for r in run.records for key in r)
    if any(run.start.values()):
        return Role.UPCYCLED if sparse else Role.DENSE_CONTINUATION
    return Role.SCRATCH if sparse else Role.DENSE


def chain(legs: Sequence[Run]) -> Run:
    """Several runs as one, each of which started where the one before ended: their costs add up.

    Args:
      legs: in order; name, role and sunk cost are the first one's, the receipt the last one's.
    """
    first, *others = legs
    records = list(first.records)
    for leg in others:
        before = records[-1] if records else {}
        for record in leg.records:
            added = {key: record.get(key, 0.0) + before.get(key, 0.0) for key in ('flops', 'seconds')}
            kept = {key: before[key] for key in ('start_step', 'sunk_flops', 'sunk_seconds') if key in before}
            records.append({**record, **added, **kept})
    return dataclasses.replace(first, records=tuple(records), receipt=legs[-1].receipt)
