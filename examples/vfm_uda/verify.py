"""Check that CLDA works inside your VFM-UDA or VFM-UDA++, in your environment, on made-up data.

    python -m examples.vfm_uda.verify --host PATH/TO/vfm-uda

Trains the host, unmodified, by its own ``main.py`` for a few steps without us, with us switched off, and with us, and
prints one line per check; the exit status is 0 only if all hold. It takes minutes; it needs no GPU, no data and no
downloads, since toy networks stand in for DINOv2. What it runs is in ``tests/hosts/vfm_uda``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from clda_core import CldaError
from tests.hosts.segmentation.command import folder_for, verify
from tests.hosts.segmentation.host import check_folder
from tests.hosts.vfm_uda.checks import CHECKS, run_check
from tests.hosts.vfm_uda.runs import VFM_UDA, VFM_UDA_PLUSPLUS, Laboratory

PROGRAM = "examples.vfm_uda.verify"


def main(arguments: Optional[List[str]] = None) -> int:
    """Check one host from the command line; return the exit status, 0 only if all checks hold."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", type=Path, required=True, help="folder of VFM-UDA or VFM-UDA++")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep data, configs and runs in this new folder")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    options = parser.parse_args(arguments)
    root = options.host.resolve()
    host = VFM_UDA_PLUSPLUS if (root / VFM_UDA_PLUSPLUS.has[1]).is_file() else VFM_UDA
    try:
        check_folder(host, root)
        with folder_for(options.keep) as folder:
            lab = Laboratory(host, root, folder.resolve())
            lab.set_up()
            try:
                return verify(lab, options.only or list(CHECKS), run_check, CHECKS)
            finally:
                lab.close()
    except CldaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
