"""Checkpoints on disk, and one family of models a file."""
