"""ViT for the trainer: its loss, its cost and its MoE layers."""

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upcycle import cost, schema
from upcycle.errors import UserError
from upcycle.models.base import BaseModel, known_facts, read_features
from upcycle.models.leaves import count_layers, mlp_width
from upcycle.models.protocol import BatchSpec
from upcycle.models.vit import Pooling, VisionTransformer, ViTConfig
from upcycle.moe.layer import METRICS
from upcycle.moe.routers.base import MoE
from upcycle.schema import Natural, Rate

Batch = Mapping[str, jax.Array]


class ClassLoss(enum.StrEnum):
    """Loss of an image."""

    SOFTMAX = 'softmax'  # cross entropy with the labels' distribution
    SIGMOID = 'sigmoid'  # binary cross entropy of every class, summed over classes: several labels for one image


@dataclasses.dataclass(frozen=True)
class ImageClassifier(BaseModel):
    """A ViT with its loss. Gin macros in brackets.

    A batch is `image` (B, height, width, channels), `labels` (B, N), int32 classes of each image padded with -1, and `weights`
    (B,), 0 for rows that only fill up a batch.

    Attributes:
      config: sizes and MoE layers.
      loss: see `ClassLoss` [CLASS_LOSS].
      label_smoothing: share of a label spread over all classes, in training [LABEL_SMOOTHING].
      mixup: mixes each training image and its labels with the previous row's, with a weight drawn for the batch from
        Beta(mixup, mixup) (Zhang et al. 2018, as in big_vision); 0 for no mixup. With NUM_MICROBATCHES above 1 each microbatch
        draws its own weight and mixes its own rows, so the result depends on it [MIXUP].
      aux_loss_factor: weight of the balance loss, averaged over all MoE layers [AUX_LOSS_FACTOR].
      router_z_loss_factor: weight of the routers' z-loss, averaged over all MoE layers [ROUTER_Z_LOSS_FACTOR].
    """

    config: ViTConfig
    loss: ClassLoss = ClassLoss.SOFTMAX
    label_smoothing: Rate = 0.0
    mixup: Natural = 0.0
    aux_loss_factor: Natural = 0.0
    router_z_loss_factor: Natural = 0.0

    family = 'vit'
    title = 'ViT'
    telltale = 'embedding/kernel'
    head = ('head', 'pre_logits')
    lacking = ('head',)  # many checkpoints are backbones
    grids = ('pos_embedding',)
    facts = ('num_heads', 'pooling', 'positions', 'gelu', 'norm_epsilon')
    inputs = ('image',)
    unit = 'image'
    blocks = ('encoderblock',)
    components = ('MlpBlock_0', 'MultiHeadDotProductAttention_0')
    moe_fields = ('moe',)
    told = ('image_channels', 'representation_size')
    settings = 'models/vit.gin'
    network = VisionTransformer

    def __post_init__(self):
        schema.validate(self, {'loss': 'CLASS_LOSS'})

    @classmethod
    def from_leaves(
        cls, path: str, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]
    ) -> 'ImageClassifier':
        """See `models.Model`."""
        patch, _, channels, emb_dim = shapes['embedding/kernel']
        learned = 'pos_embedding' in shapes
        positions = shapes['pos_embedding'][1] if learned else 1
        grid = math.isqrt(positions)
        if grid * grid != positions:
            raise UserError(
                f'{path} has {positions} positions (pos_embedding), which is not a square number: only square images are '
                'supported.'
            )
        config = {
            'num_classes': shapes.get('head/kernel', (0, 1))[1],
            'image_size': grid * patch,
            'patch_size': patch,
            'image_channels': channels,
            'emb_dim': emb_dim,
            'num_heads': shapes['Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'][1],
            'mlp_dim': mlp_width(shapes, r'encoderblock_\d+/MlpBlock_0/(expert/)?Dense_1/kernel$'),
            'num_layers': count_layers(shapes, r'Transformer/encoderblock_(\d+)/'),
            'pooling': 'token' if 'cls' in shapes else 'map' if 'MAPHead_0/probe' in shapes else 'gap',
            'positions': 'learned' if learned else 'sincos2d',
            'representation_size': shapes.get('pre_logits/kernel', (0, None))[1],
            'dtype': 'float32',
        }
        return cls(ViTConfig(**config | known_facts(path, ViTConfig, facts, ('gelu', 'norm_epsilon'))))

    @classmethod
    def sizes(cls, names: Collection[str], problems: Sequence[str]) -> tuple[str, ...]:
        """See `models.Model`. A backbone has no number of classes; only positions depend on the size of images."""
        told_only_by = {'image_size': 'pos_embedding', 'num_classes': 'head/'}
        fields = (*super().sizes(names, problems), *cls.told)
        return tuple(
            field
            for field in fields
            if field not in ('gelu', 'norm_epsilon')
            and (field != 'num_classes' or 'params/head/kernel' in names)
            and (field not in told_only_by or any(told_only_by[field] in problem for problem in problems))
        )

    def smallest_batch(self) -> BatchSpec:
        """See `models.Model`."""
        c = self.config
        examples = c.moe.groups_multiple_of if c.moe else 1
        return {'image': ((examples, c.image_size, c.image_size, c.image_channels), 'float32')}

    def init(self, rng: jax.Array, batch_spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `models.Model`."""
        return self.module().init(rng, jnp.zeros(self._image_shape(batch_spec), jnp.float32))['params']

    def loss_normalizer(self, batch: Batch) -> jax.Array:
        """See `models.Model`; the number of real images."""
        return jnp.maximum(batch['weights'].astype(jnp.float32).sum(), 1.0)

    def forward(
        self, params: Any, batch: Batch, rng: jax.Array | None, *, training: bool, num_microbatches: int = 1
    ) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
        """See `models.Model`; sums are over images, and `correct` counts top classes that are labels."""
        rngs = {}
        image_BxHxWxC = batch['image']
        labels_BxV = one_hot_labels(batch['labels'], self.config.num_classes)
        targets_BxV = self._targets(labels_BxV, training)
        if rng is not None:
            *keys, mixup_key = jax.random.split(rng, 3)
            rngs = dict(zip(('dropout', 'jitter'), keys, strict=True))
            if training and self.mixup > 0:
                share = jax.random.beta(mixup_key, self.mixup, self.mixup)
                image_BxHxWxC, targets_BxV = (
                    share * x + (1 - share) * jnp.roll(x, 1, axis=0) for x in (image_BxHxWxC, targets_BxV)
                )
        weights_B = batch['weights'].astype(jnp.float32)
        logits_BxV, written = self.module(num_microbatches).apply(
            {'params': params}, image_BxHxWxC, weights_B > 0, training=training, rngs=rngs, mutable=[METRICS]
        )
        top_B = jnp.argmax(logits_BxV, axis=-1)
        correct_B = jnp.take_along_axis(labels_BxV, top_B[:, None], axis=-1)[:, 0]
        sums = {
            'loss': (self._loss(logits_BxV, targets_BxV) * weights_B).sum(),
            'z_loss': jnp.zeros(()),
            'correct': (correct_B * weights_B).sum(),
            'weight': weights_B.sum(),
        }
        return sums, *self.moe_loss(written)

    def logits(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
        """Computes the logits of every class, float32 (B, classes), at evaluation; see `models.Model`.

        Args:
          params: of this model.
          batch: `image` (B, height, width, channels), scaled as in training (usually to [-1, 1]); optional `weights` (B,), 0 for
            rows that only fill up a batch.

        Raises:
          UserError: images are missing or of another shape than the model's, or the parameters have no head.
        """
        images = self._images(batch)
        if 'head' not in params:
            raise UserError(
                'the parameters have no head (they are a backbone): use `features` for the input of a head.'
            )
        return self.module().apply({'params': params}, *images)

    def features(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
        """Computes the input of the head, float32 (B, D), at the evaluation capacity, for few-shot probes.

        Args:
          params: of this model; a head is not needed.
          batch: as for `logits`.
        """
        return self.module().apply({'params': params}, *self._images(batch), features_only=True)

    def _images(self, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """Returns the images of a batch, and which of them are real; None if all are."""
        c = self.config
        features = read_features(batch, self.inputs, ('weights',))
        if features['image'].shape[1:] != (c.image_size, c.image_size, c.image_channels):
            raise UserError(
                f'image has shape {features["image"].shape}, but must be (batch, {c.image_size}, {c.image_size}, '
                f'{c.image_channels}).'
            )
        return features['image'], features['weights'] > 0 if 'weights' in features else None

    def _targets(self, labels_BxV: jax.Array, training: bool) -> jax.Array:
        targets_BxV = labels_BxV
        if self.loss is ClassLoss.SOFTMAX:
            targets_BxV = labels_BxV / jnp.maximum(labels_BxV.sum(axis=-1, keepdims=True), 1.0)
        if training and self.label_smoothing:
            spread = 1.0 / self.config.num_classes if self.loss is ClassLoss.SOFTMAX else 0.5
            targets_BxV = (1.0 - self.label_smoothing) * targets_BxV + self.label_smoothing * spread
        return targets_BxV

    def _loss(self, logits_BxV: jax.Array, targets_BxV: jax.Array) -> jax.Array:
        """(B,)"""
        if self.loss is ClassLoss.SOFTMAX:
            return -(targets_BxV * jax.nn.log_softmax(logits_BxV)).sum(axis=-1)
        yes_BxV, no_BxV = jax.nn.log_sigmoid(logits_BxV), jax.nn.log_sigmoid(-logits_BxV)
        return -(targets_BxV * yes_BxV + (1.0 - targets_BxV) * no_BxV).sum(axis=-1)

    def forward_flops(self, batch_spec: Mapping[str, Any], *, training: bool) -> dict[str, float]:
        """See `models.Model`."""
        c = self.config
        images = batch_spec['image'][0][0]
        tokens = images * c.num_tokens
        flops = {
            'embedding': cost.matmul(images * c.grid**2, c.patch_size**2 * c.image_channels, c.emb_dim),
            'attention': c.num_layers * cost.attention(images, c.num_tokens, c.num_tokens, c.emb_dim, c.emb_dim),
        }
        flops |= cost.mlps(c.layer_moe(), tokens, c.emb_dim, c.mlp_dim, matrices=2, training=training)
        head = cost.matmul(images, c.representation_size or c.emb_dim, c.num_classes)
        if c.representation_size is not None:
            head += cost.matmul(images, c.emb_dim, c.representation_size)
        if c.pooling is Pooling.MAP:
            # Keys and values of all tokens; query, output and MLP of one.
            head += 2 * cost.matmul(tokens, c.emb_dim, c.emb_dim) + 2 * images * cost.matmul(1, c.emb_dim, c.num_tokens)
            head += 2 * cost.matmul(images, c.emb_dim, c.emb_dim) + cost.mlp(images, c.emb_dim, c.mlp_dim, matrices=2)
        return flops | {'head': head}

    def moe_layers(self) -> dict[str, MoE]:
        """See `models.Model`."""
        return {
            f'Transformer/encoderblock_{i}/MlpBlock_0': moe
            for i, moe in enumerate(self.config.layer_moe())
            if moe is not None
        }

    def num_tokens(self, batch_spec: Mapping[str, Any]) -> int:
        """See `models.Model`; patches and class tokens."""
        return batch_spec['image'][0][0] * self.config.num_tokens

    def num_units(self, batch_spec: Mapping[str, Any]) -> int:
        """See `models.Model`; the images."""
        return batch_spec['image'][0][0]

    def moe_tokens(self, batch_spec: Mapping[str, Any]) -> dict[str, int]:
        """See `models.Model`."""
        return dict.fromkeys(self.moe_layers(), self.num_tokens(batch_spec))

    def real_tokens(self, batch: Batch, paths: tuple[str, ...]) -> dict[str, jax.Array]:
        """See `models.Model`; all tokens of real images."""
        shape = (batch['image'].shape[0], self.config.num_tokens)
        return dict.fromkeys(paths, jnp.broadcast_to(batch['weights'][:, None] > 0, shape))

    def token_kinds(self, batch: Batch) -> dict[str, tuple[jax.Array, int]]:
        """See `models.Model`; a token's kind is the first label of its image."""
        c = self.config
        label_Bx1 = jnp.where(batch['labels'][:, :1] < 0, c.num_classes, batch['labels'][:, :1])
        kind_BxL = jnp.broadcast_to(label_Bx1, (label_Bx1.shape[0], c.num_tokens))
        return dict.fromkeys(self.moe_layers(), (kind_BxL, c.num_classes))

    def check_data(self, data: Any) -> None:
        """Raises UserError unless the task has images of the model's shape and no more classes than the head, and Soft MoE does
        not mix images."""
        if 'image' not in data.batch_spec():
            raise UserError(
                'the model is a ViT, but TRAIN_DATASET or EVAL_DATASET is not an image task: choose an image task.'
            )
        c = self.config
        for moe in self.moe_layers().values():
            moe.check_examples(data.batch_spec()['image'][0][0] * c.num_tokens, c.num_tokens, 'GROUP_IMAGES = 1')
        shape = getattr(data, 'image_shape', None)
        if shape is not None and tuple(shape) != (c.image_size, c.image_size, c.image_channels):
            raise UserError(
                f"the task's images are {' x '.join(map(str, shape))}, but the model has IMAGE_SIZE = {c.image_size} and "
                f'IMAGE_CHANNELS = {c.image_channels}: change the model or the task.'
            )
        classes = getattr(data, 'num_classes', None)
        if classes is not None and classes > c.num_classes:
            raise UserError(
                f'NUM_CLASSES = {c.num_classes} is smaller than the {classes} classes of the task: raise it.'
            )

    def _image_shape(self, batch_spec: Mapping[str, Any]) -> tuple[int, ...]:
        c = self.config
        shape = batch_spec['image'][0]
        if math.prod(shape[1:]) != c.image_size**2 * c.image_channels:
            raise UserError(
                f'images of shape {shape[1:]} do not fit IMAGE_SIZE = {c.image_size} and IMAGE_CHANNELS = '
                f'{c.image_channels}: change the model or the task.'
            )
        return shape


def one_hot_labels(labels_BxN: jax.Array, num_classes: int) -> jax.Array:
    """Encodes labels as float32 (B, V): 1 at every label of an image. Labels of -1 are padding."""
    return jnp.minimum(jax.nn.one_hot(labels_BxN, num_classes, dtype=jnp.float32).sum(axis=1), 1.0)
