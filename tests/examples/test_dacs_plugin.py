"""The plug-in for DAFormer, HRDA and MIC (segmentation), inside fakes shaped like them."""

from __future__ import annotations

import importlib
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from torch import nn

from clda_core import CldaError, CollaborativeLearner, Schedule, group_layers
from clda_core.lead import FixedTrust
from clda_core.update import MaskedDistillation
from examples.daformer.collaboration import SUFFIX, fingerprint
from examples.daformer.export import main as export
from examples.daformer.options import Options
from examples.daformer.random_state import RandomStream, preserved_random_state
from examples.daformer.segmentor import Logits, images_seen, keeping_batch_statistics
from examples.daformer.teacher import network_weights, teacher_config
from tests.examples import dacs_fakes as fakes
from tests.helpers import bits

CONFIG = "teacher.py"


@pytest.fixture(params=["daformer", "mic", "mic-hrda"])
def host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with preserved_random_state():
        yield Host(request.param, tmp_path, monkeypatch)


@pytest.fixture
def daformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with preserved_random_state():
        yield Host("daformer", tmp_path, monkeypatch)


class Host:
    """One of the fakes with our plug-in imported into it, and a teacher's checkpoint that it has written."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mic = name.startswith("mic")
        self.kind = "HRDAEncoderDecoder" if name.endswith("hrda") else "EncoderDecoder"
        self.dacs = fakes.FakeMICDACS if self.mic else fakes.FakeDACS
        self.folder = folder
        monkeypatch.chdir(folder)
        (folder / CONFIG).write_text("# read by the fake\n")
        self.configs: Dict[str, Any] = {CONFIG: {"model": fakes.model_config(width=8, blocks=3, kind=self.kind)}}
        for module, value in fakes.host_modules(self.dacs, self.configs).items():
            monkeypatch.setitem(sys.modules, module, value)
        monkeypatch.delitem(sys.modules, "examples.daformer.plugin", raising=False)
        self.plugin = importlib.import_module("examples.daformer.plugin")
        teacher = self.build(self.dacs, model=self.configs[CONFIG]["model"])
        torch.save({"meta": {}, "state_dict": teacher.state_dict()}, str(folder / "teacher.pth"))

    def uda(self, model: Optional[Any] = None, **extra: Any) -> Dict[str, Any]:
        model = fakes.model_config(kind=self.kind) if model is None else model
        settings = {"alpha": 0.9, "pseudo_weight_ignore_top": 0, "pseudo_weight_ignore_bottom": 0}
        settings["color_jitter_strength"] = 0.2
        return {"model": model, "max_iters": 10, **settings, **extra}

    def build(self, dacs: Any, **extra: Any) -> Any:
        torch.manual_seed(3)
        np.random.seed(3)
        return dacs(**self.uda(**extra))

    def clda(self, **options: Any) -> Dict[str, Any]:
        teacher = {"config": CONFIG, "checkpoint": "teacher.pth"}
        return {"teacher": teacher, **options}

    def ours(self, uda: Optional[Dict[str, Any]] = None, **options: Any) -> Any:
        return self.build(self.plugin.CLDADACS, clda=self.clda(**options), **(uda or {}))

    def alone(self, **uda: Any) -> Any:
        return self.build(self.dacs, **uda)

    def hook(self, **options: Any) -> Any:
        return self.plugin.CLDACheckpointHook(by_epoch=False, **{"interval": 4, **options})

    def run(self, dacs: Any, count: int = 4, *, hook: Any = None, lr: float = 0.05) -> Any:
        runner = fakes.FakeRunner(dacs, [hook or self.hook(interval=1000)], str(self.folder), lr=lr)
        runner.run(fakes.batches(count, mic=self.mic))
        return runner


def learner_with_early_rounds(teacher: nn.Module, student: nn.Module) -> CollaborativeLearner:
    update = MaskedDistillation(learning_rate=1e-2)
    schedule = Schedule(warmup=1, interval=2)
    return CollaborativeLearner(teacher, student, update=update, schedule=schedule, trust=FixedTrust())


EARLY = f"{__name__}:learner_with_early_rounds"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(learner_with_early_rounds=learner_with_early_rounds))


def same(a: Any, b: Any) -> bool:
    """Whether two decorators, or state_dicts, are equal bit for bit, in the names too."""
    a, b = (value.state_dict() if isinstance(value, nn.Module) else value for value in (a, b))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------- off, and on but idle


def test_off_is_bitwise_the_host_and_builds_no_teacher(host: Host) -> None:
    alone = host.run(host.alone())
    ours = host.run(host.build(host.plugin.CLDADACS, clda={"enabled": False}))
    assert ours.model.module.clda is None
    assert same(ours.model.module, alone.model.module)
    assert ours.logs == alone.logs


def test_weight_0_without_rounds_is_bitwise_the_host(host: Host) -> None:
    alone = host.run(host.alone())
    ours = host.run(host.ours(weight=0.0, rounds=False, images="both"))
    assert same(ours.model.module, alone.model.module)
    assert [{key: log[key] for key in log if not key.startswith("clda.")} for log in ours.logs] == alone.logs
    assert all(log["clda.loss_kd"] > 0 for log in ours.logs)


def test_on_adds_nothing_but_the_gradient_of_the_kd_loss(host: Host) -> None:
    batch = fakes.batches(1, mic=host.mic)[0]
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        dacs = host.ours(weight=weight, rounds=False)
        dacs.train()
        torch.manual_seed(5)
        dacs.forward_train(**batch)
        gradients.append({name: parameter.grad for name, parameter in dacs.get_model().named_parameters()})
    for name, alone in gradients[0].items():
        once, thrice = (other[name] - alone for other in gradients[1:])
        assert torch.allclose(thrice, 3 * once, atol=1e-6), name
        assert float(once.abs().max()) > 0, name


def test_host_losses_of_the_first_iteration_are_its_own(host: Host) -> None:
    alone, ours = host.run(host.alone(), 1), host.run(host.ours(), 1)
    assert {key: value for key, value in ours.logs[0].items() if not key.startswith("clda.")} == alone.logs[0]


# --------------------------------------------------------------------------------------------------------- no traces


def test_no_parameter_of_ours_in_state_dict_or_optimizer(host: Host) -> None:
    alone, ours = host.run(host.alone()), host.run(host.ours(learner=EARLY))
    assert list(ours.model.module.state_dict()) == list(alone.model.module.state_dict())
    sizes = [[len(group["params"]) for group in runner.optimizer.param_groups] for runner in (ours, alone)]
    assert sizes[0] == sizes[1]
    assert [name for name, _ in ours.model.module.named_modules()] == [n for n, _ in alone.model.module.named_modules()]


def test_teacher_stays_frozen_in_eval_and_on_the_students_device(host: Host) -> None:
    dacs = host.ours(learner=EARLY)
    host.run(dacs)
    teacher = dacs.clda.teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert {p.device for p in teacher.parameters()} == {p.device for p in dacs.get_model().parameters()}
    assert dacs.get_model().training


def test_building_the_teacher_draws_nothing_from_the_hosts_random_states(host: Host) -> None:
    host.alone()
    random.seed(1)
    expected = [torch.rand(3), np.random.rand(3).tolist()]
    torch.manual_seed(3)
    np.random.seed(3)
    host.alone()
    expected = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.getstate()]
    host.ours()
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.getstate()] == expected


def test_student_has_no_leftovers_after_an_iteration_that_failed(daformer: Host) -> None:
    dacs, batch = daformer.ours(images="both"), fakes.batches(1)[0]
    batch["gt_semantic_seg"] = batch["gt_semantic_seg"] + 100
    with pytest.raises((RuntimeError, IndexError)):
        dacs.forward_train(**batch)
    student = dacs.get_model()
    assert "forward_train" not in vars(student)
    assert all(module.track_running_stats for module in student.modules() if isinstance(module, nn.BatchNorm2d))


def test_hrda_forward_leaves_no_crop_behind(tmp_path: Path) -> None:
    segmentor = fakes.FakeHRDAEncoderDecoder(width=4, blocks=1, num_classes=3)
    type(segmentor).last_train_crop_box.clear()
    images = torch.rand(1, 3, 32, 32)
    with_gradient = Logits(segmentor)(images)
    assert len(segmentor.seen_crops) == 1
    with torch.no_grad():
        without = Logits(segmentor)(images)
    assert len(segmentor.seen_crops) == 1
    assert with_gradient.shape == without.shape == (1, 3, 8, 8)
    assert segmentor.decode_head.hr_crop_box is None
    assert type(segmentor).last_train_crop_box == {}


# ------------------------------------------------------------------------------------------------------ it does learn


def test_kd_loss_is_logged_and_falls(host: Host) -> None:
    logs = host.run(host.ours(rounds=False, weight=5.0), 30, lr=0.01).logs
    losses = [log["clda.loss_kd"] for log in logs]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_rounds_happen_and_only_reported_layers_change(host: Host) -> None:
    dacs = host.ours(learner=EARLY)
    before = {name: value.clone() for name, value in dacs.clda.teacher.state_dict().items()}
    logs = host.run(dacs, 6).logs
    report = dacs.clda.learner(dacs.get_model()).report()
    assert [log["clda.rounds"] for log in logs] == [0, 0, 0, 1, 1, 2]  # a round ends its iteration
    assert [record.step for record in report.rounds] == [3, 5]
    updated = {name for record in report.rounds for name in record.updated}
    assert updated
    changed = {name for name, value in dacs.clda.teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    layers = group_layers(Logits(dacs.clda.teacher))
    assert changed <= {
        name[len("segmentor.") :] for layer in layers if layer.name in updated for name in layer.parameters
    }


def test_the_stronger_setting_learns_from_view_and_source_too(host: Host) -> None:
    plain, stronger = (host.ours(interval=2, **options) for options in ({}, {"stronger": True}))
    for dacs in (plain, stronger):
        host.run(dacs, 4)
    update = stronger.clda.learner(stronger.get_model()).update
    assert (update.learns_on, update.own_targets, update.source_weight) == ("view", True, 1.0)
    assert all(record.updated for record in stronger.clda.learner(stronger.get_model()).report().rounds)
    taught = stronger.clda.teacher.state_dict()
    assert any(not torch.equal(value, taught[name]) for name, value in plain.clda.teacher.state_dict().items())


def test_the_stronger_setting_needs_a_view() -> None:
    with pytest.raises(CldaError, match="clda.stronger without a view"):
        Options.from_config({"stronger": True, "view": "none"})


def test_frozen_teacher_without_rounds(host: Host) -> None:
    dacs = host.ours(rounds=False)
    before = fingerprint(dacs.clda.teacher)
    host.run(dacs, 6)
    assert fingerprint(dacs.clda.teacher) == before


@pytest.mark.parametrize(
    ("images", "expected"), [("target", ["target"]), ("mixed", ["mixed"]), ("both", ["mixed", "target"])]
)
def test_images_that_are_distilled(daformer: Host, images: str, expected: List[str], monkeypatch: Any) -> None:
    dacs, batch = daformer.ours(images=images), fakes.batches(1)[0]
    given: List[Any] = []
    monkeypatch.setattr(dacs.clda, "distil", lambda student, batches, _: given.extend(one.images for one in batches))
    dacs.forward_train(**batch)
    kinds = {"target": batch["target_img"], "mixed": dacs.mixed_for_tests}
    assert len(given) == len(expected)
    assert all(torch.equal(image, kinds[kind]) for image, kind in zip(given, expected))


def handed(dacs: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> List[Dict[str, Any]]:
    """Return what the learner is handed in one iteration beside the student's output."""
    learner, calls = dacs.clda.learner(dacs.get_model()), []
    distill = type(learner).distill

    def watched(self: Any, output: Any, inputs: Any, **more: Any) -> Any:
        made = more["view"]() if callable(more["view"]) else more["view"]
        calls.append({"inputs": inputs, **more, "view": made})
        return distill(self, output, inputs, **more)

    monkeypatch.setattr(type(learner), "distill", watched)
    dacs.forward_train(**batch)
    return calls


@pytest.mark.parametrize("images", ["target", "mixed", "both"])
def test_the_view_is_of_the_images_that_are_distilled_and_of_their_shape(
    host: Host, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dacs, batch = host.ours(images=images), fakes.batches(1, mic=host.mic)[0]
    target = batch["target_img"].clone()
    calls = handed(dacs, batch, monkeypatch)
    assert len(calls) == 1 + (images == "both")
    assert torch.equal(batch["target_img"], target)  # the host's functions write to what they are given
    for call in calls:
        view = call["view"]
        assert view.shape == call["inputs"].shape
        if host.mic and torch.equal(call["inputs"], target):
            assert torch.equal(view, dacs.masked_for_tests)
        else:
            assert not torch.equal(view, call["inputs"])
            assert float((view - call["inputs"]).abs().mean()) < 1.0  # other colours and blurred, nothing mixed in


def test_the_source_loss_is_the_hosts_and_differentiable_by_the_teacher(
    daformer: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    dacs, batch = daformer.ours(), fakes.batches(1)[0]
    (call,) = handed(dacs, batch, monkeypatch)
    teacher = dacs.clda.teacher
    losses = teacher.forward_train(batch["img"], batch["img_metas"], batch["gt_semantic_seg"])
    assert torch.allclose(call["source_loss"](Logits(teacher)), losses["decode.loss_seg"])
    batch["gt_semantic_seg"].fill_(255)
    assert float(call["source_loss"](Logits(teacher))) == 0.0  # no label in the batch is no NaN


@pytest.mark.parametrize(
    ("uda", "view"),
    [({}, "colours"), ({"mask_mode": None}, "auto"), ({"mask_mode": "separatesrcaug"}, "auto"), ({}, "none")],
)
def test_other_views_than_the_masked_images(
    uda: Dict[str, Any], view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host("mic", tmp_path, monkeypatch)
    batch = fakes.batches(1, mic=True)[0]
    (call,) = handed(host.ours(uda, view=view), batch, monkeypatch)
    if view == "none":
        assert call["view"] is None
        return
    assert not torch.equal(call["view"], batch["target_img"])
    assert int((call["view"] == 0).sum()) == 0  # nothing is masked out


def test_making_the_view_draws_nothing_from_the_hosts_random_states(host: Host) -> None:
    images, metas = fakes.batches(1)[0]["target_img"], fakes.batches(1)[0]["target_img_metas"]
    dacs = host.ours(view="colours")
    dacs.clda.learner(dacs.get_model())
    before = [torch.get_rng_state().tolist(), bits(np.random.get_state()[1].tolist()), random.getstate()]
    views = [dacs._view(images, metas)() for _ in range(2)]
    assert [torch.get_rng_state().tolist(), bits(np.random.get_state()[1].tolist()), random.getstate()] == before
    assert torch.equal(*views)  # it goes by the step
    host.run(dacs, 1)
    assert not torch.equal(dacs._view(images, metas)(), views[0])


def test_rounds_are_made_by_the_view_and_know_the_hosts_learning_rate(host: Host) -> None:
    dacs = host.ours(interval=1)
    runner = host.run(dacs, 2)
    learner = dacs.clda.learner(dacs.get_model())
    assert learner.state_dict()["lead"]["of"] == "SoftConsistency"
    group = runner.optimizer.param_groups[0]
    assert learner.state_dict()["peak"] == (group["lr"] if "betas" in group else 0.0)
    assert len(learner.report().rounds) == 2
    assert all(bool(record.updated) == (record.trust > 0) for record in learner.report().rounds)


def test_positions_whose_pseudo_labels_the_host_ignores_do_not_count(daformer: Host) -> None:
    dacs = daformer.ours({"pseudo_weight_ignore_top": 4, "pseudo_weight_ignore_bottom": 8})
    trusted = dacs._trusted(torch.zeros(2, 3, 32, 32), None)
    assert trusted.shape == (2, 32, 32)
    assert not trusted[:, :4].any()
    assert not trusted[:, -8:].any()
    assert trusted[:, 4:-8].all()
    valid = torch.ones(2, 1, 32, 32, dtype=torch.long)
    valid[0, 0, :, :5] = 0
    assert not dacs._trusted(torch.zeros(2, 3, 32, 32), valid)[0, :, :5].any()


def test_a_batch_without_any_valid_position_adds_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("mic", tmp_path, monkeypatch)
    batch = fakes.batches(1, mic=True)[0]
    batch["valid_pseudo_mask"] *= 0
    alone, ours = host.alone(), host.ours(rounds=False)
    for dacs in (alone, ours):
        torch.manual_seed(0)
        dacs.train()
        dacs.forward_train(**batch)
    for mine, theirs in zip(ours.get_model().parameters(), alone.get_model().parameters()):
        assert torch.equal(mine.grad, theirs.grad)


def test_no_round_is_made_on_images_of_which_no_position_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host("mic", tmp_path, monkeypatch)
    dacs = host.ours(learner=EARLY, images="target")
    dacs.clda.saved = True
    optimizer = torch.optim.SGD(dacs.get_model().parameters(), lr=0.01)
    batch = fakes.batches(1, mic=True)[0]
    nothing = {**batch, "valid_pseudo_mask": batch["valid_pseudo_mask"] * 0}
    before = fingerprint(dacs.clda.teacher)
    dacs.train_step(nothing, optimizer)
    dacs.train_step(nothing, optimizer)
    with pytest.warns(UserWarning, match="optimizer step 3 has no target data"):
        dacs.train_step(nothing, optimizer)
    assert fingerprint(dacs.clda.teacher) == before
    assert dacs.clda._learner.report().made == 0
    dacs.train_step(batch, optimizer)
    assert dacs.clda._learner.report().made == 1


# ---------------------------------------------------------------------------------------------------- save and resume


def resumed(host: Host, path: str = "iter_4.pth", **options: Any) -> Any:
    dacs = host.ours(learner=EARLY, **options)
    runner = fakes.FakeRunner(dacs, [host.hook()], str(host.folder))
    runner.resume(path)
    return runner


def test_resume_restores_teacher_learner_and_random_stream(host: Host) -> None:
    dacs = host.ours(learner=EARLY)
    host.run(dacs, 4, hook=host.hook())
    assert (host.folder / f"iter_4{SUFFIX}").exists()
    runner = resumed(host)
    with pytest.warns(UserWarning, match="the host does not save local_iter, which was 4"):
        runner.run([])
    again = runner.model.module
    student, other = dacs.get_model(), again.get_model()
    assert same(again.clda.teacher, dacs.clda.teacher)
    assert again.clda.learner(other).report() == dacs.clda.learner(student).report()
    assert len(again.clda.learner(other).report().rounds) == 1
    with again.clda.random.active(torch.device("cpu")):
        drawn = [torch.rand(2).tolist(), np.random.rand(2).tolist()]
    with dacs.clda.random.active(torch.device("cpu")):
        assert [torch.rand(2).tolist(), np.random.rand(2).tolist()] == drawn
    assert again.local_iter == 0


def test_interrupted_and_resumed_trains_as_uninterrupted(daformer: Host) -> None:
    whole = daformer.ours(learner=EARLY)
    parts = fakes.batches(8)
    runner = fakes.FakeRunner(whole, [daformer.hook()], str(daformer.folder))
    runner.run(parts[:4])
    state = torch.get_rng_state()  # the host does not keep it
    again = resumed(daformer, restore_local_iter=True)
    again.run([])
    for one in (runner, again):
        torch.set_rng_state(state)
        one.go_on(parts[4:])
    assert same(again.model.module.clda.teacher, whole.clda.teacher)
    assert same(again.model.module.get_model(), whole.get_model())


def test_state_loads_with_weights_only(host: Host) -> None:
    host.run(host.ours(learner=EARLY), 4, hook=host.hook())
    path = str(host.folder / f"iter_4{SUFFIX}")
    try:
        state = torch.load(path, weights_only=True)
    except TypeError:  # torch < 1.13
        state = torch.load(path)
    assert sorted(state) == ["learner", "local_iter", "random", "student", "teacher", "version"]
    assert state["local_iter"] == 4


def test_states_go_with_the_checkpoints_they_belong_to(daformer: Host) -> None:
    daformer.run(daformer.ours(), 4, hook=daformer.hook(interval=1, max_keep_ckpts=2))
    names = sorted(path.name for path in daformer.folder.glob("iter_*"))
    assert names == [f"iter_3{SUFFIX}", "iter_3.pth", f"iter_4{SUFFIX}", "iter_4.pth"]


def test_resume_finds_the_state_by_weights_whatever_its_number(daformer: Host) -> None:
    dacs = daformer.ours(learner=EARLY)
    daformer.run(dacs, 4, hook=daformer.hook(interval=2))
    runner = resumed(daformer, "iter_2.pth", restore_local_iter=True)
    runner.iter = 1  # as mmcv 1.7.2 counts
    runner.run([])
    assert runner.model.module.local_iter == 2


def test_resume_without_a_state_warns_and_starts_anew(daformer: Host) -> None:
    daformer.run(daformer.ours(learner=EARLY), 4, hook=daformer.hook())
    (daformer.folder / f"iter_4{SUFFIX}").unlink()
    runner = resumed(daformer)
    with pytest.warns(UserWarning, match="none of the 0 files .* was saved with these weights"):
        runner.run([])
    assert runner.model.module.clda.learner(runner.model.module.get_model()).report().rounds == ()


def test_resume_from_a_named_state(daformer: Host, tmp_path: Path) -> None:
    daformer.run(daformer.ours(learner=EARLY), 8, hook=daformer.hook())
    (tmp_path / "elsewhere").mkdir()
    (daformer.folder / f"iter_4{SUFFIX}").rename(tmp_path / "elsewhere" / "kept.pth")
    runner = resumed(daformer, resume_from=str(tmp_path / "elsewhere" / "kept.pth"), restore_local_iter=True)
    runner.run([])
    assert runner.model.module.local_iter == 4
    with pytest.raises(CldaError, match="belongs to another checkpoint"):
        resumed(daformer, resume_from=f"iter_8{SUFFIX}").run([])
    with pytest.raises(CldaError, match="is not there"):
        resumed(daformer, resume_from="nowhere.pth").run([])


def test_a_state_that_is_damaged_or_does_not_fit_is_a_clear_error_and_changes_nothing(daformer: Host) -> None:
    daformer.run(daformer.ours(learner=EARLY), 4, hook=daformer.hook())
    path = Path(f"iter_4{SUFFIX}")
    whole = path.read_bytes()
    state = torch.load(str(path))
    wrong = {name: {**state, name: part} for name, part in (("random", {"numpy": [1]}), ("learner", {"version": 99}))}
    for broken in (whole[: len(whole) // 2], whole[:-1], *wrong.values()):
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, str(path))
        runner = resumed(daformer)
        clda = runner.model.module.clda
        learner = clda.learner(runner.model.module.get_model())
        before = bits([learner.state_dict(), clda.teacher.state_dict(), clda.random.state_dict()])
        with pytest.raises(CldaError, match="cannot be read|random cannot be restored|newer clda-core"):
            runner.run([])
        assert bits([learner.state_dict(), clda.teacher.state_dict(), clda.random.state_dict()]) == before


def test_training_without_our_hook_warns_once(daformer: Host) -> None:
    dacs = daformer.ours()
    runner = fakes.FakeRunner(dacs, [fakes.FakeCheckpointHook(interval=100)], str(daformer.folder))
    with pytest.warns(UserWarning, match="CLDACheckpointHook") as caught:
        runner.run(fakes.batches(3))
    assert len(caught) == 1


# --------------------------------------------------------------------------------------------------------- bad input


def bad(host: Host, **teacher: Any) -> Any:
    return host.ours(teacher={"config": CONFIG, "checkpoint": "teacher.pth", **teacher})


def test_missing_teacher_files_and_keys(daformer: Host) -> None:
    with pytest.raises(
        CldaError, match="the teacher's checkpoint is not there: .*nowhere.pth.* Fix: download or train"
    ):
        bad(daformer, checkpoint="nowhere.pth")
    with pytest.raises(CldaError, match="the teacher's config is not there"):
        bad(daformer, config="nowhere.py")
    with pytest.raises(CldaError, match="clda.teacher is incomplete or has unknown keys"):
        bad(daformer, weight="model")
    with pytest.raises(CldaError, match="clda.teacher is incomplete"):
        daformer.ours(teacher={})
    with pytest.raises(CldaError, match="uda.clda is missing or has unknown keys"):
        daformer.build(daformer.plugin.CLDADACS)
    with pytest.raises(CldaError, match=r"unknown keys: .*received \['interwal'"):
        daformer.build(daformer.plugin.CLDADACS, clda={"interwal": 3})


def test_teacher_of_another_architecture(daformer: Host) -> None:
    daformer.configs[CONFIG]["model"]["backbone"]["width"] = 16
    with pytest.raises(
        CldaError,
        match=r"another architecture than its config.*of another shape, such as backbone.0.bias \(8,\) for \(16,\)",
    ):
        daformer.ours()
    daformer.configs[CONFIG]["model"]["backbone"] = {"width": 8, "blocks": 4}
    with pytest.raises(CldaError, match=r"another architecture.* missing, such as backbone.4.0.bias"):
        daformer.ours()
    daformer.configs[CONFIG]["model"]["backbone"] = {"width": 8, "blocks": 2}
    with pytest.raises(CldaError, match=r"another architecture.* left over, such as backbone.3.0.bias"):
        daformer.ours()


def test_teacher_with_other_classes(daformer: Host) -> None:
    daformer.configs[CONFIG]["model"]["decode_head"]["num_classes"] = 16
    with pytest.raises(CldaError, match="different classes: expected 5 classes .* received 16"):
        daformer.ours()


def test_unreadable_and_empty_checkpoints(daformer: Host) -> None:
    Path("teacher.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CldaError, match="cannot be read"):
        daformer.ours()
    torch.save([1, 2], "teacher.pth")
    with pytest.raises(CldaError, match="holds no weights"):
        daformer.ours()
    torch.save({"state_dict": {"model.conv.weight": torch.zeros(1)}}, "teacher.pth")
    with pytest.raises(CldaError, match="has no ema_model.*names beginning with model"):
        bad(daformer, weights="ema_model")
    with pytest.raises(CldaError, match="clda.teacher.weights is unknown"):
        bad(daformer, weights="student")


def test_config_without_a_model(daformer: Host) -> None:
    daformer.configs[CONFIG] = {"optimizer": {}}
    with pytest.raises(CldaError, match="the teacher's config has no model"):
        daformer.ours()


def test_student_larger_than_the_teacher_warns(daformer: Host) -> None:
    dacs = daformer.ours({"model": fakes.model_config(width=16, blocks=3)})
    with pytest.warns(UserWarning, match="the student is larger than the teacher"):
        daformer.run(dacs, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"images": "source"}, "clda.images is unknown"),
        ({"view": "flipped"}, "clda.view is unknown"),
        ({"weight": -1.0}, "clda.weight is out of range"),
        ({"interval": 0}, "interval is out of range"),
        ({"temperature": 0.0}, "temperature is out of range"),
        ({"learner": "nowhere:make"}, "clda.learner cannot be imported"),
        ({"learner": "nowhere"}, "clda.learner cannot be imported"),
        ({"learner": EARLY, "interval": 3}, "clda.learner and options of the default learner"),
    ],
)
def test_bad_options(daformer: Host, options: Dict[str, Any], match: str) -> None:
    with pytest.raises(CldaError, match=match):
        daformer.run(daformer.ours(**options), 1)


def test_mixed_images_of_a_source_only_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("mic", tmp_path, monkeypatch)
    with pytest.raises(CldaError, match="there are no mixed images"):
        host.ours({"source_only": True}, images="both")


def test_missing_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmcv", None)
    monkeypatch.delitem(sys.modules, "examples.daformer.plugin", raising=False)
    with pytest.raises(CldaError, match="the host cannot be imported: .* Fix: start the host's own program"):
        importlib.import_module("examples.daformer.plugin")


def test_host_of_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(fakes.FakeDACS):
        def forward_train(self, inputs: Any, data_samples: Any) -> Any:
            return {}

    for module, value in fakes.host_modules(Newer, {}).items():
        monkeypatch.setitem(sys.modules, module, value)
    monkeypatch.delitem(sys.modules, "examples.daformer.plugin", raising=False)
    with pytest.raises(CldaError, match=r"unknown version: .*received .*DACS.forward_train\(inputs, data_samples\)"):
        importlib.import_module("examples.daformer.plugin")


# -------------------------------------------------------------------------------------------------------- the pieces


def test_checkpoints_in_every_form_the_hosts_write() -> None:
    tensor = torch.zeros(1)
    names = ["backbone.a", "decode_head.b"]
    for prefixes in (("model.",), ("module.model.",), ("model.module.",), ("",)):
        tensors = {prefix + name: tensor for prefix in prefixes for name in names}
        tensors.update({"ema_model.backbone.a": tensor} if prefixes != ("",) else {})
        assert list(network_weights({"state_dict": tensors}, "model")) == names
    assert list(network_weights({"ema_model.module.backbone.a": tensor}, "ema_model")) == ["backbone.a"]


def test_configs_of_early_releases_are_understood() -> None:
    model = {
        "type": "MultiResEncoderDecoder",
        "pretrained": "somewhere.pth",
        "backbone": {"type": "mit_b5", "ema_drop_path_rate": 0.1},
        "decode_head": {"type": "UniHead", "decoder_params": {"fusion_cfg": {"type": "aspp", "fusion": "aspp"}}},
    }
    config = {"model": model}
    understood = teacher_config(config)
    assert understood["type"] == "HRDAEncoderDecoder"
    assert understood["pretrained"] is None
    assert understood["backbone"] == {"type": "mit_b5"}
    assert understood["decode_head"]["type"] == "DAFormerHead"
    assert understood["decode_head"]["decoder_params"]["fusion_cfg"] == {"type": "aspp"}
    assert model["pretrained"] == "somewhere.pth"


def test_random_stream_is_its_own_and_goes_on() -> None:
    with preserved_random_state():
        torch.manual_seed(0)
        np.random.seed(0)
        before = [torch.get_rng_state(), np.random.get_state()[1].tolist()]
        stream, other = RandomStream(), RandomStream(seed=1)
        drawn = []
        for source in (stream, stream, other):
            with source.active(torch.device("cpu")):
                drawn.append((torch.rand(1).item(), np.random.rand()))
        assert len(set(drawn)) == 3
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]


def test_batch_statistics_are_used_but_not_moved() -> None:
    norm = nn.BatchNorm2d(2)
    frozen = nn.BatchNorm2d(2).eval()
    model, images = nn.Sequential(norm, frozen), torch.randn(4, 2, 3, 3) + 5
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with keeping_batch_statistics(model):
        output = norm(images)
        assert frozen.track_running_stats
    assert abs(output.detach().mean().item()) < 1e-3
    assert same(model, state)
    assert norm.track_running_stats


def test_images_seen_are_those_the_host_trains_on() -> None:
    segmentor = fakes.FakeEncoderDecoder(width=2, blocks=0, num_classes=2)
    images, labels = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.long)
    with images_seen(segmentor) as seen:
        segmentor.forward_train(images, [{}], labels)
        segmentor.forward_train(img=images + 1, img_metas=[{}], gt_semantic_seg=labels)
    segmentor.forward_train(images, [{}], labels)
    assert [torch.equal(a, b) for a, b in zip(seen, (images, images + 1))] == [True, True]
    assert len(seen) == 2


def test_options_that_the_docs_name_are_all_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = Options.from_config({"teacher": {}, "weight": 0.5})
    assert options.weight == 0.5
    assert options.enabled


def test_exported_teacher_is_a_checkpoint_of_the_host(daformer: Host, capsys: pytest.CaptureFixture[str]) -> None:
    dacs = daformer.ours(learner=EARLY)
    daformer.run(dacs, 4, hook=daformer.hook())
    assert export([f"iter_4{SUFFIX}", "exported.pth"]) == 0
    again = bad(daformer, checkpoint="exported.pth")
    assert same(again.clda.teacher, dacs.clda.teacher)
    assert export(["teacher.pth", "exported.pth"]) == 2
    assert "the state file cannot be read" in capsys.readouterr().err
