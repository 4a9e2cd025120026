"""Hugging Face checkpoints in safetensors files, read and written without PyTorch or transformers.

Each architecture has a module with its table of names, its fields of `config.json` and its facts. To add one, write a subclass of
`architecture.Architecture` in a module here and register it below. Layouts matched: modeling_t5.py, modeling_(u)mt5.py,
modeling_vit.py, conversion_mapping.py, configuration_utils.py and `_get_resolved_checkpoint_files` of transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.checkpoints.hf import decoder_only, t5, vit
from upcycle.checkpoints.hf.architecture import Architecture, Shapes
from upcycle.errors import UserError

ARCHITECTURES: tuple[Architecture, ...] = (t5.T5(), vit.ViT(), *decoder_only.LAYOUTS)
BY_MODEL_TYPE = {name: architecture for architecture in ARCHITECTURES for name in architecture.model_types}
_TITLES = [architecture.title for architecture in ARCHITECTURES]
TITLES = f'{", ".join(_TITLES[:-1])} and {_TITLES[-1]}'  # for messages


def with_equal_experts(shapes: Shapes, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the metadata of a model whose dense layers are written as equal experts; raises as `Architecture`'s."""
    alternatives = [architecture for architecture in ARCHITECTURES if architecture.holds(shapes)]
    return alternatives[0].with_equal_experts(metadata) if alternatives else metadata


def of_leaves(shapes: Shapes, metadata: Mapping[str, Any], layout: str | None = None) -> Architecture | None:
    """Returns the architecture in which to store a model; None if no architecture has such leaves.

    Args:
      shapes: of the leaves, by their names below `params/`.
      metadata: of our checkpoint, with `facts` or `model`.
      layout: the `model_type` that the user asked for; None: any.

    Raises:
      UserError: no architecture computes the function of the model, or not the one that the user asked for.
    """
    alternatives = [architecture for architecture in ARCHITECTURES if architecture.holds(shapes)]
    if not alternatives:
        return None
    names = [name for architecture in alternatives for name in architecture.model_types]
    if layout not in (None, *names):
        raise UserError(f'--layout={layout} is not one of {", ".join(names)}.')
    return alternatives[0].choose(alternatives, metadata, layout)
