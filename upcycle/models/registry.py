"""The model families. To add one, add a line to `FAMILIES`; see docs/contributing.md, "A model"."""

import importlib
from collections.abc import Iterator

from upcycle.errors import UserError
from upcycle.models.protocol import Model

# The class of each family by its name. Modules are imported on demand, so that commands start quickly.
FAMILIES = {
    't5': 'upcycle.models.encoder_decoder.EncoderDecoderModel',
    'vit': 'upcycle.models.image_classifier.ImageClassifier',
    'llm': 'upcycle.models.causal_lm.CausalLM',
}
# Gin files of a complete run, for messages and help.
EXAMPLE = ('models/t5_1_1_base.gin', 'moe/t5.gin', 'tasks/c4_span_corruption.gin')


def family(name: str) -> type[Model]:
    """Returns the class of a family.

    Raises:
      UserError: the family is unknown.
    """
    if name not in FAMILIES:
        raise UserError(f'unknown model family {name!r}: must be one of {", ".join(FAMILIES)}.')
    module, _, kind = FAMILIES[name].rpartition('.')
    return getattr(importlib.import_module(module), kind)


def families() -> Iterator[type[Model]]:
    """Returns the classes of all families."""
    return map(family, FAMILIES)
