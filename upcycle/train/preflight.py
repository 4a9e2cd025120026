"""What a run is refused for before anything is allocated or written, by `train` and by `plan` alike."""

import contextlib
import dataclasses
from collections.abc import Mapping

import jax

from upcycle import configuration, cost, files, outputs, partitioning
from upcycle.checkpoints import Reader, arrays, open_checkpoints
from upcycle.checkpoints.native import NativeReader
from upcycle.errors import UserError
from upcycle.surgery.plan import Plan
from upcycle.train import folder, loop
from upcycle.train.run import Run
from upcycle.train.state import Layout, check_start, layout, make_plan


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run would start.

    Attributes:
      mesh: the run's.
      where: the layout of its state.
      reader: of the checkpoint that it would start from; None: from scratch, or the run resumes from its own checkpoint.
      surgery: what would become of that checkpoint.
    """

    mesh: jax.sharding.Mesh
    where: Layout
    reader: Reader | None = None
    surgery: Plan | None = None


def preflight(run: Run, identity: Mapping[str, str]) -> Start:
    """Looks at folder, sizes, checkpoint and data of a run, and writes nothing.

    Args:
      run: what would be trained.
      identity: `configuration.resolved()` after it was loaded.

    Raises:
      UserError: `train` cannot start or resume: see the functions that are called here.
    """
    arrays.kvstore(outputs.check('MODEL_DIR', run.model_dir, outputs.Kind.FOLDER))
    folder.require_files(run.model_dir)
    configuration.claim(run, identity, write=False)
    mesh = loop.check(run)
    where = layout(run, mesh)
    outputs.check('MODEL_DIR', run.model_dir, outputs.Kind.FOLDER, needed=cost.num_bytes(where.abstract))
    start = Start(mesh, where)
    newest = folder.newest_step(run.model_dir)
    if newest is None:
        folder.require_checkpoint(run)
        folder.require_no_other_format(run)
        if run.initial_checkpoint_path is None:
            check_start(run, 0)
        else:
            reader = open_checkpoints(run.initial_checkpoint_path)
            start = dataclasses.replace(start, reader=reader, surgery=make_plan(run, where, reader))
            check_start(run, reader.step if run.dense_step is None else run.dense_step)
    run.trainable.frozen(where.abstract.params, run.model.moe_layers(), 0)
    # The first use of the data finds what is wrong with it.
    data = run.train_data.fingerprint()
    for source in filter(None, (run.train_data, run.eval_data)):
        source.batches(share=partitioning.share_of(partitioning.batch_sharding(mesh)))
    for evaluator in run.evaluators:
        evaluator.check_data(run.eval_data)
    if newest is not None:
        stored = data
        # A step that cannot be read is set aside, or refused, when the run resumes.
        with contextlib.suppress(UserError, OSError):
            reader = NativeReader(files.absolute(run.model_dir) / 'checkpoints' / str(newest), {})
            stored = reader.data.get('fingerprint', data)
        folder.require_same_data(run, stored, data)
    return start
