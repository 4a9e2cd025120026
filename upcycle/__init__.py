"""Sparse upcycling: a trained dense Transformer becomes a Mixture-of-Experts model and trains on.

Importing the package is cheap; everything heavy is imported by the module that needs it.
"""

__version__ = '0.1.0'
