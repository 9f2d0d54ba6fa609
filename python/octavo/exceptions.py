"""VLLMValidationError: vLLM's name for the errors of a request's values, which here are ValueErrors."""

VLLMValidationError = ValueError
