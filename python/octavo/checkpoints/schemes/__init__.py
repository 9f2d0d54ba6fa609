"""Quantization schemes of safetensors checkpoints: one file a scheme, the registry names all."""
