"""gin: from files and command-line bindings to one checked `Run`, and back to a text that says what was resolved."""

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

import gin
from upcycle import files, gin_files, schema
from upcycle.errors import MissingData, UserError, mistakes_of, refuse
from upcycle.evaluate.few_shot import FewShot
from upcycle.evaluate.tasks import TaskMetrics
from upcycle.gin_files import UNKNOWN, nearest
from upcycle.metrics import warn
from upcycle.train.health import Limits
from upcycle.train.run import Run

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
)
# And these of a model.
COMPILED = ('remat', 'scan_layers')
_UNSET = object()
_ROOT = f'{Run.__module__}.{Run.__name__}'
CONFIG = 'config.gin'
# The line of a `config.gin` above what was not bound.
_DEFAULTS = '# Defaults when the run began. A resumed run keeps them, even if a later version has other defaults.'
_LISTED = 5


def load(names: Sequence[str], bindings: Mapping[str, str]) -> Run:
    """Builds the run that gin files and bindings describe. Nothing is allocated, and no device is looked for.

    Args:
      names: of gin files, in the order models, moe, tasks, runs; a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is no Python literal and no gin reference is a string, so that
        `--gin.MODEL_DIR=/tmp/run` needs no quotes.

    Raises:
      UserError: a file is missing or does not parse, a binding is unknown, unused, missing, of another type or nonsense.
      UserErrors: several are; all of them are said.
      MissingData: nothing is wrong but that.
    """
    if not names:
        raise UserError('No configuration: name one with --gin_file, such as --gin_file=models/t5_1_1_base.gin.')
    found = gin_files.read(names, bindings)
    for sentence in found.warnings:
        warn(sentence)
    try:
        has_run = bool(gin.get_bindings(Run, resolve_references=False))
    except ValueError:  # gin has never met it
        has_run = False
    if not has_run:
        refuse(
            [*found.mistakes, 'No run: end the list of files with one of runs/, such as --gin_file=runs/pretrain.gin.']
        )
    builder = _Builder()
    run = builder.make((), Run)
    others = [*found.mistakes, *builder.mistakes]
    family = next((made.family for made in builder.made() if hasattr(made, 'family')), None)
    mistakes = [
        *found.mistakes,
        *(() if family is None else gin_files.of_another_family(found.files, family)),
        *_unused(found, bindings, whole=not others),
        *_unknown_macros(found),
        *builder.mistakes,
    ]
    if mistakes and set(mistakes) == set(builder.missing_data):
        raise MissingData(mistakes[0])
    refuse(mistakes)
    return run


def as_it_began(run: Run) -> Run:
    """The run that was loaded last, or, where its folder holds one already, the same with the defaults that it began with.

    What is not bound was not bound then, or `claim` refuses the run. So its value is the default of then, which is now bound.

    Raises:
      UserError: the folder's `config.gin` cannot be read, or its defaults build no run.
    """
    path = files.absolute(run.model_dir) / CONFIG
    stored, now, bound = _read_config(path).defaults, _defaults(), resolved()
    if all(name in bound or schema.same(value, now.get(name, value)) for name, value in stored.items()):
        return run
    taken: dict[str, str] = {}
    # What is bound may itself have parameters.
    while new := {name: stored[name] for name in _not_bound() if name in stored and name not in taken}:
        gin_files.bind(as_gin(new), f'{path}')
        taken |= new
    builder = _Builder()
    run = builder.make((), Run)
    refuse(builder.mistakes)
    return run


def resolved() -> dict[str, str]:
    """Every binding that the run reads, by its full name, macros replaced by their values: the run's identity."""
    found: dict[str, str] = {}
    for selector, _, values in _reachable():
        for name, value in values.items():
            found[f'{selector}.{name}'] = _show(value)
    return found


def _not_bound() -> Iterator[str]:
    """The parameters that take their defaults, of the configurables that building a `Run` calls."""
    for selector, target, values in _reachable():
        for name, parameter in schema.parameters(target).items():
            if parameter.default is not parameter.empty and name not in values:
                yield f'{selector}.{name}'


def _defaults() -> dict[str, str]:
    """What the run's configurables take where nothing is bound, by the same names."""
    found: dict[str, str] = {}
    for selector, target, _ in _reachable():
        for name, parameter in schema.parameters(target).items():
            if parameter.default is not parameter.empty:
                found[f'{selector}.{name}'] = _show(parameter.default)
                found = dict(_fields_of(parameter.default)) | found
    return found


def name_of(kind: type, field: str) -> str:
    """What a user sets to set a field of a configurable: its macro, or else the field by its name."""
    try:
        bound = gin.get_bindings(kind, resolve_references=False).get(field)
    except ValueError:  # gin has never met it
        bound = None
    return _macro(bound) or f'{kind.__name__}.{field}'


def _fields_of(value: Any) -> Iterator[tuple[str, str]]:
    """The bindings that would make a dataclass which is a default, and those that it holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield f'{_full_name((), type(value))}.{field.name}', _show(inner)
            yield from _fields_of(inner)


def _default_of(name: str) -> str | None:
    """The default of a binding of ours, by its full name; None where there is none."""
    selector, parameter = name.rsplit('.', 1)
    module, _, kind = selector.rpartition('/')[2].rpartition('.')
    if not module.startswith('upcycle.'):
        return None
    try:
        found = schema.parameters(getattr(importlib.import_module(module), kind))[parameter].default
    except (ImportError, AttributeError, KeyError, ValueError):
        return None
    return None if found is inspect.Parameter.empty else _show(found)


def as_gin(bindings: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> str:
    """`resolved()` as a gin file that builds the same run; with the defaults of what is not bound, in any later version too."""
    defaults = defaults or {}
    modules = sorted({name.split('/')[-1].rsplit('.', 2)[0] for name in (*bindings, *defaults)})
    lines = ['from __gin__ import dynamic_registration', *(f'import {module}' for module in modules), '']
    lines += [f'{name} = {value}' for name, value in sorted(bindings.items())]
    if defaults:
        lines += ['', _DEFAULTS, *(f'{name} = {value}' for name, value in sorted(defaults.items()))]
    return '\n'.join([*lines, ''])


def _can_be_written(text: str) -> bool:
    """Whether gin can read a default: a literal, or a dataclass of ours and nothing else."""
    if text.startswith('@'):
        return text.startswith('@upcycle.') and text.endswith('()')
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def claim(run: Run, bindings: Mapping[str, str], *, write: bool = True) -> None:
    """Marks a run's folder as its own, unless another run has it. What was not bound there had its default.

    Where it writes, it also says which settings have another value than this version's default, because the run began with
    that, and which have this version's default, because the folder does not say what they were.

    Args:
      run: what will be written there.
      bindings: `resolved()` after it was loaded, and was made to be `as_it_began`.
      write: False: only look.

    Raises:
      UserError: the folder holds a run whose bindings differ; the first differing one is named.
    """
    model_dir = run.model_dir
    # A run that cools down is another one when it ends elsewhere.
    fixed = ('total_steps',) if run.learning_rate.falls_towards_the_end else ()
    folder = files.absolute(model_dir)
    path = folder / CONFIG
    # The first look: a run writes its config.gin before checkpoints, and may begin in another process meanwhile.
    has_checkpoints = (folder / 'checkpoints').is_dir()
    old = _read_config(path)
    default = _defaults()
    if old.bound:
        # From the run down: what is chosen comes before the settings of the choice.
        for name in [*bindings, *sorted(old.bound.keys() - bindings)]:
            if _may_change(name) and name.rsplit('.', 1)[1] not in fixed:
                continue
            was, now = (bound.get(name, default.get(name) or _default_of(name)) for bound in (old.all, bindings))
            if was != now and (was is None or now is None or not schema.same(was, now)):
                raise UserError(
                    f'MODEL_DIR = {model_dir!r} holds another run, in which {name} is {was or "not set"} and not '
                    f'{now or "unset"}: name another MODEL_DIR, or take the binding back.'
                )
    elif has_checkpoints:
        state = 'a config.gin that describes no run' if path.exists() else 'no config.gin'
        raise UserError(
            f'MODEL_DIR = {model_dir!r} holds checkpoints but {state}: bring that file back, or name another MODEL_DIR.'
        )
    if write:
        if old.bound:
            _say_what_differs(run.model_dir, old, bindings, default)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: old.defaults[name] for name in old.defaults.keys() & bindings if name not in old.bound}
        kept = {name: value for name, value in kept.items() if schema.same(value, bindings[name])}
        bound = {name: value for name, value in bindings.items() if name not in kept}
        new = {name: value for name, value in default.items() if name not in bindings and _can_be_written(value)}
        files.replace_text(path, as_gin(bound, new | kept))


def _say_what_differs(model_dir: str, old: '_Stored', bindings: Mapping[str, str], default: Mapping[str, str]) -> None:
    for name, value in old.defaults.items():
        now = default.get(name)
        if name in bindings and now is not None and not schema.same(value, now):
            warn(f'{name} = {value}, as when the run in {model_dir} began; the default of this version is {now}.')
    unknown = [
        f'{name} = {value}'
        for name, value in sorted(default.items())
        if not (name in bindings or name in old.all or _may_change(name)) and _can_be_written(value)
    ]
    if unknown:
        more = f' and {len(unknown) - _LISTED} more' if len(unknown) > _LISTED else ''
        warn(
            f'{model_dir}/{CONFIG} does not hold {len(unknown)} settings, which take the defaults of this version: '
            f'{", ".join(unknown[:_LISTED])}{more}. From now on it holds them.'
        )


def _may_change(name: str) -> bool:
    selector, parameter = name.rsplit('.', 1)
    if parameter == 'max_bad_records':
        return True
    looks = tuple(f'{kind.__module__}.' for kind in (FewShot, TaskMetrics, Limits))
    if selector.startswith('upcycle.models.'):
        return parameter in COMPILED
    return selector.startswith(('validation/', *looks)) or (selector == _ROOT and parameter in MAY_CHANGE)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A `config.gin`: what was bound, and the defaults of what was not."""

    bound: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """Every value."""
        return {**self.defaults, **self.bound}


def _read_config(path: epath.Path) -> _Stored:
    """The bindings of a run; none where the file is missing, or describes no run."""
    try:
        text = path.read_bytes().decode(errors='replace') if path.exists() else ''
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror or error}): name another MODEL_DIR.') from error
    parts = (part.splitlines() for part in text.partition(_DEFAULTS)[::2])
    bound, defaults = (
        dict(line.split(' = ', 1) for line in part if ' = ' in line and not line.startswith('#')) for part in parts
    )
    return _Stored(bound, defaults) if f'{_ROOT}.model' in bound else _Stored()


def _is_reference(value: Any) -> bool:
    return isinstance(value, gin.config.ConfigurableReference)


def _macro(value: Any) -> str | None:
    """The name of the macro that a value refers to."""
    if _is_reference(value) and value.selector == 'gin.macro':
        return value.scoped_selector.removesuffix('/gin.macro')
    return None


def _bindings_of(scopes: Sequence[str], target: Any) -> dict[str, Any]:
    """Bindings of a configurable in a scope, those of the outer scopes included."""
    with gin.config_scope('/'.join(scopes) or None):
        return dict(gin.get_bindings(target, resolve_references=False))


def _references(value: Any, within: tuple[str, ...] = ()) -> Iterator[Any]:
    """The references inside a value, looked for through containers and macros; `within`: the macros around it."""
    if macro := _macro(value):
        yield value
        if macro not in within:
            yield from _references(_macro_value(macro), (*within, macro))
    elif _is_reference(value):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _references(key, within)
            yield from _references(item, within)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item, within)


def _macro_value(name: str) -> Any:
    """What a macro is set to, or `_UNSET`."""
    return gin.get_bindings(f'{name}/gin.macro', resolve_references=False).get('value', _UNSET)


def _reachable() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The configurables that building a `Run` calls: scoped full names, classes or functions, and bindings."""
    seen: set[str] = set()
    root = gin.get_bindings(Run, resolve_references=False)
    yield _ROOT, Run, dict(root)
    waiting = [value for item in root.values() for value in _references(item)]
    while waiting:
        reference = waiting.pop()
        if _macro(reference) or reference.scoped_selector in seen:
            continue
        seen.add(reference.scoped_selector)
        target = reference.configurable.wrapped
        bindings = _bindings_of(reference.scopes, target)
        yield _full_name(reference.scopes, target), target, bindings
        waiting += [value for item in bindings.values() for value in _references(item)]


def _full_name(scopes: Sequence[str], target: Any) -> str:
    return '/'.join([*scopes, f'{target.__module__}.{target.__qualname__}'])


def _show(value: Any) -> str:
    if macro := _macro(value):
        return _show(_macro_value(macro))
    if _is_reference(value):
        return f'@{_full_name(value.scopes, value.configurable.wrapped)}' + ('()' if value.evaluate else '')
    return schema.written(value, _show)


class _Builder:
    """Makes what the bindings describe, from the leaves up, and goes on where something is wrong, so that every mistake is found.

    Attributes:
      mistakes: a sentence each.
    """

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self.missing_data: list[str] = []  # of these, those of data that is not here
        self._made: dict[str, Any] = {}
        self._under_way: list[str] = []

    def made(self) -> Iterator[Any]:
        """Everything that could be made."""
        return (value for value in self._made.values() if value is not UNKNOWN)

    def make(self, scopes: Sequence[str], target: Any) -> Any:
        """What a configurable makes of its bindings, once for each scope; `UNKNOWN` where a mistake is in the way."""
        name = _full_name(scopes, target)
        if name in self._under_way:
            return self._mistake(f'@{name} needs itself: bind something else.')
        if name not in self._made:
            self._under_way.append(name)
            self._made[name] = self._make(scopes, target)
            self._under_way.pop()
        return self._made[name]

    def _make(self, scopes: Sequence[str], target: Any) -> Any:
        before = len(self.mistakes)
        name = '/'.join([*scopes, target.__qualname__])
        bindings = _bindings_of(scopes, target)
        arguments = {key: self._argument(f'{name}.{key}', value, target, key) for key, value in bindings.items()}
        for key in schema.required(target):
            if key not in arguments:
                self._mistake(f'{name}.{key} is not set: bind it.')
        broken = len(self.mistakes) > before or any(value is UNKNOWN for value in arguments.values())
        for value in bindings.values():
            self._refuse_inherited(scopes, value)
        if broken:
            return UNKNOWN
        try:
            with gin.config_scope('/'.join(scopes) or None):
                return target(**arguments)
        except UserError as error:
            self.mistakes += mistakes_of(error)
            if isinstance(error, MissingData):
                self.missing_data.append(str(error))
        except Exception as error:
            if target.__module__.startswith('upcycle.'):
                raise
            self._mistake(f'@{name} cannot be made: {" ".join(str(error).split()) or type(error).__name__}.')
        return UNKNOWN

    def _argument(self, name: str, value: Any, target: Any, key: str) -> Any:
        """A parameter's value, its references made. A mistake names the macro that was set, where there is one."""
        if (macro := self._innermost(value)) is not None:
            name, value = macro, _macro_value(macro)
        if not self._is_set(name, value):
            return UNKNOWN
        hint = schema.parameters(target)[key].annotation if key in schema.parameters(target) else Any
        outline = self._each(value, self._outline)
        if outline is UNKNOWN:
            return UNKNOWN
        if not schema.fits(outline, hint):
            return self._mistake(f'{name} = {schema.shown(outline)} must be {schema.in_words(hint)}.')
        return self._each(value, self._call)

    def _innermost(self, value: Any) -> str | None:
        """The macro that a chain of them ends in; None where the value is no macro."""
        chain: list[str] = []
        while (macro := _macro(value)) and macro not in chain:
            chain.append(macro)
            value = _macro_value(macro)
        return chain[-1] if chain else None

    def _is_set(self, name: str, value: Any) -> bool:
        if _macro(value):
            self._mistake(f'{name} is set to itself: give it a value.')
        elif value is _UNSET:
            self._mistake(_not_set(name))
        elif _is_required(value):
            self._mistake(f'{name} is not set: this run needs it, so give it with --gin.{name}=...')
        else:
            return value is not UNKNOWN  # of which a mistake tells already
        return False

    def _each(self, value: Any, of_reference: Any) -> Any:
        """A value with its references replaced; `UNKNOWN` where one of them is."""
        if _is_reference(value):
            return of_reference(value)
        if isinstance(value, Mapping):
            items = [(self._each(key, of_reference), self._each(item, of_reference)) for key, item in value.items()]
            return UNKNOWN if any(UNKNOWN in (key, item) for key, item in items) else dict(items)
        if isinstance(value, list | tuple):
            made = [self._each(item, of_reference) for item in value]
            return UNKNOWN if any(item is UNKNOWN for item in made) else type(value)(made)
        return value

    def _outline(self, reference: Any) -> Any:
        """A reference as a type sees it, nothing made."""
        if _macro(reference):
            macro = self._innermost(reference)
            value = _macro_value(macro)
            return self._each(value, self._outline) if self._is_set(macro, value) else UNKNOWN
        return schema.Made(reference.configurable.wrapped, reference.evaluate)

    def _call(self, reference: Any) -> Any:
        if macro := self._innermost(reference):
            return self._each(_macro_value(macro), self._call)
        target = reference.configurable.wrapped
        return self.make(reference.scopes, target) if reference.evaluate else reference.scoped_configurable_fn

    def _refuse_inherited(self, scopes: Sequence[str], value: Any) -> None:
        """gin would let a reference without a scope inherit that of whoever calls it, which `resolved` would not show."""
        for reference in _references(value):
            target = None if _macro(reference) or reference.scopes else reference.configurable.wrapped
            if target and scopes and _bindings_of(scopes, target) != _bindings_of((), target):
                inner = f'{"/".join(scopes)}/{target.__qualname__}'
                self._mistake(f'@{target.__qualname__}() has bindings as {inner}: write @{inner}() where it is used.')

    def _mistake(self, sentence: str) -> Any:
        self.mistakes.append(sentence)
        return UNKNOWN


def _is_required(value: Any) -> bool:
    return _is_reference(value) and value.scoped_selector == 'gin.REQUIRED/gin.constant'


def _not_set(macro: str) -> str:
    """Where a missing macro could come from: a misspelt one, or a file of ours that sets it."""
    files = gin_files.definers(macro)
    # A name that our files know is what was meant, and a similar one may be a macro of its own.
    own = gin_files.macros_of(gin_files.shipped().values()) if files else set()
    if similar := nearest(macro, _set_macros() - own):
        return f'{macro} is not set{similar}: mend the name, or give --gin.{macro}=...'
    if not files:
        return f'{macro} is not set: give --gin.{macro}=...'
    folders = ' or '.join(dict.fromkeys(file.partition('/')[0] + '/' for file in files))
    choice = files[0] if len(files) == 1 else f'{files[0]} (or another file of {folders} that sets it)'
    return f'{macro} is not set: add --gin_file={choice}, or give --gin.{macro}=...'


def _set_macros() -> set[str]:
    return {scope for scope, selector in gin.config._CONFIG if selector == 'gin.macro'}


def _unknown_macros(found: gin_files.Found) -> Iterator[str]:
    """Macros of the user's files that nothing uses, here or in any run of ours: most likely misspelt."""
    if suspects := found.macros.keys() - found.used:
        known = gin_files.macros_of(gin_files.shipped().values())
        for macro in sorted(suspects - known):
            hint = nearest(macro, found.used | known)
            yield f'{found.macros[macro]}: {macro} is used by nothing{hint}: mend the name or leave it out.'


def _unused(found: gin_files.Found, bindings: Mapping[str, str], *, whole: bool) -> Iterator[str]:
    """Bindings of the command line that nothing uses; unused macros of ours in files are fine.

    Args:
      found: what was read.
      bindings: of the command line.
      whole: False: a part of the run is missing, which may be what uses a macro that our files know.
    """
    ours = set() if whole else gin_files.macros_of(gin_files.shipped().values())
    used_macros: set[str] = set()
    used_parameters: set[str] = set()
    # By the binding that takes effect: in gin, that of the innermost scope.
    setters: set[str] = set()
    for selector, target, values in _reachable():
        used_parameters |= {f'{selector}.{name}' for name in values}
        scopes = selector.split('/')[:-1]
        setters |= {f'{_full_name(_setter(scopes, target, name), target)}.{name}' for name in values}
        for value in values.values():
            used_macros |= {macro for reference in _references(value) if (macro := _macro(reference))}
    for name in found.bound:
        if '.' in name:
            *scopes, selector = name.split('/')
            wanted = '/'.join([*scopes, _full_parameter(selector)])
            if wanted in setters:
                continue
            if scoped := sorted(known for known in used_parameters if known.endswith('/' + wanted)):
                instead = ' or '.join(f'{known.removesuffix(wanted)}{name}' for known in scoped)
                yield f'--gin.{name}={bindings[name]} has no effect, because it is bound in a scope too: bind {instead}.'
                continue
            known = used_parameters
        elif name in used_macros or name in ours:
            continue
        else:
            known = used_macros | ours
        hint = nearest(name, known)
        yield f'--gin.{name}={bindings[name]} is used by nothing in this run{hint}: mend the name or leave it out.'


def _setter(scopes: Sequence[str], target: Any, parameter: str) -> Sequence[str]:
    """The scopes in which a parameter is bound that takes effect, of a configurable that is called in `scopes`."""
    while scopes:
        with gin.config_scope('/'.join(scopes)):
            if parameter in gin.get_bindings(target, resolve_references=False, inherit_scopes=False):
                break
        scopes = scopes[:-1]
    return scopes


def _full_parameter(selector_and_parameter: str) -> str:
    selector, parameter = selector_and_parameter.rsplit('.', 1)
    configurable = gin.get_configurable(selector)
    target = getattr(configurable, '__wrapped__', configurable)
    return f'{target.__module__}.{target.__qualname__}.{parameter}'
