"""`upcycle train`: starts or resumes a run."""

from collections.abc import Mapping, Sequence

import jax

from upcycle import configuration, files, run_config
from upcycle.errors import UserError, writing_to
from upcycle.training import lock, loop
from upcycle.training.describe import describe
from upcycle.training.preflight import preflight
from upcycle.training.step import TrainState


def run(
    gin_files: Sequence[str], bindings: Mapping[str, str], name: str = 'train', profile_steps: range = loop.NO_STEPS
) -> TrainState:
    """`upcycle train`: prints the resolved run, then trains; see `loop.train`.

    Raises:
      UserError: the configuration, the folder or the checkpoint is wrong; raised before anything is written.
    """
    run = run_config.as_it_began(configuration.load(gin_files, bindings))
    identity = configuration.resolved()
    if profile_steps and profile_steps[-1] > run.total_steps:
        raise UserError(
            f'--profile_steps ends at step {profile_steps[-1]}, after TRAIN_STEPS = {run.total_steps}: name earlier steps.'
        )
    start = preflight(run, identity)
    if jax.process_index() == 0:
        print(describe(start), flush=True)
    with files.patient(), lock.held(run.model_dir) as still_ours:
        if jax.process_index() == 0:
            with writing_to(run.model_dir):
                run_config.claim(run, identity)
        return loop.train(start, name, profile_steps, still_ours)
