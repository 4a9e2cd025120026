"""Tiny runs of image classifiers, from the real gin files, for tests."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from upcycle.commands import train
from upcycle.data import tensorflow_quiet

MODEL, MOE, TASK = 'models/vit_mini.gin', 'moe/vit.gin', 'tasks/mnist5k.gin'
SIZES = {'EMBED_DIM': '16', 'MLP_DIM': '32', 'NUM_HEADS': '2', 'NUM_LAYERS': '2'}
TINY = SIZES | {
    'BATCH_SIZE': '8',
    'EVAL_BATCH_SIZE': '64',
    'EVAL_STEPS': '2',
    'EVAL_PERIOD': '4',
    'LOG_PERIOD': '1',
    'WARMUP_STEPS': '1',
    'BASE_LEARNING_RATE': '0.01',
}


def bindings(model_dir: str | os.PathLike[str], steps: int, **more: object) -> dict[str, str]:
    """The command-line bindings of a tiny run."""
    values = {**TINY, 'MODEL_DIR': str(model_dir), 'TRAIN_STEPS': str(steps)}
    return values | {name: str(value) for name, value in more.items()}


@functools.cache
def dense_checkpoint(folder: str) -> str:
    """The path of a dense run of two steps, trained once per folder."""
    path = os.path.join(folder, 'dense_vit')
    train.run((MODEL, TASK, 'runs/pretrain.gin'), bindings(path, 2))
    return path


def store_as_tfds(name: str, splits: Sequence[str], num_classes: int, folder: str) -> None:
    """Prepares a data set with the real one's name, features and format, of 100 random images per split."""
    tfds = tensorflow_quiet.tfds()
    label = {'label': tfds.features.ClassLabel(num_classes=num_classes)}
    if name == 'imagenet21k':
        label = {'labels': tfds.features.Sequence(label['label'])}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 32, 30, 3), np.uint8)
    examples = [
        (i, {'image': image} | {feature: [i % 10] if feature == 'labels' else i % 10 for feature in label})
        for i, image in enumerate(images)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version={'imagenet2012': '5.1.0', 'cifar10': '3.0.2'}.get(name, '1.0.0'),
        features=tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(None, None, 3)), **label}),
        split_datasets=dict.fromkeys(splits, examples),
        data_dir=folder,
        file_format='array_record',
    )
