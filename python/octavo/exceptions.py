"""VLLMValidationError: vLLM's name for errors of a request's values; here they are ValueErrors."""

VLLMValidationError = ValueError
