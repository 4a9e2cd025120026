"""All operators and all training-time recipes, from one dense model with one budget.

A T5 with the quickstart's settings is trained on the standard library's source; every branch then spends the FLOPs of 2,000 steps
of plain upcycling. Seeds are paired: branches of one seed see the same batches in the same order. The result is one table
(report/SCALE/budgets.md: the validation loss minus that of `copy`, at 10, 25, 50 and 100% of the budget) and one report.

  upcycle sweep --config=configs/operators.py --scale=operators --out=runs/operators
  upcycle sweep --config=configs/operators.py --scale=recipes --out=runs/operators
  upcycle sweep --config=configs/operators.py --scale=to_dense --out=runs/operators

--scale=operators: the operators, the dense baselines and MoE from scratch; 23 runs per seed. --scale=recipes: the recipes on top
of `copy`; 16 runs per seed, 3 of them shared with `operators`. --scale=to_dense: the experts are merged into a dense model again,
which trains for 500 more steps, compared with 500 more steps of the dense continuation; 9 runs per seed, 4 of them shared with
`operators`. Five seeds each; a step of plain upcycling takes as long as the quickstart's (docs/quickstart.md). Scales with the
same --out share their runs. --scale=mini runs operators and recipes for 16 steps with one seed, to test the code. All scales were
run: docs/operators.md has the tables and the run times.

Equal in all branches: the dense checkpoint, the batches, and the extra FLOPs (by cost.py, so a branch with more expensive steps
takes fewer). `branches` starts from four checkpoints of the dense run; `grow` and `merge` spend half of the budget on half of the
experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from upcycle.sweep import grid
from upcycle.sweep.paper.steps import flops_of

MODEL, MOE, TASK, SETTINGS = (
    'models/t5_1_1_mini.gin',
    'moe/t5.gin',
    'tasks/stdlib_span_corruption.gin',
    'runs/quickstart.gin',
)
DENSE_STEPS, UPCYCLE_STEPS = 2000, 2000
SEEDS = {'operators': (0, 1, 2, 3, 4), 'recipes': (0, 1, 2, 3, 4), 'to_dense': (0, 1, 2, 3, 4), 'mini': (0,)}
TITLES = {'recipes': 'Training-time recipes', 'to_dense': 'Back to a dense model'}

# By branch: gin files after the settings, and bindings.
OPERATORS = {
    'copy': ((), {}),
    # Single changes that some of the other operators also make.
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
# These start from a model with half of the experts.
GROWTH = {
    'grow': ('surgery/grow.gin', {}),
    'grow, gradient': ('surgery/grow.gin', {'GROW_UTILITY': 'gradient'}),
    'merge': ('surgery/merge.gin', {}),
}
# Recipes on top of `copy`. Loss factors apply to the mean over four layers.
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
# Dense branches: run, files, bindings.
BASELINES = {
    'dense continuation': ('continue_dense', (), {}),
    # The settings of all runs have OPTIMIZER_STATE = 'tile'.
    'warm start': ('warm_start', (), {'OPTIMIZER_STATE': 'fresh_clock', 'RESTART_WARMUP_STEPS': 100}),
    'depth tiling': ('continue_dense', ('surgery/depth.gin',), {'NUM_ENCODER_LAYERS': 4, 'NUM_DECODER_LAYERS': 4}),
    'width tiling': ('continue_dense', ('surgery/width.gin',), {'EMBED_DIM': 64, 'MLP_DIM': 64, 'NUM_HEADS': 4}),
}
# Legs on the way back to a dense model: the branch that they follow, gin files, bindings, and steps.
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


class _Seed:
    """The points of one seed, and its group in the report.

    Attributes:
      points: all points.
      group: names of points by branch, in order of training.
    """

    def __init__(self, seed: int, dense_steps: int, upcycle_steps: int):
        self.points: list[dict[str, Any]] = []
        self.group: dict[str, list[str]] = {}
        self._folder, self._dense_steps, self._upcycle_steps = f'seed_{seed}', dense_steps, upcycle_steps
        # Frequent enough for an average over the last evaluations.
        periods = {'EVAL_PERIOD': max(upcycle_steps // 32, 1), 'LOG_PERIOD': max(upcycle_steps // 40, 1)}
        self._dense = {**periods, 'RANDOM_SEED': seed, 'DATA_SEED': seed}
        self._sparse = {**self._dense, 'UPCYCLE_SEED': seed, 'DIVERSITY_PERIOD': max(upcycle_steps // 8, 1)}
        self._budget = upcycle_steps * _step_flops('upcycle', (), {}, True)
        keep = {'CHECKPOINT_KEEP': None, 'CHECKPOINT_PERIOD': max(dense_steps // 8, 1)}
        self._start = self._add('dense', 'pretrain', (), {**self._dense, **keep}, dense_steps, moe=False)

    def _add(
        self,
        branch: str,
        run: str,
        files: Sequence[str],
        bindings: Mapping[str, Any],
        steps: int,
        start: str | None = None,
        checkpoints: Sequence[int] = (),
        moe: bool = True,
    ) -> str:
        """Adds a point; returns its name."""
        name = f'{self._folder}/{branch.replace(", ", "_").replace(" ", "_")}'
        point = {
            'name': name,
            'gin_files': _gin_files(run, files, moe),
            'bindings': {**bindings, 'TRAIN_STEPS': steps},
            'settings': {'branch': branch},
        }
        if start is not None:
            point['start'] = start
        if checkpoints:
            point['checkpoints'] = list(checkpoints)
        self.points.append(point)
        self.group.setdefault(branch, []).append(name)
        return name

    def upcycle(self, branch: str, files: Sequence[str], bindings: Mapping[str, Any]) -> None:
        """Adds a branch with the FLOPs of plain upcycling."""
        steps = self._dense_steps + round(self._budget / _step_flops('upcycle', files, bindings, True))
        # `branches` needs the last four of the dense run's eight checkpoints.
        several = [self._dense_steps * eighth // 8 for eighth in (5, 6, 7, 8)] if branch == 'branches' else ()
        self._add(branch, 'upcycle', files, {**self._sparse, **bindings}, steps, self._start, several)

    def baseline(self, branch: str) -> None:
        """Adds one of `BASELINES` with the FLOPs of plain upcycling."""
        run, files, bindings = BASELINES[branch]
        steps = self._dense_steps + round(self._budget / _step_flops(run, files, bindings, False))
        self._add(branch, run, files, {**self._dense, **bindings}, steps, self._start, moe=False)

    def growth(self) -> None:
        """Adds `GROWTH`, after half of the steps with half of the experts."""
        half, steps = 'half of the experts', self._dense_steps + self._upcycle_steps
        first_steps = self._dense_steps + self._upcycle_steps // 2
        first = self._add(half, 'upcycle', (), {**self._sparse, 'NUM_EXPERTS': 8}, first_steps, self._start)
        del self.group[half]
        for branch, (file, bindings) in GROWTH.items():
            self.group[branch] = [first]
            self._add(branch, 'upcycle', (file,), {**self._sparse, **bindings}, steps, first)

    def scratch(self) -> None:
        """Adds MoE from scratch, with the FLOPs of the dense run and of plain upcycling."""
        flops = self._dense_steps * _step_flops('pretrain', (), {}, False) + self._budget
        self._add('MoE from scratch', 'scratch', (), self._dense, round(flops / _step_flops('scratch', (), {}, True)))

    def legs(self) -> None:
        """Adds `LEGS`, each after the runs of an earlier branch."""
        ends = {point['name']: point['bindings']['TRAIN_STEPS'] for point in self.points}
        for branch, (start, files, bindings, steps) in LEGS.items():
            earlier = self.group.pop(start) if start == 'learned coefficients' else self.group[start]
            steps += ends[earlier[-1]]
            moe = 'recipes/merged.gin' in files
            self.group[branch] = [*earlier]
            name = self._add(branch, 'continue_dense', files, {**self._dense, **bindings}, steps, earlier[-1], moe=moe)
            ends[name] = steps


def get_config(scale: str = 'operators') -> ml_collections.ConfigDict:
    """Returns the points and the report of one of the scales."""
    grid.one_of_scales(scale, *SEEDS)
    divide = 125 if scale == 'mini' else 1
    upcycled = {
        'operators': OPERATORS,
        'recipes': {'copy': OPERATORS['copy'], **RECIPES},
        'to_dense': {branch: OPERATORS[branch] for branch in ('copy', 'shared expert')},
        'mini': OPERATORS | RECIPES,
    }[scale]
    baselines = dict.fromkeys(('recipes', 'to_dense'), ('dense continuation',)).get(scale, BASELINES)
    config = ml_collections.ConfigDict({'name': 'operators'})
    points, groups = [], []
    for number in SEEDS[scale]:
        seed = _Seed(number, DENSE_STEPS // divide, UPCYCLE_STEPS // divide)
        for branch, (files, bindings) in upcycled.items():
            seed.upcycle(branch, files, bindings)
        for branch in baselines:
            seed.baseline(branch)
        if scale in ('operators', 'mini'):
            seed.growth()
            seed.scratch()
        if scale == 'to_dense':
            seed.legs()
        points += seed.points
        groups.append(seed.group)
    config.points = points
    roles = dict.fromkeys((*BASELINES, *LEGS), 'other')
    roles |= {'dense': 'dense', 'MoE from scratch': 'MoE from scratch', 'dense continuation': 'dense continuation'}
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


def _gin_files(run: str, files: Sequence[str], moe: bool) -> list[str]:
    return [MODEL, *([MOE] if moe else []), TASK, f'runs/{run}.gin', SETTINGS, *files]


def _step_flops(run: str, files: Sequence[str], bindings: Mapping[str, Any], moe: bool) -> float:
    return flops_of(_gin_files(run, files, moe), bindings)
