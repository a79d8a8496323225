"""GTA to Cityscapes at full resolution, MIC on HRDA: MiT-B5 teacher (the released checkpoint), MiT-B3 student.

From MIC/seg, with the daformer folder copied there as clda_daformer:

    python -m tools.train clda_daformer/configs/mic/gta2cs_mic_hrda_mitb5_to_mitb3.py

Put the released checkpoint and its .json under the two names below, or name yours. The frozen-teacher baseline is the
same with --options uda.clda.rounds=False, the host alone with uda.clda.enabled=False. Nothing was tuned on these data.
"""

_base_ = ["../../../configs/mic/gtaHR2csHR_mic_hrda.py"]
custom_imports = dict(imports=["clda_daformer.plugin"], allow_failed_imports=False)
model = dict(pretrained="pretrained/mit_b3.pth", backbone=dict(type="mit_b3"))
uda = dict(
    type="CLDADACS",
    clda=dict(
        teacher=dict(
            config="work_dirs/gtaHR2csHR_mic_hrda/gtaHR2csHR_mic_hrda.json",
            checkpoint="work_dirs/gtaHR2csHR_mic_hrda/latest.pth",
        ),
        images="target",
        weight=1.0,
    ),
)
checkpoint_config = dict(type="CLDACheckpointHook", interval=4000)
name = "gtaHR2csHR_clda_mic_hrda_mitb5_to_mitb3"
name_architecture = "hrda1-512-0.1_daformer_sepaspp_sl_mitb3"
name_encoder = "mitb3"
name_uda = "clda_dacs_a999_fdthings_rcs0.01-2.0_cpl2_m64-0.7-spta"
