"""Checkpoint files and the tensors in them."""
