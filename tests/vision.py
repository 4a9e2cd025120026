"""Tiny runs of image classifiers, from the real gin files, for tests."""

import functools
import os

from upcycle import jobs

MODEL, MOE, TASK = 'models/vit_mini.gin', 'moe/vit.gin', 'tasks/mnist5k.gin'
TINY = {
    'EMBED_DIM': '16',
    'MLP_DIM': '32',
    'NUM_HEADS': '2',
    'NUM_LAYERS': '2',
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
    """A dense run of two steps, made once for each folder."""
    path = os.path.join(folder, 'dense_vit')
    jobs.train((MODEL, TASK, 'runs/pretrain.gin'), bindings(path, 2))
    return path
