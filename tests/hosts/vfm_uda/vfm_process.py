"""Runs the host's own ``main.py`` with what it needs in this environment, on stand-ins for downloaded networks.

    python vfm_process.py ARGUMENTS OF main.py
    python vfm_process.py serve                     with one job per line on stdin

``CLDA_VERIFY`` (JSON) names the host's folder, the file of recorded batches and the report. ``verify`` copies this file
next to the runs and starts it by its path, so that nothing of this repository is imported unless the config asks for
it. Each shim mends one thing that breaks without a GPU, downloads or the pinned packages, and is applied only where it
does, in the same way for the host alone and with us.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import random
import sys
import time
import traceback
import types
from typing import Any, Callable, Dict, List

SETTINGS: Dict[str, Any] = json.loads(os.environ.get("CLDA_VERIFY", "{}"))
WIDTHS = {"dinov2_vits14": 64, "dinov2_vitb14": 128, "dinov2_vitl14": 192, "dinov2_vitl14_reg": 64}


def dinov2_is_a_toy() -> bool:
    """``torch.hub`` gives a small random network of timm's blocks with DINOv2's interface."""
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn

    class PatchEmbed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, width, 14, 14)

        def forward(self, images: Any) -> Any:
            return self.proj(images).flatten(2).transpose(1, 2)

    class Toy(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            width = self.embed_dim = WIDTHS[name]
            self.patch_embed, self.norm = PatchEmbed(width), nn.LayerNorm(width)
            self.blocks = nn.ModuleList([Block(width, max(1, width // 64)) for _ in range(4)])
            self.cls_token, self.mask_token = (
                nn.Parameter(torch.zeros(1, 1, width)),
                nn.Parameter(torch.zeros(1, width)),
            )
            self.pos_embed = nn.Parameter(torch.randn(1, 1 + 5 * 5, width) * 0.02)
            self.num_register_tokens = 4 if name.endswith("_reg") else 0
            self.register_tokens = nn.Parameter(torch.zeros(1, 4, width)) if self.num_register_tokens else None

        def interpolate_pos_encoding(self, tokens: Any, width: int, height: int) -> Any:
            grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (5, 5))
            size = (height // 14, width // 14)
            grid = nn.functional.interpolate(grid, size, mode="bilinear", align_corners=False)
            return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    torch.hub.load = lambda repository, name, **options: Toy(name)
    return True


def timm_downloads_nothing() -> bool:
    """``timm.create_model`` builds without pretrained weights."""
    import timm

    create = timm.create_model
    timm.create_model = lambda *args, **options: create(*args, **{**options, "pretrained": False})
    return True


def the_adapter_takes_small_images() -> bool:
    """VFM-UDA++ resizes every image to 1120 and its feature extractor's to 406 pixels: 224 and 98 here."""
    try:
        from models.distill_feature_head.dinov2_feature_extractor import DinoV2FeatureExtractor
        from models.multiscale_vfm.vit_adapter_lightweight_pyramid_head import VITAdapterLightweightPyramidHead
    except ModuleNotFoundError:
        return False
    build, extract = VITAdapterLightweightPyramidHead.__init__, DinoV2FeatureExtractor.__init__

    def build_small(self: Any, img_size: int, *args: Any, **options: Any) -> None:
        build(self, 1024, *args, **{**options, "use_pretrained_adapter": False})
        self.img_size = self.encoder.vit_in_img_size = 224

    def extract_small(self: Any, *args: Any) -> None:
        extract(self, *args)
        self.vit_in_img_size = 98

    build_small.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # the command line reads it
    VITAdapterLightweightPyramidHead.__init__ = build_small
    DinoV2FeatureExtractor.__init__ = extract_small
    return True


def torchvision_imports_without_operators() -> bool:
    """A torchvision built for another torch lacks compiled operators, whose registration then stops its import."""
    try:
        import torchvision

        return False
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import torchvision  # noqa: F401

    return True


def schedulers_take_verbose() -> bool:
    """The hosts' learning-rate scheduler passes ``verbose``, which newer torch has taken away."""
    from torch.optim.lr_scheduler import LRScheduler

    init = LRScheduler.__init__
    if "verbose" in inspect.signature(init).parameters:
        return False
    LRScheduler.__init__ = lambda self, optimizer, last_epoch=-1, verbose=False: init(self, optimizer, last_epoch)
    return True


def checkpoints_may_hold_objects() -> bool:
    """The hosts' checkpoints hold objects beside tensors, which newer torch does not load by itself."""
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        return False
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return True


def a_checkpoint_changes_no_config() -> bool:
    """Newer Lightning's command line reads the file of ``--ckpt_path`` too, but nothing with NumPy's numbers."""
    from lightning.pytorch import cli

    if not hasattr(cli.LightningCLI, "_parse_ckpt_path"):
        return False
    cli.LightningCLI._parse_ckpt_path = lambda self: None
    return True


def devices_may_be_cpus() -> bool:
    """The hosts' data module reads the devices as GPUs."""
    import torch
    from datasets.utils import custom_lightning_data_module as module

    if torch.cuda.is_available():
        return False
    module._parse_gpu_ids = lambda devices, **options: devices
    return True


SHIMS: List[Callable[[], bool]] = [
    torchvision_imports_without_operators,
    dinov2_is_a_toy,
    timm_downloads_nothing,
    the_adapter_takes_small_images,
    schedulers_take_verbose,
    checkpoints_may_hold_objects,
    a_checkpoint_changes_no_config,
    devices_may_be_cpus,
]


def replay() -> Any:
    """Return a callback that makes every step depend on its number alone, so that runs can be compared and resumed.

    The batches are those that the host's data module gave to the first run; another rank gets another step's. Lightning
    does not restore the random state, so it is seeded at every step.
    """
    import numpy as np
    import torch
    from lightning.pytorch import Callback

    class Replay(Callback):
        def __init__(self) -> None:
            self.losses: List[Dict[str, float]] = []
            self.seconds: List[float] = []
            path = SETTINGS["batches"]
            self.recorded = torch.load(path) if os.path.exists(path) else []
            self.records = not self.recorded

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if self.records:
                self.recorded.append([tensor.clone() for tensor in batch])
            else:
                step = (trainer.global_step + trainer.global_rank) % len(self.recorded)
                for tensor, recorded in zip(batch, self.recorded[step]):
                    tensor.copy_(recorded)
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(trainer.global_step)
            self.started = time.process_time()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.seconds.append(time.process_time() - self.started)
            self.losses.append({name: float(value) for name, value in trainer.callback_metrics.items()})

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if self.records:
                torch.save(self.recorded, SETTINGS["batches"])
            learner = getattr(module, "learner", None)
            found = {
                "losses": self.losses,
                "seconds": self.seconds,
                "rounds": 0 if learner is None else learner.report().made,
                "teacher": 0.0
                if learner is None
                else sum(float(p.detach().double().sum()) for p in learner.teacher.parameters()),
                "student": sum(float(p.detach().double().sum()) for p in module.network.parameters()),
            }
            with open(f"{SETTINGS['report']}.{trainer.global_rank}", "w") as file:
                json.dump(found, file)

    return Replay()


def main() -> None:
    sys.path[0:1] = [SETTINGS["host"], os.getcwd()]
    shims = [shim.__name__ for shim in SHIMS if shim()]
    from lightning.pytorch import cli

    instantiate = cli.LightningCLI.instantiate_trainer

    def with_replay(self: Any, **options: Any) -> Any:
        trainer = instantiate(self, **options)
        trainer.callbacks.insert(0, replay())
        return trainer

    cli.LightningCLI.instantiate_trainer = with_replay
    import main as host

    host.cli_main()
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("clda_core", "clda_vfm_uda", "examples"))
    with open(SETTINGS["report"], "w") as file:
        json.dump({"shims": shims, "ours": ours}, file)


def serve() -> None:
    """Import what every run needs once, then run each job, a line of JSON on stdin, in a process forked from here."""
    torchvision_imports_without_operators()
    for name in (
        "torch",
        "timm",
        "wandb",
        "transformers",
        "torchmetrics",
        "matplotlib.pyplot",
        "lightning.pytorch.cli",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            _run(job)
        _, status = os.waitpid(process, 0)
        print(status, flush=True)


def _run(job: Dict[str, Any]) -> None:
    """Run a job in this process, which ends with it."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(job["environment"])
    SETTINGS.update(json.loads(os.environ["CLDA_VERIFY"]))
    sys.path += job["path"]
    sys.argv = [os.path.abspath(__file__), *job["arguments"]]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
