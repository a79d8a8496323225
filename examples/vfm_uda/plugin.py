"""VFM-UDA with CLDA: ``model.class_path: clda_vfm_uda.plugin.CLDAUDAVITGeneric``."""

from __future__ import annotations

from clda_core.errors import problem

try:
    from datasets.utils.util import normalize
    from training.uda_vit.uda_vit_generic import UDAVITGeneric
    from training.uda_vit.uda_vit_generic_feature_distance import UDAVITGenericFeatureDistance
except ImportError as error:
    raise problem(
        "the host cannot be imported",
        expected="VFM-UDA on the Python path, with what it requires (VFM-UDA++ has a plug-in of its own: "
        "plugin_plusplus)",
        received=f"{type(error).__name__}: {error}",
        fix="start the host's own main.py from its folder; a Python package named datasets must not come before it",
    ) from error

from .collaboration import CollaborativeUDA, check_host

check_host(UDAVITGeneric)
check_host(UDAVITGenericFeatureDistance)


class CLDAUDAVITGeneric(CollaborativeUDA, UDAVITGeneric):
    """The host's ``UDAVITGeneric`` with CLDA."""

    normalize = staticmethod(normalize)


class CLDAUDAVITGenericFeatureDistance(CollaborativeUDA, UDAVITGenericFeatureDistance):
    """The host's ``UDAVITGenericFeatureDistance`` with CLDA."""

    normalize = staticmethod(normalize)
