"""The length of the texts that a model was made for, `max_position_embeddings`.

Rotary positions have no end, so that our models, as transformers' do, compute longer texts: commands only warn of them.
"""

from upcycle import warning
from upcycle.checkpoints import Reader
from upcycle.data import DataSource


def longest(reader: Reader) -> int | None:
    """Returns the tokens of the longest text that a checkpoint's model was made for; None if the checkpoint does not tell."""
    most = reader.metadata.get('kept', {}).get('max_position_embeddings')
    return most if isinstance(most, int) else None


def warn(reader: Reader, length: int, subject: str, way_out: str) -> None:
    """Warns if texts are longer than those that a checkpoint's model was made for.

    Args:
      reader: of the checkpoint.
      length: tokens of the longest text.
      subject: what the texts are and how long, the beginning of the warning.
      way_out: what to do, its end.
    """
    most = longest(reader)
    if most is not None and length > most:
        warning.once(
            f'{subject}, and the model of {reader.path} was made for {most} (max_position_embeddings): longer texts are '
            f'computed, but their later positions are new to it: {way_out}.'
        )


def warn_of_rows(reader: Reader, data: DataSource) -> None:
    """Warns if the rows of data are longer than the texts that a checkpoint's model was made for."""
    length = getattr(data, 'sequence_length', 0)
    warn(reader, length, f'SEQUENCE_LENGTH = {length}', 'lower SEQUENCE_LENGTH, or train on documents as long as that')
