"""Tokens for decoder-only models: sources, tokenizers, shards, packing and the `DataSource`. Gin files import this package.

`upcycle tokenize` (`writing.py`) writes shards once (`shards.py`); training reads them by index through grain (`pipeline.py`).
Neither TensorFlow nor seqio is imported. The optional libraries are imported by the functions that need them.
"""

from upcycle.data.causal.stdlib import StdlibBytes
from upcycle.data.causal.tokens import Shards, Tokens

__all__ = ['Shards', 'StdlibBytes', 'Tokens']
