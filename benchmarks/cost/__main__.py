"""``python -m benchmarks.cost``; what its processes run is in modules that they can import."""

import sys

from benchmarks.cost.command import main

if __name__ == "__main__":
    sys.exit(main())
