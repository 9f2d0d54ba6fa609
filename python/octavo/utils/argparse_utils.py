"""FlexibleArgumentParser: argparse with vLLM's spellings of flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from octavo.flags import Parser


class FlexibleArgumentParser(Parser):
    """A parser for ``EngineArgs.add_cli_args``: ``LLM(**vars(parser.parse_args()))`` then works."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        del parsed.parser
        return parsed
