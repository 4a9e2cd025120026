"""gin: from files and command-line bindings to one checked `Run`, and back to a text that says what was resolved."""

import ast
import difflib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

import gin
from upcycle import files
from upcycle.errors import UserError
from upcycle.evaluate.few_shot import FewShot
from upcycle.evaluate.tasks import TaskMetrics
from upcycle.train.health import Limits
from upcycle.train.run import Run

PACKAGE = pathlib.Path(__file__).resolve().parent
# These say where, how often, for how long and how compiled; a run whose other bindings are the same is the same run.
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
    'limits',
    'leaf_gradient_norms',
    'mesh_shape',
    'parameters_over_data',
    'remat',
    'scan_layers',
)
_SEARCHED: list[str] = []
_ROOT = f'{Run.__module__}.{Run.__name__}'


def search_paths() -> list[str]:
    """Where gin files are looked for: here, then the checkout or the installed package, with and without `gin/` in front."""
    # In a wheel our files are inside the package; beside an installed package, `gin` is gin-config's own code.
    gin_folder = PACKAGE / 'gin' if (PACKAGE / 'gin').is_dir() else PACKAGE.parent / 'gin'
    return [os.getcwd(), str(gin_folder.parent), str(gin_folder)]


def load(gin_files: Sequence[str], bindings: Mapping[str, str]) -> Run:
    """Builds the run that the files and bindings describe.

    Args:
      gin_files: in the order models, moe, tasks, runs; a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is no Python literal and no gin reference is a string, so that
        `--gin.MODEL_DIR=/tmp/run` needs no quotes.

    Raises:
      UserError: a file is missing or does not parse, a binding is unknown, unused, missing or nonsense.
    """
    if not gin_files:
        raise UserError('No configuration: name one with --gin_file, such as --gin_file=models/t5_1_1_base.gin.')
    gin.clear_config(clear_constants=True)
    for path in search_paths():
        if path not in _SEARCHED:
            gin.add_config_file_search_path(path)
            _SEARCHED.append(path)
    for file in gin_files:
        if not any(os.path.isfile(os.path.join(path, file)) for path in search_paths()):
            raise UserError(f'--gin_file={file} does not exist: looked in {", ".join(dict.fromkeys(search_paths()))}.')
    # gin logs an error for every folder in which a file is not.
    logging.getLogger().disabled = True
    # Its second reader takes `runs/x.gin` for a file in a Python package `runs`, and trips over a plain folder of that name.
    readers, gin.config._FILE_READERS = gin.config._FILE_READERS, gin.config._FILE_READERS[:1]
    try:
        gin.parse_config_files_and_bindings(
            list(gin_files), [f'{name} = {_literal(value)}' for name, value in bindings.items()]
        )
    except Exception as error:  # gin raises nearly every built-in type; all of them are mistakes in the configuration
        raise UserError(f'The configuration does not parse: {_one_line(error)}') from error
    finally:
        logging.getLogger().disabled = False
        gin.config._FILE_READERS = readers
    _refuse_unused(bindings)
    try:
        if not gin.get_bindings(Run, resolve_references=False):
            raise UserError('No run: end the list of files with one of runs/, such as --gin_file=runs/pretrain.gin.')
        return gin.get_configurable(Run)()
    except Exception as error:
        if isinstance(error, UserError):
            # gin appends where it was when it built the object; the sentence already names the binding.
            raise UserError(str(error).split('\n  In call to configurable')[0]) from None
        if isinstance(error, TypeError | ValueError | RuntimeError | KeyError):
            raise UserError(f'The configuration is not complete or does not fit: {_one_line(error)}') from error
        raise


def resolved() -> dict[str, str]:
    """Every binding that the run reads, by its full name, macros replaced by their values: the run's identity."""
    found: dict[str, str] = {}
    for selector, values in _reachable():
        for name, value in values.items():
            found[f'{selector}.{name}'] = _show(value)
    return found


def as_gin(bindings: Mapping[str, str]) -> str:
    """`resolved()` as a gin file that builds the same run."""
    modules = sorted({name.split('/')[-1].rsplit('.', 2)[0] for name in bindings})
    lines = ['from __gin__ import dynamic_registration', *(f'import {module}' for module in modules), '']
    return '\n'.join([*lines, *(f'{name} = {value}' for name, value in sorted(bindings.items())), ''])


def claim(run: Run, bindings: Mapping[str, str], *, write: bool = True) -> None:
    """Marks a run's folder as its own, unless another run has it.

    Args:
      run: what will be written there.
      bindings: `resolved()` after it was loaded.
      write: False: only look.

    Raises:
      UserError: the folder holds a run whose bindings differ; the first differing one is named.
    """
    model_dir = run.model_dir
    # A run that cools down is another one when it ends elsewhere.
    fixed = ('total_steps',) if run.learning_rate.falls_towards_the_end else ()
    folder = files.absolute(model_dir)
    path = folder / 'config.gin'
    if path.exists():
        old = _read_config(path)
        for name in sorted({*old, *bindings}):
            if _may_change(name) and name.rsplit('.', 1)[1] not in fixed:
                continue
            if old.get(name) != bindings.get(name):
                raise UserError(
                    f'MODEL_DIR = {model_dir!r} holds another run, in which {name} is {old.get(name, "not set")} and not '
                    f'{bindings.get(name, "unset")}: name another MODEL_DIR, or take the binding back.'
                )
    elif (folder / 'checkpoints').is_dir():
        raise UserError(f'MODEL_DIR = {model_dir!r} holds checkpoints but no config.gin: name another MODEL_DIR.')
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_text(path, as_gin(bindings))


def _may_change(name: str) -> bool:
    selector, parameter = name.rsplit('.', 1)
    if parameter == 'max_bad_records':
        return True
    looks = tuple(f'{kind.__module__}.' for kind in (FewShot, TaskMetrics, Limits))
    return selector.startswith(('validation/', *looks)) or (selector == _ROOT and parameter in MAY_CHANGE)


def _read_config(path: epath.Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split(' = ', 1) for line in lines if ' = ' in line)


def _literal(text: str) -> str:
    """A command-line value as gin source."""
    if text.startswith(('@', '%')):
        return text
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return repr(text)
    return text


def _is_reference(value: Any) -> bool:
    return isinstance(value, gin.config.ConfigurableReference)


def _macro(value: Any) -> str | None:
    """The name of the macro that a value refers to."""
    if _is_reference(value) and value.selector == 'gin.macro':
        return value.scoped_selector.removesuffix('/gin.macro')
    return None


def _bindings_of(reference: Any) -> dict[str, Any]:
    """Bindings of a reference's target in its scope, those of the outer scopes included."""
    with gin.config_scope('/'.join(reference.scopes) or None):
        return dict(gin.get_bindings(reference.configurable.wrapped, resolve_references=False))


def _references(value: Any) -> Iterator[Any]:
    """The references inside a value, looked for through containers and macros."""
    if macro := _macro(value):
        yield value
        yield from _references(_macro_value(macro))
    elif _is_reference(value):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _references(key)
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _macro_value(name: str) -> Any:
    return gin.get_bindings(f'{name}/gin.macro', resolve_references=False).get('value')


def _reachable() -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurables that building a `Run` calls, with their bindings; (scoped full name, bindings)."""
    seen: set[str] = set()
    root = gin.get_bindings(Run, resolve_references=False)
    yield _ROOT, dict(root)
    waiting = [value for item in root.values() for value in _references(item)]
    while waiting:
        reference = waiting.pop()
        if _macro(reference) or reference.scoped_selector in seen:
            continue
        seen.add(reference.scoped_selector)
        bindings = _bindings_of(reference)
        yield _full_name(reference), bindings
        waiting += [value for item in bindings.values() for value in _references(item)]


def _full_name(reference: Any) -> str:
    target = reference.configurable.wrapped
    return '/'.join([*reference.scopes, f'{target.__module__}.{target.__qualname__}'])


def _show(value: Any) -> str:
    if macro := _macro(value):
        return _show(_macro_value(macro))
    if _is_reference(value):
        return f'@{_full_name(value)}' + ('()' if value.evaluate else '')
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{_show(key)}: {_show(item)}' for key, item in value.items()) + '}'
    if isinstance(value, list | tuple):
        inner = ', '.join(_show(item) for item in value)
        return f'[{inner}]' if isinstance(value, list) else f'({inner}{"," if len(value) == 1 else ""})'
    return repr(value)


def _refuse_unused(bindings: Mapping[str, str]) -> None:
    """A binding of the command line that nothing uses is a mistake; unused macros in files are fine."""
    used_macros: set[str] = set()
    used_parameters: set[str] = set()
    for selector, values in _reachable():
        used_parameters |= {f'{selector}.{name}' for name in values}
        for value in values.values():
            used_macros |= {macro for reference in _references(value) if (macro := _macro(reference))}
    for name in bindings:
        if '.' in name:
            *scopes, selector = name.split('/')
            wanted = '/'.join([*scopes, _full_parameter(selector)])
            if any(parameter == wanted or parameter.endswith('/' + wanted) for parameter in used_parameters):
                continue
            known = sorted(used_parameters)
        elif name in used_macros:
            continue
        else:
            known = sorted(used_macros)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f' (did you mean {close[0]}?)' if close else ''
        raise UserError(
            f'--gin.{name}={bindings[name]} is used by nothing in this run{hint}: mend the name or leave it out.'
        )


def _full_parameter(selector_and_parameter: str) -> str:
    selector, parameter = selector_and_parameter.rsplit('.', 1)
    configurable = gin.get_configurable(selector)
    target = getattr(configurable, '__wrapped__', configurable)
    return f'{target.__module__}.{target.__qualname__}.{parameter}'


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())
