"""`octavo bench latency` as a program: see --help."""

import sys

from octavo.bench import main

if __name__ == "__main__":
    sys.exit(main("latency"))
