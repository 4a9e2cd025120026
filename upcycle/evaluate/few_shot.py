"""Few-shot linear probe of frozen features: the paper's ImageNet 10-shot (arXiv 2212.05055).

A ridge regression in closed form from the features of k images of each class onto one-hot labels; the share of test images
whose highest score is one of their labels; the mean over seeds, each of which draws its own images.

What the paper does not say is as in `big_vision/evaluators/fewshot_lsr.py` and `vmoe/evaluate/fewshot.py`, which agree:
- features are what the head reads (pre-logits), standardised by the drawn images' mean and standard deviation + 1e-5;
- a constant feature of 100 stands for the bias, so that the regularisation hardly sees it;
- targets are +1 at the label and -1 elsewhere;
- seed s permutes each class with one `numpy.random.default_rng(s)`, and k shots are the first k of each class.
Where we differ: they take fewer images of a class that has fewer than k, and we refuse; they solve on the host in float32.
Here features, Gram matrix and scores are computed on the mesh with their rows split over it, in float32 products; the matrix of
the smaller side (features or images) is decomposed once for all strengths, on the host in float64. Standardised features sum
to zero, so the bias is orthogonal to them and is solved on its own: the Gram matrix loses its one huge eigenvalue.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.evaluate.protocol import Subject
from upcycle.models import Model, Params

BIAS = 100.0
_NO_IMAGES = 'FEW_SHOT needs labelled images in EVAL_DATASET, such as those of tasks/mnist5k.gin.'
_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Which probes: an evaluator (see `evaluate.protocol`). Gin macros in brackets.

    Features come from the evaluation data's preprocessing, at evaluation capacity.

    Attributes:
      shots: images a class, a probe each [FEW_SHOT_SHOTS]. The paper: 10.
      l2: strengths of the regularisation, a probe each [FEW_SHOT_L2]. The paper: 1024, not swept.
      num_seeds: draws of images, 0, 1, ...; reported is their mean [FEW_SHOT_SEEDS]. The paper: 5.
      train_split: where the images are drawn from [FEW_SHOT_TRAIN_SPLIT].
      test_split: all of it is classified; None: that of EVAL_DATASET [FEW_SHOT_TEST_SPLIT].
      period: of a training run, steps between probes; None: after the last step only [FEW_SHOT_PERIOD].
    """

    shots: Sequence[int] = (10,)
    l2: Sequence[float] = (1024.0,)
    num_seeds: int = 5
    train_split: str = 'train'
    test_split: str | None = None
    period: int | None = None
    name: ClassVar[str] = 'few_shot'
    at_start: ClassVar[bool] = False
    of_checkpoints: ClassVar[bool] = True

    def __post_init__(self):
        for binding, field in (('FEW_SHOT_SHOTS', 'shots'), ('FEW_SHOT_L2', 'l2')):
            value = getattr(self, field)
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not values or not all(isinstance(x, int | float) and x > 0 for x in values):
                raise UserError(f'{binding} = {value!r} must be a number above 0, or a list of them.')
            object.__setattr__(self, field, values)
        if not all(isinstance(shots, int) for shots in self.shots):
            raise UserError(f'FEW_SHOT_SHOTS = {self.shots!r} must be whole numbers of images.')
        if not isinstance(self.num_seeds, int) or self.num_seeds < 1:
            raise UserError(f'FEW_SHOT_SEEDS = {self.num_seeds!r} must be a whole number of at least 1.')
        if self.period is not None and (not isinstance(self.period, int) or self.period < 1):
            raise UserError(f'FEW_SHOT_PERIOD = {self.period!r} must be a whole number of at least 1, or None.')

    def check(self, model: Model, eval_data: Any) -> None:
        """Raises UserError unless the model has features to probe and the data can be read split by split."""
        if not hasattr(model, 'features'):
            raise UserError(
                f'FEW_SHOT probes image classifiers, and this model is of the family {model.family}: leave it out.'
            )
        if eval_data is None or not hasattr(eval_data, 'num_classes'):
            raise UserError(_NO_IMAGES)

    def check_data(self, data: Any) -> None:
        """Raises UserError where one of the two splits is not there."""
        for split in self.data(data):
            split.batches()

    def prepare(self, subject: Subject) -> Callable[[Params], dict[str, Any]]:
        """See `evaluate`."""
        features = compiled(subject.model)
        return lambda params: evaluate(self, features, params, subject.data, subject.sharding, subject.watch)

    def data(self, eval_data: Any) -> tuple[Any, Any]:
        """The images to draw from and those to classify: one pass each, preprocessed as for evaluation.

        Both are in a fixed random order: with Expert Choice an image's features depend on which images share its group, and
        sources sorted by class would make groups of one class.

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
      features_NxD: float32; rows that only fill up a batch are anything.
      labels_NxM: int32 on the host, filled up with -1; the rows above are all -1.
    """

    features_NxD: jax.Array
    labels_NxM: np.ndarray


def compiled(model: Model) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
    """`model.features`, compiled once for all probes of a run."""
    return jax.jit(model.features)


def extract(features: Callable[..., jax.Array], params: Params, batches: Iterable[Mapping[str, jax.Array]]) -> Features:
    """Features of every batch, batch by batch on the mesh in use.

    Args:
      features: from `compiled`.
      params: of the model.
      batches: on the mesh.

    Raises:
      UserError: there is no batch.
    """
    parts, labels = [], []
    for batch in batches:
        parts.append(features(params, batch))
        labels.append(_labels(batch['labels'], batch['weights']))
    if not parts:
        raise UserError('FEW_SHOT: a split holds no image.')
    return Features(_concatenate(parts), np.concatenate(jax.device_get(labels)))


def probe(spec: FewShot, train: Features, test: Features, num_classes: int) -> dict[str, Any]:
    """Accuracy of every number of shots and strength: mean and standard deviation over seeds, and each seed's.

    Args:
      spec: what to probe.
      train: to draw from; one label an image.
      test: to classify; an image is right when its top class is one of its labels.
      num_classes: V; every class is drawn from and scored.

    Returns:
      `10shot`, `10shot/stddev`, `10shot/seeds`; with several strengths `10shot/l2=1024` and so on.

    Raises:
      UserError: a class has too few images to draw, or an image several labels.
    """
    if train.labels_NxM.shape[1] > 1 and (train.labels_NxM[:, 1:] >= 0).any():
        raise UserError(f'FEW_SHOT draws k images a class, and an image of {spec.train_split!r} has several labels.')
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
    """The probes of a model; see `probe`.

    Args:
      spec: which.
      features: from `compiled`.
      params: of the model, on the mesh in use.
      eval_data: see `FewShot.data`.
      sharding: of batches.
      watch: sees the batches of each split go by.
    """
    train, test = (
        extract(features, params, watch(partitioning.batches(data, 0, sharding), f'features of {data.split}'))
        for data in spec.data(eval_data)
    )
    return probe(spec, train, test, eval_data.num_classes)


def permuted_classes(labels_N: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """The rows of each class, in the seed's order."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels_N == c)) for c in range(num_classes)]


def draw(classes: Sequence[np.ndarray], shots: int) -> np.ndarray:
    """The first `shots` rows of every class.

    Raises:
      UserError: a class has fewer.
    """
    for c, rows in enumerate(classes):
        if len(rows) < shots:
            raise UserError(
                f'FEW_SHOT_SHOTS = {shots}: class {c} has only {len(rows)} images in FEW_SHOT_TRAIN_SPLIT; lower the one or '
                'name a larger other.'
            )
    return np.concatenate([rows[:shots] for rows in classes])


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Scores are ((x - mean) / std) W + bias."""

    mean_D: np.ndarray
    std_D: np.ndarray
    weights_DxV: np.ndarray
    bias_V: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The fields."""
        return self.mean_D, self.std_D, self.weights_DxV, self.bias_V

    def scores(self, features_NxD: jax.Array) -> jax.Array:
        """(N, V), float32."""
        return _scores(features_NxD, *self.arrays)


def ridge(train: Features, rows: np.ndarray, num_classes: int) -> Callable[[float], Classifier]:
    """The regression on some rows, decomposed once; the result maps a strength to its classifier.

    With X the standardised features with the bias column and Y the targets, W = (X^T X + l2 I)^-1 X^T Y. For fewer images than
    features the same W is X^T (X X^T + l2 I)^-1 Y, whose matrix is the smaller one.
    """
    # Rows divide among the devices; those added weigh nothing.
    count = len(rows)
    shards = partitioning.batch_shards(partitioning.current_mesh())
    padded = np.concatenate([rows, np.zeros(-count % shards, rows.dtype)])
    weights = np.concatenate([np.ones(count, np.float32), np.zeros(len(padded) - count, np.float32)])
    labels = np.where(weights > 0, train.labels_NxM[padded, 0], -1)
    mean_D, rest_D, std_D, z_NxD, y_NxV = _standardised(train.features_NxD, padded, labels, weights, num_classes)
    counts_V = np.bincount(labels[labels >= 0], minlength=num_classes)
    total_V = 2.0 * counts_V - count
    if count >= z_NxD.shape[1]:
        gram_DxD, cross_DxV = (np.asarray(x, np.float64) for x in _normal_equations(z_NxD, y_NxV))
        eigenvalues, left = np.linalg.eigh(gram_DxD)
        right = left.T @ cross_DxV
    else:
        z_NxD, y_NxV = (np.asarray(x, np.float64)[:count] for x in _whole(z_NxD, y_NxV))
        eigenvalues, basis = np.linalg.eigh(z_NxD @ z_NxD.T)
        left, right = z_NxD.T @ basis, basis.T @ y_NxV
    # Rounding makes zeros negative, and a strength may be tiny.
    eigenvalues = np.maximum(eigenvalues, 0.0)
    shift_D = np.asarray(rest_D, np.float64) / np.asarray(std_D, np.float64)

    def solve(l2: float) -> Classifier:
        weights_DxV = (left / (eigenvalues + l2)) @ right
        bias_V = BIAS * (BIAS * total_V / (BIAS**2 * count + l2)) - shift_D @ weights_DxV
        return Classifier(*(np.asarray(x, np.float32) for x in (mean_D, std_D, weights_DxV, bias_V)))

    return solve


def accuracy(classifier: Classifier, test: Features) -> float:
    """Share of the real rows whose top class is one of their labels: precision at 1."""
    top_N = np.asarray(_top(test.features_NxD, *classifier.arrays))
    real = (test.labels_NxM >= 0).any(axis=1)
    return float(precision_at_1(top_N, test.labels_NxM)[real].mean())


def precision_at_1(top_N: np.ndarray, labels_NxM: np.ndarray) -> np.ndarray:
    """(N,) bool: whether a row's top class is one of its labels, which are filled up with -1."""
    return (labels_NxM == top_N[:, None]).any(axis=1)


def _on_every_device(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, (None,) * x.ndim)


@jax.jit
def _labels(labels_BxM: jax.Array, weights_B: jax.Array) -> jax.Array:
    return _on_every_device(jnp.where(weights_B[:, None] > 0, labels_BxM, -1))


@jax.jit
def _concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    return nn.with_logical_constraint(jnp.concatenate(parts).astype(jnp.float32), ('batch', None))


@functools.partial(jax.jit, static_argnames='num_classes')
def _standardised(features_NxD, rows_n, labels_n, weights_n, num_classes):
    """The drawn rows: mean, what rounding leaves of it, deviation, standardised features, centred targets; others are 0."""
    x_nxD = nn.with_logical_constraint(features_NxD[rows_n], ('batch', None))
    count = weights_n.sum()
    mean_D = (x_nxD * weights_n[:, None]).sum(axis=0) / count
    # A feature that hardly varies is divided by 1e-5 and its mean's rounding with it: take that off, too.
    rest_D = ((x_nxD - mean_D) * weights_n[:, None]).sum(axis=0) / count
    centred_nxD = (x_nxD - mean_D - rest_D) * weights_n[:, None]
    std_D = jnp.sqrt(jnp.square(centred_nxD).sum(axis=0) / count) + 1e-5
    y_nxV = 2.0 * jax.nn.one_hot(labels_n, num_classes) - 1.0
    # Features that sum to zero see only what the targets' mean, which is the bias's, leaves.
    y_nxV = (y_nxV - (y_nxV * weights_n[:, None]).sum(axis=0) / count) * weights_n[:, None]
    return *(_on_every_device(x) for x in (mean_D, rest_D, std_D)), centred_nxD / std_D, y_nxV


@jax.jit
def _normal_equations(z_NxD, y_NxV):
    return tuple(_on_every_device(_exact('nd,nv->dv', z_NxD, other)) for other in (z_NxD, y_NxV))


@jax.jit
def _whole(*arrays):
    return tuple(_on_every_device(x) for x in arrays)


@jax.jit
def _scores(x_NxD, mean_D, std_D, weights_DxV, bias_V):
    return _exact('nd,dv->nv', (x_NxD - mean_D) / std_D, weights_DxV) + bias_V


@jax.jit
def _top(x_NxD, mean_D, std_D, weights_DxV, bias_V):
    return _on_every_device(jnp.argmax(_scores(x_NxD, mean_D, std_D, weights_DxV, bias_V), axis=-1))
