"""GTA to Cityscapes, DAFormer: MiT-B5 teacher (the released checkpoint), MiT-B3 student of equal width.

From the host's folder, with the daformer folder copied there as clda_daformer:

    python -m tools.train clda_daformer/configs/gta2cs_daformer_mitb5_to_mitb3.py

The frozen-teacher baseline is the same with --options uda.clda.rounds=False, the host alone with
uda.clda.enabled=False. Nothing was tuned on these data.
"""

_base_ = ["../../configs/daformer/gta2cs_uda_warm_fdthings_rcs_croppl_a999_daformer_mitb5_s0.py"]
custom_imports = dict(imports=["clda_daformer.plugin"], allow_failed_imports=False)
model = dict(pretrained="pretrained/mit_b3.pth", backbone=dict(type="mit_b3"))
uda = dict(
    type="CLDADACS",
    clda=dict(
        teacher=dict(
            config="work_dirs/211108_1622_gta2cs_daformer_s0_7f24c/211108_1622_gta2cs_daformer_s0_7f24c.json",
            checkpoint="work_dirs/211108_1622_gta2cs_daformer_s0_7f24c/latest.pth",
        ),
        images="target",
        weight=1.0,
    ),
)
checkpoint_config = dict(type="CLDACheckpointHook", interval=4000)
name = "gta2cs_clda_daformer_mitb5_to_mitb3"
name_architecture = "daformer_sepaspp_mitb3"
name_encoder = "mitb3"
name_uda = "clda_dacs_a999_fd_things_rcs0.01_cpl"
