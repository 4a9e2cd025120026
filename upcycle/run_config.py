"""The `config.gin` of a run's folder: its bindings, and whether a run may resume there."""

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from upcycle import aliases, files, gin_data, schema
from upcycle.building import Builder
from upcycle.configuration import resolved
from upcycle.errors import UserError, refuse
from upcycle.evaluate.few_shot import FewShot
from upcycle.evaluate.tasks import TaskMetrics
from upcycle.gin_values import ROOT, full_name, reachable, show
from upcycle.moe.config import MoEConfig, settings
from upcycle.moe.conventions import RouterType
from upcycle.moe.routers import ROUTERS
from upcycle.training.health import Limits
from upcycle.training.run import Run
from upcycle.warning import warn

# Bindings of `Run` that may differ between a run and its resumption: paths, intervals, length, compilation.
MAY_CHANGE = (
    'model_dir',
    'total_steps',
    'few_shot',
    'task_metrics',
    'eval_period',
    'diversity_period',
    'checkpoint_period',
    'checkpoint_keep',
    'log_period',
    'metric_writers',
    'limits',
    'leaf_gradient_norms',
    'mesh_shape',
    'parameters_over_data',
)
# Bindings of a model that may differ, too.
COMPILED = ('remat', 'scan_layers')
CONFIG = 'config.gin'
# The line of a `config.gin` above the defaults of parameters that were not bound.
_DEFAULTS = '# Defaults when the run began. A resumed run keeps them, even if a later version has other defaults.'
_LISTED = 5


def as_it_began(run: Run) -> Run:
    """Returns the run that was loaded last; if its folder holds a run already, with the defaults that that run began with.

    A parameter that is not bound now was not bound then, or `claim` refuses the run: so it had the stored default.

    Raises:
      UserError: the folder's `config.gin` cannot be read, or its defaults are invalid.
    """
    path = files.absolute(run.model_dir) / CONFIG
    began_with, now, bound = _read_config(path).defaults, defaults_of_now(), resolved()
    if all(name in bound or schema.same(value, now.get(name, value)) for name, value in began_with.items()):
        return run
    taken: dict[str, str] = {}
    # The new bindings may refer to configurables with parameters of their own.
    while new := {name: began_with[name] for name in not_bound() if name in began_with and name not in taken}:
        gin_data.bind(as_gin(new), f'{path}')
        taken |= new
    builder = Builder(Run)
    run = builder.make((), Run)
    refuse(builder.mistakes)
    return run


def claim(run: Run, bindings: Mapping[str, str], *, write: bool = True) -> None:
    """Writes the `config.gin` of a run to its folder, unless the folder holds another run.

    Also warns of settings that keep the default that the run began with although this version has another one, and of settings
    that take this version's default because the folder does not hold their value.

    Args:
      run: the run.
      bindings: `resolved()` after the run was loaded by `as_it_began`.
      write: False: only check.

    Raises:
      UserError: the folder holds a run with other bindings; the message names the first one that differs.
    """
    model_dir = run.model_dir
    # With a cooldown, a run with another last step is another run.
    fixed = ('total_steps',) if run.learning_rate.falls_towards_the_end else ()
    folder = files.absolute(model_dir)
    path = folder / CONFIG
    # Checked before config.gin is read: another process may start a run meanwhile, which writes config.gin first.
    has_checkpoints = (folder / 'checkpoints').is_dir()
    old = _read_config(path)
    default = defaults_of_now()
    if old.bound:
        # From the run down, so that a choice is named before its settings.
        for name in [*bindings, *sorted(old.bound.keys() - bindings)]:
            if _may_change(name) and name.rsplit('.', 1)[1] not in fixed:
                continue
            if _is_ignored(name, bindings):
                continue
            was, now = (bound.get(name, default.get(name) or default_of(name)) for bound in (old.all, bindings))
            if was != now and (was is None or now is None or not schema.same(was, now)):
                raise UserError(
                    f'MODEL_DIR = {model_dir!r} holds another run, in which {name} is {was or "not set"} and not '
                    f'{now or "unset"}: name another MODEL_DIR, or undo the change.'
                )
    elif has_checkpoints:
        state = 'an invalid config.gin' if path.exists() else 'no config.gin'
        raise UserError(
            f'MODEL_DIR = {model_dir!r} holds checkpoints but {state}: restore that file, or name another MODEL_DIR.'
        )
    if write:
        if old.bound:
            _warn_of_defaults(run.model_dir, old, bindings, default)
        folder.mkdir(parents=True, exist_ok=True)
        unchanged = {name: old.defaults[name] for name in old.defaults.keys() & bindings if name not in old.bound}
        unchanged = {name: value for name, value in unchanged.items() if schema.same(value, bindings[name])}
        bound = {name: value for name, value in bindings.items() if name not in unchanged}
        new = {name: value for name, value in default.items() if name not in bindings and can_be_written(value)}
        files.replace_text(path, as_gin(bound, new | unchanged))


def _warn_of_defaults(model_dir: str, old: '_Stored', bindings: Mapping[str, str], default: Mapping[str, str]) -> None:
    for name, value in old.defaults.items():
        now = default.get(name)
        if name in bindings and now is not None and not schema.same(value, now):
            warn(
                f'{name} keeps {value}, with which the run in {model_dir} began; the default of this version is {now}.'
            )
    unknown = [
        f'{name} = {value}'
        for name, value in sorted(default.items())
        if not (name in bindings or name in old.all or _may_change(name)) and can_be_written(value)
    ]
    if unknown:
        more = f' and {len(unknown) - _LISTED} more' if len(unknown) > _LISTED else ''
        warn(
            f'{model_dir}/{CONFIG} does not hold {len(unknown)} settings, which take the defaults of this version: '
            f'{", ".join(unknown[:_LISTED])}{more}. They are now added to it.'
        )


def _may_change(name: str) -> bool:
    selector, parameter = name.rsplit('.', 1)
    if parameter == 'max_bad_records':
        return True
    looks = tuple(f'{kind.__module__}.' for kind in (FewShot, TaskMetrics, Limits))
    if selector.startswith('upcycle.models.'):
        return parameter in COMPILED
    return selector.startswith(('validation/', *looks)) or (selector == ROOT and parameter in MAY_CHANGE)


def _is_ignored(name: str, bindings: Mapping[str, str]) -> bool:
    """Returns whether a binding is an MoE setting that the chosen router does not have; earlier versions stored such bindings."""
    selector, field = name.rsplit('.', 1)
    if selector.rpartition('/')[2] != full_name((), MoEConfig):
        return False
    router = ast.literal_eval(bindings.get(f'{selector}.router', repr(RouterType.EXPERT_CHOICE.value)))
    return field != 'router' and router in set(RouterType) and field not in settings(ROUTERS[router])


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A `config.gin`: bindings, and the defaults of all other parameters."""

    bound: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """Bindings and defaults."""
        return {**self.defaults, **self.bound}


def stored(path: epath.Path) -> dict[str, str]:
    """Returns the bindings and defaults in a `config.gin`; {} if the file is missing or does not describe a run."""
    return _read_config(path).all


def _read_config(path: epath.Path) -> _Stored:
    """Reads the bindings of a run; empty if the file is missing or does not describe a run."""
    try:
        text = path.read_bytes().decode(errors='replace') if path.exists() else ''
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror or error}): name another MODEL_DIR.') from error
    parts = (part.splitlines() for part in text.partition(_DEFAULTS)[::2])
    bound, defaults = (
        dict(line.split(' = ', 1) for line in part if ' = ' in line and not line.startswith('#')) for part in parts
    )
    bound, defaults = (
        {aliases.current(name): aliases.current_value(value) for name, value in part.items()}
        for part in (bound, defaults)
    )
    return _Stored(bound, defaults) if f'{ROOT}.model' in bound else _Stored()


def as_gin(bindings: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> str:
    """Formats `resolved()` as a gin file that builds the same run; with `defaults`, also in later versions."""
    defaults = defaults or {}
    modules = sorted({name.split('/')[-1].rsplit('.', 2)[0] for name in (*bindings, *defaults)})
    lines = ['from __gin__ import dynamic_registration', *(f'import {module}' for module in modules), '']
    lines += [f'{name} = {value}' for name, value in sorted(bindings.items())]
    if defaults:
        lines += ['', _DEFAULTS, *(f'{name} = {value}' for name, value in sorted(defaults.items()))]
    return '\n'.join([*lines, ''])


def can_be_written(text: str) -> bool:
    """Returns whether gin can read a default: a literal, or a dataclass of this package."""
    if text.startswith('@'):
        return text.startswith('@upcycle.') and text.endswith('()')
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def not_bound() -> Iterator[str]:
    """Yields the unbound parameters with defaults of the configurables that a `Run` is built from."""
    for selector, target, values in reachable():
        for name, parameter in schema.parameters(target).items():
            if parameter.default is not parameter.empty and name not in values:
                yield f'{selector}.{name}'


def defaults_of_now() -> dict[str, str]:
    """Returns the defaults of all parameters of the run's configurables, by the same names."""
    defaults: dict[str, str] = {}
    for selector, target, _ in reachable():
        for name, parameter in schema.parameters(target).items():
            if parameter.default is not parameter.empty:
                defaults[f'{selector}.{name}'] = show(parameter.default)
                defaults = dict(_fields_of(parameter.default)) | defaults
    return defaults


def _fields_of(value: Any) -> Iterator[tuple[str, str]]:
    """Yields the bindings that would make a default that is a dataclass, and those of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield f'{full_name((), type(value))}.{field.name}', show(inner)
            yield from _fields_of(inner)


def default_of(name: str) -> str | None:
    """Returns the default of a binding of this package by its full name, or None."""
    selector, parameter = name.rsplit('.', 1)
    module, _, kind = selector.rpartition('/')[2].rpartition('.')
    if not module.startswith('upcycle.'):
        return None
    try:
        default = schema.parameters(getattr(importlib.import_module(module), kind))[parameter].default
    except (ImportError, AttributeError, KeyError, ValueError):
        return None
    return None if default is inspect.Parameter.empty else show(default)
