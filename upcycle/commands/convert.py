"""`upcycle convert`: the checkpoint that a run would start from, made on the host and streamed to disk."""

import os
from collections.abc import Mapping, Sequence

import jax

from upcycle import configuration, conversion, partitioning
from upcycle.checkpoints import open_checkpoints
from upcycle.errors import UserError
from upcycle.training import start
from upcycle.training.state import check_start


def run(
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
    files = list(gin_files)
    # The surgery is that of a run, and a model and its MoE layers need no other part of one.
    folders = [os.path.basename(os.path.dirname(file)) for file in files]
    if 'runs' not in folders:
        # Operators and recipes change what a run says.
        later = [i for i, folder in enumerate(folders) if folder in ('surgery', 'recipes')]
        files.insert(min(later, default=len(files)), 'runs/convert.gin')
    run = configuration.load_model(files, bindings)
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    # What is named of a run that is to train the result.
    if run.train_data is not None:
        start.check_batches(run, partitioning.make_mesh((1, 1, 1), run.num_experts, jax.local_devices()[:1]))
    if run.total_steps is not None:
        step = open_checkpoints(run.initial_checkpoint_path).step if run.dense_step is None else run.dense_step
        if step is not None:
            check_start(run, step)
    return conversion.convert(run, target, format, dtype=dtype, optimizer_state=optimizer_state, verify=verify)
