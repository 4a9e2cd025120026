"""RandAugment (Cubuk et al. 2020) with the operations and levels of big_vision.

The operations are Pillow's. Keras's RandAugment layer is not used: it draws once per batch from a generator that counts
calls, so a batch would not be a function of (seed, index).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

DRAWS_PER_LAYER = 4

_MAX_LEVEL = 10.0
# big_vision's pixels at 224 x 224, as fractions of the side.
_TRANSLATION, _CUTOUT = 100 / 224, 40 / 224
_GREY = 128

# (image, level / 10, sign, two uniform draws) -> image; the level may be above 10.
Operation = Callable[[Image.Image, float, int, np.ndarray], Image.Image]


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    return _GREY if image.mode == 'L' else (_GREY,) * len(image.getbands())


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign, uv: enhancer(image).enhance(0.1 + 1.8 * level)


def _posterized(image: Image.Image, level: float, sign: int, uv: np.ndarray) -> Image.Image:
    return ImageOps.posterize(image, min(max(int(4 * level), 1), 8))


def _solarized(image: Image.Image, level: float, sign: int, uv: np.ndarray) -> Image.Image:
    return ImageOps.solarize(image, int(256 * level))


def _solarize_added(image: Image.Image, level: float, sign: int, uv: np.ndarray) -> Image.Image:
    added = [min(i + int(110 * level), 255) if i < 128 else i for i in range(256)]
    return image.point(added * len(image.getbands()))


def _cut_out(image: Image.Image, level: float, sign: int, uv: np.ndarray) -> Image.Image:
    half = int(_CUTOUT * level * min(image.size))
    x, y = (int(u * side) for u, side in zip(uv, image.size, strict=True))
    if half:
        image = image.copy()
        ImageDraw.Draw(image).rectangle((x - half, y - half, x + half - 1, y + half - 1), fill=_grey(image))
    return image


OPERATIONS: dict[str, Operation] = {
    'AutoContrast': lambda image, level, sign, uv: ImageOps.autocontrast(image),
    'Equalize': lambda image, level, sign, uv: ImageOps.equalize(image),
    'Invert': lambda image, level, sign, uv: ImageOps.invert(image),
    'Rotate': lambda image, level, sign, uv: image.rotate(sign * 30 * level, fillcolor=_grey(image)),
    'Posterize': _posterized,
    'Solarize': _solarized,
    'Color': _enhanced(ImageEnhance.Color),
    'Contrast': _enhanced(ImageEnhance.Contrast),
    'Brightness': _enhanced(ImageEnhance.Brightness),
    'Sharpness': _enhanced(ImageEnhance.Sharpness),
    'ShearX': lambda image, level, sign, uv: _affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    'ShearY': lambda image, level, sign, uv: _affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    'TranslateX': lambda image, level, sign, uv: _affine(
        image, 1, 0, sign * _TRANSLATION * level * image.width, 0, 1, 0
    ),
    'TranslateY': lambda image, level, sign, uv: _affine(
        image, 1, 0, 0, 0, 1, sign * _TRANSLATION * level * image.height
    ),
    'Cutout': _cut_out,
    'SolarizeAdd': _solarize_added,
}


def rand_augment(image: Image.Image, magnitude: float, draws: np.ndarray) -> Image.Image:
    """Applies one random operation per row of `draws`, in sequence.

    Args:
      image: 8-bit grey or RGB.
      magnitude: strength of every operation; 10 is full strength. 0 still changes the image: `Posterize` keeps one bit,
        `Brightness` a tenth.
      draws: uniform [layers, DRAWS_PER_LAYER].
    """
    names = list(OPERATIONS)
    for which, sign, *uv in draws:
        operation = OPERATIONS[names[int(which * len(names))]]
        image = operation(image, magnitude / _MAX_LEVEL, 1 if sign < 0.5 else -1, np.array(uv))
    return image
