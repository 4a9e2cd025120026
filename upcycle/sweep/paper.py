"""The runs that the paper's figures are made of, for the experiments of `configs/`, at three scales.

  mini      the quickstarts' models on embedded data, minutes a run on two CPU cores
  full      the paper's models, data (public where the paper's is private) and meshes
  compiled  the programs of `full`, compiled for their TPU topology and not run

A run is named by what it is and not by the figure that it is for: `language_mini/seed_0/upcycled`. Experiments that share --out
share their runs.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import configuration, cost
from upcycle.report.runs import Role
from upcycle.sweep import grid

# What the other branches of a panel are compared with at several budgets, where it is there.
_BASES = ('dense continuation', 'upcycled', 'cf=1')
NUM_CHECKPOINTS = 10  # of a dense run, evenly spaced: where branches can start


class Scale(enum.StrEnum):
    """How large an experiment is."""

    MINI = 'mini'
    COMPILED = 'compiled'
    FULL = 'full'


def scale_of(name: str) -> Scale:
    """Raises UserError unless there is such a scale."""
    grid.one_of_scales(name, *Scale)
    return Scale(name)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs of one model at one scale have in common.

    Attributes:
      name: the folder of its runs.
      model, moe, task: gin files.
      settings: gin files after that of the run.
      bindings: of every run. (Of the dense run all checkpoints are kept, `NUM_CHECKPOINTS` of them.)
      sparse: more bindings, of runs with MoE layers.
      dense_steps: of the shared dense run.
      dense_checkpoint: where branches start from instead, as many steps old; None: the dense run.
      extra_steps: of plain upcycling at a budget of 1; that of every other branch follows from equal FLOPs.
      cooldown_steps: at the end of every branch.
      topology: of the compiled scale.
      num_experts, num_layers: of plain upcycling, and of a stack of the model.
    """

    name: str
    model: str
    moe: str
    task: str
    settings: tuple[str, ...]
    bindings: Mapping[str, Any]
    sparse: Mapping[str, Any]
    dense_steps: int
    extra_steps: int
    cooldown_steps: int
    topology: str
    num_experts: int
    num_layers: int
    dense_checkpoint: str | None = None


# Pods of the paper: 64 chips of TPU v4, 256 with 4-way model parallelism for T5 XL.
_POD = {'MESH_SHAPE': (64, 1, 1)}, {'MESH_SHAPE': (2, 32, 1), 'GROUPS_MULTIPLE_OF': 64}, 'v4:4x4x4'
_XL_POD = {'MESH_SHAPE': (64, 1, 4)}, {'MESH_SHAPE': (2, 32, 4), 'GROUPS_MULTIPLE_OF': 64}, 'v4:4x8x8'
_DEEP = {'SCAN_LAYERS': True, 'REMAT': 'full'}
LANGUAGE = {'base': (12, _POD, {}), 'large': (24, _POD, _DEEP), 'xl': (24, _XL_POD, _DEEP)}
# Base was the authors' own; the larger ones were T5X's (arXiv 2212.05055, section 3).
PUBLIC = {size: f'gs://t5-data/pretrained_models/t5x/t5_1_1_{size}/checkpoint_1000000' for size in ('large', 'xl')}
VISION = {'b32': (12, _POD, {}), 'b16': (12, _POD, {}), 'l32': (24, _POD, _DEEP), 'l16': (24, _POD, _DEEP)}


def language(scale: Scale, size: str | None = None) -> Setting:
    """T5 1.1. Full: a million dense steps of 2048 sequences on C4, half a million extra (arXiv 2212.05055, section 3).
    Large and XL start from the public checkpoints."""
    if scale is Scale.MINI:
        return Setting(
            'language_mini',
            'models/t5_1_1_mini.gin',
            'moe/t5.gin',
            'tasks/stdlib_span_corruption.gin',
            ('runs/quickstart.gin',),
            {},
            {},
            dense_steps=2000,
            extra_steps=2000,
            cooldown_steps=0,
            topology='',
            num_experts=16,
            num_layers=2,
        )
    size = size or 'base'
    layers, (dense, sparse, topology), deep = LANGUAGE[size]
    task = 'tasks/c4_span_corruption.gin' if scale is Scale.FULL else 'tasks/synthetic_text.gin'
    return Setting(
        f'language_{size}',
        f'models/t5_1_1_{size}.gin',
        'moe/t5.gin',
        task,
        (),
        {'BATCH_SIZE': 2048, 'EVAL_PERIOD': 5000, 'CHECKPOINT_PERIOD': 5000, 'CHECKPOINT_KEEP': 2, **dense, **deep},
        sparse,
        dense_steps=1_000_000,
        extra_steps=500_000,
        cooldown_steps=0,
        topology=topology,
        num_experts=32,
        num_layers=layers,
        dense_checkpoint=PUBLIC.get(size) if scale is Scale.FULL else None,
    )


def vision(scale: Scale, size: str | None = None) -> Setting:
    """ViT. Full: 14 epochs of JFT-300M, about 1.04 million steps of 4096 images (the batch is not in the paper), and 7 more. JFT
    is private: as many steps of ImageNet-21k."""
    if scale is Scale.MINI:
        return Setting(
            'vision_mini',
            'models/vit_mini.gin',
            'moe/vit.gin',
            'tasks/mnist5k.gin',
            ('runs/quickstart_vision.gin', 'runs/few_shot.gin'),
            {},
            {},
            dense_steps=10_000,
            extra_steps=4000,
            cooldown_steps=1000,
            topology='',
            num_experts=16,
            num_layers=4,
        )
    size = size or 'b16'
    layers, (dense, sparse, topology), deep = VISION[size]
    task = 'tasks/imagenet21k.gin' if scale is Scale.FULL else 'tasks/synthetic_images.gin'
    return Setting(
        f'vision_{size}',
        f'models/vit_{size}.gin',
        'moe/vit.gin',
        task,
        (),
        {'BATCH_SIZE': 4096, 'EVAL_PERIOD': 5000, 'CHECKPOINT_PERIOD': 5000, 'CHECKPOINT_KEEP': 2, **dense, **deep},
        sparse,
        dense_steps=1_040_000,
        extra_steps=520_000,
        cooldown_steps=50_000,
        topology=topology,
        num_experts=32,
        num_layers=layers,
    )


@dataclasses.dataclass(frozen=True)
class Branch:
    """A run of a comparison.

    Attributes:
      run: its file of `gin/runs/`, without the suffix.
      files: gin files after the settings.
      bindings: its own.
      role: in the report.
      budget: FLOPs, as a multiple of plain upcycling's.
      with_dense: the dense run's FLOPs as well, for a run from nothing.
      start: share of the dense run after which it begins, a multiple of 1 / `NUM_CHECKPOINTS`.
      moe: whether it has MoE layers.
    """

    run: str = 'upcycle'
    files: tuple[str, ...] = ()
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    role: Role = Role.UPCYCLED
    budget: float = 1.0
    with_dense: bool = False
    start: float = 1.0
    moe: bool = True


@dataclasses.dataclass(frozen=True)
class Downstream:
    """What the models of a setting are fine-tuned on.

    Attributes:
      name: of the runs.
      task, run: gin files.
      files: gin files after the settings.
      bindings: of every run, after the setting's own; those of schedules and periods count steps of fine-tuning.
      sparse: more bindings, of models with MoE layers.
      metric: that says how good a model is, 'SPLIT/NAME' or of validation.
    """

    name: str
    task: str
    run: str
    files: tuple[str, ...]
    bindings: Mapping[str, Any]
    sparse: Mapping[str, Any]
    metric: str


def downstream(scale: Scale, setting: Setting) -> Downstream:
    """SuperGLUE for T5 and ImageNet for ViT (arXiv 2212.05055, section 3), or what stands for them on embedded data.

    Of ImageNet it is one of the paper's twelve runs; configs/finetune_imagenet.py has all.
    """
    if setting.moe == 'moe/t5.gin':
        return _superglue(scale, setting) if scale is not Scale.MINI else _keywords()
    return _imagenet(scale) if scale is not Scale.MINI else _optdigits()


def _keywords() -> Downstream:
    bindings = {
        'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 8},
        'OPTIMIZER_STATE': 'fresh',
        'TRAIN_STEPS': 1000,
        'BASE_LEARNING_RATE': 1e-2,
        'EVAL_STEPS': 8,
        'EVAL_PERIOD': 100,
        'CHECKPOINT_PERIOD': 1000,
    }
    task, files = 'tasks/stdlib_keyword.gin', ('runs/task_metrics.gin',)
    return Downstream('stdlib_keyword', task, 'finetune', files, bindings, {}, 'tasks/stdlib_keyword/accuracy')


def _superglue(scale: Scale, setting: Setting) -> Downstream:
    bindings = {
        'BATCH_SIZE': 128,
        'TASK_FEATURE_LENGTHS': {'inputs': 512, 'targets': 62},
        'TRAIN_STEPS': 200_000,
        'EVAL_PERIOD': 10_000,
        'CHECKPOINT_PERIOD': 10_000,
        'DROPOUT_RATE': 0.1,
    }
    large = setting.name.endswith('large')
    sparse = {'BASE_LEARNING_RATE': 1e-3, 'EXPERT_DROPOUT_RATE': 0.3} if large else {'BASE_LEARNING_RATE': 1e-4}
    if scale is Scale.COMPILED:
        return Downstream('superglue', setting.task, 'finetune', (), bindings, sparse, '')
    bindings['TASK_METRICS_PERIOD'] = 10_000
    task, files = 'tasks/superglue.gin', ('runs/task_metrics.gin',)
    return Downstream('superglue', task, 'finetune', files, bindings, sparse, 'tasks/average')


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
    return Downstream('optdigits', 'tasks/optdigits.gin', 'finetune_vit', (), bindings, {}, 'accuracy')


def _imagenet(scale: Scale) -> Downstream:
    bindings = {
        'BATCH_SIZE': 512,
        'TRAIN_STEPS': 10_000,
        'WARMUP_STEPS': 400,
        'BASE_LEARNING_RATE': 0.03,
        'EVAL_PERIOD': 1000,
        'CHECKPOINT_PERIOD': 5000,
    }
    task = 'tasks/imagenet2012.gin'
    if scale is Scale.COMPILED:
        task, bindings['NUM_CLASSES'] = 'tasks/synthetic_images.gin', 1000
    return Downstream('imagenet', task, 'finetune_vit', (), bindings, {}, 'accuracy')


UPCYCLED = Branch()
CONTINUATION = Branch(run='continue_dense', role=Role.DENSE_CONTINUATION, moe=False)
SCRATCH = Branch(run='scratch', role=Role.SCRATCH, with_dense=True)


def upcycled(*files: str, budget: float = 1.0, start: float = 1.0, **bindings: Any) -> Branch:
    """Plain upcycling but for these files and bindings."""
    return dataclasses.replace(UPCYCLED, files=files, bindings=bindings, budget=budget, start=start)


def continuation(*, budget: float = 1.0, start: float = 1.0) -> Branch:
    """The dense continuation, but for its budget and where it starts."""
    return dataclasses.replace(CONTINUATION, budget=budget, start=start)


def from_scratch(**bindings: Any) -> Branch:
    """MoE from scratch on the dense run's FLOPs alone."""
    return dataclasses.replace(SCRATCH, budget=0.0, bindings=bindings)


def ablation(scale: Scale) -> tuple[dict[str, float], str]:
    """Bindings of plain upcycling in the paper's vision ablations, capacity factor 1, and its label.

    The mini scale keeps 2: at 1 a few thousand steps do not make up for the tokens that no expert takes.
    """
    return ({}, 'upcycled') if scale is Scale.MINI else (capacity(1.0), 'cf=1')


def of_experts(count: int, plain: str, setting: Setting) -> str:
    """The label of plain upcycling with so many experts."""
    return plain if count == setting.num_experts else f'{plain}, E={count}'


def experts(count: int, setting: Setting) -> dict[str, int]:
    """Bindings of so many experts; none where plain upcycling has as many, so that it is the same run."""
    return {} if count == setting.num_experts else {'NUM_EXPERTS': count}


def quality(scale: Scale) -> tuple[str, ...]:
    """What plots of image classifiers' ends show; at full scale the 10-shot probe is a job of its own (`upcycle eval`)."""
    return ('loss', 'accuracy', *(('few_shot/10shot',) if scale is Scale.MINI else ()))


def capacity(factor: float) -> dict[str, float]:
    """Bindings of a capacity factor."""
    return {'TRAIN_EXPERT_CAPACITY_FACTOR': factor, 'EVAL_EXPERT_CAPACITY_FACTOR': factor}


@dataclasses.dataclass
class Panel:
    """A comparison on one model: branches from one dense run, seed by seed.

    Attributes:
      setting: of the model.
      title: of its page.
      branches: by label; a label is the name of its runs, the same in every experiment.
      curves: labels whose curves are drawn; None: all.
      seeds: in the place of the experiment's; None: those.
      downstream: every branch, and the dense run, is fine-tuned on it, and these runs are what is compared.
      claims: see `claim`.
      finals: see `final`.
      numbers: see `table`.
    """

    setting: Setting
    title: str
    branches: Mapping[str, Branch]
    curves: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    downstream: Downstream | None = None
    claims: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    numbers: dict[str, Any] | None = None

    @property
    def labels(self) -> set[str]:
        """Of what is compared: the branches, and where they are fine-tuned, the dense run too."""
        return {*self.branches, *(() if self.downstream is None else ('dense',))}

    def claim(
        self,
        text: str,
        better: str,
        worse: str,
        *,
        paper: str = '',
        metric: str = 'loss',
        at: float | None = None,
        whole: bool = False,
        per_step: bool = False,
        than: tuple[str, str] | None = None,
        within: float | None = None,
    ) -> None:
        """A statement of the paper that these runs can contradict.

        Args:
          text: in words.
          better, worse: labels; the first has the better metric.
          paper: its numbers, where they exist.
          metric: 'loss' (lower is better), or one of which more is better, such as 'accuracy'.
          at: the cost of both at which they are compared, as a share of the dense run's; 0: before training. None: where the
            shorter ends.
          whole: a run from nothing spends the dense run's cost first, uncounted, as a branch has.
          per_step: compared are equal steps and not equal cost.
          than: two more labels; the statement is of the difference between the first two less theirs.
          within: the statement is that there is no difference as large as this.
        """
        missing = {better, worse, *(than or ())} - self.labels
        assert not missing, missing
        claim = {
            'text': text,
            'better': better,
            'worse': worse,
            'paper': paper,
            'metric': metric,
            'at': at,
            'whole': whole,
            'per_step': per_step,
            'than': than,
            'within': within,
        }
        self.claims.append(claim)

    def final(
        self,
        xlabel: str,
        series: Mapping[str, Mapping[float, str]],
        *,
        log: bool = False,
        metrics: Sequence[str] = ('loss', 'accuracy'),
        at_start: bool = False,
    ) -> None:
        """A plot of where runs end (or begin) against what distinguishes them.

        Args:
          xlabel: what that is.
          series: name: {value: label}.
          log: the axis counts doublings.
          metrics: a panel each.
          at_start: the first evaluation instead of the last.
        """
        missing = {label for points in series.values() for label in points.values()} - self.labels
        assert not missing, missing
        rows = {name: [[x, label] for x, label in points.items()] for name, points in series.items()}
        self.finals.append(
            {'xlabel': xlabel, 'series': rows, 'log': log, 'metrics': list(metrics), 'at_start': at_start}
        )

    def table(self, rows: Mapping[str, Sequence[float]], metrics: Sequence[str]) -> None:
        """The paper's table, to be shown beside where these runs end.

        Args:
          rows: label: the paper's numbers, in per cent, one for each metric.
          metrics: of a run's end.
        """
        missing = rows.keys() - self.branches.keys()
        assert not missing, missing
        self.numbers = {'metrics': list(metrics), 'rows': [[label, list(values)] for label, values in rows.items()]}


def experiment(name: str, scale: Scale | str, panels: Sequence[Panel], seeds: Iterable[int] = (0, 1, 2)) -> Any:
    """The config of an experiment.

    Args:
      name: of its folder.
      scale: 'compiled' gives programs to compile, the others runs and what is reported of them.
      panels: its comparisons.
      seeds: of initialisation, data order and surgery; paired. Only the first is compiled.
    """
    config = ml_collections.ConfigDict({'name': name})
    if scale == Scale.COMPILED:
        config.compile = _programs(panels)
        return config
    points: dict[str, dict[str, Any]] = {}
    config.reports = []
    for number, panel in enumerate(panels):
        groups = []
        for seed in seeds if panel.seeds is None else panel.seeds:
            made = _points(panel, seed)
            points |= {point['name']: point for point in made.values()}
            if panel.downstream is not None:
                made = _fine_tuned(panel, made)
                points |= {point['name']: point for point in made.values()}
            groups.append({label: [point['name']] for label, point in made.items()})
        dense = Role.DENSE if panel.downstream is None else Role.OTHER
        roles = {label: branch.role.value for label, branch in panel.branches.items()} | {'dense': dense.value}
        config.reports.append(
            {
                # Experiments share --out.
                'name': name if len(panels) == 1 else f'{name}/{number + 1}_{panel.setting.name}',
                'title': panel.title,
                'groups': groups,
                'roles': roles,
                'curves': None if panel.curves is None else ['dense', *panel.curves],
                'base': next((label for label in _BASES if label in panel.branches), None),
                'claims': panel.claims,
                'finals': panel.finals,
                'numbers': panel.numbers,
            }
        )
    config.points = list(points.values())
    return config


def _points(panel: Panel, seed: int) -> dict[str, dict[str, Any]]:
    """The dense run and its branches, by label, of one seed."""
    setting = panel.setting
    folder = f'{setting.name}/seed_{seed}'
    dense_period = setting.dense_steps // NUM_CHECKPOINTS
    same = {**setting.bindings, 'RANDOM_SEED': seed, 'DATA_SEED': seed}
    dense = {
        'name': f'{folder}/dense',
        'gin_files': _files(setting, 'pretrain', (), moe=False),
        'bindings': {
            **same,
            'TRAIN_STEPS': setting.dense_steps,
            'CHECKPOINT_PERIOD': dense_period,
            'CHECKPOINT_KEEP': None,
        },
        'settings': {'branch': 'dense'},
    }
    made = {'dense': dense} if setting.dense_checkpoint is None else {}
    for label, branch in panel.branches.items():
        steps, start = _steps(setting, branch)
        bindings = {**same, **(setting.sparse if branch.moe else {}), **branch.bindings, 'TRAIN_STEPS': steps + start}
        if setting.cooldown_steps:
            bindings['COOLDOWN_STEPS'] = min(setting.cooldown_steps, steps // 2)
        if branch.run == 'upcycle':
            bindings['UPCYCLE_SEED'] = seed
        point = {
            'name': f'{folder}/{_slug(label)}',
            'gin_files': _files(setting, branch.run, branch.files, moe=branch.moe),
            'bindings': bindings,
            'settings': {'branch': label},
        }
        if branch.run != 'scratch' and setting.dense_checkpoint is not None:
            assert start == setting.dense_steps, f'{label} starts where {setting.dense_checkpoint} is not'
            bindings['INITIAL_CHECKPOINT_PATH'] = setting.dense_checkpoint
            bindings['DENSE_FLOPS'] = setting.dense_steps * _step_flops(setting, CONTINUATION)
        elif branch.run != 'scratch':
            point['start'] = dense['name']
            if start != setting.dense_steps:
                point['checkpoints'] = [start]
        made[label] = point
    return made


def _fine_tuned(panel: Panel, made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fine-tuning of every run of one seed, by label."""
    setting, downstream = panel.setting, panel.downstream
    points = {}
    for label, point in made.items():
        moe = label in panel.branches and panel.branches[label].moe
        seeds = {name: point['bindings'][name] for name in ('RANDOM_SEED', 'DATA_SEED')}
        architecture = {**setting.sparse, **panel.branches[label].bindings} if moe else {}
        points[label] = {
            'name': f'{point["name"]}_on_{downstream.name}',
            'gin_files': _tuning_files(setting, downstream, moe=moe),
            'bindings': {
                **setting.bindings,
                **seeds,
                **architecture,
                **downstream.bindings,
                **(downstream.sparse if moe else {}),
            },
            'settings': {'branch': label},
            'start': point['name'],
        }
    return points


def _tuning_files(setting: Setting, downstream: Downstream, *, moe: bool) -> list[str]:
    at = dataclasses.replace(setting, task=downstream.task)
    return _files(at, downstream.run, downstream.files, moe=moe)


def _steps(setting: Setting, branch: Branch) -> tuple[int, int]:
    """Steps of a branch, and the one it starts at."""
    plain, own, dense = (_step_flops(setting, b) for b in (UPCYCLED, branch, CONTINUATION))
    budget = branch.budget * setting.extra_steps * plain
    if branch.with_dense:
        budget += setting.dense_steps * dense
    checkpoints = branch.start * NUM_CHECKPOINTS
    assert abs(checkpoints - round(checkpoints)) < 1e-6, (
        f'there is no checkpoint at {branch.start:.0%} of the dense run'
    )
    start = 0 if branch.run == 'scratch' else round(checkpoints) * (setting.dense_steps // NUM_CHECKPOINTS)
    return max(round(budget / own), 1), start


def _step_flops(setting: Setting, branch: Branch) -> float:
    task = {'tasks/c4_span_corruption.gin': 'text', 'tasks/imagenet21k.gin': 'images'}.get(setting.task)
    if task is not None:  # the same shapes, without the data
        setting = dataclasses.replace(setting, task=f'tasks/synthetic_{task}.gin')
    bindings = {**setting.bindings, **(setting.sparse if branch.moe else {}), **branch.bindings}
    files = _files(setting, branch.run, branch.files, moe=branch.moe)
    return _cached_step_flops(tuple(files), tuple(sorted((k, grid.text_of(v)) for k, v in bindings.items())))


@functools.cache
def _cached_step_flops(files: tuple[str, ...], bindings: tuple[tuple[str, str], ...]) -> float:
    named = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000', **dict(bindings)}
    if not {'runs/pretrain.gin', 'runs/scratch.gin'} & set(files):
        named['INITIAL_CHECKPOINT_PATH'] = 'unused'
    run = configuration.load(files, named)
    return cost.step_flops(run.model, run.train_data.batch_spec())


def _files(setting: Setting, run: str, files: Sequence[str], *, moe: bool) -> list[str]:
    return [
        setting.model,
        *([setting.moe] if moe else []),
        setting.task,
        f'runs/{run}.gin',
        *setting.settings,
        *files,
    ]


# What a step does not depend on.
_NOT_OF_THE_PROGRAM = {
    'EVAL_PERIOD',
    'CHECKPOINT_PERIOD',
    'CHECKPOINT_KEEP',
    'OPTIMIZER_STATE',
    'EXPERT_OPERATOR',
    'RANDOM_COPIED',
    'NOISE_STDDEV',
    'NOISE_FRACTION',
    'STEP_0_CAPACITY_FACTORS',
    'EVAL_EXPERT_CAPACITY_FACTOR',
}


def _programs(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The different programs of an experiment, one of each: a branch's step does not depend on where it started."""
    programs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for panel in panels:
        setting, tuning = panel.setting, panel.downstream
        dense = {'dense': dataclasses.replace(CONTINUATION, run='pretrain')}
        for label, branch in {**dense, **panel.branches}.items():
            bindings = {**setting.bindings, **(setting.sparse if branch.moe else {}), **branch.bindings}
            if tuning is None:
                name = f'{setting.name}/{_slug(label)}'
                files = [file for file in branch.files if not file.startswith('surgery/')]
                made = _files(setting, 'scratch' if branch.moe else 'pretrain', files, moe=branch.moe)
                steps = setting.dense_steps if label == 'dense' else _steps(setting, branch)[0]
                bindings['TRAIN_STEPS'] = steps
            else:
                name = f'{setting.name}/{_slug(label)}_on_{tuning.name}'
                made = _tuning_files(setting, tuning, moe=branch.moe)
                bindings |= {**tuning.bindings, **(tuning.sparse if branch.moe else {})}
                bindings['INITIAL_CHECKPOINT_PATH'] = 'unused'
            bindings = {k: v for k, v in bindings.items() if k not in _NOT_OF_THE_PROGRAM}
            different = {k: grid.text_of(v) for k, v in bindings.items() if k != 'TRAIN_STEPS'}
            key = (tuple(made), tuple(sorted(different.items())))
            program = {'name': name, 'gin_files': made, 'bindings': bindings, 'topology': setting.topology}
            programs.setdefault(key, program)
    return list(programs.values())


def _slug(label: str) -> str:
    return re.sub(r'[^\w.=-]+', '_', label)
