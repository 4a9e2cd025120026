"""`upcycle convert`: the surgery of a run, carried out on the host and streamed to disk instead of onto devices.

The plan is the one that a trainer would make and print. What is in memory is one MoE layer while it is made, and the parts that
are on their way to disk; never a model.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import partitioning
from upcycle.checkpoints import Reader, create_checkpoint, open_checkpoint
from upcycle.checkpoints.arrays import require_finite
from upcycle.checkpoints.writing import WHOLE, Writer, parts
from upcycle.errors import UserError
from upcycle.models import Model, identify
from upcycle.surgery.execute import make_expert, make_router, sha256_of
from upcycle.surgery.plan import Action, OptimizerState, Plan, Row, Surgery, mlp_of, within_mlp
from upcycle.surgery.positions import resize_positions
from upcycle.surgery.receipt import check_layer, receipt
from upcycle.train.carried import source_of
from upcycle.train.run import Run
from upcycle.train.state import layout, make_plan
from upcycle.transfer import Progress, ahead, check_dtype, discarded_if_refused, fingerprint, with_dtype

# A larger MoE layer is not put together for the function check, which then waits for the first load.
CHECKED_BYTES = 2 << 30
CHECKED_TOKENS = 256
_ALIGNMENT = 64  # of an array that XLA takes without a copy


def convert(
    run: Run,
    target: str,
    format: str,
    *,
    dtype: str | None = None,
    optimizer_state: bool = True,
    verify: bool = False,
    check_functions: bool = True,
) -> str:
    """Writes the upcycled checkpoint that a run would start from.

    Args:
      run: says what becomes of which checkpoint; its data and schedule are not looked at.
      target: where the new checkpoint will be.
      format: of the new checkpoint.
      dtype: of the parameters; None: float32, as the trainer has them.
      optimizer_state: False: leave the optimizer's state out.
      verify: read everything back, and compare every part with what it was made of.
      check_functions: compare each MoE layer with its dense MLP.

    Returns:
      The path of the new checkpoint.

    Raises:
      UserError: before anything is written, where plan, format or space do not fit; later where a source is damaged, which leaves
        nothing behind.
    """
    check_dtype(dtype)
    if run.surgery is None or run.surgery.operator is None:
        raise UserError(
            "EXPERT_OPERATOR is None: name how the experts are made, such as 'copy'; `upcycle import` only copies."
        )
    reader = open_checkpoint(run.initial_checkpoint_path)
    identify.check(reader.path, reader.leaves(), identify.facts_of(reader.metadata))
    mesh = partitioning.make_mesh((1, 1, 1), run.num_experts, jax.local_devices()[:1])
    where = layout(run, mesh, identify.smallest_batch(run.model))
    wanted = {
        name: with_dtype(name, leaf, dtype)
        for name, leaf in where.flat().items()
        if name != 'rng' and (optimizer_state or not name.startswith('opt_state/'))
    }
    what = make_plan(run, where, reader, wanted)
    step = reader.step if run.dense_step is None else run.dense_step
    leaves = {row.target: jax.ShapeDtypeStruct(row.shape, row.dtype) for row in what.rows}
    identity = {
        'from': reader.path,
        'source': fingerprint(reader.leaves()),
        'format': format,
        'step': step,
        'surgery': str(what.spec),
        'optimizer_state': optimizer_state,
        'leaves': fingerprint(leaves),
    }
    writer = create_checkpoint(target, format, leaves, step=step, identity=identity)
    with discarded_if_refused(writer):
        _check_clock(what, writer, format)
        work = _Conversion(run.model if check_functions else None, what, reader, writer, step, verify)
        work.write()
        paper = receipt(what, source=source_of(reader, step), hashes=work.source_hashes)
        paper['function_check'] = {'whole_model': 'pending', 'layers': work.checks, 'activations': 'seeded normal'}
        writer.finish(_metadata(run, reader, paper), work.compare if verify else lambda reader: None)
    for name, reason in writer.left_out.items():
        print(f'left out  {name}  because {reason}')
    return writer.path


def _metadata(run: Run, reader: Reader, paper: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer would save: the dense run's cost goes along, all of it sunk."""
    kept = {name: reader.metadata[name] for name in ('cost', 'optimizer') if name in reader.metadata}
    model = json.loads(json.dumps(run.model.describe(), default=str))
    return {**kept, 'family': run.model.family, 'model': model, 'receipt': dict(paper)}


def _check_clock(what: Plan, writer: Writer, format: str) -> None:
    if 'opt_state/count' in writer.left_out and what.spec.optimizer_state is OptimizerState.FRESH_CLOCK:
        raise UserError(
            f"OPTIMIZER_STATE = 'fresh_clock' has no counterpart in {format}, whose optimizer counts the model's steps."
        )


class _Conversion:
    """One conversion on its way."""

    def __init__(self, model: Model | None, what: Plan, reader: Reader, writer: Writer, step: int, verify: bool):
        self._model, self._plan, self._reader, self._writer = model, what, reader, writer
        self._step, self._verify = step, verify
        self._todo = writer.todo()
        self._leaves = {row.target: jax.ShapeDtypeStruct(row.shape, row.dtype) for row in what.rows}
        self.source_hashes: dict[str, str] = {}
        self.checks: dict[str, Any] = {}
        self._checking: dict[str, concurrent.futures.Future] = {}
        self._memory: dict[str, np.ndarray] = {}
        self._behind = concurrent.futures.ThreadPoolExecutor(1)
        self._made_hashes: dict[tuple[str, int], str] = {}

    def write(self) -> None:
        """Makes every leaf, in the plan's order, and hands the parts that are missing to the writer."""
        progress = Progress({name: self._leaves[name] for name in self._todo})
        groups = [group for group in self._plan.groups() if group[0].target in self._leaves]
        for group, sources in zip(groups, ahead(self._reads(groups)), strict=True):
            for row, start, value in self._parts(group, sources):
                region = WHOLE if start is None else (slice(start, start + len(value)),)
                if region in self._todo.get(row.target, ()):
                    self._writer.write(row.target, region, value, self._alike(row, region))
                    progress.add(row.target, value.nbytes)
        self._wait_for_checks()
        progress.end()

    def _wait_for_checks(self) -> None:
        while self._checking:
            path, check = self._checking.popitem()
            self.checks[path] = check.result()

    def compare(self, written: Reader) -> None:
        """Raises UserError unless every part of the result has the hash of what was made from its source."""
        for name, leaf in self._leaves.items():
            if name in self._writer.left_out:
                continue
            for region in parts(name, leaf):
                start = region[0].start if region else 0
                if _sha256(written.read(name, region=region)) != self._made_hashes[name, start]:
                    part = f'expert {start} of {name}' if region else name
                    raise UserError(f'{part} was not written as it was made: the disk or its driver is broken.')

    def _reads(self, groups: Sequence[Sequence[Row]]) -> Iterator[Callable[[], dict[str, np.ndarray]]]:
        def read(names: list[str]) -> dict[str, np.ndarray]:
            return {name: self._source(name) for name in names}

        for group in groups:
            yield lambda names=[name for row in group for name in row.sources]: read(names)

    def _source(self, name: str) -> np.ndarray:
        value = np.asarray(self._step, np.int32) if name == 'step' else self._reader.read(name)
        require_finite(self._reader.path, name, value)
        self.source_hashes[name] = sha256_of(name, value)
        return value

    def _parts(
        self, group: Sequence[Row], sources: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[Row, int | None, np.ndarray]]:
        """The parts of the rows of one group: (row, first index, numbers), or (row, None, the whole leaf)."""
        check = _LayerCheck.of(self._model, self._plan, group, self._memory)
        small: dict[str, list[np.ndarray]] = {}
        for row, index, value in on_host(self._plan.spec, group, sources):
            if check is not None:
                value = check.keep(row, index, value)
            regions = parts(row.target, self._leaves[row.target])
            if index is None:
                for region in regions:
                    yield self._made(row, region, value[region])
            elif len(regions) == row.shape[0]:
                yield self._made(row, regions[index], value[None])
            else:
                # Leaves too small to be cut are put together.
                small.setdefault(row.target, []).append(value)
                if index == row.shape[0] - 1:
                    whole = np.stack(small.pop(row.target))
                    for region in regions:
                        yield self._made(row, region, whole[region])
        if check is not None:
            self._wait_for_checks()
            self._checking[check.path] = self._behind.submit(check.result, sources)
            if not self._plan.spec.operator.identical:  # its experts are in memory
                self._wait_for_checks()

    def _made(self, row: Row, region: tuple[slice, ...], value: np.ndarray) -> tuple[Row, int | None, np.ndarray]:
        start = region[0].start if region else None
        if self._verify:
            # The experts of a copy share their memory, and one hash.
            self._made_hashes[row.target, start or 0] = self._hash(row, value)
        return row, start, value

    def _alike(self, row: Row, region: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """The part with the first expert, where the others are its copies."""
        repeats = row.action is Action.TILE or (row.action is Action.EXPERTS and self._plan.spec.operator.identical)
        return (
            (slice(0, 1),) if repeats and region and region[0].start and region[0].stop - region[0].start == 1 else None
        )

    def _hash(self, row: Row, value: np.ndarray) -> str:
        if row.action is Action.EXPERTS and self._plan.spec.operator.identical and value.shape[0] == 1:
            key = (row.target, -1)
            if key not in self._made_hashes:
                self._made_hashes[key] = _sha256(value)
            return self._made_hashes[key]
        return _sha256(value)


def on_host(
    spec: Surgery, rows: Sequence[Row], sources: Mapping[str, np.ndarray]
) -> Iterator[tuple[Row, int | None, np.ndarray]]:
    """Makes one group of a plan piece by piece, for who has no room for more: the same bytes as `execute`.

    Args:
      spec: the surgery.
      rows: one of `Plan.groups`; none is NEW.
      sources: the rows' sources, whole.

    Yields:
      A row, the index of an expert and that expert's leaf; or a row, None and the whole leaf.
    """
    row = rows[0]
    if row.action is Action.TILE or (row.action is Action.EXPERTS and spec.operator.identical):
        for row in rows:
            leaf = np.asarray(sources[row.sources[0]]).astype(row.dtype, copy=False)
            for index in range(row.shape[0]):
                yield row, index, leaf
    elif row.action is Action.EXPERTS:
        here = {name: jax.numpy.asarray(leaf) for name, leaf in sources.items()}
        for index in range(row.shape[0]):
            made = make_expert(spec, rows, here, index)
            for row in rows:
                yield row, index, np.asarray(made[row.target])
    elif row.action is Action.KEEP:
        yield row, None, np.asarray(sources[row.sources[0]]).astype(row.dtype, copy=False)
    elif row.action is Action.RESIZE:
        resized = resize_positions(jax.numpy.asarray(sources[row.sources[0]]), num_patches=row.shape[1])
        yield row, None, np.asarray(resized.astype(row.dtype))
    elif row.action is Action.ZEROS:
        yield row, None, np.zeros(row.shape, row.dtype)
    elif row.action is Action.ROUTER:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        yield row, None, np.asarray(make_router(spec, row, here))
    else:
        raise ValueError(f'{row.target} is made by the trainer, not from a checkpoint')


class _LayerCheck:
    """Puts one MoE layer together while its experts are made, and compares it with its dense MLP."""

    def __init__(self, model: Model, plan: Plan, rows: Sequence[Row], memory: dict[str, np.ndarray]):
        self.path = mlp_of(rows[0].target).removeprefix('params/')
        self._model, self._plan, self._rows = model, plan, rows
        # Experts that are all alike are spread when they are needed, in memory that the next layer's check takes over.
        self._memory = memory
        self._alike = plan.spec.operator.identical
        self._stacks = {} if self._alike else {row.target: _aligned(row.shape, row.dtype) for row in rows}

    @classmethod
    def of(
        cls, model: Model | None, plan: Plan, rows: Sequence[Row], memory: dict[str, np.ndarray]
    ) -> '_LayerCheck | None':
        """The check of a group, or None where there is nothing to check or it would not fit."""
        is_layer = rows[0].action is Action.EXPERTS and rows[0].target.startswith('params/')
        size = sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rows)
        if model is None or not is_layer or size > CHECKED_BYTES or not rows[0].sources:
            return None
        return cls(model, plan, rows, memory)

    def keep(self, row: Row, index: int, value: np.ndarray) -> np.ndarray:
        """Puts an expert's leaf in its place, and gives it back from there."""
        if self._alike:
            self._stacks[row.target] = value
            return value
        self._stacks[row.target][index] = value
        return self._stacks[row.target][index]

    def result(self, sources: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Numbers of `surgery.receipt.LayerCheck`."""
        router = [
            row for row in self._plan.rows if row.target.startswith(f'params/{self.path}/') and row not in self._rows
        ]
        params = {row.target: self._stacks[row.target] for row in self._rows}
        if self._alike:
            for row in self._rows:
                stack = self._memory.get(within_mlp(row.target))
                if stack is None or stack.shape != row.shape or stack.dtype != row.dtype:
                    stack = self._memory[within_mlp(row.target)] = _aligned(row.shape, row.dtype)
                np.copyto(stack, params[row.target])
                params[row.target] = stack
        for row in router:
            if row.action is not Action.ROUTER:
                return {}
            for _, _, value in on_host(self._plan.spec, [row], {}):
                params[row.target] = value
        inside = {name.removeprefix(f'params/{self.path}/'): jax.numpy.asarray(value) for name, value in params.items()}
        dense = {within_mlp(row.target): jax.numpy.asarray(sources[row.sources[0]]) for row in self._rows}
        return dataclasses.asdict(check_layer(self._model, self.path, dense, inside, CHECKED_TOKENS))


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory that XLA can use where it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _sha256(value: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(value, order='C').reshape(-1).view(np.uint8).data).hexdigest()
