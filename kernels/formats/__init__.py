"""Layouts of quantized weights in checkpoints: one file a family, the registry names all."""
