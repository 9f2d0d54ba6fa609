"""Names that vLLM keeps under ``v1.metrics``."""
