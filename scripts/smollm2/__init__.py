"""The parts of scripts/train_real_llm.py: texts, schedule, results."""
