"""Names that vLLM keeps under ``v1``, for programs written for it."""
