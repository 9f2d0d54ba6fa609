"""``python -m octavo.serve``: the same as ``octavo serve``."""

import sys
from collections.abc import Sequence

from octavo.cli.main import main as octavo


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m octavo.serve [MODEL] [flags]``; the process's exit status."""
    return octavo(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
