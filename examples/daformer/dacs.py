"""The plug-in for hosts with a ``DACS``: what :mod:`.plugin` puts in front of the host's own class."""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Type

import torch
from torch import Tensor, nn

from clda_core.errors import problem

from .collaboration import Collaboration, Distilled, View
from .options import Options
from .segmentor import images_seen
from .teacher import build_teacher
from .views import changed_colours, source_loss

_ALWAYS = ("img", "img_metas", "gt_semantic_seg", "target_img", "target_img_metas")
_SOMETIMES = ("rare_class", "valid_pseudo_mask")


class CollaborativeDACS:
    """Mixed into the host's ``DACS``, it adds KD from a bigger teacher, which the student updates in turns.

    The host's losses, data, augmentation, dropout and BatchNorm statistics stay its own: with ``clda.weight=0`` it
    trains bit for bit as alone, rounds or not.
    """

    # Given by the subclass, which knows the host.
    read_config: Callable[[str], Any]
    build_segmentor: Callable[[Any], nn.Module]
    transforms: Any

    def __init__(self, **cfg: Any) -> None:
        options = Options.from_config(cfg.pop("clda", None))
        super().__init__(**cfg)
        self.clda: Optional[Collaboration] = None
        if options.enabled:
            _check_images(options.images, self)
            teacher = build_teacher(
                options.teacher,
                read_config=self.read_config,
                build_segmentor=self.build_segmentor,
                num_classes=self.num_classes,
            )
            self.clda = Collaboration(teacher, options)

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> Dict[str, Any]:
        """Do the host's step, with the learner's around the optimizer's."""
        host: Any = super()
        if self.clda is None:
            return host.train_step(data_batch, optimizer, **kwargs)
        if self.clda.saved is None:
            self.clda.saved = False
            warnings.warn(
                "clda: the teacher and the learner are not saved with the host's checkpoints. Set "
                "checkpoint_config=dict(type='CLDACheckpointHook') in the config",
                stacklevel=2,
            )
        return host.train_step(data_batch, self.clda.stepping(optimizer, self.get_model()), **kwargs)

    def forward_train(
        self,
        img: Tensor,
        img_metas: Any,
        gt_semantic_seg: Tensor,
        target_img: Tensor,
        target_img_metas: Any,
        **extra: Any,
    ) -> Dict[str, Any]:
        """Let the host compute its losses and gradients, then add those of the KD loss."""
        host: Any = super()
        arguments = (img, img_metas, gt_semantic_seg, target_img, target_img_metas)
        if self.clda is None:
            return host.forward_train(*arguments, **extra)
        student = self.get_model()
        options, masked = self.clda.options, self._masks_target()
        with images_seen(student) if masked or options.images != "target" else nullcontext([]) as seen:
            log_vars = host.forward_train(*arguments, **extra)
        batches: List[Distilled] = []
        if options.images in ("mixed", "both"):
            mixed = seen[1]  # the source comes first, the mixed images second, masked ones after them
            batches.append(Distilled(mixed, self._view(mixed, target_img_metas)))
        if options.images in ("target", "both"):
            view = self._view(target_img, target_img_metas, masked=seen[2] if masked else None)
            batches.append(Distilled(target_img, view, self._trusted(target_img, extra.get("valid_pseudo_mask"))))
        self.clda.distil(student, batches, source_loss(img, gt_semantic_seg))
        log_vars.update(self.clda.log())
        return log_vars

    def _masks_target(self) -> bool:
        """Return whether the host trains on masked target images, which are a view of them."""
        mode = getattr(self, "mask_mode", None) or ""
        masks = mode.startswith("separatetrg") and not getattr(self, "source_only", False)
        return bool(masks and self.clda is not None and self.clda.options.view == "auto")

    def _view(self, images: Tensor, metas: Sequence[Any], masked: Optional[Tensor] = None) -> View:
        """Return the second view of the images: the host's own if it has one, else what makes other colours."""
        if masked is not None or self.clda is None or self.clda.options.view == "none":
            return masked
        seed = self.clda.steps(self.get_model())
        options = {"strength": self.color_jitter_s, "seed": seed}
        return partial(changed_colours, images, metas, self.transforms, **options)

    def _trusted(self, images: Tensor, valid_pseudo_mask: Optional[Tensor]) -> Optional[Tensor]:
        """Return where the host trusts pseudo-labels at all: margins and the ego car are no basis for KD either."""
        top, bottom = self.psweight_ignore_top, self.psweight_ignore_bottom
        if valid_pseudo_mask is None and top <= 0 and bottom <= 0:
            return None
        trusted = torch.ones_like(images[:, 0], dtype=torch.bool)
        trusted[:, : max(top, 0)] = False
        if bottom > 0:
            trusted[:, -bottom:] = False
        if valid_pseudo_mask is not None:
            trusted &= valid_pseudo_mask.reshape(trusted.shape) > 0
        return trusted


def check_host(dacs: Type[Any]) -> None:
    """Raise unless the host's ``DACS`` has the interface that we rely on.

    Raises:
        CldaError: If it is of an unknown version.
    """
    parameters = [name for name in inspect.signature(dacs.forward_train).parameters if name != "self"]
    fits = (
        tuple(parameters[: len(_ALWAYS)]) == _ALWAYS
        and set(parameters[len(_ALWAYS) :]) <= set(_SOMETIMES)
        and all(callable(getattr(dacs, name, None)) for name in ("get_model", "train_step"))
    )
    if not fits:
        raise problem(
            "the host's DACS is of an unknown version",
            expected=f"forward_train({', '.join(_ALWAYS)}), with {' and '.join(_SOMETIMES)} in MIC and HRDA",
            received=f"{dacs.__module__}.DACS.forward_train({', '.join(parameters)})",
            fix="use DAFormer (e6f6e04), HRDA or MIC (2f932a9), or adapt CollaborativeDACS to the new interface",
        )


def _check_images(images: str, host: Any) -> None:
    if images != "target" and getattr(host, "source_only", False):
        raise problem(
            "there are no mixed images to distil on",
            expected="clda.images='target' where the host trains with source_only=True",
            received=f"clda.images={images!r}",
            fix="set clda.images='target', or uda.source_only=False",
        )
