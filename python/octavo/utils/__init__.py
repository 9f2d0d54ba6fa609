"""Helpers under vLLM's names, for programs written for it."""

from octavo.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
