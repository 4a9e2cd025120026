"""Rotary position embeddings (arXiv 2104.09864) in the half-rotation form of transformers, with its rescaled variants.

Matched: modeling_rope_utils.py of transformers 5.24 (`default`, `linear`, `llama3`, `yarn`).
"""

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
import numpy as np


class RopeType(enum.StrEnum):
    """How the frequencies are rescaled for sequences longer than those of pretraining."""

    DEFAULT = 'default'  # not rescaled
    LINEAR = 'linear'  # divided by the factor: position interpolation
    LLAMA3 = 'llama3'  # low frequencies divided by the factor, high ones kept, interpolated between
    YARN = 'yarn'  # the same with a linear ramp over dimensions, and larger logits: arXiv 2309.00071


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of an attention layer; fields as in `decoder_config.DecoderConfig`, without `rope_`."""

    dims: int
    theta: float = 10000.0
    type: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def frequencies(self) -> np.ndarray:
        """Angles per position, float32 (dims / 2,)."""
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / self.dims
        frequencies = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        match self.type:
            case RopeType.LINEAR:
                return frequencies / np.float32(self.factor)
            case RopeType.LLAMA3:
                return self._llama3(frequencies)
            case RopeType.YARN:
                return self._yarn(frequencies)
        return frequencies

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        wavelengths = 2 * math.pi / frequencies
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = (self.original_length / wavelengths - low) / (high - low)
        kept = np.clip(kept, 0.0, 1.0)
        return ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)

    def _yarn(self, frequencies: np.ndarray) -> np.ndarray:
        def dimension(rotations: float) -> float:
            """Returns the dimension that makes this number of rotations over the original length."""
            per_rotation = self.original_length / (rotations * 2 * math.pi)
            return self.dims * math.log(per_rotation) / (2 * math.log(self.theta))

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dims - 1)
        ramp = (np.arange(self.dims // 2, dtype=np.float32) - first) / (last - first or 0.001)
        interpolated = np.clip(ramp, 0.0, 1.0)
        return (interpolated * frequencies / self.factor + (1 - interpolated) * frequencies).astype(np.float32)

    @property
    def scale(self) -> float:
        """Factor of sine and cosine, which multiplies the rotated part of queries and keys."""
        if self.type is not RopeType.YARN:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def rotate(self, x_BxLxHxN: jax.Array, position_BxL: jax.Array) -> jax.Array:
        """Rotates the first `dims` dimensions of queries or keys; dimension i pairs with i + dims / 2. Angles are float32."""
        angle_BxLx1xR = position_BxL[..., None, None].astype(jnp.float32) * self.frequencies
        cos, sin = (self.scale * f(angle_BxLx1xR) for f in (jnp.cos, jnp.sin))
        turned, rest = x_BxLxHxN[..., : self.dims].astype(jnp.float32), x_BxLxHxN[..., self.dims :]
        first, second = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return jnp.concatenate([turned.astype(x_BxLxHxN.dtype), rest], axis=-1)
