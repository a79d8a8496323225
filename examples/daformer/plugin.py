"""What the host imports by ``custom_imports``: registers ``CLDADACS`` and ``CLDACheckpointHook`` with it."""

from __future__ import annotations

from clda_core.errors import problem

from .checkpoint import StateBesideCheckpoint
from .dacs import CollaborativeDACS, check_host

try:
    from mmcv import Config
    from mmcv.runner.hooks import HOOKS, CheckpointHook
    from mmseg.models import UDA, build_segmentor
    from mmseg.models.uda.dacs import DACS
    from mmseg.models.utils import dacs_transforms
except ImportError as error:
    raise problem(
        "the host cannot be imported",
        expected="DAFormer, HRDA or MIC (segmentation) on the Python path, with mmcv",
        received=f"{type(error).__name__}: {error}",
        fix="start the host's own program from its folder, for example python -m tools.train CONFIG; uninstall any "
        "other mmsegmentation from the environment",
    ) from error

check_host(DACS)


@UDA.register_module()
class CLDADACS(CollaborativeDACS, DACS):
    """The host's ``DACS`` with CLDA: ``uda=dict(type='CLDADACS', clda=dict(...))``, see :class:`.options.Options`."""

    read_config = staticmethod(Config.fromfile)
    build_segmentor = staticmethod(build_segmentor)
    transforms = dacs_transforms


@HOOKS.register_module()
class CLDACheckpointHook(StateBesideCheckpoint, CheckpointHook):
    """mmcv's hook, with our state beside its checkpoints: ``checkpoint_config=dict(type='CLDACheckpointHook')``."""
