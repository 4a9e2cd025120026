"""`MoEConfig`, the configurable of gin files that builds a router of any class."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from upcycle import schema
from upcycle.errors import one_of, refuse
from upcycle.moe.conventions import AdaptiveBalance, RouterType  # AdaptiveBalance: gin files find it here
from upcycle.moe.routers import ROUTERS
from upcycle.moe.routers.base import MoE, macro_of_field

__all__ = ['AdaptiveBalance', 'MoEConfig', 'changed', 'settings']


def MoEConfig(*positional: Any, **named: Any) -> MoE:  # noqa: N802 gin files of all versions call it so
    """Returns the configuration of a stack's MoE layers, of the class that `router` names.

    Parameters are the fields of all routers. Fields that the class lacks are ignored, because recipes set the fields of every
    router that may be chosen; `configuration.load` refuses those that a user sets.

    Raises:
      UserError: a value is not of its field's type, or values contradict each other.
    """
    given = inspect.signature(MoEConfig).bind(*positional, **named).arguments
    kind = ROUTERS[one_of(RouterType, given.pop('router', RouterType.EXPERT_CHOICE), 'ROUTER')]
    taken = {name: value for name, value in given.items() if name in settings(kind)}
    ignored = {name: value for name, value in given.items() if name not in {*taken, 'adaptive_balance'}}
    refuse(schema.misfits(ignored, MoEConfig, macro_of_field))
    return kind(**taken)


def settings(kind: type[MoE]) -> set[str]:
    """Returns the fields of a router's class that can be set."""
    return {field.name for field in dataclasses.fields(kind) if field.init}


def changed(config: MoE, **changes: Any) -> MoE:
    """Returns the same layers with these fields changed; fields that the (possibly new) router lacks are ignored."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return MoEConfig(**(values | changes))


def _parameters() -> Iterator[inspect.Parameter]:
    """Yields the parameters of `MoEConfig`."""
    fields = {name: parameter for kind in ROUTERS.values() for name, parameter in schema.parameters(kind).items()}
    yield fields.pop('num_experts')
    yield inspect.Parameter(
        'router',
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=RouterType.EXPERT_CHOICE,
        annotation=RouterType,
    )
    for parameter in fields.values():
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


MoEConfig.__signature__ = inspect.Signature(list(_parameters()), return_annotation=MoE)
MoEConfig.__annotations__ = {name: p.annotation for name, p in MoEConfig.__signature__.parameters.items()}
# It only builds data, whatever the values: see `gin_data.HARMLESS`.
MoEConfig.harmless = {}
