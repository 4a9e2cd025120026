"""The paper's fine-tuning on SuperGLUE (arXiv 2212.05055, Figure 3): one model on all tasks, the mean of three runs.

200,000 steps of 128 sequences of 512 + 62 tokens at a constant rate with Adafactor; the score is the mean over the eight tasks
of the validation split, every 10,000 steps. Name the model and its checkpoint, dense or upcycled (with the bindings of its
upcycling), on the command line, and also the rates, which runs/finetune.gin lists:

  upcycle sweep --config=configs/finetune_superglue.py --gin_file=models/t5_1_1_base.gin --gin_file=moe/t5.gin \\
    --gin.INITIAL_CHECKPOINT_PATH=... --gin.BASE_LEARNING_RATE=1e-4 --out=runs/superglue_upcycled

At the end it prints the means of all metrics of every task and of their average, with 95% intervals. The paper does not say how
it chooses among checkpoints; the table shows the last, and metrics.jsonl has all. Expected: Base and Large, upcycled for about
half of their dense cost, end 1.5 to 2 points above their dense models. This project has not run it at that scale. It needs
`pip install upcycle[t5]` and super_glue of TFDS.
"""

import ml_collections

from upcycle.sweep import grid

SEEDS = (0, 1, 2)


def get_config(scale: str = 'full') -> ml_collections.ConfigDict:
    """Returns three points, one per seed."""
    grid.one_of_scales(scale, 'full')
    config = ml_collections.ConfigDict({'name': 'finetune_superglue'})
    same = {
        'BATCH_SIZE': 128,
        'TRAIN_STEPS': 200_000,
        'EVAL_PERIOD': 10_000,
        'CHECKPOINT_PERIOD': 10_000,
        'TASK_METRICS_PERIOD': 10_000,
    }
    seeds = grid.product(grid.axis(RANDOM_SEED=SEEDS, DATA_SEED=SEEDS))
    config.points = grid.points(['tasks/superglue.gin', 'runs/finetune.gin', 'runs/task_metrics.gin'], same, seeds)
    config.mean = 'tasks/'
    return config
