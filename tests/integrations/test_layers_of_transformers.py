"""The default layers of transformers' models are their residual and transformer blocks."""

from typing import Any, Dict, Tuple

import pytest
from torch import nn

from clda_core.layers import ModelView, group_layers
from clda_core.relation import ByRelativeDepth

transformers = pytest.importorskip("transformers", reason="these are models of transformers")

TRANSFORMER = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16, "patch_size": 8}
TEXT = {**TRANSFORMER, "vocab_size": 20}
MODELS: Dict[str, Tuple[str, str, Dict[str, Any]]] = {
    # By model: its class, that of its blocks, and its options besides the depth.
    "ResNet, basic": ("ResNet", "ResNetBasicLayer", {"layer_type": "basic"}),
    "ResNet, bottleneck": ("ResNet", "ResNetBottleNeckLayer", {"layer_type": "bottleneck"}),
    "RegNet X": ("RegNet", "RegNetXLayer", {"layer_type": "x", "groups_width": 8}),
    "RegNet Y": ("RegNet", "RegNetYLayer", {"layer_type": "y", "groups_width": 8}),
    "ConvNeXt": ("ConvNext", "ConvNextLayer", {}),
    "SegFormer (MiT)": ("Segformer", "SegformerLayer", {"num_attention_heads": [1, 1, 2, 2]}),
    "Swin": ("Swin", "SwinLayer", {"image_size": 32, "patch_size": 1, "embed_dim": 8, "window_size": 2}),
    "ViT": ("ViT", "ViTLayer", TRANSFORMER),
    "DINOv2": ("Dinov2", "Dinov2Layer", {**TRANSFORMER, "mlp_ratio": 1}),
    "BERT": ("Bert", "BertLayer", TEXT),
    "DistilBERT": ("DistilBert", "TransformerBlock", {"vocab_size": 20, "dim": 8, "n_heads": 2, "hidden_dim": 8}),
    "MobileNetV2": ("MobileNetV2", "MobileNetV2InvertedResidual", {"depth_multiplier": 0.1}),
}


def build(name: str, depth: int) -> nn.Module:
    kind, _, options = MODELS[name]
    if kind in ("ResNet", "RegNet"):
        options = {**options, "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, depth, 1, depth]}
    elif kind in ("ConvNext", "Segformer"):
        options = {**options, "hidden_sizes": [8, 16, 16, 16], "depths": [depth, 1, depth, 1]}
    elif kind == "Swin":
        options = {**options, "depths": [1, depth, 1], "num_heads": [1, 2, 2]}
    elif kind == "DistilBert":
        options = {**options, "n_layers": 1 + depth}
    elif kind != "MobileNetV2":
        options = {**options, "num_hidden_layers": 1 + depth}
    model: nn.Module = getattr(transformers, kind + "Model")(getattr(transformers, kind + "Config")(**options))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_each_block_is_a_layer_and_a_deeper_teachers_relate_to_the_students(name: str) -> None:
    teacher, student = build(name, 3), build(name, 1)
    layers = {layer.name: layer for layer in group_layers(teacher)}
    blocks = [path for path, module in teacher.named_modules() if type(module).__name__ == MODELS[name][1]]
    assert len(blocks) >= 3
    for block in blocks:
        inside = tuple(path for path, _ in teacher.named_parameters() if path.startswith(block + "."))
        assert layers[block].parameters == inside
    related = ByRelativeDepth()(ModelView(teacher, tuple(layers.values())), ModelView(student, group_layers(student)))
    assert related.unrelated == {}
    assert {related.pairs[block].name for block in blocks} <= set(blocks)
