"""Every loss with its oracle, and the inputs that the tests share."""

import torch

from clda_core import Outputs
from clda_core.distillation import (
    AttentionTransfer,
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    FeatureDistillation,
    KLDistillation,
    attention_transfer,
    channel_wise_distillation,
    decoupled_distillation,
    dist_distillation,
    feature_distillation,
    kl_distillation,
)
from tests import reference_distillation as reference

LOGIT_LOSSES = {
    "kl": (kl_distillation, reference.kl),
    "channel_wise": (channel_wise_distillation, reference.channel_wise),
    "decoupled": (decoupled_distillation, reference.decoupled),
    "dist": (dist_distillation, reference.dist),
}
FEATURE_LOSSES = {
    "features": (feature_distillation, reference.features),
    "attention": (attention_transfer, reference.attention),
}
LOSSES = {**LOGIT_LOSSES, **FEATURE_LOSSES}
SPATIAL = ("channel_wise", "attention")
STRATEGIES = (
    KLDistillation,
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    FeatureDistillation,
    AttentionTransfer,
)


def pair(*shape, dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def weights_of(shape, kind, seed=1):
    """Return (mask as the user gives it, the same as float64 weights, or ``None``) for positions of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    keep = uniform > 0.4
    keep.reshape(-1)[:2] = torch.tensor([True, False])
    if kind == "none":
        return None, None
    if kind == "bool":
        return keep, keep.double()
    if kind == "float":
        return uniform * keep, uniform * keep
    if kind == "labels":  # with ignore_index=255; a negative number is never a class
        labels = torch.full(shape, 7).masked_fill(~keep, 255)
        labels.reshape(-1)[1] = -1
        return labels, keep.double()
    raise ValueError(kind)


def ignoring(kind):
    """Return the options that go with a mask of this kind."""
    return {"ignore_index": 255} if kind == "labels" else {}


def flat(tensor):
    """Return ``(N, C, P)`` as float64 numpy, for the oracles."""
    return tensor.detach().double().reshape(*tensor.shape[:2], -1).numpy()


def outputs(channels=3):
    logits = pair(2, 3, 4, 4, dtype=torch.float32)
    widths = (channels, 5)
    features = [
        torch.randn(2, width, 4, 4, generator=torch.Generator().manual_seed(index))
        for index, width in enumerate(widths)
    ]
    return [Outputs(x, (f,)) for x, f in zip(logits, features)]
