"""Checks of a run before anything is allocated or written, for `train` and `plan`."""

import contextlib
from collections.abc import Mapping

from upcycle import cost, files, lengths, metric_writers, outputs, partitioning, router_prompts, run_config
from upcycle.checkpoints import arrays
from upcycle.checkpoints.native import NativeReader
from upcycle.checkpoints.several import readers_of
from upcycle.data.causal import same_tokenizer
from upcycle.errors import UserError
from upcycle.training import folder
from upcycle.training.run import Run, warn_without_gradient
from upcycle.training.start import Start
from upcycle.training.state import check_start, first_step


def preflight(run: Run, identity: Mapping[str, str]) -> Start:
    """Checks folder, sizes, checkpoint and data of a run. Writes nothing.

    Args:
      run: the run.
      identity: `configuration.resolved()` after the run was loaded.

    Raises:
      UserError: `train` cannot start or resume; see the functions called here.
    """
    arrays.kvstore(outputs.check('MODEL_DIR', run.model_dir, outputs.Kind.FOLDER))
    folder.require_files(run.model_dir)
    metric_writers.require(run.metric_writers)
    run_config.claim(run, identity, write=False)
    start = Start.of(run)
    outputs.check('MODEL_DIR', run.model_dir, outputs.Kind.FOLDER, needed=cost.num_bytes(start.layout.abstract))
    newest = folder.newest_step(run.model_dir)
    if newest is None:
        folder.require_checkpoint(run)
        folder.require_no_other_format(run)
        if run.initial_checkpoint_path is None:
            check_start(run, 0)
        else:
            _ = start.plan
            router_prompts.read(run.surgery, run.model, start.reader)
            check_start(run, first_step(run, start.reader))
            lengths.warn_of_rows(start.reader, run.train_data)
            same_tokenizer.warn(readers_of(start.reader)[0], run.train_data)
    warn_without_gradient(run.model)
    run.trainable.frozen(start.layout.abstract.params, run.model.moe_layers(), 0)
    # The first use of the data reports its errors.
    data = run.train_data.fingerprint()
    for source in filter(None, (run.train_data, run.eval_data)):
        source.batches(share=partitioning.share_of(partitioning.batch_sharding(start.mesh)))
    for evaluator in run.evaluators:
        evaluator.check_data(run.eval_data)
    if newest is not None:
        stored = data
        # On resuming, a step that cannot be read is set aside or refused.
        with contextlib.suppress(UserError, OSError):
            reader = NativeReader(files.absolute(run.model_dir) / 'checkpoints' / str(newest), {})
            stored = reader.data.get('fingerprint', data)
        folder.require_same_data(run, stored, data)
    return start
