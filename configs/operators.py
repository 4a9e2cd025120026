"""Every way to make experts, and every training-time recipe, from one dense model with one budget.

A T5 of the quickstart's settings is trained on the standard library's source; every branch then spends what 2,000 steps of plain
upcycling cost. Seeds are paired: branches of one seed see the same batches in the same order. Ends in one table
(report/SCALE/budgets.md: the validation loss less that of `copy`, at 10, 25, 50 and 100% of the budget), one report, its plots.

  upcycle sweep --config=configs/operators.py --scale=operators --out=runs/operators
  upcycle sweep --config=configs/operators.py --scale=recipes --out=runs/operators
  upcycle sweep --config=configs/operators.py --scale=to_dense --out=runs/operators

--scale=operators: the operators, the dense baselines and MoE from scratch, 23 runs a seed. --scale=recipes: the recipes on top
of `copy`, 16 runs a seed, of which 3 are those of `operators`. --scale=to_dense: what upcycling leaves when the experts are
merged into a dense model again, which then trains for 500 steps more, beside as many more of the dense continuation; 9 runs a
seed, 4 of them those of `operators`. Five seeds each; a step of plain upcycling takes what the quickstart's does
(docs/quickstart.md). All share the runs of one --out. --scale=mini is operators and recipes for 16 steps and one seed, and
shows that the machinery works. All were run: docs/operators.md has the tables, and what they took.

What is equal: the dense checkpoint, the batches, the extra FLOPs (by cost.py, so that a branch with dearer steps takes fewer).
`branches` takes four checkpoints of the dense run itself; `grow` and `merge` spend half of the budget on half of the experts.
"""

import functools

import ml_collections

from upcycle import configuration, cost
from upcycle.sweep import grid

MODEL, MOE, TASK, SETTINGS = (
    'models/t5_1_1_mini.gin',
    'moe/t5.gin',
    'tasks/stdlib_span_corruption.gin',
    'runs/quickstart.gin',
)
DENSE_STEPS, UPCYCLE_STEPS = 2000, 2000
SEEDS = {'operators': (0, 1, 2, 3, 4), 'recipes': (0, 1, 2, 3, 4), 'to_dense': (0, 1, 2, 3, 4), 'mini': (0,)}
TITLES = {'recipes': 'Training-time recipes', 'to_dense': 'Back to a dense model'}

# Branch: gin files after the settings, and bindings.
OPERATORS = {
    'copy': ((), {}),
    # What some of the others leave behind as well, on its own.
    'copy, fresh state': ((), {'OPTIMIZER_STATE': 'fresh'}),
    'copy, raw weights': ((), {'NORMALIZE_COMBINE_WEIGHTS': False}),
    'noise': (('surgery/noise.gin',), {}),
    'random': (('surgery/random.gin',), {}),
    'drop': (('surgery/drop.gin',), {}),
    'granular': (('surgery/granular.gin',), {}),
    'granular, nvidia': (('surgery/granular.gin',), {'GRANULAR_SCALE': 'nvidia'}),
    'partial': (('surgery/partial.gin',), {}),
    'branches': (('surgery/branches.gin',), {}),
    'shared expert': (('recipes/shared_experts.gin',), {}),
    'orthogonal router': ((), {'ROUTER_INIT': 'orthogonal'}),
    'hidden router': ((), {'ROUTER_INIT': 'hidden'}),
}
# These go on from a model with half of the experts.
GROWTH = {
    'grow': ('surgery/grow.gin', {}),
    'grow, gradient': ('surgery/grow.gin', {'GROW_UTILITY': 'gradient'}),
    'merge': ('surgery/merge.gin', {}),
}
# Recipes on top of `copy`. Factors of losses are for the mean over four layers.
RECIPES = {
    'default output': (('recipes/default_output.gin',), {}),
    'dense training': (('recipes/dense_training.gin',), {'AUX_LOSS_FACTOR': 0.0025}),
    # A group is a sequence: slots are means over it.
    'soft moe': (('recipes/soft_moe.gin',), {'GROUP_SIZE': 32, 'SLOTS_PER_EXPERT': 2}),
    'logit normalization': (('recipes/logit_normalization.gin',), {}),
    'adaptive balance': (('recipes/adaptive_balance.gin',), {'AUX_LOSS_FACTOR': 4.0}),
    'loss-free balancing': (('recipes/loss_free_balancing.gin',), {}),
    'mutual information': (('recipes/mutual_information.gin',), {'AUX_LOSS_FACTOR': 0.0025}),
    'router z-loss': (('recipes/router_z_loss.gin',), {}),
    'jitter': (('recipes/jitter.gin',), {}),
    'routers first': (('recipes/routers_first.gin',), {'TRAINABLE_STEPS': 100}),
    'moe layers only': (('recipes/moe_layers_only.gin',), {}),
    'restarted rate': (('recipes/restarted_rate.gin',), {'RESTART_WARMUP_STEPS': 100}),
    'constant minimum rate': (('recipes/constant_minimum.gin',), {}),
}
# Dense models from the dense model, and a model from nothing: run, files, bindings, role.
BASELINES = {
    'dense continuation': ('continue_dense', (), {}),
    # The settings of all runs say 'tile'.
    'warm start': ('warm_start', (), {'OPTIMIZER_STATE': 'fresh_clock', 'RESTART_WARMUP_STEPS': 100}),
    'depth tiling': ('continue_dense', ('surgery/depth.gin',), {'NUM_ENCODER_LAYERS': 4, 'NUM_DECODER_LAYERS': 4}),
    'width tiling': ('continue_dense', ('surgery/width.gin',), {'EMBED_DIM': 64, 'MLP_DIM': 64, 'NUM_HEADS': 4}),
}
# Legs on the way back to a dense model: where a leg starts, its files (with moe/ or without), bindings, and steps.
_MERGED = ('optimizers/adamw.gin', 'recipes/shared_experts.gin', 'recipes/merged.gin')
LEGS = {
    'dense continuation, more': ('dense continuation', (), {}, 500),
    'mean of copies': ('copy', ('surgery/average.gin',), {}, 500),
    'mean with shared': ('shared expert', ('surgery/average.gin',), {}, 500),
    'learned coefficients': ('shared expert', _MERGED, {}, 100),
    'mean by coefficients': (
        'learned coefficients',
        ('surgery/average.gin',),
        {'OPTIMIZER_STATE': 'fresh_clock'},
        400,
    ),
}


def get_config(scale: str = 'operators') -> ml_collections.ConfigDict:
    """Points and report of one of its scales."""
    grid.one_of_scales(scale, *SEEDS)
    divide = 125 if scale == 'mini' else 1
    dense_steps, upcycle_steps = DENSE_STEPS // divide, UPCYCLE_STEPS // divide
    # Of the budget's last third there are enough evaluations to average over.
    periods = {'EVAL_PERIOD': max(upcycle_steps // 32, 1), 'LOG_PERIOD': max(upcycle_steps // 40, 1)}
    chosen = {
        'operators': OPERATORS,
        'recipes': {'copy': OPERATORS['copy'], **RECIPES},
        'to_dense': {branch: OPERATORS[branch] for branch in ('copy', 'shared expert')},
        'mini': OPERATORS | RECIPES,
    }[scale]
    with_growth = scale in ('operators', 'mini')
    baselines = dict.fromkeys(('recipes', 'to_dense'), ('dense continuation',)).get(scale, BASELINES)
    points, groups = [], []
    for seed in SEEDS[scale]:
        same = {**periods, 'RANDOM_SEED': seed, 'DATA_SEED': seed}
        sparse = {**same, 'UPCYCLE_SEED': seed, 'DIVERSITY_PERIOD': max(upcycle_steps // 8, 1)}
        folder = f'seed_{seed}'
        group = {}

        def add(branch, run, files, bindings, steps, start=None, checkpoints=(), moe=True, folder=folder, group=group):
            """One point, and its place in the report."""
            name = f'{folder}/{branch.replace(", ", "_").replace(" ", "_")}'
            found = {
                'name': name,
                'gin_files': [MODEL, *([MOE] if moe else []), TASK, f'runs/{run}.gin', SETTINGS, *files],
                'bindings': {**bindings, 'TRAIN_STEPS': steps},
                'settings': {'branch': branch},
            }
            if start is not None:
                found |= {'start': f'{folder}/{start}'}
            if checkpoints:
                found |= {'checkpoints': list(checkpoints)}
            points.append(found)
            group.setdefault(branch, []).append(name)
            return name

        keep = {'CHECKPOINT_KEEP': None, 'CHECKPOINT_PERIOD': max(dense_steps // 8, 1)}
        add('dense', 'pretrain', (), {**same, **keep}, dense_steps, moe=False)
        budget = upcycle_steps * _step_flops('upcycle', (), {}, True)
        last_four = [dense_steps * eighth // 8 for eighth in (5, 6, 7, 8)]
        for branch, (files, bindings) in chosen.items():
            steps = round(budget / _step_flops('upcycle', files, bindings, True))
            several = last_four if branch == 'branches' else ()
            add(branch, 'upcycle', files, {**sparse, **bindings}, dense_steps + steps, 'dense', several)
        for branch in baselines:
            run, files, bindings = BASELINES[branch]
            steps = round(budget / _step_flops(run, files, bindings, False))
            add(branch, run, files, {**same, **bindings}, dense_steps + steps, 'dense', moe=False)
        if with_growth:
            few = add(
                'half of the experts',
                'upcycle',
                (),
                {**sparse, 'NUM_EXPERTS': 8},
                dense_steps + upcycle_steps // 2,
                'dense',
            )
            del group['half of the experts']
            for branch, (file, bindings) in GROWTH.items():
                start = few.removeprefix(f'{folder}/')
                add(branch, 'upcycle', (file,), {**sparse, **bindings}, dense_steps + upcycle_steps, start)
                group[branch] = [few, *group[branch]]
            scratch = _step_flops('scratch', (), {}, True)
            whole = dense_steps * _step_flops('pretrain', (), {}, False) + budget
            add('MoE from scratch', 'scratch', (), same, round(whole / scratch))
        if scale == 'to_dense':
            ends = {point['name']: point['bindings']['TRAIN_STEPS'] for point in points}
            for branch, (start, files, bindings, steps) in LEGS.items():
                earlier = group.pop(start) if start == 'learned coefficients' else group[start]
                steps += ends[earlier[-1]]
                moe = 'recipes/merged.gin' in files
                start = earlier[-1].removeprefix(f'{folder}/')
                name = add(branch, 'continue_dense', files, {**same, **bindings}, steps, start, moe=moe)
                ends[name] = steps
                group[branch] = [*earlier, name]
        groups.append(group)
    config = ml_collections.ConfigDict({'name': 'operators'})
    config.points = points
    roles = {'dense': 'dense', 'MoE from scratch': 'MoE from scratch', 'dense continuation': 'dense continuation'}
    roles |= dict.fromkeys((BASELINES.keys() | LEGS.keys()) - roles.keys(), 'other')
    config.reports = [
        {
            'name': scale,
            'title': TITLES.get(scale, 'Ways to make experts'),
            'base': 'copy' if scale != 'to_dense' else 'dense continuation, more',
            'groups': groups,
            'roles': roles,
        }
    ]
    return config


def _step_flops(run: str, files: tuple[str, ...], bindings: dict, moe: bool) -> float:
    return _cached_step_flops(
        run, files, tuple(sorted((name, grid.text_of(value)) for name, value in bindings.items())), moe
    )


@functools.cache
def _cached_step_flops(run: str, files: tuple[str, ...], bindings: tuple[tuple[str, str], ...], moe: bool) -> float:
    gin_files = [MODEL, *([MOE] if moe else []), TASK, f'runs/{run}.gin', SETTINGS, *files]
    named = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000', **dict(bindings)}
    if run not in ('pretrain', 'scratch'):
        named['INITIAL_CHECKPOINT_PATH'] = 'unused'
    built = configuration.load(gin_files, named)
    return cost.step_flops(built.model, built.train_data.batch_spec())
