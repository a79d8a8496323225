"""The plug-in for VFM-UDA and VFM-UDA++, inside fakes shaped like them."""

from __future__ import annotations

import copy
import importlib
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="VFM-UDA trains by Lightning")
import lightning

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.distillation import DISTDistillation
from clda_core.lead import FixedTrust
from clda_core.update import MaskedDistillation
from examples.vfm_uda.collaboration import Collaboration, check_host
from examples.vfm_uda.export import KEY
from examples.vfm_uda.export import main as export
from examples.vfm_uda.options import Options
from examples.vfm_uda.random_state import of_our_own
from examples.vfm_uda.views import blanked
from tests.examples import vfm_uda_fakes as fakes

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, no logger, short epochs

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "vfm_uda" / "configs"
PLUGINS = ("examples.vfm_uda.plugin", "examples.vfm_uda.plugin_plusplus")


@pytest.fixture(params=["vfm-uda", "vfm-uda++"])
def host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with of_our_own(0, torch.device("cpu")):
        yield Host(request.param, tmp_path, monkeypatch)


@pytest.fixture
def vfm_uda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with of_our_own(0, torch.device("cpu")):
        yield Host("vfm-uda", tmp_path, monkeypatch)


class Seeded(lightning.Callback):
    """Lightning does not restore the random state, so a step is seeded by its number, and its batch chosen by it."""

    def __init__(self) -> None:
        self.losses: List[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        data = fakes.Batches()
        for tensor, item in zip(batch, zip(*[data[(2 * trainer.global_step + i) % len(data)] for i in range(2)])):
            tensor.copy_(torch.stack(item))
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss_source"]))


class Host:
    """The fakes with our plug-in imported into them, and a teacher's checkpoint that they have written."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a checkpoint of the fakes holds their network
        for module, value in fakes.host_modules().items():
            monkeypatch.setitem(sys.modules, module, value)
        for plugin in PLUGINS:
            monkeypatch.delitem(sys.modules, plugin, raising=False)
        if name == "vfm-uda":
            self.alone_class = fakes.FakeUDAVITGeneric
            self.ours_class = importlib.import_module(PLUGINS[0]).CLDAUDAVITGeneric
        else:
            self.alone_class = fakes.FakeUDA
            self.ours_class = importlib.import_module(PLUGINS[1]).CLDAUDA
        self.norm = name == "vfm-uda++"
        torch.save({"state_dict": self.build(self.alone_class, width=8).state_dict()}, "teacher.ckpt")

    def build(self, of: Any, width: int = 4, dropout: float = 0.1, **extra: Any) -> Any:
        torch.manual_seed(3)
        network = fakes.FakeNetwork(fakes.SIZE, width=width, dropout=dropout, norm=self.norm)
        return of(batch_size=2, img_size=fakes.SIZE, network=network, **extra)

    def alone(self, **options: Any) -> Any:
        return self.build(self.alone_class, **options)

    def clda(self, **options: Any) -> Dict[str, Any]:
        arguments = {"width": 8, "norm": self.norm}
        teacher = {"teacher": "fake_networks.FakeNetwork", "teacher_args": arguments, "checkpoint": "teacher.ckpt"}
        return {**teacher, **options}

    def ours(self, of: Any = None, dropout: float = 0.1, **options: Any) -> Any:
        return self.build(of or self.ours_class, dropout=dropout, clda=self.clda(**options))

    def early(self) -> Any:
        """Return a subclass with rounds after the first step, as a user writes one."""

        class Early(self.ours_class):  # type: ignore[name-defined, misc]
            def make_learner(self, teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
                update = MaskedDistillation(learning_rate=1e-2, source_weight=0.1)
                schedule = Schedule(warmup=1, interval=2)
                return CollaborativeLearner(teacher, student, update=update, schedule=schedule, trust=FixedTrust())

        return Early

    def fit(self, module: Any, steps: int = 4, resume: Optional[str] = None, save: Optional[str] = None) -> Any:
        seeded = Seeded()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seeded],
        )
        torch.manual_seed(0)
        trainer.fit(module, torch.utils.data.DataLoader(fakes.Batches(), batch_size=2), ckpt_path=resume)
        if save is not None:
            trainer.save_checkpoint(save)
        return seeded.losses


def same(a: Any, b: Any) -> bool:
    """Whether two modules, or state_dicts, are equal bit for bit, in the names too."""
    a, b = (value.state_dict() if isinstance(value, nn.Module) else value for value in (a, b))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def of_network(checkpoint: Any) -> Dict[str, Any]:
    tensors = checkpoint["state_dict"].items()
    return {name[len("network.") :]: value for name, value in tensors if name.startswith("network.")}


def loaded(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


# --------------------------------------------------------------------------------------------- off, and on but idle


def test_off_is_bitwise_the_host_and_builds_no_teacher(host: Host) -> None:
    alone, ours = host.alone(), host.build(host.ours_class, clda={"enabled": False, "checkpoint": "none.ckpt"})
    losses = host.fit(alone)
    assert host.fit(ours) == losses
    assert ours.learner is None
    assert ours.configure_callbacks() == []
    assert same(ours, alone)


def test_weight_0_with_rounds_is_bitwise_the_host(host: Host) -> None:
    alone, ours = host.alone(), host.ours(host.early(), weight=0.0)
    losses = host.fit(alone)
    assert host.fit(ours) == losses
    assert same(ours, alone)
    assert ours.learner.report().made > 0


def test_on_adds_nothing_but_the_gradient_of_the_kd_loss(vfm_uda: Host) -> None:
    def gradients(weight: Optional[float]) -> Dict[str, Any]:
        module = (
            vfm_uda.alone(dropout=0.0) if weight is None else vfm_uda.ours(dropout=0.0, weight=weight, rounds=False)
        )
        caught: Dict[str, Any] = {}

        def catch(optimizer: Any) -> None:
            caught.update({name: p.grad.clone() for name, p in module.network.named_parameters()})

        module.on_before_optimizer_step = catch
        vfm_uda.fit(module, steps=1)
        return caught

    alone, on = gradients(None), gradients(2.0)
    module = vfm_uda.ours(dropout=0.0, rounds=False)
    student, teacher = copy.deepcopy(module.network).train(), module.learner.teacher
    data = fakes.Batches()
    images = fakes.normalize(torch.stack([data[index][3] for index in range(2)]))
    mask = torch.stack([data[index][5] for index in range(2)]) != 255
    with torch.no_grad():
        target = teacher(images)
    CollaborativeLearner(teacher, student, distillation=DISTDistillation()).distill(
        student(images), images, teacher_output=target, mask=mask
    ).backward()
    for name, parameter in student.named_parameters():
        added = on[name] - alone[name]
        assert torch.allclose(added, 2.0 * parameter.grad, atol=1e-6), name
        assert bool(parameter.grad.any()) == bool(added.any()), name


# ------------------------------------------------------------------------------------------- where the teacher lives


def test_the_teacher_is_no_module_of_the_host_and_building_it_draws_nothing(host: Host) -> None:
    torch.manual_seed(7)
    random.seed(7)
    states = torch.get_rng_state(), random.getstate()
    network = fakes.FakeNetwork(fakes.SIZE, norm=host.norm)
    torch.set_rng_state(states[0])
    ours = host.ours_class(batch_size=2, img_size=fakes.SIZE, network=network, clda=host.clda())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    teacher = ours.learner.teacher
    assert teacher not in list(ours.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    host.fit(ours, steps=1)
    assert not teacher.training
    assert same(teacher, of_network(loaded("teacher.ckpt")))


def test_the_checkpoint_is_the_hosts_and_our_callbacks_state(host: Host) -> None:
    host.fit(host.alone(), save="alone.ckpt")
    host.fit(host.ours(host.early()), save="ours.ckpt")
    alone, ours = loaded("alone.ckpt"), loaded("ours.ckpt")
    assert list(ours) == list(alone)
    assert list(ours["state_dict"]) == list(alone["state_dict"])
    groups = [[group["params"] for group in saved["optimizer_states"][0]["param_groups"]] for saved in (alone, ours)]
    assert groups[0] == groups[1]
    assert set(ours["callbacks"]) - set(alone["callbacks"]) == {KEY}
    assert set(ours["hyper_parameters"]) - set(alone["hyper_parameters"]) == {"clda"}
    assert ours["hyper_parameters"]["clda"] == asdict(Options(**host.clda()))


# ------------------------------------------------------------------------------------------------- rounds and resume


def test_rounds_change_the_teacher_and_frozen_kd_does_not(vfm_uda: Host) -> None:
    on, frozen = vfm_uda.ours(vfm_uda.early()), vfm_uda.ours(rounds=False)
    before = copy.deepcopy(on.learner.teacher.state_dict())
    vfm_uda.fit(on)
    vfm_uda.fit(frozen)
    assert not same(on.learner.teacher, before)
    assert same(frozen.learner.teacher, before)
    assert on.learner.report().steps == 4
    assert on.learner.report().made > 0


def test_the_stronger_setting_learns_from_view_and_source_too(vfm_uda: Host) -> None:
    plain, stronger = vfm_uda.ours(interval=2), vfm_uda.ours(interval=2, stronger=True)
    for module in (plain, stronger):
        vfm_uda.fit(module)
    update = stronger.learner.update
    assert (update.learns_on, update.own_targets, update.source_weight) == ("view", True, 1.0)
    assert all(record.updated for record in stronger.learner.report().rounds)
    assert not same(stronger.learner.teacher, plain.learner.teacher.state_dict())


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(host: Host) -> None:
    whole, first, second = (host.ours(host.early()) for _ in range(3))
    host.fit(whole, steps=4)
    host.fit(first, steps=2, save="half.ckpt")
    host.fit(second, steps=4, resume="half.ckpt")
    assert same(second, whole)
    assert same(second.learner.teacher, whole.learner.teacher)
    assert second.learner.report() == whole.learner.report()


def test_another_number_of_processes_is_refused_and_nothing_restored(vfm_uda: Host) -> None:
    module = vfm_uda.ours()
    callback = Collaboration(module.learner)
    state = {**callback.state_dict(), "world_size": 4}
    state["teacher"] = {name: value + 1 for name, value in state["teacher"].items()}
    before = copy.deepcopy(module.learner.teacher.state_dict())
    with pytest.raises(CldaError, match=r"another number of processes.*expected 4.*received 1.*trainer.devices"):
        callback.load_state_dict(state)
    assert same(module.learner.teacher, before)


def test_a_checkpoint_of_the_host_alone_resumes_with_a_warning(vfm_uda: Host) -> None:
    vfm_uda.fit(vfm_uda.alone(), steps=2, save="alone.ckpt")
    with pytest.warns(UserWarning, match="holds no state of CollaborationCallback"):
        vfm_uda.fit(vfm_uda.ours(), steps=3, resume="alone.ckpt")


def test_the_exported_teacher_is_a_checkpoint_of_the_host(vfm_uda: Host, capsys: pytest.CaptureFixture[str]) -> None:
    module = vfm_uda.ours(vfm_uda.early())
    vfm_uda.fit(module, save="run.ckpt")
    assert export(["run.ckpt", "exported.ckpt"]) == 0
    assert same(of_network(torch.load("exported.ckpt")), module.learner.teacher)
    again = vfm_uda.ours(checkpoint="exported.ckpt")  # a second turn starts from it
    assert same(again.learner.teacher, module.learner.teacher)
    assert export(["teacher.ckpt", "exported.ckpt"]) == 2
    assert "holds no teacher" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the views


@pytest.mark.parametrize("view", ["colours", "masked", "none"])
def test_the_view_is_the_same_images_position_for_position(vfm_uda: Host, view: str) -> None:
    module = vfm_uda.ours(view=view)
    given: List[Any] = []
    distill = module.learner.distill
    module.learner.__dict__["distill"] = lambda output, images, **named: (
        given.append((images, named)) or distill(output, images, **named)
    )
    vfm_uda.fit(module, steps=1)
    images, named = given[0]
    if view == "none":
        assert named["view"] is None
        return
    view_given = named["view"]()
    factors = (view_given * 0.22 + 0.45) / (images * 0.22 + 0.45)  # the fake's colours are one factor per channel
    blanked_ones = view_given == 0
    assert (blanked_ones.any() if view == "masked" else not blanked_ones.any()) or view == "masked"
    for channel, blank in zip(factors.flatten(0, 1).flatten(1), blanked_ones.flatten(0, 1).flatten(1)):
        kept = channel[~blank]
        assert kept.numel() == 0 or torch.allclose(kept, kept[0].expand_as(kept), atol=1e-3)
    assert torch.equal(named["mask"], torch.stack([fakes.Batches()[i][5] for i in range(2)]) != 255)


def test_blanked_blocks_are_whole_and_of_the_mean_colour() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 256, 128) + 1
    kept = blanked(images, 0.5) / images
    blocks = kept.unfold(2, 64, 64).unfold(3, 64, 64).flatten(-2)
    assert bool((blocks.amax(-1) == blocks.amin(-1)).all())
    assert 0 < float(kept.mean()) < 1
    assert torch.equal(blanked(images, 0.0), images)


def test_the_source_loss_is_the_hosts_on_its_augmented_images(host: Host) -> None:
    module = host.ours()
    given: List[Any] = []
    distill = module.learner.distill
    module.learner.__dict__["distill"] = lambda output, images, **named: (
        given.append(named["source_loss"]) or distill(output, images, **named)
    )
    torch.manual_seed(0)
    batch = [torch.stack(item) for item in zip(*[fakes.Batches()[i] for i in range(2)])]
    torch.manual_seed(1)
    prepared = host.alone_class.train_dataprep(module, batch)
    host.fit(module, steps=1)
    assert given[0](lambda images: torch.zeros(2, fakes.CLASSES, fakes.SIZE, fakes.SIZE)) == pytest.approx(
        np.log(fakes.CLASSES), rel=1e-5
    )
    assert len(prepared[0]) == (4 if host.norm else 3)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_missing_host_is_an_error_that_names_the_fix(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, plugin, raising=False)
    monkeypatch.setitem(sys.modules, "datasets.utils.util", None)
    with pytest.raises(CldaError, match=r"the host cannot be imported.*start the host's own main.py from its folder"):
        importlib.import_module(plugin)


def test_a_foreign_host_is_an_error_that_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(lightning.LightningModule):
        pass

    for module, value in fakes.host_modules(UDA=Foreign).items():
        monkeypatch.setitem(sys.modules, module, value)
    monkeypatch.delitem(sys.modules, PLUGINS[1], raising=False)
    with pytest.raises(CldaError, match=r"of an unknown version.*effbb03.*without train_dataprep"):
        importlib.import_module(PLUGINS[1])

    class Other(fakes.FakeUDA):
        def train_dataprep(self, source: Any, target: Any) -> Any:  # type: ignore[override]
            return source, target

    with pytest.raises(CldaError, match="with another train_dataprep"):
        check_host(Other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": "none.ckpt"}, r"the checkpoint is not there.*received 'none.ckpt'.*check the path"),
        ({"checkpoint": "text.ckpt"}, r"the checkpoint cannot be read.*text.ckpt"),
        ({"teacher_args": {"width": 6}}, r"another architecture.*of another shape, such as .*\(8.* for \(6"),
        ({"teacher_args": {"width": 8, "num_classes": 4}}, r"different classes.*expected 5 classes.*received 4"),
        ({"checkpoint": "classes.ckpt"}, r"class count.*of another shape, such as out.weight \(7,.* for \(5,"),
        ({"teacher": "fake_networks.Nothing"}, r"the teacher cannot be built.*fake_networks.Nothing"),
        ({"teacher_args": {"depth": 3}}, r"the teacher cannot be built.*TypeError.*depth"),
        ({"checkpoint": "plain.ckpt"}, r"has no network.*names beginning with encoder, out"),
        ({"weights": "ema"}, r"clda.weights"),
        ({"view": "flipped"}, r"clda.view"),
        ({"weight": -1.0}, r"clda.weight"),
        ({"wieght": 1.0}, r"unknown keys.*received .*wieght"),
        ({"stronger": True, "view": "none"}, "clda.stronger without a view"),
    ],
)
def test_bad_options_fail_before_training(vfm_uda: Host, changed: Dict[str, Any], message: str) -> None:
    Path("text.ckpt").write_text("not a checkpoint")
    network = fakes.FakeNetwork(fakes.SIZE, width=8, num_classes=7)
    torch.save({"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}, "classes.ckpt")
    torch.save(network.state_dict(), "plain.ckpt")
    with pytest.raises(CldaError, match=message):
        vfm_uda.ours(**changed)


def test_a_config_with_an_empty_clda_is_an_error(vfm_uda: Host) -> None:
    with pytest.raises(CldaError, match="clda is missing"):
        vfm_uda.build(vfm_uda.ours_class, clda=None)


def test_the_host_ema_can_be_the_teacher(vfm_uda: Host) -> None:
    states = loaded("teacher.ckpt")["state_dict"]
    ema = {name: value + 1 if name.startswith("network_ema.") else value for name, value in states.items()}
    torch.save({"state_dict": ema}, "ema.ckpt")
    module = vfm_uda.ours(checkpoint="ema.ckpt", weights="network_ema")
    assert torch.equal(module.learner.teacher.out.bias, states["network.out.bias"] + 1)


# --------------------------------------------------------------------------------------- SegFormer student, configs


def test_segformer_has_what_the_host_asks_of_a_network() -> None:
    pytest.importorskip("transformers", reason="the SegFormer student is transformers'")
    from examples.vfm_uda.networks import SegFormer

    config = {"hidden_sizes": [8, 8, 8, 16], "num_attention_heads": [1, 1, 1, 2], "depths": [1, 1, 1, 1]}
    with of_our_own(0, torch.device("cpu")):
        network = SegFormer(64, num_classes=5, config={**config, "decoder_hidden_size": 16})
    grouped = {f"head.{name}" for name, _ in dict(network.param_defs_decoder)["head"].named_parameters()}
    for prefix, blocks in network.param_defs_encoder_blocks:
        grouped |= {f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name, _ in block.named_parameters()}
    assert grouped == {name for name, _ in network.named_parameters()}
    assert all(buffer.is_floating_point() for buffer in network.buffers())
    images = torch.rand(2, 3, 64, 64)
    network.eval()
    logits, features = network(images, return_features=True)
    assert logits.shape == (2, 5, 64, 64)
    assert features.shape[:2] == (2, network.feat_dim)
    assert torch.equal(network(images, mask_ratio=0.9), logits)
    network.train()
    torch.manual_seed(0)
    assert not torch.equal(network(images, mask_ratio=1.0), network(images))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_a_class_of_ours_and_valid_options(
    config: Path, vfm_uda: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = pytest.importorskip("yaml", reason="the configs are YAML")
    model = yaml.safe_load(config.read_text())["model"]
    module, _, name = model["class_path"].rpartition(".")
    assert hasattr(importlib.import_module(module.replace("clda_vfm_uda", "examples.vfm_uda")), name)
    options = Options.from_config(model["init_args"]["clda"])
    assert options.teacher
    assert options.checkpoint
    assert config.name in config.read_text(), "its own command names another config"
