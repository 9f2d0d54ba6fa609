"""The op set on a CPU, through the Rust core; ``ops.OPS`` is it."""
