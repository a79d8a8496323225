"""The teacher: a network of the host, built from its own config and loaded from a checkpoint that the host wrote."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any, Dict, Mapping

import torch
from torch import Tensor, nn

from clda_core.errors import problem

from .random_state import of_our_own


def build_teacher(
    class_path: str, init_args: Mapping[str, Any], checkpoint: str, weights: str, *, num_classes: int, img_size: int
) -> nn.Module:
    """Build the teacher, load its weights, freeze it; in eval mode, on the CPU, without drawing from the host's RNG.

    Args:
        class_path: Of the network, as under ``model.init_args.network`` of the config that it was trained with.
        init_args: Its arguments there.
        checkpoint: The file that the host wrote then, or its URL.
        weights: Which network in it, ``"network"`` or ``"network_ema"``, the host EMA.
        num_classes: Of the student, and of the teacher where its arguments have none.
        img_size: Of the student's images; the teacher's where its arguments have none.

    Raises:
        CldaError: If the network cannot be built, the file is missing, or checkpoint or class count do not fit.
    """
    loaded = read_weights(checkpoint, weights)
    arguments = {"num_classes": num_classes, "img_size": img_size, **(init_args or {})}
    if arguments["num_classes"] != num_classes:
        raise problem(
            "teacher and student have different classes",
            expected=f"{num_classes} classes, as model.init_args.network has",
            received=f"{arguments['num_classes']} in clda.teacher_args",
            fix="name a teacher trained on the same classes",
        )
    with of_our_own(0, torch.device("cpu")):
        teacher = _built(class_path, arguments)
    load_weights(teacher, loaded, checkpoint)
    return teacher.requires_grad_(False).eval()


def read_weights(checkpoint: str, network: str) -> Dict[str, Tensor]:
    """Return one network's tensors out of a host's checkpoint, by the names that the network itself has.

    Raises:
        CldaError: If the file is missing or unreadable, or the network is not in it.
    """
    tensors = _read(checkpoint)
    tensors = tensors.get("state_dict", tensors)
    chosen = {name[len(network) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{network}.")}
    if not chosen:
        raise problem(
            f"the teacher's checkpoint has no {network}",
            expected=f"tensors named {network}.*",
            received=f"names beginning with {', '.join(sorted({name.split('.')[0] for name in tensors})) or 'nothing'}",
            fix="name a checkpoint of VFM-UDA or VFM-UDA++, and set clda.weights to a network that is in it",
        )
    return chosen


def load_weights(teacher: nn.Module, weights: Mapping[str, Tensor], checkpoint: str) -> None:
    """Load the weights, all of them or none.

    Raises:
        CldaError: If a name is missing or left over, or a shape differs; the teacher is then as before.
    """
    own = teacher.state_dict()
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    groups = (
        ("missing", sorted(set(own) - set(weights))),
        ("left over", sorted(set(weights) - set(own))),
        ("of another shape", shapes),
    )
    found = [f"{len(names)} {what}, such as {names[0]}" for what, names in groups if names]
    if found:
        raise problem(
            "the teacher's checkpoint is of another architecture, class count or image size than its config",
            expected=f"the tensors of {type(teacher).__name__} with clda.teacher_args",
            received=f"in {checkpoint}: {'; '.join(found)}",
            fix="take class_path and init_args of model.init_args.network from the config of this checkpoint",
        )
    teacher.load_state_dict(dict(weights))


def read_checkpoint(path: str) -> Mapping[str, Any]:
    """Read a checkpoint of the host, which holds pickled objects beside tensors: it has to be trusted as the host is.

    Raises:
        CldaError: If it is missing or cannot be read.
    """
    if not os.path.isfile(path):
        raise problem(
            "the checkpoint is not there",
            expected="a file, for a teacher as clda.checkpoint",
            received=f"{path!r} (looked from {os.getcwd()})",
            fix="download or train the teacher first, and check the path; it starts from where the host is run",
        )
    # The argument came with torch 1.13.
    trusted = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
    try:
        checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", **trusted)
    except Exception as error:
        raise problem(
            "the checkpoint cannot be read",
            expected="a file written by the host",
            received=f"{path}: {type(error).__name__}: {error}",
            fix="download it again, and start the program from the host's folder",
        ) from error
    return checkpoint


def _read(checkpoint: str) -> Mapping[str, Any]:
    if checkpoint.startswith("https://"):
        downloaded: Mapping[str, Any] = torch.hub.load_state_dict_from_url(checkpoint, map_location="cpu")
        return downloaded
    return read_checkpoint(checkpoint)


def _built(class_path: str, arguments: Mapping[str, Any]) -> nn.Module:
    module, _, name = class_path.rpartition(".")
    try:
        teacher: nn.Module = getattr(importlib.import_module(module), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise problem(
            "the teacher cannot be built",
            expected="the class path of a network of the host as clda.teacher, and its arguments as clda.teacher_args",
            received=f"{class_path!r} with {dict(arguments)}: {type(error).__name__}: {error}",
            fix="take class_path and init_args of model.init_args.network from the config that it was trained with",
        ) from error
    return teacher
