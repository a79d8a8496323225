"""What must be asked inside the host's process: do our recipes load, and what are the teacher's layers?

Run by ``host_process.py`` with the folder laid out as a user's: ``configs`` is the host's, ``clda_daformer`` is ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List


def main(arguments: List[str]) -> None:
    """Write what was found to the first argument; the second is the teacher's config, the others are recipes."""
    output, teacher, *recipes = arguments
    found = {"layers": layers_of(teacher), "recipes": {recipe: fault_of(recipe) for recipe in recipes}}
    Path(output).write_text(json.dumps(found))


def fault_of(recipe: str) -> Any:
    """Return why a recipe cannot be used in this host, ``None`` if it can."""
    from mmcv import Config
    from mmcv.runner.hooks import HOOKS
    from mmseg.models.builder import MODELS

    try:
        config = Config.fromfile(recipe)
        known = MODELS.get(config.uda.type), HOOKS.get(config.checkpoint_config.type)
        return None if all(known) else "its plug-in registers nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def layers_of(config: str) -> Any:
    """Return the names of parameters and buffers by layer, of a segmentor as the adapter shows it to the learner."""
    from mmcv import Config
    from mmseg.models import build_segmentor

    from clda_core.layers import group_layers
    from examples.daformer.segmentor import Logits

    layers = group_layers(Logits(build_segmentor(Config.fromfile(config).model)))
    prefix = "segmentor."
    return {layer.name: [name[len(prefix) :] for name in (*layer.parameters, *layer.buffers)] for layer in layers}
