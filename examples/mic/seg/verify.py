"""Check that CLDA works inside your MIC (segmentation), in your environment, on made-up data.

    python -m examples.mic.seg.verify --host PATH/TO/MIC/seg

The same checks as ``examples/daformer/verify.py``; by default with MIC's own model, HRDA.
"""

from __future__ import annotations

import sys

from tests.hosts.segmentation.command import main
from tests.hosts.segmentation.host import MIC_SEG

if __name__ == "__main__":
    sys.exit(main(MIC_SEG, "examples.mic.seg.verify"))
