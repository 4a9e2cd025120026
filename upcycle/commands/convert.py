"""`upcycle convert`: makes the checkpoint that a run would start from."""

import os
from collections.abc import Mapping, Sequence

import jax

from upcycle import configuration, conversion, partitioning
from upcycle.checkpoints import open_checkpoints
from upcycle.errors import UserError
from upcycle.formats import ANY_FOLDER, FolderRequest
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.training import start
from upcycle.training.run import warn_without_gradient
from upcycle.training.state import check_start, first_step


def run(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    target: str,
    format: str,
    *,
    dtype: str | None = None,
    optimizer_state: bool = True,
    verify: bool = False,
    request: FolderRequest = ANY_FOLDER,
) -> str:
    """`upcycle convert`: makes the checkpoint that a run would start from on the host, and streams it to disk.

    Args:
      gin_files, bindings: the configuration. Without a file of `models/`, the model is that of the checkpoint; without a file of
        `runs/`, `runs/convert.gin` is included.
      target, format, dtype, optimizer_state, verify, request: see `conversion.convert`.

    Returns:
      See `conversion.convert`.

    Raises:
      UserError: the configuration or the dense checkpoint is wrong.
    """
    files = list(gin_files)
    # Surgery is configured as part of a run, but a conversion may name only a model and its MoE layers.
    folders = [os.path.basename(os.path.dirname(file)) for file in files]
    if 'models' not in folders:
        files.insert(0, FROM_CHECKPOINT)
        folders.insert(0, 'models')
    if 'runs' not in folders:
        # Operators and recipes override bindings of a run, so they come after it.
        later = [i for i, folder in enumerate(folders) if folder in ('surgery', 'recipes')]
        files.insert(min(later, default=len(files)), 'runs/convert.gin')
    run = configuration.load_model(files, bindings)
    if run.initial_checkpoint_path is None:
        raise UserError('INITIAL_CHECKPOINT_PATH is not set: name the dense checkpoint with --from.')
    # Check what is configured of the run that will train the result.
    if run.train_data is not None:
        start.check_batches(run, partitioning.make_mesh((1, 1, 1), run.num_experts, jax.local_devices()[:1]))
    if run.total_steps is not None:
        check_start(run, first_step(run, open_checkpoints(run.initial_checkpoint_path)))
    warn_without_gradient(run.model)
    return conversion.convert(
        run, target, format, dtype=dtype, optimizer_state=optimizer_state, verify=verify, request=request
    )
