"""The configuration of decoder-only models."""

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from upcycle import schema
from upcycle.errors import refuse
from upcycle.models.attention_experts import refusals
from upcycle.models.layers import ACTIVATION_FUNCTIONS, MlpBlock
from upcycle.models.rope import Rope, RopeType
from upcycle.models.stack import Remat
from upcycle.moe.groups import moe_of_layers, sparse_layers
from upcycle.moe.layer import MoELayer, replace_mlp
from upcycle.moe.routers.base import MoE
from upcycle.schema import Count, Depth, FloatType, Positive, Rate, shown

_MACROS = {'vocab_size': 'NUM_EMBEDDINGS', 'emb_dim': 'EMBED_DIM', 'dtype': 'ACTIVATION_DTYPE'}


class NormPlacement(enum.StrEnum):
    """Where attention and MLP have RMS norms."""

    PRE = 'pre'  # on the input: most models
    POST = 'post'  # on the output, before it is added: OLMo 2
    BOTH = 'both'  # on both: Gemma 2 and 3


class QKNorm(enum.StrEnum):
    """RMS norms of queries and keys."""

    NONE = 'none'
    HEAD = 'head'  # of each head: Qwen3, Gemma 3
    PROJECTION = 'projection'  # of all heads together: OLMo 2, OLMoE


class LayerKind(NamedTuple):
    """What differs between the layers of a stack.

    Attributes:
      moe: the MoE layer; None for a dense MLP.
      window: of attention; None for full attention.
      rope: whether queries and keys are rotated.
      attention_moe: the attention experts; None for dense attention.
    """

    moe: MoE | None
    window: int | None
    rope: bool
    attention_moe: MoE | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and function of a decoder-only model, and its MoE layers. Gin macros in brackets.

    Settings that mean the same are stored in one form: a list of all layers as 'all', an attention scale of head_dim ** -0.5 as
    None.

    Attributes:
      vocab_size: rows of the embedding [NUM_EMBEDDINGS].
      emb_dim: D, the width of a token [EMBED_DIM].
      num_heads: H, query heads [NUM_HEADS].
      num_kv_heads: key and value heads, a divisor of `num_heads` [NUM_KV_HEADS].
      head_dim: width of an attention head [HEAD_DIM].
      mlp_dim: F, the width of a dense MLP [MLP_DIM].
      num_layers: layers of the stack [NUM_LAYERS].
      mlp_activations: ('silu', 'linear') for SwiGLU, ('gelu', 'linear') for GeGLU [MLP_ACTIVATIONS].
      tied_embeddings: logits are products with the embedding [TIED_EMBEDDINGS].
      norm_placement: see `NormPlacement` [NORM_PLACEMENT].
      norm_epsilon: of all RMS norms [NORM_EPSILON].
      final_norm_epsilon: of the last norm; None for norm_epsilon [FINAL_NORM_EPSILON].
      norm_offset: added to the scales of all norms (Gemma: 1) [NORM_OFFSET].
      qk_norm: see `QKNorm` [QK_NORM].
      qkv_bias, out_bias, mlp_bias: biases of query, key and value, of attention's output, and of MLPs
        [QKV_BIAS, OUT_BIAS, MLP_BIAS].
      clip_qkv: clamps queries, keys and values to this size; None for no limit [CLIP_QKV].
      attention_scale: factor of attention logits; None for head_dim ** -0.5 [ATTENTION_SCALE].
      attention_soft_cap, logits_soft_cap: c limits attention logits (logits) x to c * tanh(x / c); None for no limit
        [ATTENTION_SOFT_CAP, LOGITS_SOFT_CAP].
      embedding_multiplier: factor of the embedding (Gemma: sqrt(D)) [EMBEDDING_MULTIPLIER].
      residual_multiplier: factor of the outputs of attention and MLP [RESIDUAL_MULTIPLIER].
      logits_divisor: divides the logits [LOGITS_DIVISOR].
      window: w lets a query see w keys, itself included; None for all earlier ones [WINDOW].
      window_layers: layers with the window: 'all', 'none', or a list of indices [WINDOW_LAYERS].
      rope_theta: base of the rotary frequencies [ROPE_THETA].
      rope_type: see `RopeType` [ROPE_TYPE].
      rope_factor: length divided by that of pretraining, of all types but 'default' [ROPE_FACTOR].
      rope_low_freq_factor, rope_high_freq_factor: of 'llama3' [ROPE_LOW_FREQ_FACTOR, ROPE_HIGH_FREQ_FACTOR].
      rope_original_length: tokens of pretraining, of 'llama3' and 'yarn' [ROPE_ORIGINAL_LENGTH].
      rope_beta_fast, rope_beta_slow, rope_truncate: ends of the ramp of 'yarn', and whether they are rounded
        [ROPE_BETA_FAST, ROPE_BETA_SLOW, ROPE_TRUNCATE].
      rope_attention_factor: factor of sine and cosine of 'yarn'; None for 0.1 ln(rope_factor) + 1 [ROPE_ATTENTION_FACTOR].
      rope_dims: rotated dimensions of a head; None for all [ROPE_DIMS].
      rope_layers: layers with rotary positions: 'all', 'none', or a list of indices [ROPE_LAYERS].
      window_rope_theta: base of layers with the window, which are then not rescaled (Gemma 3); None for that of the others
        [WINDOW_ROPE_THETA].
      dtype: type of activations [ACTIVATION_DTYPE]; parameters are float32.
      dropout_rate: probability that an activation is dropped in training [DROPOUT_RATE].
      expert_dropout_rate: dropout_rate inside experts; None for the same rate [EXPERT_DROPOUT_RATE].
      remat: what the backward pass recomputes, see `models.stack.Remat` [REMAT].
      scan_layers: compile one block of layers and loop over it, for deep models [SCAN_LAYERS].
      moe: MoE layers; None for a dense model [MOE].
      moe_layers: which layers: 'all', 'none', 'every_other' (1, 3, 5, ...), 'last_half', 'last_N' or a list of indices
        [MOE_LAYERS].
      moe_output_bias: a bias of the output of every MoE layer, attention experts included [MOE_OUTPUT_BIAS].
      attention_moe: attention experts in every layer, see `attention_experts.AttentionExperts`; None for dense attention. Then
        num_heads is num_selected_experts * num_kv_heads, the query heads of a token [ATTENTION_MOE].
    """

    vocab_size: Count
    emb_dim: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_dim: Count
    num_layers: Depth
    mlp_activations: Sequence[str] = ('silu', 'linear')
    tied_embeddings: bool = False
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_epsilon: Positive = 1e-6
    final_norm_epsilon: Positive | None = None
    norm_offset: float = 0.0
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: Positive | None = None
    attention_scale: Positive | None = None
    attention_soft_cap: Positive | None = None
    logits_soft_cap: Positive | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: Positive = 1.0
    window: Count | None = None
    window_layers: str | Sequence[int] = 'all'
    rope_theta: Positive = 10000.0
    rope_type: RopeType = RopeType.DEFAULT
    rope_factor: Positive = 1.0
    rope_low_freq_factor: Positive = 1.0
    rope_high_freq_factor: Positive = 4.0
    rope_original_length: Count | None = None
    rope_beta_fast: Positive = 32.0
    rope_beta_slow: Positive = 1.0
    rope_attention_factor: Positive | None = None
    rope_truncate: bool = True
    rope_dims: Count | None = None
    rope_layers: str | Sequence[int] = 'all'
    window_rope_theta: Positive | None = None
    dtype: FloatType = 'bfloat16'
    dropout_rate: Rate = 0.0
    expert_dropout_rate: Rate | None = None
    remat: Remat = Remat.NONE
    scan_layers: bool = False
    moe: MoE | None = None
    moe_layers: str | Sequence[int] = 'all'
    moe_output_bias: bool = False
    attention_moe: MoE | None = None

    def __post_init__(self):
        schema.validate(self, _MACROS)
        refuse(self._invalid())
        for name in ('window_layers', 'rope_layers'):
            layers = sparse_layers(getattr(self, name), self.num_layers, name.upper())
            every = {0: 'none', self.num_layers: 'all'}
            object.__setattr__(self, name, every.get(len(layers), layers))
        same = {
            'window': (self.window_layers, 'none'),
            'attention_scale': (self.attention_scale, self.head_dim**-0.5),
            'final_norm_epsilon': (self.final_norm_epsilon, self.norm_epsilon),
            'rope_dims': (self.rope_dims, self.head_dim),
        }
        for name, (value, default) in same.items():
            if value == default:
                object.__setattr__(self, name, None)
        for layers, of in (('window_layers', self.window), ('moe_layers', self.moe)):
            if of is None:
                object.__setattr__(self, layers, 'all')
        for moe in filter(None, self.layer_moe()):
            moe.expert_width(self.mlp_dim)
        for name in ('moe', 'attention_moe'):
            moe = getattr(self, name)
            if moe is not None and not moe.causal:
                refuse(moe.looks_ahead())
                object.__setattr__(self, name, dataclasses.replace(moe, causal=True))

    def _invalid(self) -> Iterator[str]:
        """Yields a sentence for each contradiction between fields."""
        if not self.mlp_activations or not ACTIVATION_FUNCTIONS.keys() >= {*self.mlp_activations}:
            yield (
                f'MLP_ACTIVATIONS = {shown(self.mlp_activations)} must be one or several of '
                f"{', '.join(ACTIVATION_FUNCTIONS)}, such as ('silu', 'linear')."
            )
        if self.num_heads % self.num_kv_heads:
            yield f'NUM_KV_HEADS = {self.num_kv_heads} must divide NUM_HEADS = {self.num_heads}.'
        dims = self.rope_dims or self.head_dim
        if self.rope_layers != 'none' and (dims % 2 or dims > self.head_dim):
            yield f'ROPE_DIMS = {dims} must be an even number of at most HEAD_DIM = {self.head_dim}.'
        if self.rope_type in (RopeType.LLAMA3, RopeType.YARN) and self.rope_original_length is None:
            yield f"ROPE_TYPE = '{self.rope_type}' needs ROPE_ORIGINAL_LENGTH, the tokens of pretraining."
        if self.rope_type is RopeType.LLAMA3 and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            yield (
                f'ROPE_HIGH_FREQ_FACTOR = {self.rope_high_freq_factor} must be above '
                f'ROPE_LOW_FREQ_FACTOR = {self.rope_low_freq_factor}.'
            )
        if self.window_rope_theta is not None and self.window is None:
            yield f'WINDOW_ROPE_THETA = {self.window_rope_theta} belongs to layers with a window: set WINDOW.'
        if self.attention_moe is not None:
            yield from refusals(self)
        elif self.moe_output_bias and self.moe is None:
            yield 'MOE_OUTPUT_BIAS = True needs MoE layers: set MOE, or turn it off.'

    def layer_moe(self) -> tuple[MoE | None, ...]:
        """Returns the MoE of each layer; None where the MLP is dense."""
        return moe_of_layers(self.moe, self.moe_layers, self.num_layers, 'MOE_LAYERS')

    def kinds(self) -> tuple[LayerKind, ...]:
        """Returns the kind of each layer."""
        windowed = () if self.window is None else sparse_layers(self.window_layers, self.num_layers, 'WINDOW_LAYERS')
        rotated = sparse_layers(self.rope_layers, self.num_layers, 'ROPE_LAYERS')
        return tuple(
            LayerKind(moe, self.window if i in windowed else None, i in rotated, self.attention_moe)
            for i, moe in enumerate(self.layer_moe())
        )

    def rope(self, kind: LayerKind) -> Rope | None:
        """Returns the rotary position embedding of a layer; None without."""
        if not kind.rope:
            return None
        dims = self.rope_dims or self.head_dim
        if kind.window is not None and self.window_rope_theta is not None:
            return Rope(dims, self.window_rope_theta)
        names = {field.name for field in dataclasses.fields(Rope)} - {'dims'}
        return Rope(dims, **{name: getattr(self, f'rope_{name}') for name in names})

    @property
    def mlp_arguments(self) -> dict[str, Any]:
        """Arguments of `MlpBlock` for a dense MLP."""
        return {
            'mlp_dim': self.mlp_dim,
            'activations': self.mlp_activations,
            'dropout_rate': self.dropout_rate,
            'dtype': self.dtype,
            'use_bias': self.mlp_bias,
        }

    def moe_layer(self, moe: MoE, name: str | None = None) -> MoELayer:
        """Returns the module of an MoE layer."""
        # Slots have no order: a dropout mask for all of them would drop a neuron for the whole batch.
        expert = {'dropout_rate': self.expert_dropout_rate, 'dropout_broadcast_axis': None}
        return replace_mlp(moe, MlpBlock, self.mlp_arguments, expert, name, output_bias=self.moe_output_bias)

    def dense(self) -> 'DecoderConfig':
        """Returns the same model with dense attention and MLPs only, each as wide as an expert's."""
        heads = self.num_heads if self.attention_moe is None else self.num_kv_heads
        return dataclasses.replace(self, num_heads=heads, moe=None, attention_moe=None, moe_output_bias=False)
