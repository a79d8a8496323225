"""VFM-UDA++ with CLDA: ``model.class_path: clda_vfm_uda.plugin_plusplus.CLDAUDA``."""

from __future__ import annotations

from clda_core.errors import problem

try:
    from datasets.utils.util import normalize
    from training.uda.uda import UDA
except ImportError as error:
    raise problem(
        "the host cannot be imported",
        expected="VFM-UDA++ on the Python path, with what it requires (VFM-UDA has a plug-in of its own: plugin)",
        received=f"{type(error).__name__}: {error}",
        fix="start the host's own main.py from its folder; a Python package named datasets must not come before it",
    ) from error

from .collaboration import CollaborativeUDA, check_host

check_host(UDA)


class CLDAUDA(CollaborativeUDA, UDA):
    """The host's ``UDA`` with CLDA."""

    normalize = staticmethod(normalize)
