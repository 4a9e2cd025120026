"""A `DataSource` of preprocessed, labelled images. Gin files import this module.

A batch has `image` float32 [B, H, W, C], `labels` int32 [B, N], class ids padded with -1 (N = 1 for one class per image),
and `weights` float32 [B]: 1, or 0 for padding rows of the last batch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from upcycle.data import JSON, WHOLE, Share, draws
from upcycle.data.bad_records import BadRecordError, BadRecords
from upcycle.data.image_folder import ImageFolder
from upcycle.data.mnist import Mnist5k, Optdigits, ScanAugmentation
from upcycle.data.photographs import CentralCropPreprocessing, InceptionPreprocessing
from upcycle.data.tfds_images import TfdsImages
from upcycle.errors import UserError
from upcycle.schema import Count, Whole

__all__ = [
    'CentralCropPreprocessing',
    'DatasetConfig',
    'ImageFolder',
    'InceptionPreprocessing',
    'Mnist5k',
    'Optdigits',
    'ScanAugmentation',
    'TfdsImages',
]

Batch = dict[str, np.ndarray]

# Number of batches prepared ahead, on one thread.
_AHEAD = 2


class ImageSource(Protocol):
    """Labelled images, read by index within a split, or in order if `streamed` (see `TfdsImages.stream`)."""

    num_classes: int
    max_labels: int
    streamed: bool
    encoded: bool  # `read` returns `Encoded` files; otherwise pixels

    def size(self, split: str) -> int:
        """Number of examples in a split."""

    def read(self, split: str, places: np.ndarray) -> tuple[Sequence[Any], np.ndarray]:
        """Reads the images at these indices, as the preprocessing expects them, and labels int32 [n, N]."""

    def fingerprint(self, split: str) -> dict[str, JSON]:
        """The identity of the split by content, independent of the machine."""


class Preprocessing(Protocol):
    """Converts a source's images to model inputs."""

    image_shape: tuple[int, int, int]
    encoded: bool  # the kind of image that it takes

    def __call__(self, images: Sequence[Any], seed: int, first: int) -> np.ndarray:
        """Returns float32 [n, H, W, C] for consecutive examples from index `first`; randomness depends on (seed, index) only.

        Raises:
          BadRecordError: an image is broken.
        """


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A `DataSource` of batches of labelled images for an image classifier.

    Attributes:
      source: source of the images.
      preprocessing: converts them to model inputs; a frozen dataclass, whose fields are part of the fingerprint.
      split: name of the split: 'train', 'validation', ..., or a TFDS slice such as 'train[:99%]'.
      batch_size: rows of a global batch.
      seed: seed of the order and the augmentation.
      shuffle: draw a new order in every epoch; set to False for validation.
      num_batches: maximum number of batches, for a bounded evaluation.
      repeat: True: endless. False: one pass, whose last batch is padded with rows of weight 0.
      max_bad_records: number of images per host that may fail to decode; their rows have weight 0 [MAX_BAD_RECORDS].
    """

    source: ImageSource
    preprocessing: Preprocessing
    split: str
    batch_size: Count
    seed: Whole = 0
    shuffle: bool = True
    num_batches: Count | None = None
    repeat: bool = True
    max_bad_records: Whole = 0

    def __post_init__(self):
        if self.source.encoded != self.preprocessing.encoded:
            names = type(self.source).__name__, type(self.preprocessing).__name__
            raise UserError(
                f'DatasetConfig.preprocessing = @{names[1]}() does not take the images of @{names[0]}(): ScanAugmentation '
                'is for Mnist5k, and the others for image files.'
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a row of `image`."""
        return tuple(self.preprocessing.image_shape)

    @property
    def streamed(self) -> bool:
        """Whether batches before a position must be read to reach it."""
        return self.source.streamed

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of a global batch."""
        return {
            'image': ((self.batch_size, *self.image_shape), np.dtype(np.float32)),
            'labels': ((self.batch_size, self.source.max_labels), np.dtype(np.int32)),
            'weights': ((self.batch_size,), np.dtype(np.float32)),
        }

    def fingerprint(self) -> dict[str, JSON]:
        """The identity of the data, with the corpus hash and all preprocessing settings."""
        identity: dict[str, JSON] = dict(self.source.fingerprint(self.split))
        for name in ('split', 'batch_size', 'seed', 'shuffle', 'repeat'):
            identity[name] = getattr(self, name)
        settings = {
            name: list(value) if isinstance(value, tuple | list) else value
            for name, value in dataclasses.asdict(self.preprocessing).items()
        }
        return identity | {'preprocessing': {'name': type(self.preprocessing).__name__, **settings}}

    def promise(self) -> str:
        """Which determinism holds."""
        if self.source.streamed:
            return (
                f'This split ({self.split}) is streamed with seed {self.seed}: the order is the same for the same number of '
                'readers (hosts that read different rows), files and versions of TFDS and TensorFlow; a run reads it from its '
                'beginning, in an order of its first step, and a resumed run skips the examples before its position, without '
                'decoding them.'
            )
        return (
            f'Global batch b of this split ({self.split}) is a pure function of (seed {self.seed}, b), for any number of hosts '
            'and any start.'
        )

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Yields a reader's rows of global batches `start`, `start + 1`, ...; see `DataSource.batches`.

        Raises:
          UserError: the batch size is not divisible by the parts, or the data cannot be read.
        """
        rows = np.concatenate([np.arange(run.start, run.stop) for run in share.rows(self.batch_size)])
        stop = self._number_of_batches()
        numbers = itertools.count(start) if stop is None else range(start, stop)
        if not self.source.streamed:
            return _made_ahead(lambda n: self._rows(n * self.batch_size + rows), numbers)
        stream = self.source.stream(
            self.split,
            len(rows),
            start,
            shuffle=self.shuffle,
            seed=self.seed,
            repeat=self.repeat,
            index=share.index,
            count=share.count,
        )
        empty = [], np.zeros((0, self.source.max_labels), np.int32)
        return _made_ahead(lambda n: self._padded(*next(stream, empty), n * self.batch_size + rows), numbers)

    def _number_of_batches(self) -> int | None:
        """The number of batches, or None if endless."""
        size = self.source.size(self.split)
        if size < 1:
            raise UserError(f'The split {self.split!r} is empty: set DatasetConfig.split to another one.')
        if self.repeat:
            return self.num_batches
        whole = -(-size // self.batch_size)
        return whole if self.num_batches is None else min(whole, self.num_batches)

    def _rows(self, index: np.ndarray) -> Batch:
        """The batch of examples `index`, ascending, of the endless sequence, or of the padded one without `repeat`."""
        size = self.source.size(self.split)
        real = index if self.repeat else index[index < size]
        return self._padded(*self.source.read(self.split, self._places(real, size)), index)

    def _padded(self, images: Sequence[Any], labels: np.ndarray, index: np.ndarray) -> Batch:
        """The batch of examples `index`; rows beyond the images are zeros without labels."""
        batch = {name: np.zeros((len(index), *shape[1:]), dtype) for name, (shape, dtype) in self.batch_spec().items()}
        batch['labels'] -= 1
        # One run of consecutive examples at a time: a single run unless the mesh interleaves hosts.
        for rows in np.split(np.arange(len(images)), np.flatnonzero(np.diff(index[: len(images)]) > 1) + 1):
            if len(rows):
                row = slice(rows[0], rows[-1] + 1)
                batch['image'][row], good = self._preprocessed(images[row], int(index[rows[0]]))
                batch['labels'][row][good] = labels[row][good]
                batch['weights'][row] = good
        return batch

    def _preprocessed(self, images: Sequence[Any], first: int) -> tuple[np.ndarray, np.ndarray]:
        """Preprocesses consecutive images. Returns the pixels, zero for broken images, and a mask of the good ones."""
        good = np.ones(len(images), bool)
        with contextlib.suppress(BadRecordError):
            return self.preprocessing(images, self.seed, first), good
        # One by one: each result depends only on the image, the seed and its index.
        out = np.zeros((len(images), *self.image_shape), np.float32)
        for i, image in enumerate(images):
            try:
                out[i] = self.preprocessing([image], self.seed, first + i)[0]
            except BadRecordError as record:
                self._bad_records.leave_out(record)
                good[i] = False
        return out, good

    @functools.cached_property
    def _bad_records(self) -> BadRecords:
        return BadRecords(self.max_bad_records)

    def _places(self, index: np.ndarray, size: int) -> np.ndarray:
        """Indices within the split of examples of the sequence."""
        places = index % size
        if self.shuffle:
            for epoch in np.unique(index // size):
                in_epoch = index // size == epoch
                places[in_epoch] = self._order(int(epoch), size)[places[in_epoch]]
        return places

    @functools.cached_property
    def _order(self) -> Callable[[int, int], np.ndarray]:
        # A batch may span two epochs.
        return functools.lru_cache(2)(functools.partial(draws.permutation, self.seed))


def _made_ahead(make: Callable[[int], Batch], numbers: Iterable[int]) -> Iterator[Batch]:
    """Yields `make(n)` for each n, in order, prepared on a thread ahead of the caller."""
    numbers = iter(numbers)
    pool = futures.ThreadPoolExecutor(1)
    try:
        waiting = collections.deque(pool.submit(make, n) for n in itertools.islice(numbers, _AHEAD))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(make, n) for n in itertools.islice(numbers, 1))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
