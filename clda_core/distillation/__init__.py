"""Distillation losses: each one a function, and a thin class that keeps its options."""

from .attention import AttentionTransfer, attention_transfer
from .base import Distillation, WeightedSum, check_values, distillation_loss
from .channel_wise import ChannelWiseDistillation, channel_wise_distillation
from .decoupled import DecoupledDistillation, decoupled_distillation
from .dist import DISTDistillation, dist_distillation
from .features import FeatureDistillation, feature_distillation
from .kl import KLDistillation, kl_distillation

__all__ = [
    "AttentionTransfer",
    "ChannelWiseDistillation",
    "DISTDistillation",
    "DecoupledDistillation",
    "Distillation",
    "FeatureDistillation",
    "KLDistillation",
    "WeightedSum",
    "attention_transfer",
    "channel_wise_distillation",
    "check_values",
    "decoupled_distillation",
    "dist_distillation",
    "distillation_loss",
    "feature_distillation",
    "kl_distillation",
]
