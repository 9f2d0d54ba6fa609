"""Other hosts' APIs as thin dialects, for ``--compat``: ollama and tgi."""
