"""Model families: the protocol in `protocol.py`, the list in `registry.py`, and two modules for each: a network and its task."""

from upcycle.models.protocol import BatchSpec, Model, Params

__all__ = ['BatchSpec', 'Model', 'Params']
