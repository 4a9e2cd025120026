"""Preprocesses encoded images of any size: decode, crop, resize, flip, RandAugment, scale to the value range.

Crops match vision_transformer and big_vision. Resizing is bilinear with antialiasing, which big_vision recommends for new
work; its older configs do not antialias, so published accuracies may differ in the last digit.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from PIL import Image

from upcycle.data import draws
from upcycle.data.bad_records import BadRecordError
from upcycle.data.rand_augment import DRAWS_PER_LAYER, rand_augment
from upcycle.errors import UserError
from upcycle.schema import Count, Natural, Positive, Share, Whole

_CROP_ATTEMPTS = 10
_DRAWS_PER_ATTEMPT = 4


class Encoded(NamedTuple):
    """The bytes of an image file and its name in messages."""

    name: str
    content: bytes


@functools.cache
def thread_pool() -> futures.ThreadPoolExecutor:
    """The thread pool for reading and decoding; Pillow releases the GIL."""
    return futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix='images')


def decode(encoded: Encoded, channels: int) -> Image.Image:
    """Decodes to an 8-bit image with 1 (grey) or 3 (RGB) channels.

    Raises:
      BadRecordError: Pillow cannot decode it.
      UserError: it has more than 8 bits per channel.
    """
    try:
        image = Image.open(io.BytesIO(encoded.content))
        image.load()
    except Exception as error:  # OSError, SyntaxError, zlib.error, ...: it depends on the format
        raise BadRecordError(
            f'{encoded.name} cannot be decoded ({_one_line(error, encoded)}): replace the image, remove it, or raise '
            'MAX_BAD_RECORDS.'
        ) from None
    if image.mode.startswith(('I', 'F')):
        raise UserError(f'{encoded.name} has more than 8 bits per channel (mode {image.mode}): save it with 8.')
    if 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert({1: 'L', 3: 'RGB'}[channels])


def _one_line(error: Exception, encoded: Encoded) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return 'not an image format that Pillow knows' if encoded.content else 'the file is empty'
    return ' '.join(str(error).split()) or type(error).__name__


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Preprocessing shared by training and evaluation.

    Attributes:
      image_size: height and width of the result, in pixels.
      image_channels: 3, or 1 for grey.
      value_range: values of black and white in the result.
    """

    image_size: Count = 224
    image_channels: int = 3
    value_range: tuple[float, float] = (-1.0, 1.0)

    encoded = True

    def __post_init__(self):
        if self.image_channels not in (1, 3):
            raise UserError(f'IMAGE_CHANNELS = {self.image_channels!r} must be 3, or 1 for grey.')

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.image_size, self.image_size, self.image_channels

    def __call__(self, images: Sequence[Encoded], seed: int, first: int) -> np.ndarray:
        """Decodes and preprocesses consecutive examples. Each result depends only on its bytes, the seed and its index.

        Args:
          images: encoded images.
          seed: random seed.
          first: index of the first example.

        Returns:
          float32 [n, H, W, C] within `value_range`.

        Raises:
          BadRecordError: an image cannot be decoded.
        """
        u_NxK = draws.uniform(seed, draws.AUGMENT, first, len(images), self.num_draws)
        out_NxHxWxC = np.empty((len(images), *self.image_shape), np.float32)
        low, high = self.value_range

        def fill(i: int) -> None:
            image = self.prepare(decode(images[i], self.image_channels), u_NxK[i])
            pixels = np.asarray(image).reshape(self.image_shape)
            np.multiply(pixels, np.float32((high - low) / 255), out=out_NxHxWxC[i])
            out_NxHxWxC[i] += np.float32(low)

        list(thread_pool().map(fill, range(len(images))))
        return out_NxHxWxC

    num_draws = 0
    """Number of uniform random numbers per example."""

    def prepare(self, image: Image.Image, u_K: np.ndarray) -> Image.Image:
        """Converts a decoded image to one of `image_size`, with the uniform numbers `u_K`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InceptionPreprocessing(Photographs):
    """Training preprocessing: inception crop, left-right flip, RandAugment.

    Attributes:
      area_range: smallest and largest fraction of the image area that the crop covers.
      aspect_ratio_range: smallest and largest width / height of the crop.
      flip: probability of a left-right flip.
      randaugment_layers: operations per image; 0: none. big_vision's augmentation levels (Steiner et al. 2022) are 2 layers of
        magnitude 0 (light1), 10 (light2), 15 (medium1 and 2), 20 (strong1 and 2).
      randaugment_magnitude: strength of the operations; 10 is RandAugment's full strength, larger values are allowed.
    """

    area_range: tuple[Share, Share] = (0.05, 1.0)
    aspect_ratio_range: tuple[Positive, Positive] = (0.75, 1.33)
    flip: Share = 0.5
    randaugment_layers: Whole = 0
    randaugment_magnitude: Natural = 10.0

    @property
    def num_draws(self) -> int:
        """Number of uniform random numbers per example."""
        return _CROP_ATTEMPTS * _DRAWS_PER_ATTEMPT + 1 + self.randaugment_layers * DRAWS_PER_LAYER

    def prepare(self, image: Image.Image, u_K: np.ndarray) -> Image.Image:
        """Crops, resizes, flips and augments."""
        crop, flip, layers = np.split(
            u_K, [_CROP_ATTEMPTS * _DRAWS_PER_ATTEMPT, 1 + _CROP_ATTEMPTS * _DRAWS_PER_ATTEMPT]
        )
        box = inception_crop(image.size, self.area_range, self.aspect_ratio_range, crop.reshape(-1, _DRAWS_PER_ATTEMPT))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR, box=box)
        if flip[0] < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return rand_augment(image, self.randaugment_magnitude, layers.reshape(-1, DRAWS_PER_LAYER))


@dataclasses.dataclass(frozen=True)
class CentralCropPreprocessing(Photographs):
    """Evaluation preprocessing: resize the smaller side to `resize_small`, then crop the centre.

    Attributes:
      resize_small: size of the smaller side before the crop, in pixels (256 for 224). None: resize the whole image to the
        square, as vision_transformer evaluates fine-tuned models; use it for images that are already square.
    """

    resize_small: Count | None = 256

    def __post_init__(self):
        super().__post_init__()
        if self.resize_small is not None and self.resize_small < self.image_size:
            raise UserError(
                f'RESIZE_SMALL = {self.resize_small} is below IMAGE_SIZE = {self.image_size}: raise it, so that the crop fits.'
            )

    def prepare(self, image: Image.Image, u_K: np.ndarray) -> Image.Image:
        """Resizes and crops."""
        size = self.image_size
        if self.resize_small is None:
            return image.resize((size, size), Image.Resampling.BILINEAR)
        factor = self.resize_small / min(image.size)
        width, height = (round(side * factor) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def inception_crop(
    image_size: tuple[int, int],
    area_range: Sequence[float],
    aspect_ratio_range: Sequence[float],
    attempts: np.ndarray,
) -> tuple[int, int, int, int]:
    """Draws a random box as TensorFlow's `sample_distorted_bounding_box` does without objects.

    The aspect ratio is uniform. The height is uniform over those for which the area is in range and the box fits.

    Args:
      image_size: (width, height).
      area_range: smallest and largest fraction of the image area.
      aspect_ratio_range: smallest and largest width / height.
      attempts: uniform [n, 4]; the first attempt that gives a valid box is used, or else the whole image.

    Returns:
      (left, top, right, bottom).
    """
    width, height = image_size
    least, most = (share * width * height for share in area_range)
    for u_ratio, u_height, u_top, u_left in attempts.tolist():
        ratio = aspect_ratio_range[0] + u_ratio * (aspect_ratio_range[1] - aspect_ratio_range[0])
        highest = min(round(math.sqrt(most / ratio)), int((width + 0.5 - 1e-7) / ratio), height)
        lowest = min(round(math.sqrt(least / ratio)), highest)
        h = lowest + int(u_height * (highest - lowest + 1))
        # Rounding can move the area just out of range.
        h += (round(h * ratio) * h < least) - (round(h * ratio) * h > most)
        w = round(h * ratio)
        if least <= w * h <= most and 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
