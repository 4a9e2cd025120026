"""What is run, in which order: fixed before the first run."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from smollm2.texts import Texts

FROM_CHECKPOINT, TOKENS = 'models/from_checkpoint.gin', 'tasks/tokens.gin'
DENSE, UPCYCLED = 'dense', 'upcycled'
BRANCHES: Mapping[str, tuple[str, ...]] = {
    DENSE: (FROM_CHECKPOINT, TOKENS, 'runs/continue_dense.gin'),
    UPCYCLED: (FROM_CHECKPOINT, 'moe/llm.gin', TOKENS, 'runs/upcycle.gin'),
}
CHAT_FILES = (FROM_CHECKPOINT, TOKENS, 'runs/finetune_llm.gin')
START, RATES, CONTINUED, CHAT = 'start', 'rates', 'continued', 'chat'
Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of the schedule; see scripts/train_real_llm.py.

    Attributes:
      rates: peak learning rates that are tried.
      rate_seeds, rate_steps: of the runs that try them.
      seeds, steps: of the continued runs; `steps` of the upcycled model.
      chat_rate, chat_seed, chat_steps: of the runs on conversations; `chat_steps` of the upcycled model.
      batch, length: rows a step, and their tokens.
      experts: of every layer.
      eval_batches: batches of the validation in a run.
      text_batches: batches of a text that the final models are evaluated on, at most.
      evaluations: validations in a continued run, after the one at its start.
      checkpoints: steps between checkpoints.
    """

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    rate_seeds: tuple[int, ...] = (0, 1, 2)
    rate_steps: int = 80
    seeds: tuple[int, ...] = (3, 4, 5)
    steps: int = 300
    chat_rate: float = 5e-5
    chat_seed: int = 0
    chat_steps: int = 60
    batch: int = 2
    length: int = 512
    experts: int = 4
    eval_batches: int = 16
    text_batches: int = 40
    evaluations: int = 6
    checkpoints: int = 100


# To try the code: a run of each kind and branch.
SMOKE = Sizes(
    rates=(1e-4,),
    rate_seeds=(0,),
    rate_steps=2,
    seeds=(3,),
    steps=2,
    chat_steps=2,
    eval_batches=1,
    text_batches=1,
    evaluations=1,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      part: `RATES`, `CONTINUED` or `CHAT`.
      branch: a key of `BRANCHES`.
      rate: peak learning rate.
      seed: of the order of the data, and of new routers.
      steps: number of steps.
    """

    part: str
    branch: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the row of the run."""
        return self.part, self.branch, f'{self.rate:g}', str(self.seed)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return '_'.join(self.key)

    def arguments(self, sizes: Sizes, texts: Texts, start: pathlib.Path, folder: pathlib.Path) -> list[str]:
        """Returns the arguments of `upcycle train`.

        Args:
          sizes: the schedule.
          texts: the data.
          start: the checkpoint; of an upcycled model's conversations, one with experts.
          folder: the run folder.
        """
        chat = self.part == CHAT
        bindings = {
            'INITIAL_CHECKPOINT_PATH': start,
            'MODEL_DIR': folder,
            'TRAIN_STEPS': self.steps,
            'BASE_LEARNING_RATE': f'{self.rate:g}',
            'WARMUP_STEPS': max(round(self.steps / 10), 1),
            'TOKENS_DIR': texts.chat if chat else texts.code,
            'BATCH_SIZE': sizes.batch,
            'SEQUENCE_LENGTH': sizes.length,
            'DATA_SEED': self.seed,
            'RANDOM_SEED': self.seed,
            'ACTIVATION_DTYPE': 'float32',
            'EVAL_STEPS': sizes.eval_batches,
            'EVAL_PERIOD': -(-self.steps // (sizes.evaluations if self.part == CONTINUED else 1)),
            'LOG_PERIOD': 10,
            'CHECKPOINT_PERIOD': sizes.checkpoints,
            'METRIC_WRITERS': (),
        }
        if not chat:
            bindings['OPTIMIZER_STATE'] = 'fresh'
        if not chat and self.branch == UPCYCLED:
            bindings |= {'NUM_EXPERTS': sizes.experts, 'UPCYCLE_SEED': self.seed}
        files = CHAT_FILES if chat else BRANCHES[self.branch]
        return [
            *(f'--gin_file={file}' for file in files),
            *(f'--gin.{name}={value}' for name, value in bindings.items()),
        ]


def runs(sizes: Sizes, rows: Sequence[Row], ratio: float) -> list[Run]:
    """Returns all runs in their order; those that need a rate only when it is chosen.

    Args:
      sizes: the schedule.
      rows: of the runs that are finished.
      ratio: FLOPs of a step of the upcycled model, over those of a dense step.
    """
    steps = functools.partial(_steps, ratio=ratio)
    found = [
        Run(CHAT, branch, sizes.chat_rate, sizes.chat_seed, steps(branch, sizes.chat_steps)) for branch in BRANCHES
    ]
    found += [
        Run(RATES, branch, rate, seed, sizes.rate_steps)
        for seed in sizes.rate_seeds
        for rate in sizes.rates
        for branch in BRANCHES
    ]
    chosen = {branch: best_rate(sizes, rows, branch) for branch in BRANCHES}
    return found + [
        Run(CONTINUED, branch, rate, seed, steps(branch, sizes.steps))
        for seed in sizes.seeds
        for branch, rate in chosen.items()
        if rate is not None
    ]


def _steps(branch: str, steps: int, ratio: float) -> int:
    return steps if branch == UPCYCLED else round(steps * ratio)


def best_rate(sizes: Sizes, rows: Sequence[Row], branch: str) -> float | None:
    """Returns the rate with the lowest validation loss, a mean over the seeds; None before all runs are finished."""
    losses = {(row['peak rate'], row['seed']): float(row['loss']) for row in rows if _is(row, RATES, branch)}
    means = {}
    for rate in sizes.rates:
        values = [losses.get((f'{rate:g}', str(seed))) for seed in sizes.rate_seeds]
        if None in values:
            return None
        means[rate] = statistics.fmean(values)
    return min(means, key=means.__getitem__)


def _is(row: Row, part: str, branch: str) -> bool:
    return (row['part'], row['branch']) == (part, branch)
