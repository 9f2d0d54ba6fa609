"""Between messages and text: what the server and LLM share."""
