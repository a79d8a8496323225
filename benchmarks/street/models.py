"""SegFormer (MiT encoder, MLP decoder) from transformers: sizes that train on a CPU in minutes, and the published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import torch
from torch import Tensor, nn

from benchmarks.street.scenes import CLASSES


@dataclass(frozen=True)
class Size:
    """Blocks and widths of the four stages, the decoder's width, and the stages' attention."""

    depths: Tuple[int, int, int, int]
    widths: Tuple[int, int, int, int]
    decoder: int
    heads: Tuple[int, int, int, int] = (1, 2, 4, 4)
    reductions: Tuple[int, int, int, int] = (4, 2, 1, 1)


TEACHER = Size((2, 2, 4, 2), (32, 64, 128, 192), 96)
STUDENT = Size((1, 1, 1, 1), (32, 64, 128, 192), 96)  # of equal width
NARROW = Size((1, 1, 1, 1), (16, 32, 64, 96), 48)

# Xie et al., SegFormer, NeurIPS 2021, tables 6 and 7.
MIT_B0 = Size((2, 2, 2, 2), (32, 64, 160, 256), 256, (1, 2, 5, 8), (8, 4, 2, 1))
MIT_B3 = Size((3, 4, 18, 3), (64, 128, 320, 512), 768, (1, 2, 5, 8), (8, 4, 2, 1))
MIT_B5 = Size((3, 6, 40, 3), (64, 128, 320, 512), 768, (1, 2, 5, 8), (8, 4, 2, 1))


class Segmenter(nn.Module):
    """Images ``(N, 3, H, W)`` in [0, 1] to logits ``(N, C, H/4, W/4)``."""

    def __init__(self, size: Size, classes: int) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        super().__init__()
        self.segformer = SegformerForSemanticSegmentation(
            SegformerConfig(
                num_labels=classes,
                depths=list(size.depths),
                hidden_sizes=list(size.widths),
                num_attention_heads=list(size.heads),
                sr_ratios=list(size.reductions),
                decoder_hidden_size=size.decoder,
                drop_path_rate=0.0,
                classifier_dropout_prob=0.1,
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.segformer((images - 0.5) / 0.25).logits


def segmenter(size: Size, seed: int, classes: int = len(CLASSES)) -> Segmenter:
    """Return a network with weights drawn from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segmenter(size, classes)
