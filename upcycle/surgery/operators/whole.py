"""Operators that make dense models from other models: deeper, wider, or from a model with experts."""

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import check_fraction, describe_options

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]
Shapes = Mapping[str, Shape]
# A numbered module: 'layers_3', 'encoderblock_3'.
_NUMBERED = re.compile(r'(.*)_(\d+)')
_STATE = 'opt_state/'


@dataclasses.dataclass(frozen=True)
class DenseOperator:
    """Makes the leaves of a dense model. Subclasses are registered in `DENSE_OPERATORS`.

    Class attributes:
      name: name in the registry, in receipts and in messages.
      keeps_shape: a leaf has the shape of its source, or of one of its experts, so that its optimizer state can be kept.
      changes: fields of the model's configuration that it changes and that cannot be inferred from shapes.
    """

    name: ClassVar[str] = ''
    keeps_shape: ClassVar[bool] = False
    changes: ClassVar[tuple[str, ...]] = ()

    def sources(self, stored: Shapes, wanted: Shapes) -> Callable[[str], tuple[str, ...]]:
        """Returns a function from a target leaf to the names of its sources, which may be missing from `stored`."""
        return lambda target: (target,)

    def fits(self, sources: Sequence[Shape], shape: Shape) -> bool:
        """True if leaves of these shapes can make a leaf of shape `shape`."""
        raise NotImplementedError

    def drops(self, source: str) -> str | None:
        """Returns why an unused leaf is dropped on purpose, or None if it is not."""
        return None

    def make(self, sources: Sequence[jax.Array], shape: Shape, axes: Axes, name: str, key: jax.Array) -> jax.Array:
        """Makes one leaf. Pure and traceable: it is compiled once for all leaves of a kind.

        Args:
          sources: source leaves.
          shape: shape of the leaf.
          axes: logical axes of the leaf.
          name: name of the target, with a `*` for the number of its layer.
          key: key of this leaf.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return describe_options(self.name, self)


class DepthOrder(enum.StrEnum):
    """The order of the repeated layers."""

    TILE = 'tile'  # 0 1 2 0 1 2: repeat the stack
    INTERLEAVE = 'interleave'  # 0 0 1 1 2 2: repeat each layer


@dataclasses.dataclass(frozen=True)
class Depth(DenseOperator):
    """Dense upcycling by depth tiling: a deeper model that repeats the layers of a shallower one.

    Komatsuzaki et al. 2023, section 4.2.1 (figure 5), after Gopher (Rae et al. 2021, appendix on reusing smaller models). Layers
    are the numbered modules of which the checkpoint has fewer. Nothing else changes.

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

    def fits(self, sources: Sequence[Shape], shape: Shape) -> bool:
        return sources[0] == shape

    def make(self, sources: Sequence[jax.Array], shape: Shape, axes: Axes, name: str, key: jax.Array) -> jax.Array:
        return jnp.asarray(sources[0])


def _count_modules(names: Shapes) -> dict[str, int]:
    """Number of modules `stem_0`, `stem_1`, ... by the path of their stem."""
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
    """Dense upcycling by width tiling: a wider model whose axes are multiples of a narrower one's, filled by repetition.

    A matrix whose inputs are repeated n times is divided by n to preserve the function: HyperCloning (Samragh et al. 2024, arXiv
    2409.12903). Heads are repeated; the width of a head is unchanged. Komatsuzaki et al. 2023 mention width tiling without trying
    it. Repeated weights get equal gradients and would stay equal, so a little noise is added.

    The function is not preserved if the logits are products with the embedding.

    Attributes:
      noise: standard deviation relative to the root mean square of the leaf; 0 preserves the function exactly [WIDTH_NOISE].
    """

    name = 'width'
    changes = ('num_heads',)

    noise: float = 0.01

    def __post_init__(self):
        if not self.noise >= 0:
            raise UserError(f'WIDTH_NOISE = {self.noise!r} must be at least 0.')

    def fits(self, sources: Sequence[Shape], shape: Shape) -> bool:
        (old,) = sources
        return len(old) == len(shape) and all(new % size == 0 for size, new in zip(old, shape, strict=True))

    def make(self, sources: Sequence[jax.Array], shape: Shape, axes: Axes, name: str, key: jax.Array) -> jax.Array:
        (w,) = sources
        times = [new // size for size, new in zip(w.shape, shape, strict=True)]
        repeated = 1
        if name.endswith('/kernel'):
            # The input axis is the first one if it is the model's width, or else all but the last.
            repeated = math.prod(times[:1] if axes and axes[0] in ('embed', 'mlp_embed') else times[:-1])
        tiled = jnp.tile(jnp.asarray(w), times) / repeated
        if self.noise and max(times, default=1) > 1:
            size = jnp.sqrt(jnp.mean(jnp.square(tiled.astype(jnp.float32))))
            tiled = tiled + self.noise * size * jax.random.normal(key, shape, jnp.float32)
        return tiled


@dataclasses.dataclass(frozen=True)
class Average(DenseOperator):
    """A dense model from one with experts: every MLP is a mean of its layer's experts.

    XFT's merge (Ding et al. 2024, arXiv 2404.15247, section 3.2): lambda * shared + (1 - lambda) * sum_e a_e W_e, with lambda = 0
    without a shared expert. The a_e are 1 / E, or those learned by a run with the router 'merged'. Routers are dropped.

    Optimizer state that is kept is summed over the experts, since the gradient of a dense MLP is the sum over equal experts. This
    is exact for momentum, and for second moments if the experts' gradients are independent.

    Attributes:
      shared_weight: lambda, for models with shared experts [AVERAGE_SHARED_WEIGHT].
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
            # Module and leaf; for optimizer state also the statistic.
            at = len(segments) - (3 if is_state else 2)
            if target in stored or at < 1:
                return (target,)
            mlp, rest = segments[:at], segments[at:]
            experts, shared = ('/'.join([*mlp, segment, *rest]) for segment in ('expert', 'shared'))
            others = (shared,) if is_state else (shared, '/'.join([*mlp, 'mixing']))
            return (experts, *(name for name in others if name in stored))

        return of

    def fits(self, sources: Sequence[Shape], shape: Shape) -> bool:
        experts, *others = sources
        if not others and experts == shape:
            return True
        return experts[1:] == shape and all(other in (shape, experts[:1]) for other in others)

    def drops(self, source: str) -> str | None:
        segments = source.split('/')
        if source.startswith(_STATE) and 'mixing' in segments:
            return 'a dense model has no mixing coefficients'
        return 'a dense model has no routers' if {'router', 'shared_gate'} & {*segments} else None

    def make(self, sources: Sequence[jax.Array], shape: Shape, axes: Axes, name: str, key: jax.Array) -> jax.Array:
        first, *others = (jnp.asarray(leaf) for leaf in sources)
        if first.ndim == len(shape):
            return first
        if name.startswith(_STATE):
            return sum(others, first.sum(axis=0))
        shared = [leaf for leaf in others if leaf.shape == shape]
        mixing = [leaf for leaf in others if leaf.shape != shape]
        share_E = jax.nn.softmax(mixing[0]) if mixing else jnp.full(first.shape[0], 1 / first.shape[0])
        mean = jnp.tensordot(share_E, first.astype(jnp.float32), axes=1)
        return self.shared_weight * shared[0] + (1 - self.shared_weight) * mean if shared else mean
