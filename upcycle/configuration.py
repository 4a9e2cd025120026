"""gin: from files and command-line bindings to one checked `Run`, and to the text that says what was resolved."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import aliases, gin_files
from upcycle.building import Builder
from upcycle.errors import MissingData, UserError, refuse
from upcycle.gin_files import nearest
from upcycle.gin_values import full_name, macro_of, reachable, references, show
from upcycle.metrics import warn
from upcycle.models.registry import EXAMPLE
from upcycle.training.run import ModelRun, Run


def load(names: Sequence[str], bindings: Mapping[str, str]) -> Run:
    """Builds the run that gin files and bindings describe; see `load_model`."""
    return _load(names, bindings, Run)


def load_model(names: Sequence[str], bindings: Mapping[str, str]) -> ModelRun:
    """Builds the part of a run that `eval`, `convert` and `compile` need: what only training needs may be missing.

    Nothing is allocated, and no device is looked for.

    Args:
      names: of gin files, in the order models, moe, tasks, runs; a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is no Python literal and no gin reference is a string, so that
        `--gin.MODEL_DIR=/tmp/run` needs no quotes.

    Raises:
      UserError: a file is missing or does not parse, a binding is unknown, unused, missing, of another type or nonsense.
      UserErrors: several are; all of them are said.
      MissingData: nothing is wrong but that.
    """
    return _load(names, bindings, ModelRun)


def _load(names: Sequence[str], bindings: Mapping[str, str], kind: type[ModelRun]) -> Any:
    if not names:
        raise UserError(f'No configuration: name one with --gin_file, such as --gin_file={EXAMPLE[0]}.')
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
    builder = Builder(kind)
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


def resolved() -> dict[str, str]:
    """Every binding that the run reads, by its full name, macros replaced by their values: the run's identity."""
    found: dict[str, str] = {}
    for selector, _, values in reachable():
        for name, value in values.items():
            found[f'{selector}.{name}'] = show(value)
    return found


def name_of(kind: type, field: str) -> str:
    """What a user sets to set a field of a configurable: its macro, or else the field by its name."""
    try:
        bound = gin.get_bindings(kind, resolve_references=False).get(field)
    except ValueError:  # gin has never met it
        bound = None
    return macro_of(bound) or f'{kind.__name__}.{field}'


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
    for selector, target, values in reachable():
        used_parameters |= {f'{selector}.{name}' for name in values}
        scopes = selector.split('/')[:-1]
        setters |= {f'{full_name(_setter(scopes, target, name), target)}.{name}' for name in values}
        for value in values.values():
            used_macros |= {macro for reference in references(value) if (macro := macro_of(reference))}
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
    selector, parameter = aliases.current(selector_and_parameter).rsplit('.', 1)
    configurable = gin.get_configurable(selector)
    target = getattr(configurable, '__wrapped__', configurable)
    return f'{target.__module__}.{target.__qualname__}.{parameter}'
