"""The class token and the position embeddings of a ViT, where other programs add a position to the token too."""

import jax
import numpy as np

from upcycle.checkpoints import views
from upcycle.errors import UserError


def without_own_position(cls: views.Lazy, table: views.Lazy) -> tuple[views.Lazy, views.Lazy]:
    """Position embeddings of the patches alone, and the class token with its own position added.

    vision_transformer, V-MoE and Hugging Face add positions after they have put the class token in front, so that the first row
    is the token's. Ours are added before, as in big_vision today; the activations are the same.

    Args:
        cls: (1, 1, D).
        table: (1, 1 + patches, D).

    Returns:
        (1, patches, D) and (1, 1, D). Reading the second raises UserError where the sum is too large for its dtype.
    """
    patches = views.Window(table, (slice(None), slice(1, None)))
    dtype = jax.numpy.promote_types(cls.dtype.newbyteorder('='), table.dtype.newbyteorder('='))

    def add(cls: np.ndarray, position: np.ndarray) -> np.ndarray:
        wide = [x.astype(np.float32) for x in (cls, position)]
        with np.errstate(over='ignore'):
            total = (wide[0] + wide[1]).astype(dtype)
        if (~np.isfinite(total) & np.isfinite(wide[0]) & np.isfinite(wide[1])).any():
            raise UserError(
                f'the class token and its position add up to more than {dtype} holds: save the model again as float32.'
            )
        return total

    position = views.Window(table, (slice(None), slice(0, 1)))
    return patches, views.Computed((1, 1, table.shape[-1]), dtype, (cls, position), add)
