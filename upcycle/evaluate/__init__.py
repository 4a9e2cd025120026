"""Evaluators: validation loss, few-shot probes, seqio tasks and expert diversity."""
