"""Hugging Face checkpoints in safetensors files, read and written without PyTorch or transformers.

Each architecture has a module with its table of names, its fields of `config.json` and its facts. To add one, write a subclass of
`architecture.Architecture` in a module here and register it below. Layouts matched: modeling_t5.py, modeling_(u)mt5.py,
modeling_vit.py, conversion_mapping.py, configuration_utils.py and `_get_resolved_checkpoint_files` of transformers 4 and 5.
"""

from __future__ import annotations

from upcycle.checkpoints.hf import t5, vit
from upcycle.checkpoints.hf.architecture import Architecture, Shapes

ARCHITECTURES: tuple[Architecture, ...] = (t5.T5(), vit.ViT())
BY_MODEL_TYPE = {name: architecture for architecture in ARCHITECTURES for name in architecture.model_types}
TITLES = ' and '.join(architecture.title for architecture in ARCHITECTURES)  # for messages


def of_leaves(shapes: Shapes) -> Architecture | None:
    """Returns the first architecture that matches our leaves; their names start below `params/`."""
    return next((architecture for architecture in ARCHITECTURES if architecture.holds(shapes)), None)
