"""Parts of the checks against serving engines; see scripts/serve_check.py and scripts/real_llm.py."""
