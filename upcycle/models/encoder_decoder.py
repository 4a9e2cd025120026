"""T5 for the trainer: its loss, its cost and its MoE layers. As T5X's `EncoderDecoderModel`."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from upcycle import cost, schema
from upcycle.errors import UserError
from upcycle.models.base import BaseModel, known_facts, read_features
from upcycle.models.decoding import FIRST_ID, t5_decode, t5_start
from upcycle.models.generation import Cache
from upcycle.models.head import head_sums
from upcycle.models.leaves import count_layers, mlp_width
from upcycle.models.protocol import BatchSpec
from upcycle.models.t5 import T5Config, Transformer, head_of
from upcycle.moe.layer import METRICS
from upcycle.moe.routers.base import MoE
from upcycle.schema import Count, Natural, Rate

Batch = Mapping[str, jax.Array]
_INPUTS = (
    'encoder_input_tokens',
    'decoder_input_tokens',
    'decoder_target_tokens',
    'encoder_segment_ids',
    'decoder_segment_ids',
)
_POSITION_BIASES = '/relpos_bias/rel_embedding'


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel(BaseModel):
    """A T5 with its loss.

    Attributes:
      config: sizes and MoE layers.
      z_loss: weight of the logits z-loss [Z_LOSS].
      label_smoothing: share of a label spread over the vocabulary, in training [LABEL_SMOOTHING].
      logits_chunk: most entries of a device's vocabulary whose logits the loss computes at once; None: all; 'auto': all up to
        1 GiB of logits on a device, else 512 MiB at once [LOGITS_CHUNK].
      loss_normalizing_factor: divides the summed loss: a number, 'NUM_REAL_TARGET_TOKENS', or None for 1
        [LOSS_NORMALIZING_FACTOR]. Adafactor does not depend on it, but the balance with the auxiliary losses does.
      aux_loss_factor: weight of the load-balance loss, averaged over all MoE layers [AUX_LOSS_FACTOR].
      router_z_loss_factor: weight of the routers' z-loss, averaged over all MoE layers [ROUTER_Z_LOSS_FACTOR].
    """

    config: T5Config
    z_loss: Natural = 1e-4
    label_smoothing: Rate = 0.0
    logits_chunk: Count | Literal['auto'] | None = 'auto'
    loss_normalizing_factor: float | Literal['NUM_REAL_TARGET_TOKENS'] | None = 'NUM_REAL_TARGET_TOKENS'
    aux_loss_factor: Natural = 0.01
    router_z_loss_factor: Natural = 0.0

    family = 't5'
    title = 'T5'
    telltale = 'encoder/encoder_norm/scale'
    head = ('decoder/logits_dense',)
    facts = ('num_heads', 'head_dim', 'mlp_activations', 'logits_via_embedding')
    inputs = ('encoder_input_tokens', 'decoder_input_tokens')
    blocks = ('layers',)
    components = ('mlp', 'attention', 'self_attention', 'encoder_decoder_attention')
    prompts = 'answered'
    moe_fields = ('encoder_moe', 'decoder_moe')
    told = ('position_biases',)
    settings = 'models/t5_1_1.gin'
    network = Transformer

    def __post_init__(self):
        schema.validate(self, {})

    @classmethod
    def from_leaves(
        cls, path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]
    ) -> 'EncoderDecoderModel':
        """See `models.Model`."""
        vocab_size, emb_dim = shapes['token_embedder/embedding']
        first = '/layers_0' if facts.get('position_biases') == 'every_layer' else ''
        heads = shapes[f'encoder{first}{_POSITION_BIASES}'][0]
        joined = shapes['encoder/layers_0/attention/query/kernel'][1]
        gated = any(re.search(r'/mlp/(expert/)?wi_0/kernel$', name) for name in shapes)
        config = {
            'vocab_size': vocab_size,
            'emb_dim': emb_dim,
            'num_heads': heads,
            'head_dim': joined // heads,
            'mlp_dim': mlp_width(shapes, r'/mlp/(expert/)?wo/kernel$'),
            'num_encoder_layers': count_layers(shapes, r'encoder/layers_(\d+)/'),
            'num_decoder_layers': count_layers(shapes, r'decoder/layers_(\d+)/'),
            'mlp_activations': ('gelu', 'linear') if gated else ('relu',),
            'logits_via_embedding': 'decoder/logits_dense/kernel' not in shapes,
            'dtype': 'float32',
        }
        return cls(T5Config(**config | known_facts(path, T5Config, facts, ('mlp_activations', 'position_biases'))))

    @classmethod
    def facts_in(cls, path: str, names: Iterable[str]) -> dict[str, Any]:
        """See `models.Model`; whether every layer has position biases."""
        tables = {name for name in names if name.endswith(_POSITION_BIASES)}
        in_layers = {name for name in tables if '/layers_' in name}
        if not tables:
            return {}
        if len(in_layers) not in (0, len(tables)):
            raise UserError(
                f'{path} has position biases in every layer ({min(in_layers)}) and for a whole stack '
                f'({min(tables - in_layers)}), and POSITION_BIASES is one for both stacks.'
            )
        return {'position_biases': 'every_layer' if in_layers else 'shared'}

    @classmethod
    def files_that_fit(cls, facts: Mapping[str, Any]) -> str:
        """See `models.Model`; T5 1.0 has its own files."""
        is_t5_1_0 = facts.get('mlp_activations') in (['relu'], ('relu',)) and facts.get('logits_via_embedding')
        return 'models/t5_1_0_base.gin' if is_t5_1_0 else ''

    def smallest_batch(self) -> BatchSpec:
        """See `models.Model`."""
        moes = (self.config.encoder_moe, self.config.decoder_moe)
        examples = math.lcm(*(moe.groups_multiple_of for moe in moes if moe))
        return dict.fromkeys(_INPUTS[:3], ((examples, 1), 'int32'))

    def init(self, rng: jax.Array, batch_spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `models.Model`. Parameters do not depend on the sizes in `batch_spec`."""
        tokens = {name: jnp.ones(batch_spec[name][0], jnp.int32) for name in _INPUTS[:3]}
        return self.module().init(rng, **tokens)['params']

    def loss_normalizer(self, batch: Batch) -> jax.Array:
        """See `models.Model`."""
        if self.loss_normalizing_factor == 'NUM_REAL_TARGET_TOKENS':
            return jnp.maximum(batch['decoder_loss_weights'].astype(jnp.float32).sum(), 1.0)
        return jnp.asarray(self.loss_normalizing_factor or 1.0, jnp.float32)

    def forward(
        self, params: Any, batch: Batch, rng: jax.Array | None, *, training: bool, num_microbatches: int = 1
    ) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
        """See `models.Model`; sums are over target tokens."""
        rngs = {} if rng is None else dict(zip(('dropout', 'jitter'), jax.random.split(rng), strict=True))
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        x_BxLxD, written = self.module(num_microbatches).apply(
            {'params': params}, **inputs, training=training, features_only=True, rngs=rngs, mutable=[METRICS]
        )
        sums = head_sums(
            head_of(self.config, params),
            x_BxLxD,
            batch['decoder_target_tokens'],
            batch['decoder_loss_weights'],
            chunk=self.logits_chunk,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        return sums, *self.moe_loss(written)

    def logits(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
        """Computes the logits of every target, float32 (B, L, V), at evaluation; see `models.Model`.

        Args:
          params: of this model.
          batch: `encoder_input_tokens` (B, K), int32, 0 at padding; `decoder_input_tokens` (B, L), the targets shifted right by
            one with 0 in front. Optional: `decoder_target_tokens` (B, L), 0 at padding, so that padded targets take no slots of
            experts (without it every position is real); for packed sequences `encoder_segment_ids` (B, K) and
            `decoder_segment_ids` (B, L).

        Raises:
          UserError: a feature is missing, or is not a matrix of whole numbers.
        """
        tokens = read_features(batch, self.inputs, _INPUTS[len(self.inputs) :])
        for name, array in tokens.items():
            if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
                raise UserError(
                    f'{name} has type {array.dtype.name} and shape {array.shape}, but must hold whole numbers (batch, length).'
                )
        return self.module().apply({'params': params}, **tokens, training=False)

    def prefill(self, params: Any, tokens: jax.Array, mask: jax.Array, max_new_tokens: int) -> tuple[jax.Array, Cache]:
        """See `models.Model`. Prompts are the encoder's inputs."""
        inputs = jnp.where(mask, tokens, 0)
        return jnp.full(len(tokens), FIRST_ID), t5_start(self.module(), params, inputs, max_length=max_new_tokens)

    def decode(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """See `models.Model`."""
        fixed, cache = cache
        logits_BxV, cache = t5_decode(self.module(), params, fixed, tokens, cache)
        return logits_BxV, (fixed, cache)

    def forward_flops(self, batch_spec: Mapping[str, Any], *, training: bool) -> dict[str, float]:
        """See `models.Model`."""
        c = self.config
        batch, inputs = batch_spec['encoder_input_tokens'][0]
        targets = batch_spec['decoder_input_tokens'][0][1]
        heads = c.num_heads * c.head_dim
        matrices = len(c.mlp_activations) + 1
        flops = {
            'encoder/attention': c.num_encoder_layers * cost.attention(batch, inputs, inputs, c.emb_dim, heads),
            'decoder/attention': c.num_decoder_layers * cost.attention(batch, targets, targets, c.emb_dim, heads),
            'decoder/cross_attention': c.num_decoder_layers * cost.attention(batch, targets, inputs, c.emb_dim, heads),
            'logits': cost.matmul(batch * targets, c.emb_dim, c.vocab_size),
        }
        for stack, tokens in (('encoder', batch * inputs), ('decoder', batch * targets)):
            parts = cost.mlps(c.layer_moe(stack), tokens, c.emb_dim, c.mlp_dim, matrices, training=training)
            flops |= {f'{stack}/{part}': count for part, count in parts.items()}
        return flops

    def moe_layers(self) -> dict[str, MoE]:
        """See `models.Model`."""
        return {
            f'{stack}/layers_{i}/mlp': moe
            for stack in ('encoder', 'decoder')
            for i, moe in enumerate(self.config.layer_moe(stack))
            if moe is not None
        }

    def num_tokens(self, batch_spec: Mapping[str, Any]) -> int:
        """See `models.Model`; inputs and targets."""
        return sum(math.prod(batch_spec[f'{stack}_input_tokens'][0]) for stack in ('encoder', 'decoder'))

    def moe_tokens(self, batch_spec: Mapping[str, Any]) -> dict[str, int]:
        """See `models.Model`."""
        tokens = {stack: math.prod(batch_spec[f'{stack}_input_tokens'][0]) for stack in ('encoder', 'decoder')}
        return {path: tokens[path.split('/')[0]] for path in self.moe_layers()}

    def real_tokens(self, batch: Batch, paths: tuple[str, ...]) -> dict[str, jax.Array]:
        """See `models.Model`."""
        real = {'encoder': batch['encoder_input_tokens'] > 0, 'decoder': batch['decoder_target_tokens'] > 0}
        return {path: real[path.split('/')[0]] for path in paths}

    def token_kinds(self, batch: Batch) -> dict[str, tuple[jax.Array, int]]:
        """See `models.Model`; kinds are token ids of the layer's stack."""
        return {
            path: (batch[f'{path.split("/")[0]}_input_tokens'], self.config.vocab_size) for path in self.moe_layers()
        }

    def check_data(self, data: Any) -> None:
        """Raises UserError unless the task is text, its vocabulary fits the embedding, and Soft MoE does not mix examples."""
        if not {*_INPUTS[:3]} <= data.batch_spec().keys():
            raise UserError(
                'the model is a T5, but TRAIN_DATASET or EVAL_DATASET is not a text task: choose a text task.'
            )
        for moe in filter(None, self.config.layer_moe('encoder')):
            batch, length = data.batch_spec()['encoder_input_tokens'][0]
            moe.check_examples(batch * length, length, f'GROUP_SIZE = {length}')
        size = getattr(data, 'vocabulary_size', None)
        if size is not None and size > self.config.vocab_size:
            raise UserError(
                f"NUM_EMBEDDINGS = {self.config.vocab_size} is smaller than the task's vocabulary of {size} tokens, sentinels "
                'included: raise it, or use the vocabulary that the model was trained with.'
            )
        if (check := getattr(data, 'check_lengths', None)) is not None:
            check()
