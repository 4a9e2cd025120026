"""ViT in the paper's experiments (arXiv 2212.05055, section 3).

Full: the paper trains 14 epochs of JFT-300M, about 1.04 million steps of 4096 images (the batch size is not in the paper), and 7
more. JFT is private, so we use as many steps of ImageNet-21k. Fine-tuned on ImageNet, with one of the paper's twelve runs (all
are in configs/finetune_imagenet.py). At the mini scale, both data sets are scanned digits.

The paper's ablations have capacity factor 1. The mini scale keeps 2: at 1, a few thousand steps do not make up for the tokens
that no expert takes.
"""

from upcycle.sweep.paper import POD, Downstream, Scale, Setting, capacity

_DEEP = {'SCAN_LAYERS': True, 'REMAT': 'full'}
# Layers, and further bindings.
SIZES = {'b32': (12, {}), 'b16': (12, {}), 'l32': (24, _DEEP), 'l16': (24, _DEEP)}
SYNTHETIC = 'tasks/synthetic_images.gin'


def get_setting(scale: Scale, size: str | None = None) -> Setting:
    """Returns the setting of ViT at one scale; the default size is B/16."""
    if scale is Scale.MINI:
        return Setting(
            name='vision_mini',
            model='models/vit_mini.gin',
            moe='moe/vit.gin',
            task='tasks/mnist5k.gin',
            settings=('runs/quickstart_vision.gin', 'runs/few_shot.gin'),
            dense_steps=10_000,
            extra_steps=4000,
            cooldown_steps=1000,
            num_experts=16,
            num_layers=4,
            end_metrics=('loss', 'accuracy', 'few_shot/10shot'),
            downstream=_optdigits(),
        )
    size = size or 'b16'
    layers, deep = SIZES[size]
    full = scale is Scale.FULL
    periods = {'EVAL_PERIOD': 5000, 'CHECKPOINT_PERIOD': 5000, 'CHECKPOINT_KEEP': 2}
    return Setting(
        name=f'vision_{size}',
        model=f'models/vit_{size}.gin',
        moe='moe/vit.gin',
        task='tasks/imagenet21k.gin' if full else SYNTHETIC,
        shapes=SYNTHETIC,
        bindings={'BATCH_SIZE': 4096, **periods, **POD.bindings, **deep},
        sparse=POD.sparse,
        dense_steps=1_040_000,
        extra_steps=520_000,
        cooldown_steps=50_000,
        topology=POD.topology,
        num_experts=32,
        num_layers=layers,
        ablation=(capacity(1.0), 'cf=1'),
        # At this scale, run the 10-shot probe as a separate job (`upcycle eval`).
        downstream=_imagenet(compiled=not full),
    )


def _optdigits() -> Downstream:
    bindings = {
        'EVAL_AUGMENT_STRENGTH': 0.0,
        'OPTIMIZER_STATE': 'fresh',
        'TRAIN_STEPS': 200,
        'WARMUP_STEPS': 20,
        'BASE_LEARNING_RATE': 0.03,
        'EVAL_STEPS': 4,
        'EVAL_PERIOD': 20,
        'LOG_PERIOD': 20,
        'CHECKPOINT_PERIOD': 200,
    }
    return Downstream('optdigits', 'tasks/optdigits.gin', 'finetune_vit', bindings, 'accuracy')


def _imagenet(*, compiled: bool) -> Downstream:
    bindings = {
        'BATCH_SIZE': 512,
        'TRAIN_STEPS': 10_000,
        'WARMUP_STEPS': 400,
        'BASE_LEARNING_RATE': 0.03,
        'EVAL_PERIOD': 1000,
        'CHECKPOINT_PERIOD': 5000,
    }
    task = 'tasks/imagenet2012.gin'
    if compiled:
        task, bindings['NUM_CLASSES'] = SYNTHETIC, 1000
    return Downstream('imagenet', task, 'finetune_vit', bindings, 'accuracy')
