"""Grids: axes, their products, and the points of a config or a command line.

A config is a Python file with `get_config(scale) -> ml_collections.ConfigDict`:

  name      the experiment's name; its default folder is runs/NAME
  points    a list of {name, gin_files, bindings, start?, checkpoints?, settings?}. `start`: the point whose checkpoint is
            loaded; `checkpoints`: the steps to load, one, or several for EXPERT_OPERATOR = 'branches'
  select?   {metric, best, among?}: how to choose the best point when all are finished, such as 'validation/accuracy' and
            'max', from the points whose name begins with `among`
  mean?     a prefix of metric names. The points are seeds; the means of these metrics are printed when all are finished
  reports?  a list of {title, groups, roles, name?, base?, curves?, claims?, finals?, numbers?}: comparisons, written into
            report/NAME when all points are finished. `groups`: one per seed, {branch: names of its points in order of
            training}; `roles`: by branch, 'upcycled' by default; `base`: the branch that the others are compared with at
            several budgets; `curves`: the branches to draw, all by default; `claims`: fields of `report.claims.Claim`;
            `finals`: fields of `report.plots.ends.Final`; `numbers`: fields of `report.numbers.Numbers`
  compile?  instead of points: a list of {name, gin_files, bindings, topology}, programs that are compiled and not run
  test?     bindings for a final evaluation of the best point, such as the test split
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
    """Returns the settings along one axis: `axis(TRAIN_STEPS=[5000, 10000], WARMUP_STEPS=[200, 400])` changes both together."""
    return [dict(zip(bindings, values, strict=True)) for values in zip(*bindings.values(), strict=True)]


def product(*axes: Iterable[Setting]) -> list[Setting]:
    """Returns all combinations of one setting per axis; the first axis varies slowest."""
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]


def points(
    gin_files: Sequence[str],
    bindings: Mapping[str, Any],
    settings: Iterable[Setting],
    *,
    prefix: str = '',
    start: str | None = None,
) -> list[dict[str, Any]]:
    """Returns the points of a config, one per setting, that are otherwise equal.

    Args:
      gin_files: gin files of every point.
      bindings: bindings of every point; a setting overrides them.
      settings: from `axis` or `product`.
      prefix: prefix of the points' names.
      start: name of the point whose checkpoint they load.
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
    """Parses `--grid NAME=a,b,c` into an axis. Values are Python literals, or else strings.

    Raises:
      UserError: the text has another form.
    """
    name, _, values = text.partition('=')
    try:
        parsed = list(ast.literal_eval(f'[{values}]'))
    except (ValueError, SyntaxError):
        parsed = [value.strip() for value in values.split(',')]
    if not name or not parsed or '' in parsed:
        raise UserError(f'--grid {text} must look like --grid NUM_EXPERTS=2,4,8, without empty values.')
    return axis(**{name: parsed})


def parse_option(text: str) -> tuple[str, Any]:
    """Parses `--cluster NAME=VALUE`. The value is a Python literal, or else a string.

    Raises:
      UserError: the text has another form.
    """
    name, _, value = text.partition('=')
    if not name or not value:
        raise UserError(f'--cluster {text} must look like --cluster slurm_partition=a100.')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def from_command_line(gin_files: Sequence[str], axes: Sequence[str]) -> ml_collections.ConfigDict:
    """Makes the config of `--gin_file=... --grid ...`.

    Raises:
      UserError: an axis cannot be parsed, or two axes set the same binding.
    """
    parsed = [parse_axis(text) for text in axes]
    names = [name for settings in parsed for name in settings[0]]
    if len(set(names)) < len(names):
        raise UserError(
            f'--grid names {next(n for n in names if names.count(n) > 1)} twice: give all its values in one --grid.'
        )
    return ml_collections.ConfigDict({'name': 'sweep', 'points': points(gin_files, {}, product(*parsed))})


def load(path: str, scale: str | None) -> ml_collections.ConfigDict:
    """Loads a config from the working folder, the checkout or the installed package.

    Args:
      path: such as 'configs/finetune_imagenet.py'.
      scale: passed to `get_config`; None: its default.

    Raises:
      UserError: the file does not exist, is not a config, or does not know the scale.
    """
    file = find(path)
    if file is None:
        folders = ', '.join(str((pathlib.Path(folder) / path).parent) for folder in gin_files.search_paths())
        raise UserError(f'--config={path} does not exist: searched {folders}.')
    try:
        config = executed(file).get_config(**({} if scale is None else {'scale': scale}))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config is code and can raise anything
        raise UserError(f'--config={path} fails: {type(error).__name__}: {error}') from error
    if 'name' not in config or not (config.get('points') or config.get('compile')):
        raise UserError(f'--config={path} is not an experiment: get_config must set `name`, and `points` or `compile`.')
    return config


def find(path: str) -> pathlib.Path | None:
    """Finds a file such as 'configs/operators.py' in the working folder, the checkout or the installed package."""
    files = (pathlib.Path(folder) / path for folder in gin_files.search_paths())
    return next((file for file in files if file.is_file()), None)


def executed(file: pathlib.Path) -> types.ModuleType:
    """Executes a Python file; returns its module, which is not in `sys.modules`.

    Raises:
      UserError: the file is not a Python file.
    """
    spec = importlib.util.spec_from_file_location(f'upcycle_config_{file.stem}', file)
    if spec is None:
        raise UserError(f'{file} is not a Python file.')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_of_scales(scale: str, *scales: str) -> None:
    """Checks the scale in a `get_config`; raises UserError if it is unknown."""
    if scale not in scales:
        raise UserError(f'--scale={scale} is unknown: it must be one of {", ".join(scales)}.')


def resolve(
    config: ml_collections.ConfigDict,
    out: str,
    gin_files: Sequence[str] = (),
    bindings: Mapping[str, str] | None = None,
) -> list[Point]:
    """Returns the points of a config, sorted so that each comes after the point it starts from.

    Args:
      config: see the module's docstring.
      out: the sweep's folder; run folders are below it.
      gin_files: included before the gin files of each point: a model and its MoE layers.
      bindings: bindings of the command line for all points; they override the config's.

    Raises:
      UserError: two points have the same name, or a point starts from an unknown one.
    """
    waiting = {point['name']: point for point in config.points}
    if len(waiting) < len(config.points):
        names = [point['name'] for point in config.points]
        raise UserError(f'The grid holds {next(n for n in names if names.count(n) > 1)} twice: remove or rename one.')
    made: dict[str, Point] = {}
    while waiting:
        ready = [name for name, point in waiting.items() if point.get('start') is None or point['start'] in made]
        if not ready:
            name, point = next(iter(waiting.items()))
            raise UserError(f'The point {name} starts from {point["start"]}, which is unknown or part of a cycle.')
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
        settings=dict(point.get('settings', {})),
    )


def only(points: Sequence[Point], pattern: str) -> list[Point]:
    """Returns the points whose names match a shell pattern, and the points that they start from.

    Raises:
      UserError: no name matches.
    """
    wanted = set(fnmatch.filter((point.name for point in points), pattern))
    if not wanted:
        raise UserError(f'--only={pattern} matches no run: names are {points[0].name}, {points[-1].name}, ...')
    for point in reversed(points):  # sorted: each comes after the points it needs
        if point.name in wanted:
            wanted |= set(point.after)
    return [point for point in points if point.name in wanted]


def _checkpoints(model_dir: str, steps: Sequence[int]) -> str:
    """Returns INITIAL_CHECKPOINT_PATH of a point: a run folder, which means its newest step, or the named steps."""
    if not steps:
        return model_dir
    paths = tuple(os.path.join(model_dir, 'checkpoints', str(step)) for step in steps)
    return paths[0] if len(paths) == 1 else repr(paths)


def _name(setting: Setting) -> str:
    return _UNSAFE.sub('-', ','.join(f'{name}={value}' for name, value in setting.items())).strip('-')


def text_of(value: Any) -> str:
    """Formats the value of a binding for the command line."""
    return value if isinstance(value, str) else repr(value)
