"""SYNTHIA to Cityscapes, DAFormer: MiT-B5 teacher, MiT-B0 student, narrower in every stage."""

_base_ = ["synthia2cs_daformer_mitb5_to_mitb3.py"]
model = dict(
    pretrained="pretrained/mit_b0.pth",
    backbone=dict(type="mit_b0"),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
)
name = "synthia2cs_clda_daformer_mitb5_to_mitb0"
name_architecture = "daformer_sepaspp_mitb0"
name_encoder = "mitb0"
