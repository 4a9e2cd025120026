"""Decoding, cropping and augmenting, compared with TensorFlow's operations if they are the reference."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from upcycle.data import draws, rand_augment, tensorflow_quiet
from upcycle.data.photographs import (
    CentralCropPreprocessing,
    Encoded,
    InceptionPreprocessing,
    Photographs,
    decode,
    inception_crop,
)
from upcycle.errors import UserError


def picture(width=61, height=47, mode='RGB', seed=0):
    """A smooth image without repetition."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Encoded(f'photo.{kind.lower()}', file.getvalue())


def test_central_crop_is_tensorflows():
    tf = tensorflow_quiet.tensorflow()
    preprocessing = CentralCropPreprocessing(image_size=28, resize_small=32)
    for size in ((61, 47), (40, 100), (32, 32)):
        image = picture(*size)
        ours = preprocessing([encoded(image)], 0, 0)[0]
        factor = 32 / min(size)
        height, width = round(size[1] * factor), round(size[0] * factor)
        theirs = tf.image.resize(np.asarray(image), (height, width), antialias=True)
        theirs = tf.image.crop_to_bounding_box(theirs, (height - 28) // 2, (width - 28) // 2, 28, 28)
        np.testing.assert_allclose((ours + 1) * 127.5, theirs, atol=1.5)  # Pillow rounds to bytes, twice


def test_a_whole_image_is_squeezed():
    image = picture(20, 40)
    ours = CentralCropPreprocessing(image_size=10, resize_small=None)([encoded(image)], 0, 0)[0]
    theirs = tensorflow_quiet.tensorflow().image.resize(np.asarray(image), (10, 10), antialias=True)
    np.testing.assert_allclose((ours + 1) * 127.5, theirs, atol=1.5)
    same = CentralCropPreprocessing(image_size=10, resize_small=None)([encoded(picture(10, 10))], 0, 0)[0]
    np.testing.assert_allclose(same, np.asarray(picture(10, 10)) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize('size', [(200, 150), (90, 300)])
def test_inception_crops_are_distributed_as_tensorflows(size):
    tf = tensorflow_quiet.tensorflow()
    width, height = size
    n = 1500
    u = draws.uniform(0, draws.AUGMENT, 0, n, 40).reshape(n, 10, 4)
    boxes = np.array([inception_crop(size, (0.05, 1.0), (0.75, 1.33), attempts) for attempts in u])
    left, top, right, bottom = boxes.T
    ours = np.stack([top, left, bottom - top, right - left])
    assert (ours >= 0).all() and right.max() <= width and bottom.max() <= height
    assert (0.05 * width * height <= ours[2] * ours[3]).all()

    @tf.function
    def sample(seed):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            (height, width, 3),
            tf.zeros([0, 0, 4]),
            seed=(seed, 0),
            area_range=(0.05, 1.0),
            aspect_ratio_range=(0.75, 1.33),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.stack([begin[0], begin[1], extent[0], extent[1]])

    theirs = tf.map_fn(sample, tf.range(n)).numpy().T
    spread = theirs.std(axis=1)
    # Means of 1500 draws each; five standard errors.
    assert (np.abs(ours.mean(axis=1) - theirs.mean(axis=1)) < 5 * spread * (2 / n) ** 0.5).all()
    np.testing.assert_allclose(ours.std(axis=1), spread, rtol=0.1)


def test_a_box_that_cannot_be_had_is_the_whole_image():
    attempts = draws.uniform(0, 1, 0, 1, 40).reshape(10, 4)
    assert inception_crop((200, 2), (0.9, 1.0), (0.75, 1.33), attempts) == (0, 0, 200, 2)


def test_examples_are_a_function_of_seed_and_index():
    preprocessing = InceptionPreprocessing(image_size=16, randaugment_layers=2)
    images = [encoded(picture(seed=i)) for i in range(9)]
    whole = preprocessing(images, 3, 100)
    assert whole.shape == (9, 16, 16, 3) and whole.dtype == np.float32
    assert whole.min() >= -1 and whole.max() <= 1
    np.testing.assert_array_equal(preprocessing(images[4:6], 3, 104), whole[4:6])
    assert all((one != other).any() for one, other in zip(preprocessing(images, 3, 109), whole, strict=True))
    assert (preprocessing(images, 4, 100) != whole).any()


def test_flip_and_grey_and_value_range():
    def pixels(**settings):
        return InceptionPreprocessing(image_size=16, **settings)([encoded(picture())], 0, 0)[0]

    np.testing.assert_array_equal(pixels(flip=1.0), pixels(flip=0.0)[:, ::-1])
    grey = pixels(image_channels=1, value_range=(0, 255), flip=0.0)
    assert grey.shape == (16, 16, 1)
    colour = (pixels(flip=0.0) + 1) * 127.5
    np.testing.assert_allclose(grey[..., 0], colour @ [0.299, 0.587, 0.114], atol=1.6)
    with pytest.raises(UserError, match='IMAGE_CHANNELS = 2'):
        Photographs(image_channels=2)
    with pytest.raises(UserError, match='RESIZE_SMALL = 200 is below IMAGE_SIZE = 224'):
        CentralCropPreprocessing(resize_small=200)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', list(rand_augment.OPERATIONS))
def test_every_operation_of_randaugment(name, mode):
    operation = rand_augment.OPERATIONS[name]
    image = picture(mode=mode).point(lambda value: 60 + value // 2)
    results = {}
    for level in (0.0, 0.4, 1.0, 2.0):
        results[level] = operation(image, level, 1, np.array([0.5, 0.5]))
        assert results[level].size == image.size and results[level].mode == mode
    if mode == 'RGB' or name != 'Color':
        assert results[0.4].tobytes() != image.tobytes()
    signed = name.startswith(('Rotate', 'Shear', 'Translate'))
    assert (operation(image, 0.4, -1, np.array([0.5, 0.5])).tobytes() != results[0.4].tobytes()) == signed
    # At level 0 these change nothing.
    if signed or name in ('Cutout', 'SolarizeAdd'):
        assert results[0.0].tobytes() == image.tobytes()


def test_operations_have_big_visions_levels():
    """Values of the TensorFlow implementation at 224 x 224 and magnitude 10."""
    x = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)

    def result(name, level=1.0, uv=(0.5, 0.5)):
        return np.asarray(rand_augment.OPERATIONS[name](Image.fromarray(x), level, 1, np.array(uv))).astype(int)

    wide = x.astype(int)
    np.testing.assert_array_equal(result('Invert'), 255 - wide)
    np.testing.assert_array_equal(result('Posterize'), wide // 16 * 16)
    np.testing.assert_array_equal(result('Solarize', 0.5), np.where(wide < 128, wide, 255 - wide))
    np.testing.assert_array_equal(result('SolarizeAdd'), np.where(wide < 128, np.minimum(wide + 110, 255), wide))
    np.testing.assert_allclose(result('Brightness'), np.minimum(1.9 * wide, 255), atol=1)
    moved = result('TranslateX')
    np.testing.assert_array_equal(moved[:, :124], wide[:, 100:])
    assert (moved[:, 124:] == 128).all()
    cut = result('Cutout')
    assert (cut[72:152, 72:152] == 128).all()
    cut[72:152, 72:152] = wide[72:152, 72:152]
    np.testing.assert_array_equal(cut, wide)


def test_randaugment_chooses_all_operations_alike(monkeypatch):
    chosen = []
    operations = {
        name: lambda i, level, sign, uv, name=name: chosen.append((name, sign)) or i for name in rand_augment.OPERATIONS
    }
    original, rand_augment.OPERATIONS = rand_augment.OPERATIONS, operations
    try:
        rand_augment.rand_augment(picture(), 10, draws.uniform(0, 1, 0, 1600, rand_augment.DRAWS_PER_LAYER))
    finally:
        rand_augment.OPERATIONS = original
    counts = [sum(name == wanted for name, _ in chosen) for wanted in operations]
    assert len(chosen) == 1600 and min(counts) > 60 and max(counts) < 140
    assert 700 < sum(sign == 1 for _, sign in chosen) < 900


def test_images_that_cannot_be_decoded():
    jpeg = encoded(picture(), 'JPEG')
    for content, reason in (
        (b'', 'the file is empty'),
        (b'not an image', 'not an image format that Pillow knows'),
        (jpeg.content[:-200], 'truncated'),
    ):
        with pytest.raises(
            UserError, match=rf'broken\.jpg cannot be decoded \(.*{reason}.*\): replace the image'
        ) as error:
            CentralCropPreprocessing()([jpeg, Encoded('broken.jpg', content)], 0, 0)
        assert '\n' not in str(error.value)
    deep = Image.fromarray(np.full((9, 9), 40000, np.uint16))
    with pytest.raises(UserError, match=r'photo\.png has more than 8 bits per channel'):
        decode(encoded(deep), 3)


def test_palettes_and_transparency_are_decoded_quietly():
    palette = picture().quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = decode(encoded(palette, transparency=bytes(range(16))), 3)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(palette.convert('RGB')))
