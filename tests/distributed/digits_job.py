"""The digits job with small networks on a few images, for torchrun to start."""

import sys

from examples.classification import digits
from tests.examples.test_digits import quick

if __name__ == "__main__":
    sys.exit(digits.main(config=quick(progress=True)))
