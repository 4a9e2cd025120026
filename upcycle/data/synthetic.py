"""Random batches for compiling and for measuring speed. Nothing is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from upcycle.data import JSON, WHOLE, Share, draws, require_lengths
from upcycle.schema import Count, Whole

Batch = dict[str, np.ndarray]


class _Endless:
    """Global batch b is a pure function of (seed, b)."""

    batch_size: int
    seed: int
    num_batches: int | None

    def fingerprint(self) -> dict[str, JSON]:
        """All fields, which determine the batches."""
        return {'synthetic': type(self).__name__, **dataclasses.asdict(self)}

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of a global batch."""
        return {name: ((self.batch_size, *row.shape[1:]), row.dtype) for name, row in self._rows(0, 1).items()}

    def promise(self) -> str:
        """Which determinism holds."""
        return f'Random numbers, no data: global batch b is a pure function of (seed {self.seed}, b).'

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Yields a reader's rows of global batches `start`, `start + 1`, ...; see `DataSource.batches`."""
        runs = share.rows(self.batch_size)
        numbers = itertools.count(start) if self.num_batches is None else range(start, self.num_batches)
        return (self._batch(number, runs) for number in numbers)

    def _batch(self, number: int, runs: Sequence[range]) -> Batch:
        parts = [self._rows(number * self.batch_size + run.start, len(run)) for run in runs]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, first: int, rows: int) -> Batch:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SyntheticText(_Endless):
    """A `DataSource` of random tokens without padding, for an encoder-decoder.

    Attributes:
      task_feature_lengths: tokens of 'inputs' and 'targets' per row [TASK_FEATURE_LENGTHS].
      vocabulary_size: tokens lie between 1 and `vocabulary_size` - 1.
      batch_size: rows of a global batch.
      seed: seed of the tokens.
      num_batches: number of batches; None: endless.
    """

    task_feature_lengths: Mapping[str, Count]
    vocabulary_size: Count
    batch_size: Count
    seed: Whole = 0
    num_batches: Count | None = None

    def __post_init__(self):
        require_lengths(self.task_feature_lengths)

    def _rows(self, first: int, rows: int) -> Batch:
        """Features [rows, L] with T5X's names, unpacked."""
        inputs, targets = self.task_feature_lengths['inputs'], self.task_feature_lengths['targets']
        uniform = draws.uniform(self.seed, draws.NOISE, first, rows, inputs + targets)
        tokens = 1 + (uniform * (self.vocabulary_size - 1)).astype(np.int32)
        target = tokens[:, inputs:]
        return {
            'encoder_input_tokens': tokens[:, :inputs],
            'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))),
            'decoder_target_tokens': target,
            'decoder_loss_weights': np.ones(target.shape, np.float32),
        }


@dataclasses.dataclass(frozen=True)
class SyntheticTokens(_Endless):
    """A `DataSource` of random tokens without padding, for a decoder-only model.

    Attributes:
      sequence_length: tokens per row [SEQUENCE_LENGTH].
      vocabulary_size: tokens lie between 0 and `vocabulary_size` - 1.
      batch_size: rows of a global batch.
      seed: seed of the tokens.
      num_batches: number of batches; None: endless.
    """

    sequence_length: Count
    vocabulary_size: Count
    batch_size: Count
    seed: Whole = 0
    num_batches: Count | None = None

    def _rows(self, first: int, rows: int) -> Batch:
        length = self.sequence_length
        uniform = draws.uniform(self.seed, draws.NOISE, first, rows, length + 1)
        tokens = (uniform * self.vocabulary_size).astype(np.int32)
        weights = np.ones((rows, length), np.float32)
        return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_weights': weights}


@dataclasses.dataclass(frozen=True)
class SyntheticImages(_Endless):
    """A `DataSource` of random images and classes, for an image classifier.

    Attributes:
      image_size: height and width in pixels; values have mean 0 and standard deviation 1.
      image_channels: number of channels.
      num_classes: labels are below it, one per image.
      batch_size: rows of a global batch.
      seed: seed of the images.
      num_batches: number of batches; None: endless.
    """

    image_size: Count
    image_channels: Count
    num_classes: Count
    batch_size: Count
    seed: Whole = 0
    num_batches: Count | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a row of `image`."""
        return self.image_size, self.image_size, self.image_channels

    def _rows(self, first: int, rows: int) -> Batch:
        shape = self.image_shape
        image = draws.normal(self.seed, draws.NOISE, first, rows, int(np.prod(shape))).reshape(rows, *shape)
        label = draws.uniform(self.seed, draws.ORDER, first, rows, 1) * self.num_classes
        return {'image': image, 'labels': label.astype(np.int32), 'weights': np.ones(rows, np.float32)}
