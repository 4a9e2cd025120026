"""What the models of all families share."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle import schema
from upcycle.errors import UserError, refuse
from upcycle.models.generation import Generated, Sampling, generate
from upcycle.models.protocol import BatchSpec
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.layer import METRICS, moe_metrics


class BaseModel:
    """Implements members of `Model` for a frozen dataclass with fields `config`, `aux_loss_factor` and `router_z_loss_factor`.

    A family sets `network`, the class of its Flax module, and `moe_fields`, the fields of its configuration that hold a `MoE`.
    Its configuration has `dense()` and `moe_layer(moe)`.
    """

    lacking: ClassVar[tuple[str, ...]] = ()
    grids: ClassVar[tuple[str, ...]] = ()
    prompts: ClassVar[str | None] = None
    unit: ClassVar[str] = 'token'
    told: ClassVar[tuple[str, ...]] = ()
    moe_fields: ClassVar[tuple[str, ...]]
    network: ClassVar[type[nn.Module]]

    config: Any
    aux_loss_factor: float
    router_z_loss_factor: float

    @classmethod
    def facts_in(cls, path: str, names: Iterable[str]) -> dict[str, Any]:
        """No facts; see `models.Model`."""
        return {}

    @classmethod
    def files_that_fit(cls, facts: Mapping[str, Any]) -> str:
        """No file; see `models.Model`."""
        return ''

    @classmethod
    def sizes(cls, names: Collection[str], problems: Sequence[str]) -> tuple[str, ...]:
        """Fields without a default, and the facts; see `models.Model`."""
        fields = dataclasses.fields(cls.__dataclass_fields__['config'].type)
        required = (field.name for field in fields if field.default is dataclasses.MISSING)
        return tuple(dict.fromkeys((*required, *cls.facts)))

    def with_dtype(self, dtype: str) -> Self:
        """See `models.Model`."""
        return self._with_config(dtype=dtype)

    def dense(self) -> Self:
        """See `models.Model`."""
        return dataclasses.replace(self, config=self.config.dense())

    def with_moe(self, **changes: Any) -> Self:
        """See `models.Model`."""
        stacks = {name: moe for name in self.moe_fields if (moe := getattr(self.config, name)) is not None}
        return self._with_config(**{name: changed(moe, **changes) for name, moe in stacks.items()})

    def saved(self, description: Mapping[str, Any]) -> Self:
        """See `models.Model`."""
        kind = type(self.config)
        config = known_fields(kind, description['config'])
        for name in self.moe_fields:
            if config.get(name) is not None:
                config[name] = MoEConfig(**known_fields(MoEConfig, config[name]))
        return dataclasses.replace(self, config=kind(**config))

    def describe(self) -> dict[str, Any]:
        """See `models.Model`."""
        return {'family': self.family, **dataclasses.asdict(self)}

    def sample_inputs(self) -> dict[str, np.ndarray] | None:
        """None; see `models.Model`."""
        return None

    def num_units(self, batch_spec: BatchSpec) -> int:
        """See `models.Model`; the tokens."""
        return self.num_tokens(batch_spec)

    def module(self, num_microbatches: int = 1) -> nn.Module:
        """See `models.Model`."""
        return self.network(self.with_moe(num_microbatches=num_microbatches).config)

    def moe_module(self, path: str) -> nn.Module:
        """See `models.Model`."""
        return self.config.moe_layer(self.moe_layers()[path])

    def generate(
        self,
        params: Any,
        tokens: Any,
        mask: Any = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_ids: Iterable[int] = (),
        key: jax.Array | int = 0,
    ) -> Generated:
        """See `models.Model`."""
        sampling = Sampling(temperature, top_k, top_p, tuple(eos_ids))
        return generate(self, params, tokens, mask, sampling, max_new_tokens, key)

    def moe_loss(self, written: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the auxiliary loss of the MoE layers and their metrics, from the variables that a forward pass wrote."""
        metrics = moe_metrics(written.get(METRICS, {}))
        if not metrics:
            return jnp.zeros(()), {}
        loss = self.aux_loss_factor * metrics['experts/auxiliary_loss']
        return loss + self.router_z_loss_factor * metrics['experts/router_z_loss'], metrics

    def _with_config(self, **changes: Any) -> Self:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


def read_features(
    batch: Mapping[str, Any], required: Sequence[str], optional: Iterable[str] = ()
) -> dict[str, jax.Array]:
    """Returns features of a batch as JAX arrays, optional ones if the batch has them.

    Raises:
      UserError: the batch is not a dict, or a required feature is missing.
    """
    if not isinstance(batch, Mapping):
        names = ', '.join(map(repr, required))
        raise UserError(
            f'batch must be a dict of arrays by feature, not {type(batch).__name__}: name the arrays {names}.'
        )
    if missing := [name for name in required if name not in batch]:
        raise UserError(f'the batch has no {missing[0]!r}, only {", ".join(sorted(batch)) or "nothing"}: add it.')
    return {name: jnp.asarray(batch[name]) for name in (*required, *optional) if name in batch}


def known_facts(path: str, config: type, facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns those facts of a checkpoint that are among these fields of a configuration.

    Raises:
      UserError: a value is not of its field's type.
    """
    known = {name: facts[name] for name in names if name in facts}
    refuse(schema.misfits(known, config, lambda name: f'the metadata of {path} is damaged: {name}'))
    return known


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that a dataclass has fields for; a checkpoint of a later version may have others.

    Raises:
      UserError: a field without a default is missing, or a value is not of its field's type.
    """
    fields = schema.parameters(kind)
    known = {name: value for name, value in values.items() if name in fields}
    if missing := [name for name in schema.required(kind) if name not in known]:
        raise UserError(f"the checkpoint's metadata is damaged: {missing[0]} of its model is missing.")
    for name, value in known.items():
        # JSON holds a nested configuration as its fields.
        nested = isinstance(value, dict) and any(map(dataclasses.is_dataclass, get_args(fields[name].annotation)))
        if not nested and not schema.fits(value, fields[name].annotation):
            raise UserError(f"the checkpoint's metadata is damaged: its model has {name} = {schema.shown(value)}.")
    return known
