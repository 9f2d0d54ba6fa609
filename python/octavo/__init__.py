"""octavo: a server for language models, vLLM's interface from one small, fast process."""

__version__ = "0.1.0"
