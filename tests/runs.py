"""Tiny runs of the real trainer, from the real gin files, for tests."""

import functools
import os

from tests import vision
from upcycle import configuration
from upcycle.commands import train as command
from upcycle.training.run import Run

# Random tokens, because building seqio's pipelines costs more than the steps of a tiny model. Tests about text use TEXT.
TASK = 'tasks/synthetic_text.gin'
TEXT = 'tasks/stdlib_span_corruption.gin'
TINY = 'models/t5_1_1_tiny.gin'
LLM = 'models/llm_tiny.gin'
LLM_TASK = 'tasks/synthetic_tokens.gin'
LLM_TEXT = 'tasks/stdlib_bytes.gin'
SMALL_STEPS = {
    'ACTIVATION_DTYPE': 'float32',
    'BATCH_SIZE': '4',
    'NUM_EMBEDDINGS': '384',
    'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 9}",
    'EVAL_STEPS': '2',
    'EVAL_PERIOD': '3',
    'LOG_PERIOD': '3',
    'CHECKPOINT_PERIOD': '2',
    'WARMUP_STEPS': '100',
}
LLM_STEPS = SMALL_STEPS | {'SEQUENCE_LENGTH': '32'}
del LLM_STEPS['TASK_FEATURE_LENGTHS'], LLM_STEPS['NUM_EMBEDDINGS']
FILES = {
    'dense': (TINY, TASK, 'runs/pretrain.gin'),
    'scratch': (TINY, 'moe/t5.gin', TASK, 'runs/scratch.gin'),
    'continue': (TINY, TASK, 'runs/continue_dense.gin'),
    'upcycle': (TINY, 'moe/t5.gin', TASK, 'runs/upcycle.gin'),
    'text dense': (TINY, TEXT, 'runs/pretrain.gin'),
    'text upcycle': (TINY, 'moe/t5.gin', TEXT, 'runs/upcycle.gin'),
    'llm dense': (LLM, LLM_TASK, 'runs/pretrain.gin'),
    'llm continue': (LLM, LLM_TASK, 'runs/continue_dense.gin'),
    'llm scratch': (LLM, 'moe/llm.gin', LLM_TASK, 'runs/scratch.gin'),
    'llm upcycle': (LLM, 'moe/llm.gin', LLM_TASK, 'runs/upcycle.gin'),
    'llm text upcycle': (LLM, 'moe/llm.gin', LLM_TEXT, 'runs/upcycle.gin'),
    'vit dense': (vision.MODEL, vision.TASK, 'runs/pretrain.gin'),
    'vit scratch': (vision.MODEL, vision.MOE, vision.TASK, 'runs/scratch.gin'),
    'vit continue': (vision.MODEL, vision.TASK, 'runs/continue_dense.gin'),
    'vit upcycle': (vision.MODEL, vision.MOE, vision.TASK, 'runs/upcycle.gin'),
}


# One layer per stack, for tests in which the layout of sparse layers does not matter.
ONE_LAYER = {'NUM_ENCODER_LAYERS': '1', 'NUM_DECODER_LAYERS': '1'}
ONE_SPARSE_LAYER = ONE_LAYER | {'ENCODER_MOE_LAYERS': '(0,)', 'DECODER_MOE_LAYERS': '(0,)'}


def bindings(kind: str, model_dir: str | os.PathLike[str], steps: int, **more: object) -> dict[str, str]:
    """The command-line bindings of a tiny run."""
    sparse = {'NUM_EXPERTS': '4'} if kind.split()[-1] in ('scratch', 'upcycle') else {}
    small = {'vit': vision.TINY | {'CHECKPOINT_PERIOD': '2'}, 'llm': LLM_STEPS}.get(kind.split()[0], SMALL_STEPS)
    values = {**small, **sparse, 'MODEL_DIR': str(model_dir), 'TRAIN_STEPS': str(steps)}
    return values | {name: str(value) for name, value in more.items()}


def build(kind: str, model_dir: str | os.PathLike[str], steps: int, **more: object) -> Run:
    """The configured run of a kind."""
    return configuration.load(FILES[kind], bindings(kind, model_dir, steps, **more))


def train(kind: str, model_dir: str | os.PathLike[str], steps: int, **more: object):
    """Trains it, as `upcycle train` does."""
    return command.run(FILES[kind], bindings(kind, model_dir, steps, **more))


@functools.cache
def dense_checkpoint(folder: str, kind: str = 'dense') -> str:
    """The path of a dense run of four steps that keeps two checkpoints, trained once per folder."""
    path = os.path.join(folder, kind)
    train(kind, path, 4, CHECKPOINT_KEEP=2)
    return path
