"""SYNTHIA to Cityscapes, MIC on HRDA: MiT-B5 teacher, MiT-B0 student, narrower in every stage."""

_base_ = ["synthia2cs_mic_hrda_mitb5_to_mitb3.py"]
model = dict(
    pretrained="pretrained/mit_b0.pth",
    backbone=dict(type="mit_b0"),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
)
name = "synthiaHR2csHR_clda_mic_hrda_mitb5_to_mitb0"
name_architecture = "hrda1-512-0.1_daformer_sepaspp_sl_mitb0"
name_encoder = "mitb0"
