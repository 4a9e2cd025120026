"""Builds a checked `Run` from gin files and command-line bindings, and lists its resolved bindings."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from upcycle import aliases, from_checkpoint, gin_files, schema
from upcycle.building import Builder
from upcycle.errors import MissingData, UserError, refuse
from upcycle.gin_files import nearest
from upcycle.gin_values import bindings_of, full_name, innermost, macro_of, reachable, references, show
from upcycle.models.registry import EXAMPLE
from upcycle.moe.config import MoEConfig, settings
from upcycle.moe.routers import ROUTERS
from upcycle.moe.routers.base import MoE, macro_of_field
from upcycle.training.run import ModelRun, Run
from upcycle.warning import warn


def load(names: Sequence[str], bindings: Mapping[str, str]) -> Run:
    """Builds the run that gin files and bindings describe; see `load_model`."""
    return _load(names, bindings, Run)


def load_model(names: Sequence[str], bindings: Mapping[str, str]) -> ModelRun:
    """Builds the part of a run that `eval`, `convert` and `compile` need; what only training needs may be unset.

    Allocates no arrays and initialises no device.

    Args:
      names: gin files, in the order models, moe, tasks, runs; a later one overrides an earlier one.
      bindings: of the command line, as text. A value that is neither a Python literal nor a gin reference is a string, so
        `--gin.MODEL_DIR=/tmp/run` needs no quotes.

    Raises:
      UserError: a file is missing or does not parse, or a binding is unknown, unused, missing, or not of its type.
      UserErrors: several such mistakes, all of them.
      MissingData: only data is missing.
    """
    return _load(names, bindings, ModelRun)


def _load(names: Sequence[str], bindings: Mapping[str, str], kind: type[ModelRun]) -> Any:
    if not names:
        raise UserError(f'No configuration: name one with --gin_file, such as --gin_file={EXAMPLE[0]}.')
    parsed = _read(names, bindings)
    for sentence in parsed.warnings:
        warn(sentence)
    if not bindings_of((), Run):
        no_run = 'No run: end the list of files with one of runs/, such as --gin_file=runs/pretrain.gin.'
        refuse([*parsed.mistakes, no_run])
    builder = Builder(kind)
    run = builder.make((), Run)
    complete = not parsed.mistakes and not builder.mistakes
    family = next((built.family for built in builder.built() if hasattr(built, 'family')), None)
    mistakes = [
        *parsed.mistakes,
        *(() if family is None else gin_files.of_another_family(parsed.files, family)),
        *_unused_on_command_line(parsed, bindings, complete=complete),
        *_unused_in_files(parsed),
        *_of_other_routers(parsed, bindings, builder, run),
        *builder.mistakes,
    ]
    if mistakes and set(mistakes) == set(builder.missing_data):
        raise MissingData(mistakes[0])
    refuse(mistakes)
    return run


def _read(names: Sequence[str], bindings: Mapping[str, str]) -> gin_files.Parsed:
    """Reads files and bindings; twice if the model is that of a checkpoint, which only they name."""
    parsed = gin_files.read(names, bindings)
    if not parsed.needs_model or parsed.mistakes or not bindings_of((), Run):
        return parsed
    return gin_files.read(names, bindings, from_checkpoint.model_as_gin())


def resolved() -> dict[str, str]:
    """All bindings that the run reads, by full name, with macros replaced by their values: the run's identity."""
    return {f'{selector}.{name}': show(value) for selector, _, values in reachable() for name, value in values.items()}


def name_of(kind: type, field: str) -> str:
    """The name that a user binds to set a field of a configurable: its macro, else its class and name."""
    return macro_of(bindings_of((), kind).get(field)) or f'{kind.__name__}.{field}'


def _unused_in_files(parsed: gin_files.Parsed) -> Iterator[str]:
    """Macros in the user's files that nothing uses, here or in our files: most likely misspelt."""
    if suspects := parsed.macros.keys() - parsed.used:
        known = gin_files.known_macros()
        for macro in sorted(suspects - known):
            hint = nearest(macro, parsed.used | known)
            yield f'{parsed.macros[macro]}: {macro} is unused{hint}: fix its name or remove it.'


def _unused_on_command_line(parsed: gin_files.Parsed, bindings: Mapping[str, str], *, complete: bool) -> Iterator[str]:
    """Bindings of the command line that nothing uses.

    Args:
      parsed: the files and bindings.
      bindings: the same bindings, with their values.
      complete: False if a part of the run could not be built, which may use any macro that our files know.
    """
    used_macros = set() if complete else gin_files.known_macros()
    used_parameters: set[str] = set()
    # The bindings that take effect: in gin, those of the innermost scope.
    setters: set[str] = set()
    for selector, target, values in reachable():
        used_parameters |= {f'{selector}.{name}' for name in values}
        setters |= {_setter(selector, target, name) for name in values}
        for value in values.values():
            used_macros |= {macro for reference in references(value) if (macro := macro_of(reference))}
    for name in parsed.bound:
        full = _full(name)
        used, known = (setters, used_parameters) if '.' in name else (used_macros, used_macros)
        if full in used:
            continue
        if scoped := sorted(other for other in known if other.endswith('/' + full)):
            instead = ' or '.join(f'{other.removesuffix(full)}{name}' for other in scoped)
            yield f'--gin.{name}={bindings[name]} has no effect, because it is also bound in a scope: bind {instead}.'
        else:
            yield f'--gin.{name}={bindings[name]} is unused in this run{nearest(name, known)}: fix its name or remove it.'


def _of_other_routers(
    parsed: gin_files.Parsed, bindings: Mapping[str, str], builder: Builder, run: Any
) -> Iterator[str]:
    """Settings of MoE layers that the user made and that no layer's router reads.

    Those of our recipes do not count, which set the fields of every router. Neither do those of a run's config.gin, which binds
    all fields of its layers directly, without macros.

    Args:
      parsed: the files and bindings.
      bindings: the same bindings, with their values.
      builder: built the run.
      run: the run; `UNKNOWN` after mistakes, and then any router counts.
    """
    kinds = ROUTERS.values()
    if isinstance(run, ModelRun):
        kinds = {type(layer) for layer in run.model.moe_layers().values()}
    chosen = {kind.router: kind for kind in kinds}
    on_command_line = {_full(name): name for name in parsed.bound}
    read: set[str] = set()
    # By setter: the field and its value; and the routers that do not read it.
    ignored: dict[str, tuple[str, str]] = {}
    routers: dict[str, set[str]] = {}
    for selector, target, values in reachable():
        layers = builder.built_by(selector)
        stored = not any(map(innermost, values.values()))
        for field, value in values.items():
            setter = innermost(value) or _setter(selector, target, field)
            if _is_read(layers, field, value, chosen):
                read.add(setter)
            elif not stored or setter in on_command_line:
                ignored[setter] = field, show(value)
                routers.setdefault(setter, set()).add(layers.router)
    recipes = gin_files.recipe_values()
    for setter in sorted(ignored.keys() - read):
        field, text = ignored[setter]
        if name := on_command_line.get(setter):
            label = f'--gin.{name}={bindings[name]}'
        elif _is_allowed_in_files(field, text, chosen.values(), recipes):
            continue
        else:
            label = f'{setter} = {text}'
        readers = ' or '.join(f"'{router}'" for router, kind in ROUTERS.items() if field in settings(kind))
        have = ', '.join(sorted(routers[setter] & chosen.keys() or chosen))
        yield f'{label} is read by the router {readers} only, and the MoE layers have {have}: remove it, or change the router.'


def _is_allowed_in_files(
    field: str, text: str, chosen: Iterable[type[MoE]], recipes: Mapping[str, Collection[str]]
) -> bool:
    """Whether a file may set a field that no chosen router has: to a recipe's value, the default, or that of the run before."""
    if any(field in kind.of_the_run_before for kind in chosen):
        return True
    values = [given for macro, given in recipes.items() if macro.endswith(macro_of_field(field))]
    usual = {schema.written(schema.parameters(MoEConfig)[field].default)}.union(*values)
    return any(schema.same(text, value) for value in usual)


def _is_read(built: Any, field: str, value: Any, chosen: Mapping[str, type[MoE]]) -> bool:
    """Whether the built object reads a binding. MoE layers do if their router is chosen and has, or implies, the setting."""
    if not isinstance(built, MoE) or field == 'router':
        return True
    if field in built.implied:
        return built.router in chosen and schema.same(show(value), schema.written(built.implied[field]))
    return built.router in chosen and field in settings(type(built))


def _full(name: str) -> str:
    """The full name, with its module, of a parameter on the command line; a macro's name is unchanged."""
    *scopes, parameter = name.split('/')
    if '.' not in parameter:
        return name
    selector, parameter = aliases.current(parameter).rsplit('.', 1)
    configurable = gin.get_configurable(selector)
    return f'{full_name(scopes, getattr(configurable, "__wrapped__", configurable))}.{parameter}'


def _setter(selector: str, target: Any, parameter: str) -> str:
    """The full name, with scopes, of the binding that sets a parameter of a configurable called by `selector`."""
    *scopes, _ = selector.split('/')
    while scopes:
        with gin.config_scope('/'.join(scopes)):
            if parameter in gin.get_bindings(target, resolve_references=False, inherit_scopes=False):
                break
        scopes.pop()
    return f'{full_name(scopes, target)}.{parameter}'
