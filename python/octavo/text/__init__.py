"""Chat templates: from messages to text, for the server and LLM."""
