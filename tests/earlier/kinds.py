"""Small runs whose folders a version of this package wrote, so that later versions can be tried on them.

`python -m tests.earlier.kinds FOLDER` writes FOLDER/KIND.tar.gz, which is a run folder, and FOLDER/KIND.json, which is what the
version that wrote it says of it. Keep the files of earlier versions as they are.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from tests import programs, runs, vision
from upcycle.checkpoints import Reader, open_checkpoint
from upcycle.commands import evaluate
from upcycle.commands import train as command
from upcycle.log_lines import depends_on_speed
from upcycle.metrics import read_metrics

_COMMON = {
    'BATCH_SIZE': '8',
    'EVAL_BATCH_SIZE': '8',
    'EVAL_STEPS': '2',
    'EVAL_PERIOD': '2',
    'LOG_PERIOD': '1',
    'CHECKPOINT_PERIOD': '2',
    'CHECKPOINT_KEEP': '1',
    'WARMUP_STEPS': '10',
}
_SIZES = {'EMBED_DIM': '8', 'MLP_DIM': '16', 'NUM_HEADS': '2'}
_TEXT = {
    **_COMMON,
    **_SIZES,
    **runs.ONE_LAYER,
    'BASE_LEARNING_RATE': '0.01',  # at T5's own rate rounding grows tenfold a step
    'HEAD_DIM': '4',
    'ACTIVATION_DTYPE': 'float32',
    'NUM_EMBEDDINGS': '64',
    'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}",
}
_IMAGES = {**_COMMON, **_SIZES, 'NUM_LAYERS': '2', 'BASE_LEARNING_RATE': '0.01'}
_SPARSE = {
    **_TEXT,
    'DIVERSITY_PERIOD': '2',
    'NUM_EXPERTS': '2',
    'ENCODER_MOE_LAYERS': '(0,)',
    'DECODER_MOE_LAYERS': '(0,)',
}
_T5, _VIT = runs.FILES['upcycle'], (vision.MODEL, vision.MOE, vision.TASK, 'runs/upcycle.gin')
# By kind: the kind that it starts from, if any, gin files, and bindings. Together they name every configurable of a run.
KINDS: Mapping[str, tuple[str | None, tuple[str, ...], Mapping[str, str]]] = {
    't5_dense': (None, runs.FILES['dense'], _TEXT),
    't5_continued': ('t5_dense', runs.FILES['continue'], _TEXT),
    't5_upcycled': ('t5_dense', _T5, _SPARSE),
    't5_router_state': (
        't5_dense',
        (*_T5, 'recipes/adaptive_balance.gin', 'recipes/default_output.gin', 'recipes/routers_first.gin'),
        {**_SPARSE, 'ENCODER_ROUTER': 'top_k', 'BALANCE_BIAS_RATE': '0.001', 'GROUPS_MULTIPLE_OF': '2'},
    ),
    't5_soft_and_dense': (
        't5_dense',
        (*_T5, 'recipes/soft_moe.gin', 'recipes/dense_training.gin', 'surgery/noise.gin', 'optimizers/adamw.gin'),
        {
            **_SPARSE,
            'GROUP_SIZE': '16',
            'DECODER_ROUTER': 'dense',
            'ENCODER_ROUTER': 'soft',
            'NUM_SELECTED_EXPERTS': '2',
            'OPTIMIZER_STATE': 'fresh',
        },
    ),
    't5_shared_and_granular': (
        't5_dense',
        (*_T5, 'surgery/granular.gin', 'recipes/shared_experts.gin', 'recipes/constant_minimum.gin'),
        {**_SPARSE, 'NUM_EXPERTS': '4', 'OPTIMIZER_STATE': 'fresh'},
    ),
    't5_merged': (
        't5_upcycled',
        (runs.TINY, 'optimizers/adamw.gin', 'moe/t5.gin', runs.TASK, 'runs/continue_dense.gin', 'recipes/merged.gin'),
        _SPARSE,
    ),
    'vit_dense': (None, (vision.MODEL, vision.TASK, 'runs/pretrain.gin'), _IMAGES),
    'vit_upcycled': (
        'vit_dense',
        (*_VIT, 'surgery/drop.gin', 'runs/few_shot.gin'),
        {
            **_IMAGES,
            'DIVERSITY_PERIOD': '2',
            'NUM_EXPERTS': '2',
            'ROUTER': 'top_k',
            'GATE_NOISE': '1.0',
            'OPTIMIZER_STATE': 'fresh',
        },
    ),
}


def saved(kind: str) -> int:
    """The step of a run folder; a copy of it is resumed for two more."""
    start = KINDS[kind][0]
    return 4 if start is None else saved(start) + 2


def bindings(kind: str, model_dir: str | pathlib.Path, steps: int) -> dict[str, str]:
    """Of the command that starts or resumes a kind, in the folder that holds what it starts from."""
    start, _, values = KINDS[kind]
    begin = {} if start is None else {'INITIAL_CHECKPOINT_PATH': start}
    return {**values, **begin, 'MODEL_DIR': str(model_dir), 'TRAIN_STEPS': str(steps)}


def train(kind: str, model_dir: str | pathlib.Path, steps: int) -> None:
    """`upcycle train`."""
    command.run(KINDS[kind][1], bindings(kind, model_dir, steps))


def digests(reader: Reader) -> dict[str, str]:
    """Of every leaf of a checkpoint."""
    return {name: hashlib.sha256(reader.read(name).tobytes()).hexdigest() for name in sorted(reader.leaves())}


def told(kind: str) -> dict[str, Any]:
    """What this version says of a run folder in the working directory: it is evaluated, and a copy of it is resumed.

    Returns:
      `leaves`: digests of the leaves; `evaluation`: metrics of `upcycle eval`; `lines`: of the log of the two steps after it.
    """
    leaves = digests(open_checkpoint(kind))
    evaluation = evaluate.run((), {}, kind)['metrics']
    with tempfile.TemporaryDirectory() as scratch:
        again = pathlib.Path(scratch) / 'again'
        shutil.copytree(kind, again)
        train(kind, again, saved(kind) + 2)
        lines = [_numbers(line) for line in read_metrics(again / 'metrics.jsonl') if line['step'] > saved(kind)]
    return {'leaves': leaves, 'evaluation': evaluation, 'lines': lines}


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line of the log does not depend on the machine's speed."""
    return {
        name: value
        for name, value in line.items()
        if not depends_on_speed(name) and not isinstance(value, list | str | dict) or name == 'split'
    }


def main(out: str) -> None:
    """Writes every kind."""
    folder = pathlib.Path(out).absolute()
    folder.mkdir(parents=True)
    programs.share()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for kind in KINDS:
            train(kind, kind, saved(kind))
            for events in pathlib.Path(kind).glob('*/events.*'):
                events.unlink()
            shutil.make_archive(str(folder / kind), 'gztar', '.', kind)
            (folder / f'{kind}.json').write_text(json.dumps(told(kind), indent=1) + '\n')


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main(sys.argv[1])
