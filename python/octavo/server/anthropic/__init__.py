"""Anthropic's interface: messages, counts of tokens, models."""
