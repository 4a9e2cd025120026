"""The first state of a run that starts from a checkpoint: surgery, leaf by leaf onto the devices, and the receipt."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle import casts, hosts, partitioning, router_prompts
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.several import readers_of
from upcycle.progress import Progress, waiting
from upcycle.surgery.fingerprint import sha256_of
from upcycle.surgery.operators import Lineage
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Action, Plan
from upcycle.surgery.receipt import carried_on, check_function, make_receipt, reported
from upcycle.training.read_ahead import Examination, ReadAhead, requests_of
from upcycle.training.receipt_of_start import ReceiptOfStart, source_of
from upcycle.training.run import Run
from upcycle.training.source_model import SourceModel
from upcycle.training.start import Start
from upcycle.training.state import Layout, first_step
from upcycle.training.step import TrainState


def from_checkpoint(start: Start, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, Any] | None]:
    """Makes the first state by surgery on `run.initial_checkpoint_path`, leaf by leaf onto the devices.

    Args:
      start: the run, its checkpoint, and the plan.
      batch: a batch to compare the upcycled model with the dense one on.

    Returns:
      The state, and the receipt, or None if nothing was expanded.
    """
    run, reader, plan = start.run, start.reader, start.plan
    for part in readers_of(reader):
        require_whole(part.path)
    receipt_of_start = ReceiptOfStart.of(reader)
    upcycles = run.surgery.made_by is not None
    leaves, stored = start.layout.flat(), reader.leaves()
    source = SourceModel(run.model, plan, reader, leaves)
    prompts = router_prompts.read(run.surgery, run.model, reader)
    hidden = functools.partial(source.hidden_states, batch)
    if prompts:
        hidden = router_prompts.MeanStates(prompts, run.model, run.surgery, reader, leaves).for_target

    def read(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
        if name.partition('@')[0] != 'step' or (run.dense_step is None and name in stored):
            return reader.read(name, sharding)
        step = np.asarray(first_step(run, reader), np.int32)
        return step if sharding is None else partitioning.put_whole(step, sharding)

    def read_whole(name: str) -> np.ndarray:
        leaf = read(name, None)
        return casts.cast(name, leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))  # as on a device

    step = jax.ShapeDtypeStruct((), jnp.int32)  # of a checkpoint without one
    sources = {name: stored.get(name, step) for row in plan.rows for name in row.sources}
    whole, examine = sources.keys(), sha256_of
    if not upcycles and receipt_of_start is None:
        whole, examine = set(), None
    elif not upcycles:
        whole, examine = receipt_of_start.comparable() & whole, receipt_of_start.compare
    examination = Examination(str(reader.path), sources, whole, examine, read_whole)

    def read_checked(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
        leaf = read(name, sharding)
        examination.check(name, leaf)
        return leaf

    run_key = jax.random.key_data(jax.random.split(jax.random.key(run.seed))[1])
    shardings = {name: leaf.sharding for name, leaf in leaves.items()}
    lineages: dict[str, Lineage] = {}
    new = {'rng': run_key, **new_head(run, start.layout, plan)}
    with (
        contextlib.closing(examination),
        ReadAhead(read_checked, requests_of(plan, shardings)) as reading,
        Progress('upcycling' if upcycles else 'loading', 'leaf', len(plan.rows)) as progress,
    ):
        flat = hosts.together(
            lambda: execute(
                plan,
                reading,
                shardings,
                new=new,
                hidden=hidden,
                progress=progress.show,
                lineages=lineages,
            )
        )
        hashes = examination.result()
    state = TrainState(**unflatten_dict(flat, sep='/'))
    if not upcycles:
        if receipt_of_start is None:
            return state, None
        receipt = receipt_of_start.complete(run.model, state.params, batch, leaves, new_head=run.surgery.new_head)
        return state, carried_on(receipt, plan)
    receipt = make_receipt(
        plan,
        source=source_of(reader, int(state.step)),
        hashes=hashes,
        lineages=lineages,
        prompts=router_prompts.described(prompts),
    )
    with waiting('comparing the MoE layers with their source'):
        receipt['function_check'] = reported(
            lambda: check_function(run.model, source.params(flat), state.params, batch, source.model)
        )
    return state, receipt


def new_head(run: Run, layout: Layout, plan: Plan) -> dict[str, jax.Array]:
    """Initialises the parameters that a plan does not copy, like a run from scratch with the same seed."""
    names = [row.target for row in plan.rows if row.action is Action.NEW and row.target.startswith('params/')]
    if not names:
        return {}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = partitioning.unbox(run.model.init(jax.random.split(key)[0], run.train_data.batch_spec()))
        flat = flatten_dict({'params': params}, sep='/')
        return {name: flat[name] for name in names}

    # XLA computes only these parameters.
    shardings = {name: layout.flat()[name].sharding for name in names}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(run.seed))
