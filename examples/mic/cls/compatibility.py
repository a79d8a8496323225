"""What newer libraries took away and the host still asks for, put back before the host is imported.

The same is done for runs with and without CLDA. In the environment that the host pins nothing is missing and nothing is
done. To run the host alone where something is missing, in its ``examples`` folder:

    python -m examples.mic.cls.compatibility cdan_mcc_sdat_masking.py ARGUMENTS
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import runpy
import sys
import types
import warnings
from typing import Any, List, Sequence

import numpy as np
import torch

_OPERATORS = ("nms", "qnms")
"""Compiled operators of torchvision that its Python side describes on import, found or not."""

_keep: List[Any] = []
"""A torch.library lives as long as its handle."""


def apply() -> List[str]:
    """Put back what is missing and return its names."""
    done = []
    if _put_back_float():
        done.append("numpy.float")
    if importlib.util.find_spec("torchvision") is not None:
        if _put_back_operators():
            done.append("torchvision's compiled operators")
        if _put_back_download():
            done.append("torchvision.models.utils")
        if _put_back_addresses():
            done.append("torchvision.models.resnet.model_urls")
    return done


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python script arguments`` does."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _put_back_float() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 1.20 to 1.23 deprecate it, and some 1.x warn where it is gone
        if hasattr(np, "float"):
            return False
    np.float = float
    return True


def _put_back_operators() -> bool:
    """Declare the operators that a torchvision built for another torch lacks; the host calls none of them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)
    importlib.import_module("torchvision")
    return True


def _put_back_download() -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module("torchvision.models.utils")
        return False
    module = types.ModuleType("torchvision.models.utils")
    module.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return True


def _put_back_addresses() -> bool:
    """Rebuild the table of ImageNet weights; they are the ones of torchvision 0.10, ``IMAGENET1K_V1`` today."""
    resnet = importlib.import_module("torchvision.models.resnet")
    if hasattr(resnet, "model_urls"):
        return False
    models = importlib.import_module("torchvision.models")
    resnet.model_urls = {
        name: models.get_model_weights(name).IMAGENET1K_V1.url
        for name in models.list_models(module=models)
        if name.startswith(("resnet", "resnext", "wide_resnet")) and "IMAGENET1K_V1" in _names(models, name)
    }
    return True


def _names(models: Any, model: str) -> List[str]:
    return list(models.get_model_weights(model).__members__)


if __name__ == "__main__":
    apply()
    run_script(sys.argv[1], sys.argv[2:])
