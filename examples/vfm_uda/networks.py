"""A student of another kind than the host's networks: SegFormer, with what the host's training modules ask of one."""

# Without `from __future__ import annotations`, which the host's jsonargparse does not read.

from typing import Any, List, Tuple, Union

from torch import Tensor, nn
from torch.nn import functional as F

from .views import blanked


class SegFormer(nn.Module):
    """SegFormer of Hugging Face transformers.

    Args:
        model_name: A checkpoint's name or folder, for example ``"nvidia/mit-b0"``, ImageNet weights.
        num_classes: Of the target.
        img_size: What the host's config links; SegFormer takes any.
        pretrained: Whether to take the weights as well as the configuration.
        config: Entries of a ``SegformerConfig`` instead of a name; the weights are then random.
    """

    def __init__(
        self,
        img_size: int,
        model_name: str = "nvidia/mit-b0",
        num_classes: int = 19,
        pretrained: bool = True,
        config: Any = None,
    ) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        self.img_size, self.num_classes = img_size, num_classes
        if config is None and pretrained:
            model = SegformerForSemanticSegmentation.from_pretrained(model_name, num_labels=num_classes)
        else:
            settings = SegformerConfig.from_pretrained(model_name) if config is None else SegformerConfig(**config)
            settings.num_labels = num_classes
            model = SegformerForSemanticSegmentation(settings)
        self.feat_dim = model.config.hidden_sizes[-1]
        self.encoder, self.head = nn.ModuleList([model.segformer]), model.decode_head
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # VFM-UDA averages all buffers, and an integer cannot be averaged
        # By these the host makes its optimizer groups: a list of blocks is named by its prefix.
        self.param_defs_decoder = [("head", self.head)]
        self.param_defs_encoder_blocks = [("encoder", self.encoder)]
        self.param_defs_encoder_stems: List[Tuple[str, nn.Module]] = []

    def forward(
        self, img: Tensor, mask_ratio: float = 0.0, return_features: bool = False
    ) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """Return logits of the images' size, and the last stage's features if asked for.

        In training mode ``mask_ratio`` of the images' blocks are blanked, as the host's networks blank tokens.
        """
        if mask_ratio > 0 and self.training:
            img = blanked(img, mask_ratio)
        features = self.encoder[0](img, output_hidden_states=True).hidden_states
        logits = F.interpolate(self.head(features), img.shape[2:], mode="bilinear", align_corners=False)
        return (logits, features[-1]) if return_features else logits
