"""LoRA, under vLLM's names. There is none yet."""
