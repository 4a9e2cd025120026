"""Grids: axes, their products, and the points that a config or a command line describes.

A config is a Python file with `get_config(scale) -> ml_collections.ConfigDict`:

  name      the experiment's; its folder's default is runs/NAME
  points    a list of {name, gin_files, bindings, start?, checkpoints?, settings?}; `start` names the point whose checkpoint it
            starts from, `checkpoints` the steps of it: one, or several for EXPERT_OPERATOR = 'branches'
  select?   {metric, best, among?}: which point is the best when all are finished, such as 'validation/accuracy' and 'max',
            of those whose name begins with `among`
  mean?     the points are seeds: the mean over all points, of metrics whose names begin so, is printed when they are finished
  reports?  a list of {title, groups, roles, name?, base?, curves?, claims?, finals?, numbers?}: comparisons, written when all
            points are finished, into report/NAME. A group is a seed: {branch: names of the points that make it, one after the
            other}; roles are of branches, 'upcycled' where none is said; `base` is the branch with which the others are
            compared at several budgets; curves are drawn of all branches, or of those in `curves`; `claims` are
            `report.claims.Claim`s, `finals` `report.plots.Final`s, `numbers` a `report.numbers.Numbers`
  compile?  instead of points: a list of {name, gin_files, bindings, topology}, programs to compile and not to run
  test?     bindings with which the best point is evaluated once more, such as a split that chose nothing
"""

import ast
import fnmatch
import importlib.util
import itertools
import os
import pathlib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from upcycle import gin_files
from upcycle.errors import UserError
from upcycle.sweep.points import Point

Setting = dict[str, Any]
_UNSAFE = re.compile(r'[^\w.,=+-]+')


def axis(**bindings: Sequence[Any]) -> list[Setting]:
    """Settings along one axis: `axis(TRAIN_STEPS=[5000, 10000], WARMUP_STEPS=[200, 400])` changes both together."""
    return [dict(zip(bindings, values, strict=True)) for values in zip(*bindings.values(), strict=True)]


def product(*axes: Iterable[Setting]) -> list[Setting]:
    """Every combination of one setting of each axis, the first axis slowest."""
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]


def points(
    gin_files: Sequence[str],
    bindings: Mapping[str, Any],
    settings: Iterable[Setting],
    *,
    prefix: str = '',
    start: str | None = None,
) -> list[dict[str, Any]]:
    """Points of a config, one for each setting, all else equal.

    Args:
      gin_files: of every point.
      bindings: of every point; a setting overrides them.
      settings: from `axis` or `product`.
      prefix: of the points' names.
      start: name of the point whose checkpoint they start from.
    """
    start_from = {} if start is None else {'start': start}
    return [
        {
            'name': prefix + _name(setting),
            'gin_files': list(gin_files),
            'bindings': {**bindings, **setting},
            'settings': dict(setting),
            **start_from,
        }
        for setting in settings
    ]


def parse_axis(text: str) -> list[Setting]:
    """`--grid NAME=a,b,c` as an axis. Values are Python literals, or else words.

    Raises:
      UserError: it is not of that form.
    """
    name, equals, values = text.partition('=')
    if not equals or not name or not values:
        raise UserError(f'--grid {text} is not understood: axes look like --grid NUM_EXPERTS=2,4,8.')
    try:
        parsed = list(ast.literal_eval(f'[{values}]'))
    except (ValueError, SyntaxError):
        parsed = [value.strip() for value in values.split(',')]
    if '' in parsed:
        raise UserError(f'--grid {text} holds an empty value: axes look like --grid NUM_EXPERTS=2,4,8.')
    return axis(**{name: parsed})


def parse_option(text: str) -> tuple[str, Any]:
    """`--cluster NAME=VALUE`; the value is a Python literal, or else text.

    Raises:
      UserError: it is not of that form.
    """
    name, equals, value = text.partition('=')
    if not equals or not name or not value:
        raise UserError(f'--cluster {text} is not understood: options look like --cluster slurm_partition=a100.')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def from_command_line(gin_files: Sequence[str], axes: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of `--gin_file=... --grid ...`.

    Raises:
      UserError: an axis is not understood, or two are of one binding.
    """
    parsed = [parse_axis(text) for text in axes]
    names = [name for settings in parsed for name in settings[0]]
    if len(set(names)) < len(names):
        raise UserError(
            f'--grid names {next(n for n in names if names.count(n) > 1)} twice: give all its values at once.'
        )
    return ml_collections.ConfigDict({'name': 'sweep', 'points': points(gin_files, {}, product(*parsed))})


def load(path: str, scale: str | None) -> ml_collections.ConfigDict:
    """The config of a file, looked for here and in the checkout or the installed package.

    Args:
      path: such as 'configs/finetune_imagenet.py'.
      scale: handed to `get_config`; None: its default.

    Raises:
      UserError: the file does not exist, is not a config, or has no such scale.
    """
    file = find(path)
    if file is None:
        places = ', '.join(str((pathlib.Path(folder) / path).parent) for folder in gin_files.search_paths())
        raise UserError(f'--config={path} does not exist: looked in {places}.')
    try:
        config = executed(file).get_config(**({} if scale is None else {'scale': scale}))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is code, and may do anything
        raise UserError(f'--config={path} fails: {type(error).__name__}: {error}') from error
    if 'name' not in config or not (config.get('points') or config.get('compile')):
        raise UserError(
            f'--config={path} describes no experiment: get_config must set `name`, and `points` or `compile`.'
        )
    return config


def find(path: str) -> pathlib.Path | None:
    """A file such as 'configs/operators.py': looked for here, and in the checkout or the installed package."""
    places = (pathlib.Path(folder) / path for folder in gin_files.search_paths())
    return next((place for place in places if place.is_file()), None)


def executed(file: pathlib.Path) -> types.ModuleType:
    """A Python file as a module, which is not imported by its name.

    Raises:
      UserError: it is not a Python file.
    """
    spec = importlib.util.spec_from_file_location(f'upcycle_config_{file.stem}', file)
    if spec is None:
        raise UserError(f'{file} is not a Python file.')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_of_scales(scale: str, *scales: str) -> None:
    """For a `get_config`: raises UserError unless it knows the scale."""
    if scale not in scales:
        raise UserError(f'--scale={scale} is not one of {", ".join(scales)}.')


def resolve(
    config: ml_collections.ConfigDict,
    out: str,
    gin_files: Sequence[str] = (),
    bindings: Mapping[str, str] | None = None,
) -> list[Point]:
    """The points of a config, in an order in which each comes after the one it starts from.

    Args:
      config: see the module.
      out: the sweep's folder; a point's run folder is below it.
      gin_files: put before each point's own: a model and its MoE layers.
      bindings: of the command line, for every point; they override the config's.

    Raises:
      UserError: two points have one name, or a point starts from one that does not exist.
    """
    waiting = {point['name']: point for point in config.points}
    if len(waiting) < len(config.points):
        names = [point['name'] for point in config.points]
        raise UserError(f'The grid holds {next(n for n in names if names.count(n) > 1)} twice: leave one out.')
    made: dict[str, Point] = {}
    while waiting:
        ready = [name for name, point in waiting.items() if point.get('start') is None or point['start'] in made]
        if not ready:
            name, point = next(iter(waiting.items()))
            raise UserError(f'The point {name} starts from {point["start"]}, which leads to no point without a start.')
        for name in ready:
            made[name] = _resolved(waiting.pop(name), made, out, gin_files, bindings or {})
    return list(made.values())


def _resolved(
    point: Mapping[str, Any], made: Mapping[str, Point], out: str, gin_files: Sequence[str], bindings: Mapping[str, str]
) -> Point:
    name, start = point['name'], point.get('start')
    values = {key: text_of(value) for key, value in point.get('bindings', {}).items()}
    if start is not None:
        values['INITIAL_CHECKPOINT_PATH'] = _checkpoints(made[start].model_dir, point.get('checkpoints', ()))
    return Point(
        name=name,
        gin_files=(*gin_files, *point['gin_files']),
        bindings={**values, **bindings, 'MODEL_DIR': os.path.join(out, name)},
        after=() if start is None else (start,),
        settings=point.get('settings', {}),
    )


def only(points: Sequence[Point], pattern: str) -> list[Point]:
    """The points with names like a pattern of the shell, and those that they start from.

    Raises:
      UserError: there are none.
    """
    wanted = set(fnmatch.filter((point.name for point in points), pattern))
    if not wanted:
        raise UserError(f'--only={pattern}: no run is called that; there are {points[0].name}, {points[-1].name}, ...')
    for point in reversed(points):  # each comes after those it needs
        if point.name in wanted:
            wanted |= set(point.after)
    return [point for point in points if point.name in wanted]


def _checkpoints(model_dir: str, steps: Sequence[int]) -> str:
    """Where a point starts: the newest step of a run, or those that are named."""
    if not steps:
        return model_dir
    paths = tuple(os.path.join(model_dir, 'checkpoints', str(step)) for step in steps)
    return paths[0] if len(paths) == 1 else repr(paths)


def _name(setting: Setting) -> str:
    return _UNSAFE.sub('-', ','.join(f'{name}={value}' for name, value in setting.items())).strip('-')


def text_of(value: Any) -> str:
    """A binding as the command line writes it."""
    return value if isinstance(value, str) else repr(value)
