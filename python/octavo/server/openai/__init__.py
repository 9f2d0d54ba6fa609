"""OpenAI's text API: chat, completions, models, tokens."""
