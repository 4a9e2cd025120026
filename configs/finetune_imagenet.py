"""The paper's fine-tuning on ImageNet-2012 (arXiv 2212.05055): twelve runs; the best on a validation split is reported.

5,000 steps with 200 of warm-up, or 10,000 with 400; learning rates 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003; SGD, batch 512, cosine.
Name the model and its checkpoint, dense or upcycled (with the bindings of its upcycling), on the command line:

  upcycle sweep --config=configs/finetune_imagenet.py --gin_file=models/vit_b16.gin --gin_file=moe/vit.gin \\
    --gin.INITIAL_CHECKPOINT_PATH=... --out=runs/finetune_upcycled

The paper does not name its validation split; here it is the last hundredth of the training images, as in big_vision, and the
best run is evaluated once on the official validation images. Twelve runs of ViT-B/16 are 90,000 steps of 512 images, about 36
epochs. Expected: an upcycled model ends above its dense continuation (Figure 3; the paper gives no numbers). This project has not
run it at that scale.

--scale=mini needs no checkpoint: it pretrains a ViT Mini on the embedded scans, upcycles it, and fine-tunes it twelve times for a
hundredth of the steps, on two CPU cores. It tests the code; its results say nothing about ImageNet.
"""

import ml_collections

from upcycle.sweep import grid

RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)


def get_config(scale: str = 'full') -> ml_collections.ConfigDict:
    """Returns the twelve points; at scale 'mini', also the dense and the upcycled run that they start from."""
    grid.one_of_scales(scale, 'full', 'mini')
    config = ml_collections.ConfigDict({'name': 'finetune_imagenet'})
    divide = {'full': 1, 'mini': 100}[scale]
    steps = [steps // divide for steps in (5000, 10_000)]
    warmup = [steps // divide for steps in (200, 400)]
    runs = grid.product(
        grid.axis(TRAIN_STEPS=steps, WARMUP_STEPS=warmup),
        grid.axis(BASE_LEARNING_RATE=RATES),
    )
    if scale == 'full':
        files = ['tasks/imagenet2012.gin', 'runs/finetune_vit.gin']
        held_out = {'EVAL_SPLIT': 'train[99%:]', 'EVAL_STEPS': None}
        config.points = grid.points(files, held_out, runs)
        config.test = {'EVAL_SPLIT': 'validation'}
    else:
        model, moe, task = 'models/vit_mini.gin', 'moe/vit.gin', 'tasks/mnist5k.gin'
        small = {'BATCH_SIZE': 64, 'EVAL_BATCH_SIZE': 200, 'EVAL_STEPS': None, 'EVAL_PERIOD': 1000, 'LOG_PERIOD': 10}
        small['AUGMENT_STRENGTH'] = 0.0  # distorted scans would take thousands of steps to learn
        dense = {**small, 'TRAIN_STEPS': 400, 'WARMUP_STEPS': 50, 'BASE_LEARNING_RATE': 1e-3}
        few = {'NUM_EXPERTS': 8}
        config.points = [
            {'name': 'dense', 'gin_files': [model, task, 'runs/pretrain.gin'], 'bindings': dense},
            {
                'name': 'upcycled',
                'gin_files': [model, moe, task, 'runs/upcycle.gin'],
                'bindings': {**dense, **few, 'TRAIN_STEPS': 500},
                'start': 'dense',
            },
            *grid.points(
                [model, moe, task, 'runs/finetune_vit.gin'],
                {**small, **few},
                runs,
                prefix='finetune/',
                start='upcycled',
            ),
        ]
    config.select = {'metric': 'validation/accuracy', 'best': 'max', 'among': '' if scale == 'full' else 'finetune/'}
    return config
