"""``python -m benchmarks.evidence``; what its processes run is in a module that they can import."""

import sys

from benchmarks.evidence.command import main

if __name__ == "__main__":
    sys.exit(main())
