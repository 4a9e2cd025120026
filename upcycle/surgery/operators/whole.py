"""Dense models out of other models: deeper, wider, or out of one with experts. By names, shapes and logical axes."""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import check_fraction, describe_options

Shapes = Mapping[str, tuple[int, ...]]
# A numbered module: 'layers_3', 'encoderblock_3'.
_NUMBERED = re.compile(r'(.*)_(\d+)')
# Segments of an MoE layer that a dense MLP's names do not have.
_MOE_SEGMENTS = ('expert', 'shared')
_STATE = 'opt_state/'


@dataclasses.dataclass(frozen=True)
class DenseOperator:
    """How the leaves of a dense model are made. Subclasses are registered in `DENSE_OPERATORS`.

    Class attributes:
      name: in the registry, in receipts and in messages.
      keeps_shape: a leaf has the shape of its source, or of one expert of it, so that its optimizer state can follow it.
      changes: fields of the model's configuration that change with it, and that the shapes do not tell.
    """

    name: ClassVar[str] = ''
    keeps_shape: ClassVar[bool] = False
    changes: ClassVar[tuple[str, ...]] = ()

    def sources(self, stored: Shapes, wanted: Shapes) -> Callable[[str], tuple[str, ...]]:
        """From a wanted leaf to the names of those that it is made of; those that are not stored are missing."""
        return lambda target: (target,)

    def fits(self, sources: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
        """Whether leaves of these shapes make one of that shape."""
        raise NotImplementedError

    def drops(self, source: str) -> str | None:
        """Why a leaf that nothing is made of is dropped on purpose; None: it is not."""
        return None

    def make(
        self,
        sources: Sequence[jax.Array],
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        name: str,
        key: jax.Array,
    ) -> jax.Array:
        """One leaf. Pure, and traceable: it is compiled once for all leaves of a kind.

        Args:
          sources: what it is made of.
          shape: wanted.
          axes: its logical axes.
          name: of the target, with a `*` for the number of its layer.
          key: of this leaf.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return describe_options(self.name, self)


class DepthOrder(enum.StrEnum):
    """Which layer of the shallow model a layer of the deep one is."""

    TILE = 'tile'  # 0 1 2 0 1 2: the stack again
    INTERLEAVE = 'interleave'  # 0 0 1 1 2 2: each layer again


@dataclasses.dataclass(frozen=True)
class Depth(DenseOperator):
    """Dense upcycling by depth tiling: a deeper model whose layers are those of a shallower one, repeated.

    Komatsuzaki et al. 2023, section 4.2.1 (figure 5), after Gopher (Rae et al. 2021, appendix on reusing smaller models). A layer
    is a numbered module whose number the checkpoint has less of. Nothing else changes.

    Attributes:
      order: see `DepthOrder` [DEPTH_ORDER].
    """

    name = 'depth'
    keeps_shape = True

    order: DepthOrder = DepthOrder.TILE

    def __post_init__(self):
        object.__setattr__(self, 'order', one_of(DepthOrder, self.order, 'DEPTH_ORDER'))

    def sources(self, stored: Shapes, wanted: Shapes) -> Callable[[str], tuple[str, ...]]:
        have, want = _count_modules(stored), _count_modules(wanted)

        def of(target: str) -> tuple[str, ...]:
            old, new = [], []
            for segment in target.split('/'):
                if match := _NUMBERED.fullmatch(segment):
                    stem, number = match[1], int(match[2])
                    few, many = have.get('/'.join([*old, stem]), 0), want['/'.join([*new, stem])]
                    if 0 < few < many:
                        number = number % few if self.order is DepthOrder.TILE else number * few // many
                    old.append(f'{stem}_{number}')
                else:
                    old.append(segment)
                new.append(segment)
            return ('/'.join(old),)

        return of

    def fits(self, sources: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
        return tuple(sources[0]) == tuple(shape)

    def make(
        self,
        sources: Sequence[jax.Array],
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        name: str,
        key: jax.Array,
    ) -> jax.Array:
        return jnp.asarray(sources[0])


def _count_modules(names: Shapes) -> dict[str, int]:
    """How many modules `stem_0`, `stem_1`, ... there are, by the path of their stem."""
    counts: dict[str, int] = {}
    for name in names:
        segments = name.split('/')
        for i, segment in enumerate(segments):
            if match := _NUMBERED.fullmatch(segment):
                stem = '/'.join([*segments[:i], match[1]])
                counts[stem] = max(counts.get(stem, 0), 1 + int(match[2]))
    return counts


@dataclasses.dataclass(frozen=True)
class Width(DenseOperator):
    """Dense upcycling by width tiling: a wider model whose every axis is a multiple of a narrower one's, filled by repetition.

    A matrix whose inputs are repeated n times is divided by n, so that the function stays: HyperCloning (Samragh et al. 2024,
    arXiv 2409.12903). Heads are repeated, a head's width is not. Komatsuzaki et al. 2023 name width tiling and do not try it.
    Repeated weights have equal gradients and would stay equal for ever, so they get a little noise.

    The function stays only where logits are not products with the embedding.

    Attributes:
      noise: standard deviation, as a share of the leaf's own root mean square; 0 keeps the function exactly [WIDTH_NOISE].
    """

    name = 'width'
    changes = ('num_heads',)

    noise: float = 0.01

    def __post_init__(self):
        if not self.noise >= 0:
            raise UserError(f'WIDTH_NOISE = {self.noise!r} must be at least 0.')

    def fits(self, sources: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
        (old,) = sources
        return len(old) == len(shape) and all(new % size == 0 for size, new in zip(old, shape, strict=True))

    def make(
        self,
        sources: Sequence[jax.Array],
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        name: str,
        key: jax.Array,
    ) -> jax.Array:
        (w,) = sources
        times = [new // size for size, new in zip(w.shape, shape, strict=True)]
        repeated = 1
        if name.endswith('/kernel'):
            # A product adds up over the first axis, if that is the model's width, or over all but the last.
            inputs = times[:1] if axes and axes[0] in ('embed', 'mlp_embed') else times[:-1]
            for n in inputs:
                repeated *= n
        tiled = jnp.tile(jnp.asarray(w), times) / repeated
        if self.noise and max(times, default=1) > 1:
            size = jnp.sqrt(jnp.mean(jnp.square(tiled.astype(jnp.float32))))
            tiled = tiled + self.noise * size * jax.random.normal(key, shape, jnp.float32)
        return tiled


@dataclasses.dataclass(frozen=True)
class Average(DenseOperator):
    """A dense model out of one with experts: every MLP is a mean of its layer's experts.

    XFT's merge (Ding et al. 2024, arXiv 2404.15247, section 3.2): lambda * shared + (1 - lambda) * sum_e a_e W_e, with lambda = 0
    where no expert is shared. The a_e are 1 / E, or those that a run with the router 'merged' has learned. Routers are dropped.

    Optimizer state that is carried over is the experts' sum: the gradient of a dense MLP is the sum of what its tokens give to
    equal experts. Exact for a momentum; for second moments as if experts' gradients were independent.

    Attributes:
      shared_weight: lambda, where there are shared experts [AVERAGE_SHARED_WEIGHT].
    """

    name = 'average'
    keeps_shape = True

    shared_weight: float = 0.75

    def __post_init__(self):
        check_fraction('AVERAGE_SHARED_WEIGHT', self.shared_weight)

    def sources(self, stored: Shapes, wanted: Shapes) -> Callable[[str], tuple[str, ...]]:
        def of(target: str) -> tuple[str, ...]:
            is_state = target.startswith(_STATE)
            segments = target.split('/')
            # A module and its leaf, and of a state its statistic.
            at = len(segments) - (3 if is_state else 2)
            if target in stored or at < 1:
                return (target,)
            mlp, rest = segments[:at], segments[at:]
            experts, shared = ('/'.join([*mlp, segment, *rest]) for segment in _MOE_SEGMENTS)
            others = (shared,) if is_state else (shared, '/'.join([*mlp, 'mixing']))
            return (experts, *(name for name in others if name in stored))

        return of

    def fits(self, sources: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
        if len(sources) == 1 and tuple(sources[0]) == tuple(shape):
            return True
        experts, *others = (tuple(old) for old in sources)
        return experts[1:] == tuple(shape) and all(old in (tuple(shape), experts[:1]) for old in others)

    def drops(self, source: str) -> str | None:
        segments = source.split('/')
        if source.startswith(_STATE) and 'mixing' in segments:
            return 'a dense model has no coefficients'
        return 'a dense model has no routers' if 'router' in segments else None

    def make(
        self,
        sources: Sequence[jax.Array],
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        name: str,
        key: jax.Array,
    ) -> jax.Array:
        first, *others = (jnp.asarray(leaf) for leaf in sources)
        if first.ndim == len(shape):
            return first
        if name.startswith(_STATE):
            return sum(others, first.sum(axis=0))
        shared = [leaf for leaf in others if leaf.shape == tuple(shape)]
        mixing = [leaf for leaf in others if leaf.shape != tuple(shape)]
        share_E = jax.nn.softmax(mixing[0]) if mixing else jnp.full(first.shape[0], 1 / first.shape[0])
        mean = jnp.tensordot(share_E, first.astype(jnp.float32), axes=1)
        return self.shared_weight * shared[0] + (1 - self.shared_weight) * mean if shared else mean
