"""SYNTHIA to Cityscapes, DAFormer: MiT-B5 teacher, MiT-B3 student; the GTA recipe with the host's SYNTHIA data.

Put the released checkpoint and its .json under the two names below, or name yours.
"""

import mmcv

_base_ = ["gta2cs_daformer_mitb5_to_mitb3.py"]
data = mmcv.Config.fromfile("configs/_base_/datasets/uda_synthia_to_cityscapes_512x512.py").data
del mmcv  # a config keeps every name
uda = dict(
    clda=dict(
        teacher=dict(
            config="work_dirs/synthia2cs_daformer/synthia2cs_daformer.json",
            checkpoint="work_dirs/synthia2cs_daformer/latest.pth",
        )
    )
)
name = "synthia2cs_clda_daformer_mitb5_to_mitb3"
name_dataset = "synthia2cityscapes"
