"""Rows of `scripts/accelerator_check.py`."""
