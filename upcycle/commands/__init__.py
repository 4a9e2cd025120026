"""Commands that work on a configured run: one module each, with a function `run`. `upcycle.cli` parses their options."""
