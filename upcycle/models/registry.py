"""The model families. A new one is a line in `FAMILIES`; see docs/contributing.md, "A model"."""

import importlib
from collections.abc import Iterator

from upcycle.errors import UserError
from upcycle.models.protocol import Model

# The class of each family by its name. The modules are imported when they are needed: a command line must start quickly.
FAMILIES = {
    't5': 'upcycle.models.encoder_decoder.EncoderDecoderModel',
    'vit': 'upcycle.models.image_classifier.ImageClassifier',
}
# Gin files of a complete run, for messages and help.
EXAMPLE = ('models/t5_1_1_base.gin', 'moe/t5.gin', 'tasks/c4_span_corruption.gin')


def family(name: str) -> type[Model]:
    """The class of a family.

    Raises:
      UserError: there is no such family.
    """
    if name not in FAMILIES:
        raise UserError(f'unknown model family {name!r}: it is none of {", ".join(FAMILIES)}.')
    module, _, kind = FAMILIES[name].rpartition('.')
    return getattr(importlib.import_module(module), kind)


def families() -> Iterator[type[Model]]:
    """The class of every family."""
    return map(family, FAMILIES)
