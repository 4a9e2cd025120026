"""Generators of `scripts/fuzz.py`: each makes random cases of one kind."""
