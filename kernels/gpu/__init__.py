"""The op set in Triton, for CUDA devices; ``ops.OPS`` is it."""
