"""One step, from its plan to its tokens."""
