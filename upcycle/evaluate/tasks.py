"""Metrics of seqio tasks: a language model's predictions and scores, given to the tasks' own metrics by `seqio.Evaluator`.

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
from upcycle.evaluate.protocol import Evaluator, Subject
from upcycle.models import Model, Params
from upcycle.models.decoding import generate
from upcycle.models.losses import cross_entropy
from upcycle.schema import Count

_NO_TASK = 'TASK_METRICS needs a text task in EVAL_DATASET, such as the one of tasks/superglue.gin.'


@dataclasses.dataclass(frozen=True)
class TaskMetrics(Evaluator):
    """The seqio tasks to evaluate, and how to decode answers. Gin macros in brackets.

    Lengths and batch size are those of EVAL_DATASET.

    Attributes:
      mixture_or_task_name: seqio mixture or task; None: that of EVAL_DATASET. Tasks without the split or without metrics are
        skipped [TASK_METRICS_OF].
      split: split to evaluate [TASK_METRICS_SPLIT].
      num_examples: number of examples of each task, from its start; None: all [TASK_METRICS_EXAMPLES].
      num_decodes: beam width; 1: greedy decoding [TASK_METRICS_DECODES].
      alpha: exponent of the beam search's brevity penalty [TASK_METRICS_ALPHA].
      period: training steps between evaluations; None: only after the last step [TASK_METRICS_PERIOD].
    """

    mixture_or_task_name: str | None = None
    split: str = 'validation'
    num_examples: Count | None = None
    num_decodes: Count = 1
    alpha: float = 0.6
    period: Count | None = None
    name: ClassVar[str] = 'tasks'

    def check(self, model: Model, eval_data: Any) -> None:
        """Raises UserError unless the model generates text and the data is a text task."""
        if model.family != 't5':
            raise UserError(
                f'TASK_METRICS is for T5 models, and this model is of the family {model.family}: remove TASK_METRICS.'
            )
        if eval_data is None or not hasattr(eval_data, 'task_feature_lengths'):
            raise UserError(_NO_TASK)

    def data(self, eval_data: Any) -> Any:
        """Returns EVAL_DATASET with the tasks to evaluate. Reads no example.

        Raises:
          UserError: EVAL_DATASET is not a task, or none of the tasks has the split and a metric.
        """
        if not hasattr(eval_data, 'mixture_or_task_name'):  # random tokens
            raise UserError(_NO_TASK)
        other = self.mixture_or_task_name
        data = eval_data if other is None else dataclasses.replace(eval_data, mixture_or_task_name=other, source=None)
        # Raises if the task is unknown.
        subtasks = tensorflow_quiet.seqio().get_subtasks(data.task)
        if not any(self.split in task.splits and task.metric_objs for task in subtasks):
            raise UserError(
                f'{data.mixture_or_task_name} has no task with metrics and a split {self.split!r}: change TASK_METRICS_OF or '
                'TASK_METRICS_SPLIT.'
            )
        return data

    def check_data(self, data: Any) -> None:
        """Raises UserError if the task does not exist, or no task has the split and a metric."""
        self.data(data)

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, float]]:
        """See `TaskEvaluator.evaluate`."""
        return TaskEvaluator(self, subject.model, subject.data, subject.sharding).evaluate


class TaskEvaluator:
    """Evaluates a model repeatedly: reads examples and compiles programs once.

    Args:
      spec: the tasks.
      model: a T5, dense or sparse.
      eval_data: a `data.text.DatasetConfig`: task, lengths, global batch size.
      sharding: of batches, on the current mesh.

    Raises:
      UserError: none of the tasks has the split and a metric, or the data cannot be read.
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
        """Returns `TASK/METRIC` for every scalar of a task's metrics, and `average`, the mean over tasks of a task's mean scalar.

        The result is the same on every host.
        """

        def answers(step: Any, dataset: Any) -> list[tuple[int, Any]]:
            pairs: list[tuple[int, Any]] = []
            for numbers, batch in self._batches(dataset):
                # Rows that pad the batch come last.
                pairs += zip(numbers, jax.device_get(step(params, batch)).tolist(), strict=False)
            return pairs

        metrics, _ = self._evaluator.evaluate(
            compute_metrics=True,
            predict_fn=functools.partial(answers, self._predict),
            score_fn=functools.partial(answers, self._score),
        )
        return summarize(metrics.result())

    def _batches(self, dataset: Any) -> Iterator[tuple[list[int], dict[str, jax.Array]]]:
        """Yields the numbers of the examples and their global batch, which they fill from its start."""
        for numbers, examples in dataset.batch(self._batch_size).as_numpy_iterator():
            batch = {}
            for name, value in examples.items():
                filled = np.zeros((self._batch_size, *value.shape[1:]), value.dtype)
                filled[: len(value)] = value
                batch[name] = filled
            # Every host reads all examples.
            yield numbers.tolist(), partitioning.put_batch(batch, self._sharding, WHOLE)


def predict(
    params: Params, batch: Mapping[str, jax.Array], *, model: Model, spec: TaskMetrics, length: int
) -> jax.Array:
    """Generates answers: tokens (B, L), padded after the end."""
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
    """Computes the log-probability of each row's targets, end of sequence included, (B,); matches T5X's `score_batch`."""
    logits_BxLxV = model.logits(params, batch)
    loss_BxL, _ = cross_entropy(logits_BxLxV, batch['decoder_target_tokens'])
    return -(loss_BxL * batch['decoder_loss_weights'].astype(jnp.float32)).sum(axis=-1)


def summarize(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Computes the result of `TaskEvaluator.evaluate`. Texts and histograms are skipped."""
    result: dict[str, float] = {}
    means = []
    for task, values in metrics.items():
        numbers = {name: getattr(value, 'value', value) for name, value in values.items()}
        numbers = {
            name: float(value) for name, value in numbers.items() if np.isscalar(value) and not isinstance(value, str)
        }
        result |= {f'{task}/{name}': value for name, value in numbers.items()}
        if numbers:
            means.append(np.mean(list(numbers.values())))
    return {**result, 'average': float(np.mean(means))} if means else result


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
