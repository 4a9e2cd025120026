"""Decoder-only language models for the trainer: next-token loss, cost and MoE layers."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle import cost, schema
from upcycle.errors import UserError
from upcycle.models.attention_experts import RouterOnly
from upcycle.models.base import BaseModel, known_facts, read_features
from upcycle.models.decoder import DecoderOnly, head_of
from upcycle.models.decoder_config import DecoderConfig
from upcycle.models.generation import Cache
from upcycle.models.head import head_sums
from upcycle.models.leaves import count_layers, mlp_width
from upcycle.models.protocol import BatchSpec
from upcycle.moe.groups import is_attention
from upcycle.moe.layer import METRICS
from upcycle.moe.routers.base import MoE
from upcycle.schema import Count, Natural, Rate

Batch = Mapping[str, jax.Array]
_SAMPLE = (2, 32)  # sequences and tokens of `sample_inputs`
_OPTIONAL = ('positions', 'segment_ids', 'mask')
# Fields of the configuration that shapes tell, and those that do not change the function.
_SHAPES = {'vocab_size', 'emb_dim', 'mlp_dim', 'num_layers'}
_FORM = {'dtype', 'dropout_rate', 'expert_dropout_rate', 'remat', 'scan_layers'}
_EXPERTS = {'moe', 'moe_layers', 'moe_output_bias', 'attention_moe'}


@dataclasses.dataclass(frozen=True)
class CausalLM(BaseModel):
    """A decoder-only model with its loss. Gin macros in brackets.

    A batch is `tokens` and `targets` (B, L), int32, the targets being the next tokens; `loss_weights` (B, L), 0 for targets
    that do not count; optional `positions`, `segment_ids` and `mask`, see `decoder.DecoderOnly`.

    Attributes:
      config: sizes, function and MoE layers.
      z_loss: weight of the logits z-loss [Z_LOSS].
      label_smoothing: share of a label spread over the vocabulary, in training [LABEL_SMOOTHING].
      logits_chunk: most entries of a device's vocabulary whose logits the loss computes at once; None: all; 'auto': all up to
        1 GiB of logits on a device, else 512 MiB at once [LOGITS_CHUNK].
      aux_loss_factor: weight of the balance loss, averaged over all MoE layers [AUX_LOSS_FACTOR].
      router_z_loss_factor: weight of the routers' z-loss, averaged over all MoE layers [ROUTER_Z_LOSS_FACTOR].
    """

    config: DecoderConfig
    z_loss: Natural = 0.0
    label_smoothing: Rate = 0.0
    logits_chunk: Count | Literal['auto'] | None = 'auto'
    aux_loss_factor: Natural = 0.01
    router_z_loss_factor: Natural = 0.0

    family = 'llm'
    title = 'decoder-only model'
    telltale = 'decoder/layers_0/self_attention/key/kernel'
    head = ('decoder/logits_dense',)
    facts = tuple(f.name for f in dataclasses.fields(DecoderConfig) if f.name not in _SHAPES | _FORM | _EXPERTS)
    inputs = ('tokens',)
    blocks = ('layers',)
    components = ('mlp', 'self_attention')
    prompts = 'continued'
    moe_fields = ('moe', 'attention_moe')
    told = ('moe_output_bias',)
    settings = 'models/llm.gin'
    network = DecoderOnly

    def __post_init__(self):
        schema.validate(self, {})

    @classmethod
    def from_leaves(cls, path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> 'CausalLM':
        """See `models.Model`. Facts must tell the width of a head."""
        if 'head_dim' not in facts:
            raise UserError(
                f'{path} does not tell the width of its attention heads: only checkpoints with a configuration can be read.'
            )
        vocab_size, emb_dim = shapes['token_embedder/embedding']
        attention = 'decoder/layers_0/self_attention'
        queries = [f'{attention}/query/kernel', f'{attention}/expert/query/kernel']
        query = next((name for name in queries if name in shapes), queries[0])
        config = known_facts(path, DecoderConfig, facts, cls.facts) | {
            'vocab_size': vocab_size,
            'emb_dim': emb_dim,
            'num_heads': shapes[query][-1] // facts['head_dim'],
            'num_kv_heads': shapes[f'{attention}/key/kernel'][1] // facts['head_dim'],
            'mlp_dim': mlp_width(shapes, r'/mlp/(expert/)?wo/kernel$'),
            'num_layers': count_layers(shapes, r'decoder/layers_(\d+)/'),
            'dtype': 'float32',
        }
        return cls(DecoderConfig(**config))

    def smallest_batch(self) -> BatchSpec:
        """See `models.Model`."""
        multiples = (moe.groups_multiple_of for moe in (self.config.moe, self.config.attention_moe) if moe is not None)
        return {'tokens': ((math.lcm(*multiples), 1), 'int32')}

    def init(self, rng: jax.Array, batch_spec: BatchSpec) -> Mapping[str, Any]:
        """See `models.Model`. Parameters do not depend on the sizes in `batch_spec`."""
        return self.module().init(rng, jnp.ones(batch_spec['tokens'][0], jnp.int32))['params']

    def sample_inputs(self) -> dict[str, np.ndarray]:
        """Returns two sequences of random tokens; see `models.Model`."""
        tokens = np.random.default_rng(0).integers(self.config.vocab_size, size=_SAMPLE, dtype=np.int32)
        return {'tokens': tokens}

    def loss_normalizer(self, batch: Batch) -> jax.Array:
        """See `models.Model`; the sum of the targets' weights."""
        return jnp.maximum(batch['loss_weights'].astype(jnp.float32).sum(), 1.0)

    def forward(
        self, params: Any, batch: Batch, rng: jax.Array | None, *, training: bool, num_microbatches: int = 1
    ) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
        """See `models.Model`; sums are over target tokens."""
        rngs = {} if rng is None else dict(zip(('dropout', 'jitter'), jax.random.split(rng), strict=True))
        inputs = {name: batch[name] for name in ('tokens', *_OPTIONAL) if name in batch}
        x_BxLxD, written = self.module(num_microbatches).apply(
            {'params': params}, **inputs, training=training, features_only=True, rngs=rngs, mutable=[METRICS]
        )
        sums = head_sums(
            head_of(self.config, params),
            x_BxLxD,
            batch['targets'],
            batch['loss_weights'],
            chunk=self.logits_chunk,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing if training else 0.0,
        )
        return sums, *self.moe_loss(written)

    def logits(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
        """Computes the logits of the next tokens, float32 (B, L, V), at evaluation; see `models.Model`.

        Args:
          params: of this model.
          batch: `tokens` (B, L), int32. Optional: `positions` (B, L), int32; `segment_ids` (B, L), int32, of packed documents,
            which do not see each other; `mask` (B, L), bool, False at padding on either side, whose logits are arbitrary. No
            token id means padding.

        Raises:
          UserError: a feature is missing, or has another type or shape.
        """
        features = read_features(batch, self.inputs, _OPTIONAL)
        shape = features['tokens'].shape
        for name, array in features.items():
            whole = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
            if array.ndim != 2 or array.shape != shape or not whole:
                raise UserError(
                    f'{name} has type {array.dtype.name} and shape {array.shape}, but must hold '
                    f'{"truth values" if name == "mask" else "whole numbers"} (batch, length), as many as tokens.'
                )
        if 'mask' in features:
            features['mask'] = features['mask'] != 0
        return self.module().apply({'params': params}, **features, training=False)

    def prefill(self, params: Any, tokens: jax.Array, mask: jax.Array, max_new_tokens: int) -> tuple[jax.Array, Cache]:
        """See `models.Model`. All tokens but the last of a prompt are read at once."""
        if tokens.shape[1] == 1:  # nothing to read makes no cache
            tokens, mask = (jnp.pad(x, ((0, 0), (1, 0))) for x in (tokens, mask))
        _, cache = self._append(params, tokens[:, :-1], mask[:, :-1], tokens.shape[1] - 1 + max_new_tokens, {})
        return tokens[:, -1], cache

    def decode(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """See `models.Model`."""
        logits_Bx1xV, cache = self._append(params, tokens, None, cache['real'].shape[1], cache)
        return logits_Bx1xV[:, 0], cache

    def teacher_forced(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """See `models.protocol.Continuing`."""
        return self._append(params, tokens, mask, tokens.shape[1], {})[0]

    def _append(
        self, params: Any, tokens: jax.Array, mask: jax.Array | None, max_length: int, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        variables = {'params': params} | ({'cache': cache} if cache else {})
        logits_BxLxV, written = self.module().apply(
            variables, tokens, mask=mask, max_length=max_length, mutable=['cache']
        )
        return logits_BxLxV, written['cache']

    def forward_flops(self, batch_spec: BatchSpec, *, training: bool) -> dict[str, float]:
        """See `models.Model`. Attention counts all pairs of positions, also those that the mask hides."""
        c = self.config
        batch, length = batch_spec['tokens'][0]
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        projections = 2 * cost.matmul(batch * length, c.emb_dim, heads + kv_heads)
        scores = 2 * batch * cost.matmul(length, heads, length)
        layers, matrices = c.layer_moe(), len(c.mlp_activations) + 1
        parts = collections.Counter(attention=c.num_layers * (projections + scores))
        parts.update(cost.mlps(layers, batch * length, c.emb_dim, c.mlp_dim, matrices, training=training))
        if c.attention_moe is not None:
            routing = cost.routing(c.attention_moe, batch * length, c.emb_dim, training=training)
            parts.update({name: c.num_layers * flops for name, flops in routing.items()})
        return {**parts, 'logits': cost.matmul(batch * length, c.emb_dim, c.vocab_size)}

    def moe_layers(self) -> dict[str, MoE]:
        """See `models.Model`."""
        layers: dict[str, MoE] = {}
        for i, kind in enumerate(self.config.kinds()):
            both = (('self_attention', kind.attention_moe), ('mlp', kind.moe))
            layers |= {f'decoder/layers_{i}/{name}': moe for name, moe in both if moe is not None}
        return layers

    def moe_module(self, path: str) -> nn.Module:
        """See `models.Model`. Of attention experts only the router, since their output depends on other tokens."""
        return RouterOnly(self.config.attention_moe) if is_attention(path) else super().moe_module(path)

    def num_tokens(self, batch_spec: BatchSpec) -> int:
        """See `models.Model`."""
        return math.prod(batch_spec['tokens'][0])

    def moe_tokens(self, batch_spec: BatchSpec) -> dict[str, int]:
        """See `models.Model`."""
        return dict.fromkeys(self.moe_layers(), self.num_tokens(batch_spec))

    def real_tokens(self, batch: Batch, paths: tuple[str, ...]) -> dict[str, jax.Array]:
        """See `models.Model`."""
        mask = batch['mask'] if 'mask' in batch else jnp.ones(batch['tokens'].shape, bool)
        return dict.fromkeys(paths, mask)

    def token_kinds(self, batch: Batch) -> dict[str, tuple[jax.Array, int]]:
        """See `models.Model`; kinds are token ids."""
        return dict.fromkeys(self.moe_layers(), (batch['tokens'], self.config.vocab_size))

    def check_data(self, data: Any) -> None:
        """Raises UserError unless the task is next-token prediction and its vocabulary fits the embedding."""
        if not {'tokens', 'targets', 'loss_weights'} <= data.batch_spec().keys():
            raise UserError(
                'the model is decoder-only, but TRAIN_DATASET or EVAL_DATASET does not predict next tokens: choose another task.'
            )
        size = getattr(data, 'vocabulary_size', None)
        if size is not None and size > self.config.vocab_size:
            raise UserError(
                f"NUM_EMBEDDINGS = {self.config.vocab_size} is smaller than the task's vocabulary of {size} tokens: raise it, or "
                'use the tokenizer that the model was trained with.'
            )
