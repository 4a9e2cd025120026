"""The class token and position embeddings of ViTs from programs that add a position to the token, too."""

import jax
import numpy as np

from upcycle.checkpoints import views
from upcycle.errors import UserError


def without_own_position(cls: views.Lazy, table: views.Lazy) -> tuple[views.Lazy, views.Lazy]:
    """Separates the position embeddings of the patches, and adds the class token's position to the token itself.

    vision_transformer, V-MoE and Hugging Face prepend the class token and then add positions, so that row 0 belongs to the token.
    We add positions first, as big_vision does today; the activations are the same.

    Args:
      cls: (1, 1, D).
      table: (1, 1 + patches, D).

    Returns:
      (1, patches, D) and (1, 1, D). Reading the second raises UserError if the sum overflows its dtype.
    """
    patches = views.Window(table, (slice(None), slice(1, None)))
    dtype = jax.numpy.promote_types(cls.dtype.newbyteorder('='), table.dtype.newbyteorder('='))

    def add(cls: np.ndarray, position: np.ndarray) -> np.ndarray:
        with np.errstate(over='ignore'):
            total = (cls.astype(np.float32) + position.astype(np.float32)).astype(dtype)
        if (~np.isfinite(total) & np.isfinite(cls) & np.isfinite(position)).any():
            raise UserError(f'the class token plus its position overflows {dtype}: save the model again as float32.')
        return total

    position = views.Window(table, (slice(None), slice(0, 1)))
    return patches, views.Computed((1, 1, table.shape[-1]), dtype, (cls, position), add)
