"""Few-shot linear probe of frozen features: the paper's ImageNet 10-shot (arXiv 2212.05055).

Ridge regression in closed form from the features of k images of each class onto one-hot labels. The result is the share of test
images whose highest score is one of their labels, averaged over seeds; each seed draws its own images.

Details that the paper does not give follow `big_vision/evaluators/fewshot_lsr.py` and `vmoe/evaluate/fewshot.py`, which agree:
- features are what the head reads (pre-logits), standardised by the drawn images' mean and standard deviation + 1e-5;
- a constant feature of 100 stands for the bias, so that the regularisation hardly affects it;
- targets are +1 at the label and -1 elsewhere;
- seed s permutes each class with one `numpy.random.default_rng(s)`, and k shots are the first k of each class.
Differences: they take fewer images of a class that has fewer than k, and we refuse; they solve in float32, we in float64.
Features and scores are computed on the mesh, their rows split over it. The regression runs on the host.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle import partitioning, schema
from upcycle.errors import UserError
from upcycle.evaluate.protocol import Evaluator, Subject
from upcycle.models import Model, Params
from upcycle.schema import Count, Positive

BIAS = 100.0
_NO_IMAGES = 'FEW_SHOT needs labelled images in EVAL_DATASET, such as those of tasks/mnist5k.gin.'

_MACROS = {
    'shots': 'FEW_SHOT_SHOTS',
    'l2': 'FEW_SHOT_L2',
    'num_seeds': 'FEW_SHOT_SEEDS',
    'train_split': 'FEW_SHOT_TRAIN_SPLIT',
    'test_split': 'FEW_SHOT_TEST_SPLIT',
    'period': 'FEW_SHOT_PERIOD',
}


@dataclasses.dataclass(frozen=True)
class FewShot(Evaluator):
    """The few-shot probes. Gin macros in brackets.

    Features come from the evaluation data's preprocessing, at evaluation capacity.

    Attributes:
      shots: images per class, one probe each [FEW_SHOT_SHOTS]. The paper: 10.
      l2: regularisation strengths, one probe each [FEW_SHOT_L2]. The paper: 1024, not swept.
      num_seeds: number of draws (seeds 0, 1, ...) that the result is averaged over [FEW_SHOT_SEEDS]. The paper: 5.
      train_split: split to draw images from [FEW_SHOT_TRAIN_SPLIT].
      test_split: split to classify as a whole; None: that of EVAL_DATASET [FEW_SHOT_TEST_SPLIT].
      period: training steps between probes; None: only after the last step [FEW_SHOT_PERIOD].
    """

    shots: Sequence[Count] = (10,)
    l2: Sequence[Positive] = (1024.0,)
    num_seeds: Count = 5
    train_split: str = 'train'
    test_split: str | None = None
    period: Count | None = None
    name: ClassVar[str] = 'few_shot'

    def __post_init__(self):
        schema.validate(self, _MACROS)
        for binding, values in (('FEW_SHOT_SHOTS', self.shots), ('FEW_SHOT_L2', self.l2)):
            if not values:
                raise UserError(f'{binding} must have at least one value.')

    def check(self, model: Model, eval_data: Any) -> None:
        """Raises UserError unless the model has features and the data is labelled images."""
        if not hasattr(model, 'features'):
            raise UserError(
                f'FEW_SHOT is for image classifiers, and this model is of the family {model.family}: remove FEW_SHOT.'
            )
        if eval_data is None or not hasattr(eval_data, 'num_classes'):
            raise UserError(_NO_IMAGES)

    def check_data(self, data: Any) -> None:
        """Raises UserError if one of the two splits does not exist."""
        for split in self.data(data):
            split.batches()

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, Any]]:
        """See `evaluate`."""
        features = compiled(subject.model)
        return lambda params: evaluate(self, features, params, subject.data, subject.sharding, subject.watch)

    def data(self, eval_data: Any) -> tuple[Any, Any]:
        """Returns the images to draw from and the images to classify: one pass each, preprocessed as for evaluation.

        Both are in a fixed random order: with Expert Choice an image's features depend on the other images of its group, and
        sources sorted by class would give groups of one class.

        Raises:
          UserError: EVAL_DATASET has no splits.
        """
        if not hasattr(eval_data, 'split'):  # random images
            raise UserError(_NO_IMAGES)
        one_pass = dataclasses.replace(eval_data, num_batches=None, repeat=False, shuffle=True, seed=0)
        test_split = eval_data.split if self.test_split is None else self.test_split
        return dataclasses.replace(one_pass, split=self.train_split), dataclasses.replace(one_pass, split=test_split)


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of a split, rows split over the mesh.

    Attributes:
      features_NxD: float32; arbitrary in rows that pad a batch.
      labels_NxM: int32 on the host, padded with -1; all -1 in rows that pad a batch.
    """

    features_NxD: jax.Array
    labels_NxM: np.ndarray


def compiled(model: Model) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
    """Compiles `model.features` once for all probes of a run."""
    return jax.jit(model.features)


def extract(features: Callable[..., jax.Array], params: Params, batches: Iterable[Mapping[str, jax.Array]]) -> Features:
    """Computes the features of every batch on the current mesh.

    Args:
      features: from `compiled`.
      params: of the model.
      batches: on the mesh.

    Raises:
      UserError: there are no batches.
    """
    parts, labels = [], []
    for batch in batches:
        parts.append(features(params, batch))
        labels.append(_labels(batch['labels'], batch['weights']))
    if not parts:
        raise UserError('FEW_SHOT: a split has no images.')
    return Features(_concatenate(parts), np.concatenate(jax.device_get(labels)))


def probe(spec: FewShot, train: Features, test: Features, num_classes: int) -> dict[str, Any]:
    """Computes the accuracy for every number of shots and strength: mean and standard deviation over seeds, and each seed's.

    Args:
      spec: the probes.
      train: features to draw from; one label per image.
      test: features to classify; an image counts as correct if its top class is one of its labels.
      num_classes: V; every class is drawn from and scored.

    Returns:
      `10shot`, `10shot/stddev`, `10shot/seeds`; with several strengths `10shot/l2=1024` and so on.

    Raises:
      UserError: a class has fewer images than shots, or an image has several labels.
    """
    if train.labels_NxM.shape[1] > 1 and (train.labels_NxM[:, 1:] >= 0).any():
        raise UserError(
            f'FEW_SHOT needs one label per image, and an image of the split {spec.train_split!r} has several.'
        )
    accuracies: dict[str, list[float]] = {}
    for seed in range(spec.num_seeds):
        classes = permuted_classes(train.labels_NxM[:, 0], num_classes, seed)
        for shots in spec.shots:
            solve = ridge(train, draw(classes, shots), num_classes)
            for l2 in spec.l2:
                name = f'{shots}shot' + (f'/l2={l2:g}' if len(spec.l2) > 1 else '')
                accuracies.setdefault(name, []).append(accuracy(solve(l2), test))
    out: dict[str, Any] = {}
    for name, values in accuracies.items():
        out[name] = float(np.mean(values))
        out[f'{name}/stddev'] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        out[f'{name}/seeds'] = values
    return out


def evaluate(
    spec: FewShot,
    features: Callable[..., jax.Array],
    params: Params,
    eval_data: Any,
    sharding: jax.sharding.NamedSharding,
    watch: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, name: batches,
) -> dict[str, Any]:
    """Extracts the features of both splits and probes them; see `probe`.

    Args:
      spec: the probes.
      features: from `compiled`.
      params: of the model, on the current mesh.
      eval_data: see `FewShot.data`.
      sharding: of batches.
      watch: wraps the batches of each split, to show progress.
    """
    train, test = (
        extract(features, params, watch(partitioning.batches(data, 0, sharding), f'features of {data.split}'))
        for data in spec.data(eval_data)
    )
    return probe(spec, train, test, eval_data.num_classes)


def permuted_classes(labels_N: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """Returns the rows of each class, in the seed's order."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels_N == c)) for c in range(num_classes)]


def draw(classes: Sequence[np.ndarray], shots: int) -> np.ndarray:
    """Returns the first `shots` rows of every class.

    Raises:
      UserError: a class has fewer.
    """
    for c, rows in enumerate(classes):
        if len(rows) < shots:
            raise UserError(
                f'FEW_SHOT_SHOTS = {shots}: class {c} has only {len(rows)} images in FEW_SHOT_TRAIN_SPLIT: lower '
                'FEW_SHOT_SHOTS or use a larger split.'
            )
    return np.concatenate([rows[:shots] for rows in classes])


class Classifier(NamedTuple):
    """A linear classifier: scores are ((x - mean) / std) W + bias."""

    mean_D: np.ndarray
    std_D: np.ndarray
    weights_DxV: np.ndarray
    bias_V: np.ndarray

    def scores(self, features_NxD: jax.Array) -> jax.Array:
        """Returns the scores, (N, V) float32."""
        return _scores(features_NxD, *self)


def ridge(train: Features, rows: np.ndarray, num_classes: int) -> Callable[[float], Classifier]:
    """Decomposes the regression on some rows once and returns a function from a strength to its classifier.

    With X the standardised features, the bias column included, and Y the targets, W = (X^T X + l2 I)^-1 X^T Y.
    """
    x_NxD = np.asarray(_rows(train.features_NxD, rows), np.float64)
    mean_D, std_D = x_NxD.mean(axis=0), x_NxD.std(axis=0) + 1e-5
    z_NxP = np.pad((x_NxD - mean_D) / std_D, ((0, 0), (0, 1)), constant_values=BIAS)
    eigenvalues_P, basis_PxP = np.linalg.eigh(z_NxP.T @ z_NxP)
    # X^T Y for targets of 1 and -1, without the matrix Y, which is large if there are many classes.
    sums_VxP = np.zeros((num_classes, z_NxP.shape[1]))
    np.add.at(sums_VxP, train.labels_NxM[rows, 0], z_NxP)
    projected_PxV = basis_PxP.T @ (2.0 * sums_VxP - z_NxP.sum(axis=0)).T
    # Rounding can make zeros negative, and a strength can be tiny.
    eigenvalues_Px1 = np.maximum(eigenvalues_P, 0.0)[:, None]

    def solve(l2: float) -> Classifier:
        weights_PxV = basis_PxP @ (projected_PxV / (eigenvalues_Px1 + l2))
        fields = (mean_D, std_D, weights_PxV[:-1], BIAS * weights_PxV[-1])
        return Classifier(*(np.asarray(field, np.float32) for field in fields))

    return solve


def accuracy(classifier: Classifier, test: Features) -> float:
    """Returns the share of the real rows whose top class is one of their labels: precision at 1."""
    top_N = np.asarray(_top(test.features_NxD, *classifier))
    real = (test.labels_NxM >= 0).any(axis=1)
    return float(precision_at_1(top_N, test.labels_NxM)[real].mean())


def precision_at_1(top_N: np.ndarray, labels_NxM: np.ndarray) -> np.ndarray:
    """Returns whether each row's top class is one of its labels, which are padded with -1: (N,) bool."""
    return (labels_NxM == top_N[:, None]).any(axis=1)


def _on_every_device(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, (None,) * x.ndim)


@jax.jit
def _labels(labels_BxM: jax.Array, weights_B: jax.Array) -> jax.Array:
    return _on_every_device(jnp.where(weights_B[:, None] > 0, labels_BxM, -1))


@jax.jit
def _concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    return nn.with_logical_constraint(jnp.concatenate(parts).astype(jnp.float32), ('batch', None))


@jax.jit
def _rows(features_NxD: jax.Array, rows_n: jax.Array) -> jax.Array:
    return _on_every_device(features_NxD[rows_n])


@jax.jit
def _scores(x_NxD, mean_D, std_D, weights_DxV, bias_V):
    return jnp.matmul((x_NxD - mean_D) / std_D, weights_DxV, precision='highest') + bias_V


@jax.jit
def _top(x_NxD, mean_D, std_D, weights_DxV, bias_V):
    return _on_every_device(jnp.argmax(_scores(x_NxD, mean_D, std_D, weights_DxV, bias_V), axis=-1))
