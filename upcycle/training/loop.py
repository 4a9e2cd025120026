"""The loop around the training step: state in, batches through, metrics and checkpoints out."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import cost, files, partitioning
from upcycle.checkpoints import integrity
from upcycle.checkpoints.native import CheckpointManager
from upcycle.data import DataSource
from upcycle.errors import Preempted, UserError, writing_to
from upcycle.evaluate.protocol import Subject
from upcycle.evaluate.step_zero import quality_at_step_0
from upcycle.metrics import MetricsLog, warn
from upcycle.models import identify
from upcycle.progress import Progress
from upcycle.training import folder as run_folder
from upcycle.training import preemption
from upcycle.training import state as states
from upcycle.training.diagnosis import diagnose
from upcycle.training.first_state import from_checkpoint
from upcycle.training.health import Health, NotFiniteError, Rollback
from upcycle.training.ledger import Ledger, Timer
from upcycle.training.profile import Profile
from upcycle.training.receipt_of_start import require_match
from upcycle.training.run import ModelRun
from upcycle.training.start import Start
from upcycle.training.step import TrainState, train_step
from upcycle.training.window import Window

NO_STEPS = range(0)
# Evaluators that a checkpoint may call by the names that earlier versions had for them.
FORMER_NAMES = {'evaluate': 'validation', 'probe': 'few_shot', 'measure': 'tasks', 'look': 'diversity'}


def train(
    start: Start,
    name: str = 'train',
    profile_steps: range = NO_STEPS,
    still_ours: Callable[[bool], None] = lambda look: None,
) -> TrainState:
    """Trains until `run.total_steps`; picks up where an earlier leg of the same run stopped.

    Args:
      start: the run, and how it starts.
      name: shown on the progress line.
      profile_steps: to be traced into `MODEL_DIR/profile`.
      still_ours: what `lock.held` yields; nothing by default, for a caller who keeps other processes out.

    Returns:
      The last state.

    Raises:
      UserError: the configuration, data or checkpoint does not fit, and nothing has been written; or the data broke off, too
        many steps were not finite, or the folder cannot be written any more, or is another process's now.
      Preempted: the process got SIGTERM, and the state is saved.
    """
    with partitioning.use(start.mesh), writing_to(start.run.model_dir):
        trainer = _Trainer(start, name, profile_steps, still_ours)
        while True:
            try:
                return trainer.train()
            except Rollback as rollback:
                trainer.go_back(rollback)


class _Trainer:
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        start: Start,
        name: str,
        profile_steps: range,
        still_ours: Callable[[bool], None],
    ):
        run = start.run
        self.start, self.run, self.name, self.still_ours = start, run, name, still_ours
        # Whether a save has begun of which it is not known yet that it was finished.
        self.saves = False
        self.profile = Profile(profile_steps, str(files.absolute(run.model_dir) / 'profile'))
        self.layout = start.layout
        self.batch_sharding = partitioning.batch_sharding(start.mesh)
        self.ledger = Ledger()
        self._watch()
        # The last step before a rollback, and what was known then.
        self.before: tuple[int, Ledger, Health] | None = None
        # After the newest step, for a diagnosis.
        self.state: TrainState | None = None
        self.receipt: dict[str, Any] | None = None
        self.sentinels = states.sentinels_of(run, {})
        # What was due at the newest checkpoint's step when the run was asked to stop.
        self.unfinished: list[str] = []
        self.data_identity = run.train_data.fingerprint()
        self.step_flops = cost.step_flops(run.model, run.train_data.batch_spec())
        self.step_tokens = run.model.num_tokens(run.train_data.batch_spec())
        self.subject = Subject(run.model, run.eval_data, self.batch_sharding)

    @functools.cached_property
    def step(self):
        """`train_step`, compiled when it is first needed: a run that is already finished needs none."""
        return lower_step(self.run, self.layout, self.batch_sharding, self.ledger.start_step).compile()

    @functools.cached_property
    def evaluations(self) -> dict[str, Callable[[Any], Mapping[str, Any]]]:
        """By the names of the run's evaluators what they make of parameters, prepared when the first is needed."""
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
                rest = f': nothing is left of TRAIN_STEPS = {run.total_steps}' if newest >= run.total_steps else ''
                print(f'{self.name}  goes on from step {newest}{rest}', file=sys.stderr, flush=True)
        else:
            state = self._first_state()
            folder.mkdir(parents=True, exist_ok=True)
            if self.receipt is not None and jax.process_index() == 0:
                files.replace_text(folder / 'receipt.json', json.dumps(self.receipt, indent=1))
        self.health.step = int(state.step)
        if self.before is not None:
            self._leave_out(int(state.step))
        with contextlib.ExitStack() as closing:
            log = None
            if jax.process_index() == 0:
                run_folder.record(run.model_dir, saved=newest is not None)
                log = MetricsLog(run.model_dir, newest, only_training_at_it=bool(self.unfinished))
                closing.enter_context(log)
            closing.callback(self.profile.close)
            try:
                with CheckpointManager(run.model_dir, keep=run.checkpoint_keep) as manager:
                    if newest is None:
                        begins = [evaluator.name for evaluator in run.evaluators if evaluator.at_start]
                        self._evaluate(begins, state, int(state.step), log)
                    return self._loop(state, manager, log)
            except NotFiniteError as found:
                raise UserError(self._diagnosis(found)) from None

    def _first_state(self) -> TrainState:
        run = self.run
        if run.initial_checkpoint_path is None:
            return states.from_scratch(run, self.layout)
        batch = next(self._batches(run.train_data, 0))
        state, self.receipt = from_checkpoint(self.start, batch)
        metadata = self.start.reader.metadata
        self.ledger.start_from(int(state.step), metadata, run.dense_flops)
        self.sentinels = states.sentinels_of(run, metadata)
        states.check_start(run, self.ledger.start_step)
        # A model that has trained since its surgery keeps the account of its own step 0.
        fresh = self.receipt is not None and 'step_0' not in self.receipt
        if fresh and run.eval_data is not None and run.step_0_factors:
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
        # Older checkpoints say of how many processes they are, each of which was a reader.
        before = data.get('readers', data.get('process_count', readers))
        if before != readers and jax.process_index() == 0:
            promise = self.run.train_data.promise()
            warn(f'the number of readers of the data changed from {before} to {readers} at step {step}. {promise}')
        self.ledger = Ledger(**metadata['cost'])
        self._watch(metadata.get('health'), metadata['window'])
        self.receipt = metadata.get('receipt')
        self.sentinels = states.sentinels_of(self.run, metadata)
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
        batches = self._endless(first + self.health.values['batches_left_out'])
        with contextlib.ExitStack() as closing:
            asked_to_stop = closing.enter_context(preemption.watch(first))
            self._evaluate(self.unfinished, state, first, log)
            timer = closing.enter_context(Timer(self.ledger, first))
            progress = closing.enter_context(Progress(self.name, 'step', run.total_steps, first=first, period=0.0))
            for step in range(first + 1, run.total_steps + 1):
                self.profile.before(step)
                timer.book('seconds')
                batch = next(batches)
                timer.book_data()
                state, metrics = step_fn(state, batch)
                timer.under_way(metrics)
                self.profile.after(step, metrics)
                self.state = state
                self.window.add(metrics)
                self.ledger.flops += self.step_flops
                self.ledger.tokens += self.step_tokens
                last = step == run.total_steps
                if step % run.log_period == 0 or last:
                    means = self.window.close()
                    timer.book('seconds')
                    found = self.health.look_at_routing(means) | self.health.counts
                    self._write(log, step, 'train', means | found | {'steps_per_second': timer.rate(step)})
                    shown = [f'{name} {means[name]:.4f}' for name in ('loss', 'accuracy') if name in means]
                    progress.show(step, '  '.join(shown))
                    timer.book()
                # The last step ends as it would: a checkpoint of it says that the run is finished.
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
                    # Evaluating could take longer than whoever asked will wait.
                    self._evaluate([] if stop else due, state, step, log)
                    timer.book('evaluation_seconds')
                    if saves:
                        if log is not None:
                            log.copy()
                        self._save(manager, step, state, unfinished=due if stop else [])
                    timer.book('checkpoint_seconds')
                if stop:
                    self._wait(manager)
                    raise Preempted(f'asked to stop, and saved step {step}; the same command goes on from there.')
        self._wait(manager)
        return state

    def _evaluate(self, names: Sequence[str], state: TrainState, step: int, log: MetricsLog | None) -> None:
        """Runs evaluators; one that the run no longer has is passed over."""
        for name in names:
            if name in self.evaluations:
                self._write(log, step, name, self.evaluations[name](state.params))

    def _write(self, log: MetricsLog | None, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        if log is not None:
            self.still_ours(False)
            self._note_saved()
            log.write(step, split, {**metrics, **self.ledger.for_the_log(self.start.mesh.size)})

    def _note_saved(self) -> None:
        """Writes down that the first save is finished, when it is; a bucket that does not answer is asked at the next line."""
        with files.unanswered(self.run.model_dir), files.asking_once():
            if self.saves and run_folder.newest_step(self.run.model_dir) is not None:
                run_folder.record(self.run.model_dir, saved=True)
                self.saves = False

    def _wait(self, manager: CheckpointManager) -> None:
        """Returns when everything is saved."""
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
            **({'unfinished': unfinished} if unfinished else {}),
        }
        left_out = self.health.values['batches_left_out']
        data = {
            'next_batch': step + left_out,
            'fingerprint': self.data_identity,
            'process_count': jax.process_count(),
            'readers': partitioning.share_of(self.batch_sharding).count,
        }
        self.still_ours(True)
        self.saves = self.saves or manager.latest_step() is None
        manager.save(step, states.as_dict(state), data, metadata)

    def go_back(self, rollback: Rollback) -> None:
        """Makes ready for another call of `train`, which goes on from the newest checkpoint, or starts again."""
        self.before = rollback.step, self.ledger, self.health
        self.ledger = Ledger()
        self._watch()

    def _leave_out(self, step: int) -> None:
        """After going back to `step`: what was spent stays spent, and the batches since are not used again."""
        last, ledger, health = self.before
        self.before = None
        # Earlier rollbacks to the same step included.
        wasted = last - step + health.values['batches_left_out'] - self.health.values['batches_left_out']
        ledger.flops = self.ledger.flops + wasted * self.step_flops
        ledger.tokens = self.ledger.tokens + wasted * self.step_tokens
        self.ledger = ledger
        self.health.leave_out(health.values, last - step)

    def _watch(self, health: dict[str, Any] | None = None, window: dict[str, Any] | None = None) -> None:
        """Begins to take note of steps, or goes on with what was saved."""
        self.health = Health(self.run.limits, health, quiet=jax.process_index() > 0)
        self.window = Window(self.health, window)

    def _diagnosis(self, found: NotFiniteError) -> str:
        """Of the first of the steps that were not finite. Since then the state has changed only where a step was taken that was
        under way already, and then the message says so."""
        run, first = self.run, found.first - 1
        taken = self.window.taken_under_way()
        batch = next(self._batches(run.train_data, first + self.health.values['batches_left_out']))
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
        at = f'at step {found.first}' + ('' if taken is None else f' (with the parameters after step {taken})')
        return (
            f'steps {found.first} to {found.last} were not finite and changed nothing, more in a row than MAX_SKIPPED_STEPS = '
            f'{run.limits.max_skipped_steps}: {at}, {cause}; step {first} was the last good one, and the newest '
            f'checkpoint in {run.model_dir} is of step {newest}: correct the data, start another run from there with a lower '
            'BASE_LEARNING_RATE, or raise MAX_SKIPPED_STEPS and go on.'
        )

    def _endless(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Training batches from `start` on.

        Raises:
          UserError: instead of an end.
        """
        count = start
        for batch in self._batches(self.run.train_data, start):
            yield batch
            count += 1
        raise UserError(
            f'TRAIN_DATASET ends after {count} batches, and TRAIN_STEPS = {self.run.total_steps} asks for more: look for empty '
            'or missing files, let it repeat, or lower TRAIN_STEPS.'
        )

    def _batches(self, data: DataSource, start: int) -> Iterator[dict[str, jax.Array]]:
        return partitioning.batches(data, start, self.batch_sharding)


def lower_step(
    run: ModelRun, layout: states.Layout, batch_sharding: jax.sharding.Sharding, start_step: int = 0
) -> jax.stages.Lowered:
    """`train_step` for the run's shapes, on the mesh in use, ready to be compiled; `start_step`: of the run's first state."""
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
    return step.lower(layout.abstract, batch)
