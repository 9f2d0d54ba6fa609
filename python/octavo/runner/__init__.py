"""One step, from its plan to its tokens. Start with runner.py."""
