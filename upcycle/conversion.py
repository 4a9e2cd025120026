"""`upcycle convert`: runs the surgery of a training run on the host and streams the result to disk.

The plan is the one that a trainer would make. Memory holds one MoE layer and the parts in flight to the disk, never a model.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from upcycle import partitioning, router_prompts
from upcycle.checkpoints import Reader, check_target, create_checkpoint, open_checkpoints
from upcycle.checkpoints.arrays import require_finite
from upcycle.checkpoints.hf import companions
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.several import readers_of
from upcycle.checkpoints.writing import Region, Writer
from upcycle.collected_layer import CHECKED_BYTES, CollectedLayer
from upcycle.errors import UserError
from upcycle.formats import ANY_FOLDER, FolderRequest
from upcycle.leaf_names import left_out, not_read
from upcycle.models import Model, identify
from upcycle.surgery.fingerprint import in_c_order, sha256_of
from upcycle.surgery.make import NEEDS_DATA, Hidden, Maker
from upcycle.surgery.operators import Lineage, Start
from upcycle.surgery.plan import Action, OptimizerState, Plan, Row, mlp_of
from upcycle.surgery.receipt import make_receipt
from upcycle.surgery.router_init import RouterInit
from upcycle.training.receipt_of_start import source_of
from upcycle.training.run import ModelRun
from upcycle.training.state import first_step, make_layout, make_plan
from upcycle.transfer import Leaves, Part, ahead, check_dtype, discarded_if_refused, fingerprint, with_dtype, write
from upcycle.whole_model import compare_logits

# Entries of the source's metadata that its conversion keeps.
INHERITED = ('cost', 'optimizer', 'sentinels', 'kept', 'model_type')


def convert(
    run: ModelRun,
    target: str,
    format: str,
    *,
    dtype: str | None = None,
    optimizer_state: bool = True,
    verify: bool = False,
    check_functions: bool = True,
    request: FolderRequest = ANY_FOLDER,
) -> str:
    """Writes the checkpoint that a run would start from.

    Args:
      run: names the source and the surgery; its data and schedule are ignored.
      target: path of the new checkpoint.
      format: of the new checkpoint.
      dtype: of the parameters; None: float32, as in the trainer, or in a format that other programs read (huggingface), that of
        each leaf's source.
      optimizer_state: False leaves the optimizer state out.
      verify: read everything back and compare hashes.
      check_functions: compare each MoE layer with its dense MLP.
      request: see `checkpoints.create_checkpoint`.

    Returns:
      The path of the new checkpoint.

    Raises:
      UserError: before any write, if plan, format or disk space do not fit; later, if a source is damaged. No files are left.
    """
    check_dtype(dtype)
    if format == 'huggingface' and run.surgery is not None and run.surgery.optimizer_state is OptimizerState.FRESH:
        optimizer_state = False  # zeros, for which the format has no place
    target = check_target(target, format, below_runs=False)
    if run.surgery is None or run.surgery.made_by is None:
        raise UserError(
            "EXPERT_OPERATOR is None: set it, such as to 'copy', or use `upcycle import`, which only copies."
        )
    if run.surgery.router_init is RouterInit.HIDDEN and not run.surgery.router_prompts:
        raise UserError(NEEDS_DATA)
    reader = _open_source(run)
    # A folder without a step becomes one without a step.
    without_step = format == 'huggingface' and run.dense_step is None and reader.step is None
    if without_step:
        run = dataclasses.replace(run, dense_step=0)
    first = readers_of(reader)[0]
    files = {companions.KEY: companions.of(first.path, first.format)}
    mesh = partitioning.make_mesh((1, 1, 1), run.num_experts, jax.local_devices()[:1])
    layout = make_layout(run, mesh, run.model.smallest_batch())
    run.trainable.frozen(layout.abstract.params, run.model.moe_layers(), 0)
    wanted = {
        name: with_dtype(name, leaf, dtype)
        for name, leaf in layout.flat().items()
        if name != 'rng' and (optimizer_state or not name.startswith('opt_state/'))
    }
    plan = make_plan(run, layout, reader, wanted)
    prompts = router_prompts.read(run.surgery, run.model, reader)
    hidden = router_prompts.MeanStates(prompts, run.model, run.surgery, reader, layout.flat()) if prompts else None
    if dtype is None and format == 'huggingface':
        plan = dataclasses.replace(plan, rows=tuple(_with_dtype_of_source(row, reader) for row in plan.rows))
    step = first_step(run, reader)
    if without_step:
        plan = dataclasses.replace(plan, rows=tuple(row for row in plan.rows if row.target != 'step'))
    leaves = {row.target: jax.ShapeDtypeStruct(row.shape, row.dtype) for row in plan.rows}
    identity = {
        'from': reader.path,
        'source': fingerprint(reader.leaves()),
        'format': format,
        'step': step,
        'surgery': str(plan.spec),
        'optimizer_state': optimizer_state,
        'leaves': fingerprint(leaves),
        **({'prompts': router_prompts.described(prompts)} if prompts else {}),
    }
    alike = {row.target for row in plan.rows if _is_alike(plan, row)}
    metadata = _metadata(run, reader)
    writer = create_checkpoint(
        target, format, leaves, step=step, identity=identity, metadata=metadata, alike=alike, request=request
    )
    for line in not_read(reader.metadata):
        print(line)
    with discarded_if_refused(writer):
        _check_clock(plan, writer, format)
        work = _Conversion(run.model if check_functions else None, plan, reader, writer, step, verify, hidden)
        write(writer, work.missing_parts(), leaves)
        started_from = source_of(reader, step)
        receipt = make_receipt(
            plan,
            source=started_from,
            hashes=dict(sorted(work.source_hashes.items())),
            lineages=work.lineages(),
            prompts=router_prompts.described(prompts),
        )
        receipt['function_check'] = {'whole_model': 'pending', 'layers': work.checks, 'activations': 'seeded normal'}
        if check_functions:
            _compare_logits(receipt, run, plan, reader, layout.flat(), hidden)
        writer.finish({**metadata, **files, 'receipt': receipt}, work.compare if verify else lambda reader: None)
    for line in left_out(writer.left_out):
        print(line)
    return writer.path


def _open_source(run: ModelRun) -> Reader:
    """Opens the source, or all of several; raises UserError if one is damaged or not a model that is known."""
    reader = open_checkpoints(run.initial_checkpoint_path)
    for part in readers_of(reader):
        require_whole(part.path)
        identify.check(part.path, part.leaves(), identify.facts_of(part.metadata))
    return reader


def _metadata(run: ModelRun, reader: Reader) -> dict[str, Any]:
    """Returns the metadata that a trainer would save, without the receipt, and with the cost of the dense run as sunk cost."""
    inherited = {name: reader.metadata[name] for name in INHERITED if name in reader.metadata}
    model = json.loads(json.dumps(run.model.describe(), default=str))
    return {**inherited, 'family': run.model.family, 'model': model}


def _compare_logits(
    receipt: dict[str, Any], run: ModelRun, plan: Plan, reader: Reader, leaves: Leaves, hidden: Hidden | None
) -> None:
    """Adds the comparison of the logits of small models to the receipt, and prints the largest difference."""
    logits = compare_logits(run.model, plan, reader, leaves, hidden)
    if logits is not None:
        receipt['function_check']['logits'] = logits
        largest = f'{logits["max_abs_difference"]:.2g} (largest logit {logits["max_abs"]:.2g})'
        print(f'on random inputs the logits differ from those of the dense model by at most {largest}')


def _with_dtype_of_source(row: Row, reader: Reader) -> Row:
    """Returns the row with the dtype that its source has in the checkpoint, if it is a parameter with a source."""
    if not row.sources or not row.target.startswith('params/'):
        return row
    return dataclasses.replace(row, dtype=reader.leaves()[row.sources[0]].dtype)


def _is_alike(plan: Plan, row: Row) -> bool:
    return row.action in (Action.EXPERTS, Action.TILE) and plan.alike(row)


def _check_clock(plan: Plan, writer: Writer, format: str) -> None:
    if 'opt_state/count' in writer.left_out and plan.spec.optimizer_state is OptimizerState.FRESH_CLOCK:
        raise UserError(
            f"OPTIMIZER_STATE = 'fresh_clock' cannot be stored as {format}, whose optimizer counts the model's steps: use "
            "'fresh'."
        )


class _Conversion:
    """One conversion in progress."""

    def __init__(
        self,
        model: Model | None,
        plan: Plan,
        reader: Reader,
        writer: Writer,
        step: int,
        verify: bool,
        hidden: Hidden | None,
    ):
        self._model, self._plan, self._reader, self._writer = model, plan, reader, writer
        self._step, self._verify, self._hidden = step, verify, hidden
        self._todo = writer.todo()
        self._leaves = {row.target: jax.ShapeDtypeStruct(row.shape, row.dtype) for row in plan.rows}
        self.source_hashes: dict[str, str] = {}
        self.checks: dict[str, Any] = {}
        self._checking: dict[str, concurrent.futures.Future] = {}
        self._memory: dict[str, jax.Array] = {}
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._made_hashes: dict[tuple[str, int], str] = {}
        self._maker = Maker(plan, self._read, new={}, hidden=hidden)
        self._sources: dict[str, np.ndarray] = {}
        self._check: CollectedLayer | None = None

    def missing_parts(self) -> Iterator[Part]:
        """Makes every leaf and yields the parts that the writer does not have.

        Experts come after other leaves, so that a large embedding is not in memory while an MoE layer is checked.
        """
        rows = [row for row in self._plan.in_order() if row.target not in self._writer.left_out]
        rows.sort(key=lambda row: row.action is Action.EXPERTS)
        alike = (row for row in rows if self._is_checked(row) and self._plan.alike(row))
        if (check := next(filter(None, map(self._new_check, alike)), None)) is not None:
            self._background.submit(check.compile)  # while leaves that are not of experts are converted
        reads = (functools.partial(self._read_all, row.sources) for row in rows)
        for row, sources in zip(rows, ahead(reads), strict=True):
            self._sources = sources
            for region, value in self._parts(row):
                if region in self._todo.get(row.target, ()):
                    yield row.target, region, value
        self._wait_for_checks()

    def lineages(self) -> dict[str, Lineage]:
        """Returns the lineage of the experts of each MLP, including those that an interrupted call has written."""
        for row in self._plan.rows:
            if row.action is Action.EXPERTS:
                self._maker.lineage(row)
        return self._maker.lineages

    def _wait_for_checks(self) -> None:
        while self._checking:
            path, check = self._checking.popitem()
            self.checks[path] = check.result()

    def compare(self, written: Reader) -> None:
        """Raises UserError unless every part that was read back has the hash of the part that was made."""
        for name in self._leaves:
            if name in self._writer.left_out:
                continue
            for region in self._writer.parts(name):
                start = region[0].start if region else 0
                if _sha256(written.read(name, region=region)) != self._made_hashes[name, start]:
                    part = f'expert {start} of {name}' if region else name
                    raise UserError(f'{part} was not written correctly: the disk or its driver is broken.')

    def _read_all(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: self._source(name) for name in names}

    def _read(self, name: str, sharding: Any) -> np.ndarray:
        # Operators may also read leaves that are not sources of the row, in order to measure them.
        return self._sources[name] if name in self._sources else self._source(name)

    def _source(self, name: str) -> np.ndarray:
        is_step = name.partition('@')[0] == 'step'
        value = np.asarray(self._step, np.int32) if is_step else self._reader.read(name)
        require_finite(self._reader.path, name, value)
        self.source_hashes[name] = sha256_of(name, value)
        return value

    def _parts(self, row: Row) -> Iterator[tuple[Region, np.ndarray]]:
        """Makes the parts of a leaf."""
        check = self._check_of(row)
        regions = self._writer.parts(row.target)
        small: list[np.ndarray] = []
        for index, value in self._maker.pieces(row):
            value = np.asarray(value)
            if check is not None:
                value = check.keep(row, index, value)
            if index is not None and len(regions) == row.shape[0]:
                self._hash(row, regions[index], value)
                yield regions[index], value[None]
                continue
            # Leaves too small to be cut by experts are put together.
            small.append(value)
            if index is None or index == row.shape[0] - 1:
                whole = value if index is None else np.stack(small)
                for region in regions:
                    self._hash(row, region, whole[region])
                    yield region, whole[region]
        if check is not None and check.is_whole(row, self._sources[row.sources[0]]):
            self._check = None
            self._wait_for_checks()  # one at a time, since each holds a layer in memory
            maker = Maker(self._plan, lambda name, sharding: self._source(name), new={}, hidden=self._hidden)
            self._checking[check.path] = self._background.submit(check.result, maker, self._memory)
            if not self._plan.alike(row):  # a check of different experts holds the whole layer in memory
                self._wait_for_checks()

    def _is_checked(self, row: Row) -> bool:
        """Whether the row is of experts that start from a dense MLP, and functions are to be compared."""
        if self._model is None or row.action is not Action.EXPERTS or not row.sources:
            return False
        return mlp_of(row.target) is not None and self._plan.spec.operator.starts_from is Start.DENSE

    def _check_of(self, row: Row) -> CollectedLayer | None:
        """Returns the check of the MoE layer of a row; None if the row needs no check, or the layer is too large."""
        if not self._is_checked(row):
            return None
        if self._check is None:
            self._check = self._new_check(row)
        return self._check

    def _new_check(self, row: Row) -> CollectedLayer | None:
        mlp = mlp_of(row.target)
        rows = [row for row in self._plan.rows if row.target.startswith(f'{mlp}/')]
        size = sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rows)
        routed = any(row.action is Action.ROUTER for row in rows)
        if not routed or size > CHECKED_BYTES:
            return None
        return CollectedLayer(self._model, mlp, rows, alike=self._plan.alike(row))

    def _hash(self, row: Row, region: Region, value: np.ndarray) -> None:
        if self._verify:
            start = region[0].start if region else 0
            copied = start > 0 and _is_alike(self._plan, row)
            self._made_hashes[row.target, start] = self._made_hashes[row.target, 0] if copied else _sha256(value)


def _sha256(value: np.ndarray) -> str:
    digest = hashlib.sha256()
    for block in in_c_order(value):
        digest.update(block)
    return digest.hexdigest()
