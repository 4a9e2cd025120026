"""The training loop: restores or makes the first state, runs the steps, and writes metrics and checkpoints."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import files, partitioning
from upcycle.checkpoints import integrity
from upcycle.checkpoints.hf import companions
from upcycle.checkpoints.native import CheckpointManager
from upcycle.checkpoints.several import readers_of
from upcycle.data import of_run
from upcycle.errors import Preempted, UserError, writing_to
from upcycle.evaluate.protocol import Subject
from upcycle.evaluate.step_zero import quality_at_step_0
from upcycle.metrics import MetricsLog
from upcycle.models import identify
from upcycle.progress import Progress, waiting
from upcycle.training import folder as run_folder
from upcycle.training import preemption
from upcycle.training import state as states
from upcycle.training.ahead import Ahead
from upcycle.training.diagnosis import diagnose
from upcycle.training.first_state import from_checkpoint
from upcycle.training.health import Health, NotFiniteError, Rollback
from upcycle.training.ledger import Ledger, Timer, Work
from upcycle.training.profile import Profile
from upcycle.training.receipt_of_start import require_match
from upcycle.training.run import ModelRun
from upcycle.training.start import Start
from upcycle.training.step import TrainState, train_step
from upcycle.training.window import Window
from upcycle.warning import warn

NO_STEPS = range(0)
# Entries of the metadata of a checkpoint of another program that a run keeps, to store its model in that format again.
KEPT = ('kept', 'model_type')
# Evaluators, by their names in checkpoints of earlier versions.
FORMER_NAMES = {'evaluate': 'validation', 'probe': 'few_shot', 'measure': 'tasks', 'look': 'diversity'}


def train(
    start: Start,
    name: str = 'train',
    profile_steps: range = NO_STEPS,
    still_ours: Callable[[bool], None] = lambda look: None,
) -> TrainState:
    """Trains until `run.total_steps`, from the newest checkpoint of the run if there is one.

    Args:
      start: the run, and how it starts.
      name: shown in progress lines.
      profile_steps: steps to trace into `MODEL_DIR/profile`.
      still_ours: the function that `lock.held` yields; by default no lock is checked.

    Returns:
      The last state.

    Raises:
      UserError: the configuration, data or checkpoint does not fit, and nothing was written; or the data ended, too many steps
        were not finite, or the folder cannot be written or was taken over by another process.
      Preempted: the process got SIGTERM, and the state is saved.
    """
    over_data = start.run.parameters_over_data
    with partitioning.use(start.mesh, over_data=over_data), writing_to(start.run.model_dir):
        trainer = _Trainer(start, name, profile_steps, still_ours)
        while True:
            try:
                return trainer.train()
            except Rollback as rollback:
                trainer.roll_back(rollback)


def _kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in KEPT if name in metadata}


class _Trainer:
    """The state of one call of `train`."""

    def __init__(self, start: Start, name: str, profile_steps: range, still_ours: Callable[[bool], None]):
        run = start.run
        self.start, self.run, self.name, self.still_ours = start, run, name, still_ours
        # Whether the run's first save is under way.
        self.first_save = False
        self.profile = Profile(profile_steps, str(files.absolute(run.model_dir) / 'profile'))
        self.layout = start.layout
        self.batch_sharding = partitioning.batch_sharding(start.mesh)
        self.ledger = Ledger()
        self._observe()
        # The last step before a rollback, with its ledger and health.
        self.before: tuple[int, Ledger, Health] | None = None
        # The state after the newest step, for a diagnosis.
        self.state: TrainState | None = None
        self.receipt: dict[str, Any] | None = None
        self.sentinels = states.sentinels_of(run, {})
        # Entries of the first checkpoint's metadata that `KEPT` names.
        self.of_source: dict[str, Any] = {}
        # Evaluators that were due at the newest checkpoint's step when the run was asked to stop.
        self.unfinished: list[str] = []
        self.data_identity = run.train_data.fingerprint()
        # The step of a stream's first batch; 0 for other data.
        self.first_step = 0
        self.step_tokens = run.model.num_tokens(run.train_data.batch_spec())
        self.work = Work.of(run.model, run.train_data.batch_spec(), start.mesh)
        self.subject = Subject(run.model, run.eval_data, self.batch_sharding)

    @functools.cached_property
    def step(self):
        """`train_step`, compiled on first use: a finished run does not need it."""
        with waiting(f'{self.name}  compiling the training step'):
            return lower_step(self.run, self.layout, self.batch_sharding, self.ledger.start_step).compile()

    @functools.cached_property
    def evaluations(self) -> dict[str, Callable[[Any], Mapping[str, Any]]]:
        """The run's evaluations by evaluator name, prepared on first use."""
        return {evaluator.name: evaluator.prepare(self.subject) for evaluator in self.run.evaluators}

    def train(self) -> TrainState:
        run = self.run
        folder = files.absolute(run.model_dir)
        newest = integrity.newest_whole_step(run.model_dir)
        if newest is None and self.before is None:
            run_folder.require_checkpoint(run)
        if newest is not None:
            with CheckpointManager(run.model_dir, keep=run.checkpoint_keep) as manager:
                state = self._restore(manager, newest)
            if jax.process_index() == 0:
                rest = f': TRAIN_STEPS = {run.total_steps} is already reached' if newest >= run.total_steps else ''
                print(f'{self.name}  resumes from step {newest}{rest}', file=sys.stderr, flush=True)
        else:
            source = None if run.initial_checkpoint_path is None else readers_of(self.start.reader)[0]
            companion_files = None if source is None else companions.of(source.path, source.format)
            state = self._first_state()
            folder.mkdir(parents=True, exist_ok=True)
            if self.receipt is not None and jax.process_index() == 0:
                files.replace_text(folder / 'receipt.json', json.dumps(self.receipt, indent=1))
            if jax.process_index() == 0:
                companions.copy(companion_files, folder / companions.FOLDER)
        self.health.step = int(state.step)
        if self.before is not None:
            self._skip_batches(int(state.step))
        with contextlib.ExitStack() as closing:
            log = None
            if jax.process_index() == 0:
                run_folder.record(run.model_dir, saved=newest is not None)
                log = MetricsLog(run.model_dir, newest, run.metric_writers, only_training_at_it=bool(self.unfinished))
                closing.enter_context(log)
            closing.callback(self.profile.close)
            try:
                with CheckpointManager(run.model_dir, keep=run.checkpoint_keep) as manager:
                    if newest is None:
                        begins = [evaluator.name for evaluator in run.evaluators if evaluator.at_start]
                        with waiting(f'{self.name}  {", ".join(begins)} at step {int(state.step)}'):
                            self._evaluate(begins, state, int(state.step), log)
                    return self._loop(state, manager, log)
            except NotFiniteError as error:
                raise UserError(self._diagnosis(error)) from None

    def _first_state(self) -> TrainState:
        run = self.run
        if run.initial_checkpoint_path is None:
            with waiting(f'{self.name}  initialising the parameters'):
                return states.from_scratch(run, self.layout)
        batch = next(self._batches(self.first_step))
        state, self.receipt = from_checkpoint(self.start, batch)
        metadata = self.start.reader.metadata
        self.ledger.start_from(int(state.step), metadata, run.dense_flops)
        _, self.first_step = of_run(run.train_data, self.ledger.start_step)
        self.sentinels = states.sentinels_of(run, metadata)
        self.of_source = _kept(metadata)
        states.check_start(run, self.ledger.start_step)
        # A model that was trained after its surgery keeps its step-0 metrics.
        fresh = self.receipt is not None and 'step_0' not in self.receipt
        if fresh and run.eval_data is not None and run.step_0_factors:
            with waiting(f'{self.name}  capacity factors {", ".join(map(str, run.step_0_factors))} at step 0'):
                self.receipt['step_0'] = quality_at_step_0(
                    run.model, state.params, lambda: self.subject.batches('step 0'), run.step_0_factors
                )
        return state

    def _restore(self, manager: CheckpointManager, step: int) -> TrainState:
        tree, data, metadata = manager.restore(step, states.as_dict(self.layout.abstract))
        path = f'{self.run.model_dir}/checkpoints/{step}'
        identify.require_function(path, self.run.model, identify.facts_of(metadata))
        run_folder.require_same_data(self.run, data['fingerprint'], self.data_identity)
        readers = partitioning.share_of(self.batch_sharding).count
        # Checkpoints of earlier versions hold the number of processes, each of which was a reader.
        before = data.get('readers', data.get('process_count', readers))
        if before != readers and jax.process_index() == 0:
            promise = self.run.train_data.promise()
            warn(f'the number of readers of the data changed from {before} to {readers} at step {step}. {promise}')
        self.ledger = Ledger(**metadata['cost'])
        # Earlier versions read and discarded the batches before the run's first step.
        self.first_step = data.get('first_step', 0)
        self._observe(metadata.get('health'), metadata['window'])
        self.receipt = metadata.get('receipt')
        self.sentinels = states.sentinels_of(self.run, metadata)
        self.of_source = _kept(metadata)
        self.unfinished = [FORMER_NAMES.get(name, name) for name in metadata.get('unfinished', [])]
        if self.receipt is not None:
            require_match(path, self.receipt, self.layout.flat())
        return TrainState(**tree)

    def _loop(self, state: TrainState, manager: CheckpointManager, log: MetricsLog | None) -> TrainState:
        run = self.run
        first = int(state.step)
        if first >= run.total_steps:
            return state
        step_fn = self.step
        with contextlib.ExitStack() as closing:
            asked_to_stop = closing.enter_context(preemption.watch(first))
            self._evaluate(self.unfinished, state, first, log)
            timer = closing.enter_context(Timer(self.ledger, first))
            batches = Ahead(self._endless(first + self.health.values['batches_left_out']), timer)
            progress = closing.enter_context(Progress(self.name, 'step', run.total_steps, first=first, period=0.0))
            for step in range(first + 1, run.total_steps + 1):
                self.profile.before(step)
                batch = batches.take()
                state, metrics = step_fn(state, batch)
                timer.under_way(metrics)
                self.profile.after(step, metrics)
                last = step == run.total_steps
                if not last:
                    batches.prepare()
                self.state = state
                self.window.add(metrics)
                self.ledger.flops += self.work.flops
                self.ledger.tokens += self.step_tokens
                if step % run.log_period == 0 or last:
                    means = self.window.close()
                    timer.book('seconds')
                    health = self.health.look_at_routing(means) | self.health.counts
                    speed = self.work.speed(*timer.since_last(step))
                    self._write(log, step, 'train', means | health | speed)
                    shown = [f'{name} {means[name]:.4f}' for name in ('loss', 'accuracy') if name in means]
                    shown += self.work.shown(speed)
                    progress.show(step, '  '.join(shown))
                    timer.book()
                # The last step ends normally: its checkpoint marks the run as finished.
                stop = asked_to_stop(step) and not last
                due = [
                    evaluator.name
                    for evaluator in run.evaluators
                    if last or (evaluator.period is not None and step % evaluator.period == 0)
                ]
                saves = stop or last or step % run.checkpoint_period == 0
                if due or saves:
                    self.window.settle()
                    timer.book('seconds')
                    # A scheduler that asked to stop may not wait for an evaluation.
                    self._evaluate([] if stop else due, state, step, log)
                    timer.book('evaluation_seconds')
                    if saves:
                        if log is not None:
                            log.copy()
                        self._save(manager, step, state, unfinished=due if stop else [])
                    timer.book('checkpoint_seconds')
                if stop:
                    self._wait(manager)
                    raise Preempted(f'stopped on request and saved step {step}; repeat the command to continue.')
        self._wait(manager)
        return state

    def _evaluate(self, names: Sequence[str], state: TrainState, step: int, log: MetricsLog | None) -> None:
        """Runs evaluators; skips those that the run no longer has."""
        for name in names:
            if name in self.evaluations:
                self._write(log, step, name, self.evaluations[name](state.params))

    def _write(self, log: MetricsLog | None, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        if log is not None:
            self.still_ours(False)
            self._note_saved()
            log.write(step, split, {**metrics, **self.ledger.for_the_log(self.start.mesh.size)})

    def _note_saved(self) -> None:
        """Records that the first save is finished, once it is. If a bucket does not answer, the next call tries again."""
        with files.unanswered(self.run.model_dir), files.asking_once():
            if self.first_save and run_folder.newest_step(self.run.model_dir) is not None:
                run_folder.record(self.run.model_dir, saved=True)
                self.first_save = False

    def _wait(self, manager: CheckpointManager) -> None:
        """Waits until everything is saved."""
        manager.wait()
        if jax.process_index() == 0:
            self._note_saved()

    def _save(self, manager: CheckpointManager, step: int, state: TrainState, unfinished: list[str]) -> None:
        metadata = {
            'family': self.run.model.family,
            'model': self.run.model.describe(),
            'cost': dataclasses.asdict(self.ledger),
            'window': self.window.values,
            'health': self.health.values,
            'receipt': self.receipt,
            **({'sentinels': self.sentinels} if self.sentinels else {}),
            **self.of_source,
            **({'unfinished': unfinished} if unfinished else {}),
        }
        data = {
            'first_step': self.first_step,
            'next_batch': step + self.health.values['batches_left_out'],
            'fingerprint': self.data_identity,
            'process_count': jax.process_count(),
            'readers': partitioning.share_of(self.batch_sharding).count,
        }
        self.still_ours(True)
        self.first_save = self.first_save or manager.latest_step() is None
        manager.save(step, states.as_dict(state), data, metadata)

    def roll_back(self, rollback: Rollback) -> None:
        """Prepares another call of `train`, which continues from the newest checkpoint, or starts again."""
        self.before = rollback.step, self.ledger, self.health
        self.ledger = Ledger()
        self._observe()

    def _skip_batches(self, step: int) -> None:
        """After a rollback to `step`: keeps the cost so far, and skips the batches since."""
        last, ledger, health = self.before
        self.before = None
        # Includes earlier rollbacks to the same step.
        wasted = last - step + health.values['batches_left_out'] - self.health.values['batches_left_out']
        ledger.flops = self.ledger.flops + wasted * self.work.flops
        ledger.tokens = self.ledger.tokens + wasted * self.step_tokens
        self.ledger = ledger
        self.health.leave_out(health.values, last - step)

    def _observe(self, health: dict[str, Any] | None = None, window: dict[str, Any] | None = None) -> None:
        """Starts to observe steps, from saved values if given."""
        self.health = Health(self.run.limits, health, quiet=jax.process_index() > 0)
        self.window = Window(self.health, window)

    def _diagnosis(self, error: NotFiniteError) -> str:
        """Explains the first step that was not finite. If a step under way has changed the state since, the message says so."""
        run, first = self.run, error.first - 1
        taken = self.window.taken_under_way()
        batch = next(self._batches(first + self.health.values['batches_left_out']))
        cause = diagnose(
            self.state.replace(step=partitioning.put_whole(np.asarray(first, np.int32), self.state.step.sharding)),
            batch,
            model=run.model,
            num_microbatches=run.num_microbatches,
            frozen=run.trainable.frozen(self.layout.abstract.params, run.model.moe_layers(), self.ledger.start_step),
            when='before the step' if taken is None else f'after step {taken}',
        )
        with CheckpointManager(run.model_dir, keep=run.checkpoint_keep) as manager:
            newest = manager.latest_step()
        at = f'at step {error.first}' + ('' if taken is None else f' (with the parameters after step {taken})')
        return (
            f'steps {error.first} to {error.last} were not finite and were skipped, more in a row than MAX_SKIPPED_STEPS = '
            f'{run.limits.max_skipped_steps}: {at}, {cause}; step {first} was the last good one, and the newest '
            f'checkpoint in {run.model_dir} is of step {newest}: correct the data, start another run from there with a lower '
            'BASE_LEARNING_RATE, or raise MAX_SKIPPED_STEPS and continue.'
        )

    def _endless(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Yields training batches from `start` on.

        Raises:
          UserError: the data ended.
        """
        count = start
        for batch in self._batches(start):
            yield batch
            count += 1
        raise UserError(
            f'TRAIN_DATASET ends after {count} batches, and TRAIN_STEPS = {self.run.total_steps} needs more: look for empty or '
            'missing files, let it repeat, or lower TRAIN_STEPS.'
        )

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        data, first = of_run(self.run.train_data, self.first_step)
        return partitioning.batches(data, start - first, self.batch_sharding)


def lower_step(
    run: ModelRun, layout: states.Layout, batch_sharding: jax.sharding.Sharding, start_step: int = 0
) -> jax.stages.Lowered:
    """Lowers `train_step`; see `trace_step`."""
    return trace_step(run, layout, batch_sharding, start_step).lower()


def trace_step(
    run: ModelRun, layout: states.Layout, batch_sharding: jax.sharding.Sharding, start_step: int = 0
) -> jax.stages.Traced:
    """Traces `train_step` for the run's shapes on the current mesh; `start_step` is that of the run's first state."""
    step = jax.jit(
        functools.partial(
            train_step,
            model=run.model,
            optimizer=run.optimizer,
            learning_rate=run.learning_rate.schedule(start_step, run.total_steps),
            batch_axes=layout.batch_axes,
            num_microbatches=run.num_microbatches,
            frozen=run.trainable.frozen(layout.abstract.params, run.model.moe_layers(), start_step),
            leaf_norms=run.leaf_gradient_norms,
        ),
        out_shardings=(layout.shardings, None),
        donate_argnums=0,
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
        for name, (shape, dtype) in run.train_data.batch_spec().items()
    }
    return step.trace(layout.abstract, batch)
