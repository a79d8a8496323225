"""The host's segmentors as what the learner needs: modules from images to logits."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, List

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Logits(nn.Module):
    """A view of a segmentor whose forward pass is images to low-resolution logits.

    Logits stay on the decoder's grid (a quarter of the image for DAFormer): distilled there, they cost a sixteenth of
    the memory. A multi-resolution segmentor (HRDA) fuses a context view of the whole image with detail crops. Without
    gradients all overlapping crops are used, as the host does for pseudo-labels and tests; with gradients a single
    random one, as in the host's training, because the activations of nine would not fit.

    Args:
        segmentor: An ``EncoderDecoder`` or ``HRDAEncoderDecoder`` of the host; not copied.
    """

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, C, h, w)`` of images ``(N, 3, H, W)``, normalised as the host normalises them."""
        segmentor: Any = self.segmentor
        if not is_multi_resolution(segmentor):
            return segmentor._decode_head_forward_test(segmentor.extract_feat(images), None)
        if not torch.is_grad_enabled():
            return segmentor.encode_decode(images, None, upscale_pred=False)
        with _keeping_crop_boxes(segmentor):
            features, _ = segmentor._forward_train_features(images)
            return segmentor._decode_head_forward_test(features, None)


def is_multi_resolution(segmentor: nn.Module) -> bool:
    """Return whether the segmentor is HRDA's."""
    return hasattr(segmentor, "_forward_train_features")


@contextlib.contextmanager
def keeping_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch as in training, without moving its running statistics."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextlib.contextmanager
def images_seen(segmentor: nn.Module) -> Iterator[List[Tensor]]:
    """Collect the images that the host trains the segmentor on while the context is open, in the host's order."""
    seen: List[Tensor] = []
    original = segmentor.forward_train

    def forward_train(img: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(img.detach())
        return original(img, *args, **kwargs)

    # The host calls the method, not the module, so hooks would not fire; an instance attribute shadows it.
    segmentor.__dict__["forward_train"] = forward_train
    try:
        yield seen
    finally:
        del segmentor.__dict__["forward_train"]


@contextlib.contextmanager
def _keeping_crop_boxes(segmentor: Any) -> Iterator[None]:
    """Undo where a training forward pass of HRDA leaves its crop: on the head, and on the class for all models."""
    boxes = getattr(type(segmentor), "last_train_crop_box", {})
    before = dict(boxes)
    try:
        yield
    finally:
        segmentor.decode_head.reset_crop()
        boxes.clear()
        boxes.update(before)
