"""What seqio's tasks measure of a language model: predictions and scores, through `seqio.Evaluator` and the tasks' own metrics.

SuperGLUE as in the paper (arXiv 2212.05055): `gin/tasks/superglue.gin` and `gin/runs/task_metrics.gin`.
Shape suffixes: `B` rows of a batch, `L` length in tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import partitioning
from upcycle.data import WHOLE, tensorflow_quiet
from upcycle.errors import UserError
from upcycle.evaluate.protocol import Subject
from upcycle.models import Model, Params
from upcycle.models.decoding import generate
from upcycle.models.losses import cross_entropy
from upcycle.schema import Count

_NO_TASK = 'TASK_METRICS needs a text task in EVAL_DATASET, such as that of tasks/superglue.gin.'


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """Which tasks, and how they are answered: an evaluator (see `evaluate.protocol`). Gin macros in brackets.

    Lengths and batch size are those of EVAL_DATASET.

    Attributes:
      mixture_or_task_name: None: that of EVAL_DATASET. Tasks without the split or without metrics are passed over
        [TASK_METRICS_OF].
      split: all of it is answered [TASK_METRICS_SPLIT].
      num_examples: of each task, from its beginning; None: all [TASK_METRICS_EXAMPLES].
      num_decodes: 1: greedy; more: the best of a beam search of that width [TASK_METRICS_DECODES].
      alpha: exponent of the beam search's brevity penalty [TASK_METRICS_ALPHA].
      period: of a training run, steps between evaluations; None: after the last step only [TASK_METRICS_PERIOD].
    """

    mixture_or_task_name: str | None = None
    split: str = 'validation'
    num_examples: Count | None = None
    num_decodes: Count = 1
    alpha: float = 0.6
    period: Count | None = None
    name: ClassVar[str] = 'tasks'
    at_start: ClassVar[bool] = False
    of_checkpoints: ClassVar[bool] = True

    def check(self, model: Model, eval_data: Any) -> None:
        """Raises UserError unless the model writes text and the data says how it is to be read."""
        if model.family != 't5':
            raise UserError(
                f'TASK_METRICS is for models that write text, and this one is of the family {model.family}: leave it out.'
            )
        if eval_data is None or not hasattr(eval_data, 'task_feature_lengths'):
            raise UserError(_NO_TASK)

    def data(self, eval_data: Any) -> Any:
        """EVAL_DATASET with the tasks to answer; none of their examples is read.

        Raises:
          UserError: EVAL_DATASET is no task, or no task of that name has the split and a metric.
        """
        if not hasattr(eval_data, 'mixture_or_task_name'):  # random tokens
            raise UserError(_NO_TASK)
        other = self.mixture_or_task_name
        data = eval_data if other is None else dataclasses.replace(eval_data, mixture_or_task_name=other, source=None)
        # Looking the task up says what is wrong with its name.
        subtasks = tensorflow_quiet.seqio().get_subtasks(data.task)
        if not any(self.split in task.splits and task.metric_objs for task in subtasks):
            raise UserError(
                f'{data.mixture_or_task_name} has no task with metrics and a split {self.split!r}: name one that has in '
                'TASK_METRICS_OF, or another TASK_METRICS_SPLIT.'
            )
        return data

    def check_data(self, data: Any) -> None:
        """Raises UserError where there is no such task, or none with the split and a metric."""
        self.data(data)

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, float]]:
        """See `TaskEvaluator.evaluate`."""
        return TaskEvaluator(self, subject.model, subject.data, subject.sharding).evaluate


class TaskEvaluator:
    """Measures a model again and again as it trains: examples are read once and programs compiled once.

    Args:
      spec: which tasks.
      model: a T5; dense or sparse.
      eval_data: a `data.text.DatasetConfig`: task, lengths, global batch size.
      sharding: of batches, on the mesh in use.

    Raises:
      UserError: no task of that name has the split and a metric, or the data cannot be read.
    """

    def __init__(self, spec: TaskMetrics, model: Model, eval_data: Any, sharding: jax.sharding.NamedSharding):
        spec.check(model, eval_data)
        self._spec, self._sharding = spec, sharding
        self._batch_size = eval_data.batch_size
        self._evaluator = _evaluator(spec.data(eval_data), spec)
        whole = partitioning.replicated(sharding.mesh)
        length = eval_data.task_feature_lengths['targets']
        self._predict = jax.jit(functools.partial(predict, model=model, spec=spec, length=length), out_shardings=whole)
        self._score = jax.jit(functools.partial(log_likelihood, model=model), out_shardings=whole)

    def evaluate(self, params: Params) -> dict[str, float]:
        """`TASK/METRIC` for every number that a task's metrics give, and `average`: over tasks, of the mean of a task's numbers.

        The same on every host.
        """

        def answers(step: Any, dataset: Any) -> list[tuple[int, Any]]:
            found: list[tuple[int, Any]] = []
            for numbers, batch in self._batches(dataset):
                # The rows that only fill up the batch come last.
                found += zip(numbers, jax.device_get(step(params, batch)).tolist(), strict=False)
            return found

        metrics, _ = self._evaluator.evaluate(
            compute_metrics=True,
            predict_fn=functools.partial(answers, self._predict),
            score_fn=functools.partial(answers, self._score),
        )
        return summarize(metrics.result())

    def _batches(self, dataset: Any) -> Iterator[tuple[list[int], dict[str, jax.Array]]]:
        """The numbers of the examples, and the global batch that they begin."""
        for numbers, examples in dataset.batch(self._batch_size).as_numpy_iterator():
            batch = {}
            for name, value in examples.items():
                filled = np.zeros((self._batch_size, *value.shape[1:]), value.dtype)
                filled[: len(value)] = value
                batch[name] = filled
            # Every host reads every example.
            yield numbers.tolist(), partitioning.put_batch(batch, self._sharding, WHOLE)


def predict(
    params: Params, batch: Mapping[str, jax.Array], *, model: Model, spec: TaskMetrics, length: int
) -> jax.Array:
    """The model's answers: tokens (B, L), padding after the end."""
    tokens_BxNxL, _ = generate(
        model.module(),
        params,
        batch['encoder_input_tokens'],
        max_length=length,
        num_decodes=spec.num_decodes,
        alpha=spec.alpha,
    )
    return tokens_BxNxL[:, 0]


def log_likelihood(params: Params, batch: Mapping[str, jax.Array], *, model: Model) -> jax.Array:
    """Log-probability of each row's targets, its end included (B,), as T5X's `score_batch`."""
    logits_BxLxV = model.logits(params, batch)
    loss_BxL, _ = cross_entropy(logits_BxLxV, batch['decoder_target_tokens'])
    return -(loss_BxL * batch['decoder_loss_weights'].astype(jnp.float32)).sum(axis=-1)


def summarize(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """See `TaskEvaluator.evaluate`; what is no number (texts, histograms) is left out."""
    found: dict[str, float] = {}
    means = []
    for task, values in metrics.items():
        numbers = {name: getattr(value, 'value', value) for name, value in values.items()}
        numbers = {
            name: float(value) for name, value in numbers.items() if np.isscalar(value) and not isinstance(value, str)
        }
        found |= {f'{task}/{name}': value for name, value in numbers.items()}
        if numbers:
            means.append(np.mean(list(numbers.values())))
    return {**found, 'average': float(np.mean(means))} if means else found


def _evaluator(data: Any, spec: TaskMetrics) -> Any:
    seqio = tensorflow_quiet.seqio()
    with data.reading():
        return seqio.Evaluator(
            data.mixture_or_task_name,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=spec.split,
            use_cached=data.use_cached,
            sequence_length=dict(data.task_feature_lengths),
            num_examples=spec.num_examples,
            async_compute_metrics=False,
        )
