"""SYNTHIA to Cityscapes, MIC on HRDA: MiT-B5 teacher, MiT-B3 student; the GTA recipe with the host's SYNTHIA data.

Put the released checkpoint and its .json under the two names below, or name yours.
"""

import mmcv

_base_ = ["gta2cs_mic_hrda_mitb5_to_mitb3.py"]
data = mmcv.Config.fromfile("configs/_base_/datasets/uda_synthiaHR_to_cityscapesHR_1024x1024.py").data
del mmcv  # a config keeps every name
uda = dict(
    clda=dict(
        teacher=dict(
            config="work_dirs/synthiaHR2csHR_mic_hrda/synthiaHR2csHR_mic_hrda.json",
            checkpoint="work_dirs/synthiaHR2csHR_mic_hrda/latest.pth",
        )
    )
)
name = "synthiaHR2csHR_clda_mic_hrda_mitb5_to_mitb3"
name_dataset = "synthiaHR2cityscapesHR_1024x1024"
