"""gin: from files and command-line bindings to one checked `Run`, and to the text that says what was resolved."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import aliases, gin_files, schema
from upcycle.building import Builder
from upcycle.errors import MissingData, UserError, refuse
from upcycle.gin_files import nearest
from upcycle.gin_values import full_name, innermost, macro_of, reachable, references, show
from upcycle.metrics import warn
from upcycle.models.registry import EXAMPLE
from upcycle.moe.config import MoEConfig, settings
from upcycle.moe.routers import ROUTERS
from upcycle.moe.routers.base import MoE, macro_of_field
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
        *_of_other_routers(found, bindings, builder, run),
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
            yield f'{found.macros[macro]}: {macro} is used by nothing{hint}: correct the name or leave it out.'


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
        setters |= {_name_of_setter(selector, target, name) for name in values}
        for value in values.values():
            used_macros |= {macro for reference in references(value) if (macro := macro_of(reference))}
    for name in found.bound:
        if '.' in name:
            wanted = _in_full(name)
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
        yield f'--gin.{name}={bindings[name]} is used by nothing in this run{hint}: correct the name or leave it out.'


def _of_other_routers(found: gin_files.Found, bindings: Mapping[str, str], builder: Builder, run: Any) -> Iterator[str]:
    """Settings of MoE layers that a user made and that no layer's router reads.

    Recipes set the fields of every router; these do not count, and neither does a run's config.gin, which binds all fields of
    its layers and no macros.

    Args:
      found: what was read.
      bindings: of the command line.
      builder: that made the run.
      run: that it made; `UNKNOWN`, and with it which layers there are, where mistakes were in the way.
    """
    kinds = (
        {type(layer) for layer in run.model.moe_layers().values()} if isinstance(run, ModelRun) else ROUTERS.values()
    )
    chosen = {kind.router: kind for kind in kinds}
    on_command_line = {_in_full(name): name for name in found.bound}
    read: set[str] = set()
    passed_over: dict[str, tuple[str, str]] = {}
    routers: dict[str, set[str]] = {}
    for selector, target, values in reachable():
        layers = builder.made_by(selector)
        stored = not any(map(innermost, values.values()))
        for field, value in values.items():
            setter = innermost(value) or _name_of_setter(selector, target, field)
            if _is_read(layers, field, value, chosen):
                read.add(setter)
            elif not stored or setter in on_command_line:
                passed_over[setter] = field, show(value)
                routers.setdefault(setter, set()).add(layers.router)
    recipes = gin_files.recipe_values()
    for setter in sorted(passed_over.keys() - read):
        field, text = passed_over[setter]
        if setter in on_command_line:
            label = f'--gin.{on_command_line[setter]}={bindings[on_command_line[setter]]}'
        elif _may_stand_in_a_file(field, text, chosen.values(), recipes):
            continue
        else:
            label = f'{setter} = {text}'
        wanted = ' or '.join(f"'{router}'" for router, kind in ROUTERS.items() if field in settings(kind))
        have = ', '.join(sorted(routers[setter] & chosen.keys() or chosen))
        yield f'{label} is read by the router {wanted} only, and the MoE layers have {have}: leave it out, or change the router.'


def _may_stand_in_a_file(
    field: str, text: str, chosen: Iterable[type[MoE]], recipes: Mapping[str, Collection[str]]
) -> bool:
    """Whether a file may set a field that no chosen router has: to a recipe's value, the default, or that of the run before."""
    if any(field in kind.of_the_run_before for kind in chosen):
        return True
    values = [given for macro, given in recipes.items() if macro.endswith(macro_of_field(field))]
    usual = {schema.written(schema.parameters(MoEConfig)[field].default)}.union(*values)
    return any(schema.same(text, value) for value in usual)


def _is_read(made: Any, field: str, value: Any, chosen: Mapping[str, type[MoE]]) -> bool:
    """Whether what was made reads a binding. MoE layers do where their router is a chosen one, and has or implies the setting."""
    if not isinstance(made, MoE) or field == 'router':
        return True
    if field in made.implied:
        return made.router in chosen and schema.same(show(value), schema.written(made.implied[field]))
    return made.router in chosen and field in settings(type(made))


def _in_full(name: str) -> str:
    """A name of the command line, that of a parameter with its module."""
    *scopes, parameter = name.split('/')
    return '/'.join([*scopes, _full_parameter(parameter)]) if '.' in parameter else name


def _name_of_setter(selector: str, target: Any, parameter: str) -> str:
    """The full name of the binding that takes effect, in the scopes that it is in, of a configurable called by `selector`."""
    scopes = selector.split('/')[:-1]
    while scopes:
        with gin.config_scope('/'.join(scopes)):
            if parameter in gin.get_bindings(target, resolve_references=False, inherit_scopes=False):
                break
        scopes = scopes[:-1]
    return f'{full_name(scopes, target)}.{parameter}'


def _full_parameter(selector_and_parameter: str) -> str:
    selector, parameter = aliases.current(selector_and_parameter).rsplit('.', 1)
    configurable = gin.get_configurable(selector)
    target = getattr(configurable, '__wrapped__', configurable)
    return f'{target.__module__}.{target.__qualname__}.{parameter}'
