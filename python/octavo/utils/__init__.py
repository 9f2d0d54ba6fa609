"""Helpers under vLLM's names, for programs written for it."""

import uuid

from octavo.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser", "random_uuid"]


def random_uuid() -> str:
    """A request id that no other has."""
    return uuid.uuid4().hex
