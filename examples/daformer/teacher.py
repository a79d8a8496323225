"""The teacher: built from a config of the host, loaded from a checkpoint that the host wrote."""

from __future__ import annotations

import copy
import os
import re
from typing import Any, Callable, Dict, List, Mapping

import torch
from torch import Tensor, nn

from clda_core.errors import check_choice, problem

from .random_state import preserved_random_state

# Names of early releases, whose published checkpoints come with their configs.
_LEGACY_TYPES = {
    "UniHead": "DAFormerHead",
    "MultiResEncoderDecoder": "HRDAEncoderDecoder",
    "MultiResAttentionWrapper": "HRDAHead",
}


def build_teacher(
    options: Mapping[str, Any],
    *,
    read_config: Callable[[str], Any],
    build_segmentor: Callable[[Any], nn.Module],
    num_classes: int,
) -> nn.Module:
    """Build the teacher, load its weights, freeze it; in eval mode, on the CPU, without drawing from the host's RNG.

    Args:
        options: ``config``: path of the config that the teacher was trained with; ``checkpoint``: the file that the
            host wrote then; ``weights``: which network in it, ``"model"`` (default) or ``"ema_model"``, the host EMA.
        read_config: The host's reader of config files.
        build_segmentor: The host's builder.
        num_classes: Of the student.

    Raises:
        CldaError: If an option is missing or unknown, a file is missing, or the checkpoint or the class count does not
            fit.
    """
    _check_options(options)
    config = teacher_config(read_config(options["config"]))
    classes = config["decode_head"]["num_classes"]
    if classes != num_classes:
        raise problem(
            "teacher and student have different classes",
            expected=f"{num_classes} classes as in the host's model.decode_head.num_classes",
            received=f"{classes} in {options['config']}",
            fix="name the config of a teacher trained on the same classes as clda.teacher.config",
        )
    with preserved_random_state():
        teacher = build_segmentor(config)
    weights = network_weights(_read_checkpoint(options["checkpoint"]), options.get("weights", "model"))
    load_weights(teacher, weights, checkpoint=options["checkpoint"], config=options["config"])
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher.eval()


def teacher_config(config: Any) -> Any:
    """Return the model part of a host's config, to be built without downloading, in today's names."""
    if "model" not in config:
        raise problem(
            "the teacher's config has no model",
            expected="the config that the teacher was trained with",
            received=f"keys {sorted(config)}",
            fix="set clda.teacher.config to it",
        )
    model = copy.deepcopy(config["model"])
    model["pretrained"] = None
    model["backbone"].pop("ema_drop_path_rate", None)
    for part in (model, model["decode_head"]):
        part["type"] = _LEGACY_TYPES.get(part["type"], part["type"])
    fusion = model["decode_head"].get("decoder_params", {}).get("fusion_cfg")
    if fusion is not None:
        fusion.pop("fusion", None)
    return model


def network_weights(checkpoint: Mapping[str, Any], network: str) -> Dict[str, Tensor]:
    """Return one network's tensors out of a host's checkpoint, by the names that the segmentor itself has.

    A host saves ``model.*`` and ``ema_model.*``, with a ``module.`` in any place if it was trained on several GPUs; a
    plain segmentor's checkpoint has neither prefix and is taken as it is for ``"model"``.

    Raises:
        CldaError: If the network is not in the checkpoint.
    """
    check_choice("clda.teacher.weights", network, ("model", "ema_model"))
    tensors = checkpoint.get("state_dict", checkpoint)
    tensors = {re.sub(r"(^|(?<=\.))module\.", "", name): value for name, value in tensors.items()}
    chosen = {name[len(network) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{network}.")}
    if not chosen and network == "model":
        chosen = tensors
    if not chosen:
        raise problem(
            f"the teacher's checkpoint has no {network}",
            expected=f"tensors named {network}.*",
            received=f"names beginning with {', '.join(sorted({name.split('.')[0] for name in tensors})) or 'nothing'}",
            fix="set clda.teacher.weights to 'model' or 'ema_model', whichever is in it",
        )
    return chosen


def load_weights(teacher: nn.Module, weights: Mapping[str, Tensor], *, checkpoint: str, config: str) -> None:
    """Load the weights, all of them or none.

    Raises:
        CldaError: If a name is missing or left over, or a shape differs; the teacher is then as before.
    """
    own = teacher.state_dict()
    # Losses and heads of old versions keep counters that a checkpoint may lack.
    missing = sorted(name for name in own if name not in weights and not name.endswith("num_batches_tracked"))
    extra = sorted(name for name in weights if name not in own)
    shapes = sorted(
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    )
    found = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in ((missing, "missing"), (extra, "left over"), (shapes, "of another shape"))
        if names
    ]
    if found:
        raise problem(
            "the teacher's checkpoint is of another architecture than its config",
            expected=f"the tensors of the model in {config}",
            received=f"in {checkpoint}: {'; '.join(found)}",
            fix="name the config that this checkpoint was trained with as clda.teacher.config",
        )
    teacher.load_state_dict(dict(weights), strict=False)


def _check_options(options: Mapping[str, Any]) -> None:
    known: List[str] = ["config", "checkpoint", "weights"]
    if not set(options) <= set(known) or not {"config", "checkpoint"} <= set(options):
        raise problem(
            "clda.teacher is incomplete or has unknown keys",
            expected="dict(config='...', checkpoint='...'), with weights='model' or 'ema_model' if wanted",
            received=f"keys {sorted(options)}",
            fix="set uda.clda.teacher=dict(config=..., checkpoint=...) in the config",
        )
    for key in ("config", "checkpoint"):
        if not os.path.isfile(str(options[key])):
            raise problem(
                f"the teacher's {key} is not there",
                expected=f"a file as clda.teacher.{key}",
                received=f"{options[key]!r} (looked from {os.getcwd()})",
                fix="download or train the teacher first, and check the path; it starts from where the host is run",
            )


def _read_checkpoint(path: str) -> Mapping[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu")
    except Exception as error:
        raise problem(
            "the teacher's checkpoint cannot be read",
            expected="a file written by the host",
            received=f"{path}: {type(error).__name__}: {error}",
            fix="download it again, or train the teacher again",
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise problem(
            "the teacher's checkpoint holds no weights",
            expected="a dict, with the weights under 'state_dict' or by themselves",
            received=f"{type(checkpoint).__name__} in {path}",
            fix="name a checkpoint that the host wrote as clda.teacher.checkpoint",
        )
    return checkpoint
