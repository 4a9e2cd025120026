"""What the models of all families share."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.errors import UserError
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.layer import METRICS, moe_metrics


class BaseModel:
    """Members of `Model` for a frozen dataclass with the fields `config`, `aux_loss_factor` and `router_z_loss_factor`.

    A family sets `moe_fields`, the fields of its configuration that hold a `MoE`; each configuration has `dense()`.
    """

    lacking: ClassVar[tuple[str, ...]] = ()
    grids: ClassVar[tuple[str, ...]] = ()
    moe_fields: ClassVar[tuple[str, ...]]

    config: Any
    aux_loss_factor: float
    router_z_loss_factor: float

    @classmethod
    def facts_in(cls, path: str, names: Iterable[str]) -> dict[str, Any]:
        """None; see `models.Model`."""
        return {}

    @classmethod
    def files_that_fit(cls, facts: Mapping[str, Any]) -> str:
        """None; see `models.Model`."""
        return ''

    @classmethod
    def sizes(cls, names: Collection[str], problems: Sequence[str]) -> tuple[str, ...]:
        """Sizes without a default, and the facts; see `models.Model`."""
        fields = dataclasses.fields(cls.__dataclass_fields__['config'].type)
        required = (field.name for field in fields if field.default is dataclasses.MISSING)
        return tuple(dict.fromkeys((*required, *cls.facts)))

    def with_dtype(self, dtype: str) -> Self:
        """The same model with activations of another type."""
        return self._with_config(dtype=dtype)

    def dense(self) -> Self:
        """The same model with dense MLPs only."""
        return dataclasses.replace(self, config=self.config.dense())

    def with_moe(self, **changes: Any) -> Self:
        """The same model with other MoE conventions; see `models.Model`."""
        stacks = {name: moe for name in self.moe_fields if (moe := getattr(self.config, name)) is not None}
        return self._with_config(**{name: changed(moe, **changes) for name, moe in stacks.items()})

    def saved(self, description: Mapping[str, Any]) -> Self:
        """The model that a checkpoint's metadata describes, with this one's losses; see `models.Model`."""
        kind = type(self.config)
        config = known_fields(kind, description['config'])
        for name in self.moe_fields:
            if config.get(name) is not None:
                config[name] = MoEConfig(**known_fields(MoEConfig, config[name]))
        return dataclasses.replace(self, config=kind(**config))

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return {'family': self.family, **dataclasses.asdict(self)}

    def moe_loss(self, written: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The auxiliary loss of the MoE layers, and their metrics, from the variables that a forward pass wrote."""
        metrics = moe_metrics(written.get(METRICS, {}))
        if not metrics:
            return jnp.zeros(()), {}
        loss = self.aux_loss_factor * metrics['experts/auxiliary_loss']
        return loss + self.router_z_loss_factor * metrics['experts/router_z_loss'], metrics

    def _with_config(self, **changes: Any) -> Self:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


def read_features(
    batch: Mapping[str, Any], required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, jax.Array]:
    """Features of a batch as arrays of JAX; those that are optional where they are there.

    Raises:
      UserError: a required feature is missing.
    """
    if missing := [name for name in required if name not in batch]:
        raise UserError(f'the batch has no {missing[0]!r}, only {", ".join(sorted(batch)) or "nothing"}: add it.')
    return {name: jnp.asarray(batch[name]) for name in (*required, *optional) if name in batch}


def told(config: type, facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What the facts of a checkpoint say of these fields of a configuration.

    Raises:
      ValueError: a value is of another type than its field.
    """
    found = {name: facts[name] for name in names if name in facts}
    for name, value in found.items():
        if not schema.fits(value, schema.parameters(config)[name].annotation):
            raise ValueError(f'{name} = {schema.shown(value)}, of what it says of itself,')
    return found


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a dataclass has fields for: a checkpoint may tell more than this version knows.

    Raises:
      UserError: a field without a default is missing, or a value is of another type than its field.
    """
    fields = schema.parameters(kind)
    known = {name: value for name, value in values.items() if name in fields}
    if missing := [name for name in schema.required(kind) if name not in known]:
        raise UserError(f'the checkpoint does not say {missing[0]} of its model: its metadata is damaged.')
    for name, value in known.items():
        # Of a configuration within a configuration JSON tells the fields.
        nested = isinstance(value, dict) and any(map(dataclasses.is_dataclass, get_args(fields[name].annotation)))
        if not nested and not schema.fits(value, fields[name].annotation):
            raise UserError(
                f'the checkpoint says {name} = {schema.shown(value)} of its model: its metadata is damaged.'
            )
    return known
