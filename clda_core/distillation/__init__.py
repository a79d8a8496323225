"""Distillation losses: each one a function, and a thin class that keeps its options."""

from .attention import AttentionTransfer, attention_transfer
from .channel_wise import ChannelWiseDistillation, channel_wise_distillation
from .decoupled import DecoupledDistillation, decoupled_distillation
from .dist import DISTDistillation, dist_distillation
from .features import FeatureDistillation, feature_distillation
from .kl import KLDistillation, kl_distillation
from .masks import check_values
from .protocol import Distillation, distillation_loss
from .weighted_sum import WeightedSum

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
