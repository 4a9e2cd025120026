"""The commands that work on a configured run, a module each, whose `run` does what the command says. `upcycle.cli` parses."""
