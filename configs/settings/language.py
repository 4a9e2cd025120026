"""T5 1.1 in the paper's experiments (arXiv 2212.05055, section 3).

Full: a million dense steps of 2048 sequences on C4, half a million extra. Base was trained by the authors; Large and XL are T5X's
public checkpoints. Fine-tuned on SuperGLUE. At the mini scale, both data sets are the source of the standard library.
"""

from upcycle.sweep.paper import FOUR_WAY_POD, POD, Downstream, Scale, Setting

_DEEP = {'SCAN_LAYERS': True, 'REMAT': 'full'}
# Layers per stack, pod, and further bindings.
SIZES = {'base': (12, POD, {}), 'large': (24, POD, _DEEP), 'xl': (24, FOUR_WAY_POD, _DEEP)}
PUBLIC = {size: f'gs://t5-data/pretrained_models/t5x/t5_1_1_{size}/checkpoint_1000000' for size in ('large', 'xl')}
C4 = 'tasks/c4_span_corruption.gin'
SYNTHETIC = 'tasks/synthetic_text.gin'


def get_setting(scale: Scale, size: str | None = None) -> Setting:
    """Returns the setting of T5 1.1 at one scale; the default size is Base."""
    if scale is Scale.MINI:
        return Setting(
            name='language_mini',
            model='models/t5_1_1_mini.gin',
            moe='moe/t5.gin',
            task='tasks/stdlib_span_corruption.gin',
            settings=('runs/quickstart.gin',),
            dense_steps=2000,
            extra_steps=2000,
            num_experts=16,
            num_layers=2,
            downstream=_keywords(),
        )
    size = size or 'base'
    layers, pod, deep = SIZES[size]
    full = scale is Scale.FULL
    periods = {'EVAL_PERIOD': 5000, 'CHECKPOINT_PERIOD': 5000, 'CHECKPOINT_KEEP': 2}
    return Setting(
        name=f'language_{size}',
        model=f'models/t5_1_1_{size}.gin',
        moe='moe/t5.gin',
        task=C4 if full else SYNTHETIC,
        shapes=SYNTHETIC,
        bindings={'BATCH_SIZE': 2048, **periods, **pod.bindings, **deep},
        sparse=pod.sparse,
        dense_steps=1_000_000,
        dense_checkpoint=PUBLIC.get(size) if full else None,
        extra_steps=500_000,
        topology=pod.topology,
        num_experts=32,
        num_layers=layers,
        downstream=_superglue(size, compiled=not full),
    )


def _keywords() -> Downstream:
    return Downstream(
        name='stdlib_keyword',
        task='tasks/stdlib_keyword.gin',
        run='finetune',
        bindings={
            'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 8},
            'OPTIMIZER_STATE': 'fresh',
            'TRAIN_STEPS': 1000,
            'BASE_LEARNING_RATE': 1e-2,
            'EVAL_STEPS': 8,
            'EVAL_PERIOD': 100,
            'CHECKPOINT_PERIOD': 1000,
        },
        metric='tasks/stdlib_keyword/accuracy',
        files=('runs/task_metrics.gin',),
    )


def _superglue(size: str, *, compiled: bool) -> Downstream:
    bindings = {
        'BATCH_SIZE': 128,
        'TASK_FEATURE_LENGTHS': {'inputs': 512, 'targets': 62},
        'TRAIN_STEPS': 200_000,
        'EVAL_PERIOD': 10_000,
        'CHECKPOINT_PERIOD': 10_000,
        'DROPOUT_RATE': 0.1,
    }
    large = {'BASE_LEARNING_RATE': 1e-3, 'EXPERT_DROPOUT_RATE': 0.3}
    sparse = large if size == 'large' else {'BASE_LEARNING_RATE': 1e-4}
    if compiled:
        return Downstream('superglue', SYNTHETIC, 'finetune', bindings, '', sparse=sparse)
    bindings['TASK_METRICS_PERIOD'] = 10_000
    files = ('runs/task_metrics.gin',)
    return Downstream('superglue', 'tasks/superglue.gin', 'finetune', bindings, 'tasks/average', files, sparse)
