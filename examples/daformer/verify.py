"""Check that CLDA works inside your DAFormer, in your environment, on made-up data.

    python -m examples.daformer.verify --host PATH/TO/DAFormer

Trains DAFormer, unmodified, for a few iterations without us, with us switched off, and with us, and prints one line
per check; the exit status is 0 only if all hold. It takes minutes, and 2 GB in the temporary folder; it needs no GPU,
no data and no downloads. What it runs is in ``tests/hosts/segmentation``.
"""

from __future__ import annotations

import sys

from tests.hosts.segmentation.command import main
from tests.hosts.segmentation.host import DAFORMER

if __name__ == "__main__":
    sys.exit(main(DAFORMER, "examples.daformer.verify"))
