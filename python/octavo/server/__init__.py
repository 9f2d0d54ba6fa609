"""The HTTP server: OpenAI's interface, with vLLM's additions, over one AsyncEngine."""
