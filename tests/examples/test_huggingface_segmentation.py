"""The segmentation script for networks of transformers, on generated street frames and with networks of toy size."""

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the script runs under Accelerate")
pytest.importorskip("torchmetrics", reason="mIoU is torchmetrics'")
pytest.importorskip("transformers", reason="the networks are transformers'")
pytest.importorskip("scipy", reason="the frames are drawn by SciPy")

from PIL import Image
from transformers import (
    BertConfig,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
)

from benchmarks.street.scenes import CLASSES as STREET_CLASSES
from benchmarks.street.scenes import game_frame, photo_frame
from clda_core.distillation import DISTDistillation
from examples.huggingface import segmentation
from examples.huggingface.segmentation_data import (
    CLASSES,
    Pairs,
    RareClassSampling,
    pixel_counts,
    source_split,
    target_splits,
)
from examples.huggingface.segmentation_networks import check, load
from tests.examples.huggingface_segmentation_ranks import (
    interrupted,
    options_for,
    segformer,
    street_with_networks,
    trained,
)
from tests.helpers import bits

# transformers and its dependencies warn of their own future, Accelerate of the CPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return street_with_networks(tmp_path_factory.mktemp("street"))


@pytest.fixture
def options(street: Path) -> List[str]:
    return options_for(street)


# --------------------------------------------------------------------------------------------------------- trainings


def test_a_run_writes_networks_figures_and_a_report_and_resumes_bit_for_bit(
    options: List[str], street: Path, tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    student, teacher = trained([*options, f"--output={whole}"])
    interrupted([*options, f"--output={again}"], at=4)
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-2"]
    assert bits(trained([*options, f"--output={again}", "--resume"])) == bits([student, teacher])
    results = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    assert results["curve"] == json.loads((again / "results.json").read_text(encoding="utf-8"))["curve"]
    assert [point["step"] for point in results["curve"]] == [0, 2, 4]
    assert [made["step"] for made in results["report"]["rounds"]] == [1, 2, 3, 4]
    there = {"IoU road", "IoU sky", "IoU car"}
    assert there < set(results["curve"][0]["student"]), "only of classes that the validation labels have"
    assert "IoU train" not in results["curve"][0]["student"]
    assert bits(teacher) != bits(load(str(street / "teacher"), "teacher", trained=True).state_dict())
    for name, state in (("student", student), ("teacher", teacher)):
        assert bits(load(str(whole / name), name, trained=True).state_dict()) == bits(state)


def test_the_stronger_setting_learns_from_view_and_source_too(options: List[str], street: Path, tmp_path: Path) -> None:
    _, teacher = trained([*options, f"--output={tmp_path}", "--rounds=stronger", "--steps=1"])
    assert bits(teacher) != bits(load(str(street / "teacher"), "teacher", trained=True).state_dict())
    [made] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["report"]["rounds"]
    assert made["updated"]


@pytest.mark.parametrize(("rounds", "changes"), [("stronger", True), ("off", False)])
def test_a_teacher_that_rounds_change_is_evaluated_again(
    options: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: str, changes: bool
) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(segmentation.Evaluation, "__call__", lambda *_: {"mIoU": float(next(numbers))})
    trained([*options, f"--output={tmp_path}", f"--rounds={rounds}", "--steps=1"])
    curve = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["curve"]
    assert (curve[-1]["teacher"] != curve[0]["teacher"]) == changes


class FrozenKD:
    """KD from a frozen teacher as a few lines of PyTorch."""

    enabled = True

    def __init__(self, teacher: torch.nn.Module, student: torch.nn.Module, **_: Any) -> None:
        self.teacher = teacher.eval()

    def distill(self, logits: torch.Tensor, images: torch.Tensor, **_: Any) -> torch.Tensor:
        with torch.no_grad():
            of_teacher = self.teacher(images)
        return DISTDistillation()(logits, of_teacher)

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def metrics(self) -> Dict[str, float]:
        return {}

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def report(self) -> Any:
        return type("Report", (), {"to_dict": lambda self: {}})()


def test_without_rounds_it_is_the_host_with_the_kd_loss_bit_for_bit(
    options: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = trained([*options, f"--output={tmp_path / 'off'}", "--rounds=off"])
    monkeypatch.setattr(segmentation, "CollaborativeLearner", FrozenKD)
    assert bits(trained([*options, f"--output={tmp_path / 'plain'}"])) == bits([student, teacher])


def test_without_clda_it_is_the_host_alone_bit_for_bit(options: List[str], street: Path, tmp_path: Path) -> None:
    student, none = trained([*options, f"--output={tmp_path / 'off'}", "--clda=off"])
    assert none is None
    alone = [*options, f"--teacher={street / 'student'}", "--teacher-only"]  # the same network, trained as a teacher is
    assert bits(trained([*alone, f"--output={tmp_path / 'alone'}"])[0]) == bits(student)
    models = [path.parent.name for path in (tmp_path / "alone").glob("*/config.json")]
    assert models == ["teacher"]


# -------------------------------------------------------------------------------------------------------------- data


def test_the_three_layouts_hold_the_frames(street: Path) -> None:
    names = {"sign": "traffic sign"}
    of_street = np.array([CLASSES.index(names.get(name, name)) for name in STREET_CLASSES])
    for split in (source_split(street / "gta"), source_split(street / "synthia")):
        for index in range(4):
            assert np.array_equal(np.asarray(split.read_labels(index)), of_street[game_frame(index).labels])
    train, validation = target_splits(street / "cityscapes")
    assert (len(train.images), train.labels, len(validation.images)) == (4, [], 2)
    assert np.array_equal(np.asarray(validation.read_labels(1)), of_street[photo_frame(1, 1).labels])


def test_labels_by_train_id_are_taken_where_they_are(street: Path, tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    shutil.copytree(street / "cityscapes", root)
    expected = np.asarray(target_splits(root)[1].read_labels(0))
    for path in (root / "gtFine/val").rglob("*_labelIds.png"):
        index = 0 if "000000" in path.name else 1
        labels = target_splits(street / "cityscapes")[1].read_labels(index)
        labels.save(str(path).replace("labelIds", "labelTrainIds"))
        path.unlink()
    assert np.array_equal(np.asarray(target_splits(root)[1].read_labels(0)), expected)


def test_rare_classes_are_drawn_as_the_formula_says() -> None:
    counts = np.zeros((3, 19), dtype=np.int64)
    counts[:, 0], counts[1, 5], counts[2, 7] = 900, 90, 10
    sampling = RareClassSampling(counts, temperature=0.5)
    share = np.array([2700, 90, 10]) / 2800
    expected = np.exp((1 - share) / 0.5) / np.exp((1 - share) / 0.5).sum()
    rng = np.random.default_rng(0)
    drawn = [sampling.draw(rng) for _ in range(4000)]
    for number, image in ((5, 1), (7, 2)):
        assert {index for index, rare in drawn if rare == number} == {image}
    found = [np.mean([rare == number for _, rare in drawn]) for number in (0, 5, 7)]
    assert np.allclose(found, expected, atol=0.03)


def test_a_draw_depends_on_seed_and_number_alone_and_labels_go_with_their_image(street: Path, tmp_path: Path) -> None:
    split, (target, _) = source_split(street / "gta"), target_splits(street / "cityscapes")
    counts = pixel_counts(split, tmp_path / "counts.npz")
    assert np.array_equal(pixel_counts(split, tmp_path / "counts.npz"), counts)
    of_image = Image.open(split.images[0])
    for path, label in zip(split.images, split.labels):  # images that show their labels
        ids = np.asarray(Image.open(label))
        Image.fromarray(np.stack([ids] * 3, axis=-1)).save(tmp_path / path.name)
    shown = [tmp_path / path.name for path in split.images]
    pairs = [Pairs(type(split)(**{**vars(split), "images": shown}), target, 32, (64, 64), seed) for seed in (0, 0, 1)]
    for each in pairs:
        each.sampling = RareClassSampling(counts, 0.01)
    assert bits(pairs[0][3]) == bits(pairs[1][3])
    assert bits(pairs[0][3]) != bits(pairs[0][4])
    assert bits(pairs[0][3]) != bits(pairs[2][3])
    for number in range(4):
        drawn = pairs[0][number]
        assert drawn["source"].shape == drawn["target"].shape == (3, 32, 32)
        assert np.array_equal(split.table[drawn["source"][0].numpy()], drawn["labels"].numpy())
    assert of_image.size == (128, 64)


# ---------------------------------------------------------------------------------------------------------- networks


def test_a_backbone_gets_a_head_that_survives_saving(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4)).save_pretrained(tmp_path / "convnext")
    for name in ("dinov2", "convnext"):
        network = load(str(tmp_path / name), "teacher", trained=False)
        check(network, "teacher", 64, trains=True)
        frozen = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
        assert ("model.backbone.embeddings.mask_token" in frozen) == (name == "dinov2")
        assert all(parameter.grad is None for parameter in network.parameters())
        network.save(tmp_path / "saved")
        images = torch.rand(1, 3, 64, 64)
        again = load(str(tmp_path / "saved"), "teacher", trained=True).eval()
        assert bits(again.state_dict()) == bits(network.state_dict())
        assert torch.allclose(again(images), network.eval()(images), atol=1e-5)


def test_the_processors_normalisation_is_used_and_kept(street: Path, tmp_path: Path) -> None:
    shutil.copytree(street / "student", tmp_path / "half")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "BeitImageProcessor"}
    (tmp_path / "half" / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    of_half, of_imagenet = (
        load(str(path), "student", trained=True).eval() for path in (tmp_path / "half", street / "student")
    )
    images = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(of_half(((images - mean) / std + 1) / 2), of_imagenet(images), atol=1e-5)
    of_half.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text(encoding="utf-8")) == settings


# --------------------------------------------------------------------------------------------------------- bad input


def without_labels(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "gta" / "images", folder / "gta" / "images")
    return [f"--source={folder / 'gta'}"]


def of_another_layout(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "gta" / "images", folder / "voc" / "JPEGImages")
    return [f"--source={folder / 'voc'}"]


def ids_outside_the_map(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "gta", folder / "gta")
    for path in (folder / "gta" / "labels").iterdir():
        Image.fromarray(np.full((64, 128), 77, np.uint8)).save(path)
    return [f"--source={folder / 'gta'}"]


def coloured_labels(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "gta", folder / "gta")
    for path in (folder / "gta" / "labels").iterdir():
        Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(path)
    return [f"--source={folder / 'gta'}"]


def an_empty_split(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "cityscapes", folder / "cityscapes")
    shutil.rmtree(folder / "cityscapes" / "leftImg8bit" / "val" / "street")
    return [f"--target={folder / 'cityscapes'}"]


def unlabelled_validation(street: Path, folder: Path) -> List[str]:
    shutil.copytree(street / "cityscapes", folder / "cityscapes")
    shutil.rmtree(folder / "cityscapes" / "gtFine")
    return [f"--target={folder / 'cityscapes'}"]


def gta_as_the_target(street: Path, folder: Path) -> List[str]:
    return [f"--target={street / 'gta'}"]


def a_large_crop(street: Path, folder: Path) -> List[str]:
    return ["--crop=512"]


def other_classes(street: Path, folder: Path) -> List[str]:
    segformer(8, 1, labels=10).save_pretrained(folder / "ten")
    return [f"--teacher={folder / 'ten'}"]


def an_untrained_head(street: Path, folder: Path) -> List[str]:
    segformer(8, 1).segformer.save_pretrained(folder / "encoder")
    config = json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))
    (folder / "encoder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return [f"--teacher={folder / 'encoder'}"]


def no_logits(street: Path, folder: Path) -> List[str]:
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder / "bert")
    return [f"--student={folder / 'bert'}"]


def a_foreign_checkpoint(street: Path, folder: Path) -> List[str]:
    torch.save({}, folder / "mit_b5.pth")
    return [f"--teacher={folder}"]


BAD: Dict[Callable[[Path, Path], List[str]], str] = {
    without_labels: "an image has no labels: .*00001.png.*no such folder.*Fix: unpack the labels too",
    of_another_layout: "voc is of no known layout.*images/\\*.png.*a folder with JPEGImages.*Fix",
    ids_outside_the_map: "00001.png has label ids outside the map of GTA.*received 77.*Fix",
    coloured_labels: "00001.png is no map of label ids.*mode RGB.*Fix: use the files with ids",
    an_empty_split: "leftImg8bit/val has no images.*Fix: unpack",
    unlabelled_validation: "an image has no labels: .*val/street.*Fix: unpack the labels too",
    gta_as_the_target: "gta cannot be the target.*Fix: pass the folder",
    a_large_crop: "a crop does not fit into GTA's images.*received 128x64.*Fix: pass a smaller --crop",
    other_classes: "the teacher .*ten is not trained on our classes.*a segformer with 10 labels.*Fix: train it",
    an_untrained_head: "the teacher .*encoder is not trained.*decode_head.*Fix: train it first: --teacher-only",
    no_logits: "the student .*bert gives no logits per pixel.*received a bert.*Fix: pass a SegFormer",
    a_foreign_checkpoint: "the teacher .* cannot be read.*Fix: check the name, or pass a folder",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_input_is_refused_before_training(
    bad: Callable[[Path, Path], List[str]], options: List[str], street: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{BAD[bad]}"):
        segmentation.main([*options, f"--output={tmp_path / 'run'}", *bad(street, tmp_path)])
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_another_number_of_processes_does_not_resume(options: List[str], tmp_path: Path) -> None:
    trained([*options, f"--output={tmp_path}", "--steps=1", "--clda=off"])
    run = tmp_path / "checkpoint-1" / "run.json"
    run.write_text(run.read_text(encoding="utf-8").replace('"processes": 1', '"processes": 2'), encoding="utf-8")
    with pytest.raises(SystemExit, match="belongs to another run.*processes=2.*processes=1.*as many processes"):
        segmentation.main([*options, f"--output={tmp_path}", "--steps=1", "--clda=off", "--resume"])


def test_a_folder_with_a_run_is_not_trained_into(options: List[str], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(SystemExit, match="holds a run already.*Fix: go on with it by --resume"):
        segmentation.main([*options, f"--output={tmp_path}"])
