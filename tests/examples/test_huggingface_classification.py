"""Image folders under Accelerate: one and two processes, rounds off and on, LoRA, resumed; and what is refused."""

import json
import os
import pickle
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch import multiprocessing as mp

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

import numpy as np
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from clda_core import CldaError, CollaborativeLearner, Schedule
from clda_core.lead import FixedTrust
from examples.huggingface import classification, image_folders
from examples.huggingface.running import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about each other

CLASSES = ["back_pack", "bike", "mug"]
SIZES = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.1}
NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: label for label, name in enumerate(CLASSES)}}


@pytest.fixture(autouse=True)
def learners(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let every run have an Accelerator of its own, and a round at every second step that trusts the student."""
    made: List[CollaborativeLearner] = []

    def learner(*models: nn.Module, **options: Any) -> CollaborativeLearner:
        made.append(CollaborativeLearner(*models, trust=FixedTrust(), **options))
        return made[-1]

    reset()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(classification, "Schedule", partial(Schedule, interval=2, observe_every=1))
    monkeypatch.setattr(classification, "CollaborativeLearner", learner)
    yield made
    reset()


def reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits as two domains of Office-31, and tiny models as ``save_pretrained`` leaves them."""
    folder = tmp_path_factory.mktemp("office31")
    digits = load_digits()
    for label, name in enumerate(CLASSES):
        for number, image in enumerate(digits.images[digits.target == label][:16]):
            dark = (image * 15).astype(np.uint8)
            file = folder / ("amazon", "webcam")[number % 2] / "images" / name / f"frame_{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dark if number % 2 else 255 - dark).save(file)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=3, mlp_ratio=1, **SIZES)
        Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
        vit = ViTConfig(hidden_size=8, num_hidden_layers=2, intermediate_size=8, **SIZES)
        ViTForImageClassification(vit).save_pretrained(folder / "vit")
        dinov2.update(NAMES)
        Dinov2ForImageClassification(dinov2).save_pretrained(folder / "teacher")
    return folder


def arguments(data: Path, output: Path, *more: str) -> List[str]:
    fixed = ["--steps", "4", "--batch", "4", "--workers", "0", "--save-every", "2", "--rate", "0.01"]
    domains = ["--source", str(data / "amazon"), "--target", str(data / "webcam"), "--output", str(output)]
    return ["--teacher", str(data / "teacher"), "--student", str(data / "vit"), *domains, *fixed, *more]


def run(data: Path, output: Path, *more: str) -> Dict[str, Any]:
    reset()
    assert classification.main(arguments(data, output, *more)) == 0
    results: Dict[str, Any] = json.loads((output / "results.json").read_text())
    return results


def weights(folder: Path) -> Dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def stop_after_the_first_checkpoint(saves: Any) -> Any:
    def saved(*given: Any) -> None:
        saves(*given)
        raise KeyboardInterrupt

    return saved


# ------------------------------------------------------------------------------------------------------------ trainings


def test_off_leaves_the_teacher_and_on_makes_rounds(data: Path, tmp_path: Path) -> None:
    off, on = (run(data, tmp_path / rounds, "--rounds", rounds) for rounds in ("off", "on"))
    assert same(data / "teacher", tmp_path / "off" / "teacher")
    assert off["report"]["rounds"] == []
    assert not same(data / "teacher", tmp_path / "on" / "teacher")
    assert [made["step"] for made in on["report"]["rounds"]] == [2, 4]
    assert [point["step"] for point in on["curve"]] == [0, 2, 4]
    assert [point["teacher"] for point in off["curve"]] == [on["curve"][0]["teacher"]] * 3
    last = on["curve"][-1]["student"]
    assert last["mean"] == pytest.approx(sum(last[f"class/{name}"] for name in CLASSES) / 3)
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "on" / "student")
    assert list(student.config.id2label.values()) == CLASSES
    assert json.loads((tmp_path / "on" / "student" / "preprocessor_config.json").read_text())["size"]["height"] == 8


def test_with_lora_rounds_write_the_adapters_alone_and_a_resumed_run_is_the_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learners: List[CollaborativeLearner]
) -> None:
    results = run(data, tmp_path / "whole", "--lora", "2")
    assert [made["accepted"] is not False for made in results["report"]["rounds"]] == [True, True]
    written = {name for made in results["report"]["rounds"] for name in made["updated"]}
    assert written, "a round changed the teacher"
    adapters = weights(tmp_path / "whole" / "teacher")
    assert all("lora_" in name or "classifier" in name for name in adapters)
    assert any("lora_B" in name and value.any() for name, value in adapters.items()), "they start at zero"
    original = dict(Dinov2ForImageClassification.from_pretrained(data / "teacher").named_parameters())
    for name, parameter in learners[0].teacher.named_parameters():
        if not parameter.requires_grad:
            for wrapped in ("base_model.model.", ".base_layer", ".original_module"):
                name = name.replace(wrapped, "")
            assert torch.equal(parameter, original[name]), name

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop_after_the_first_checkpoint(Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "parts", "--lora", "2")
    resumed = run(data, tmp_path / "parts", "--lora", "2", "--resume")
    for part in ("teacher", "student"):
        assert same(tmp_path / "whole" / part, tmp_path / "parts" / part)
    assert resumed["report"] == results["report"]
    assert resumed["curve"] == results["curve"]

    student = run(data, tmp_path / "next", "--teacher", str(tmp_path / "whole" / "teacher"), "--rounds", "off")
    assert student["curve"][0]["teacher"] == results["curve"][-1]["teacher"], "the adapters are all that changed"
    assert same(tmp_path / "whole" / "teacher", tmp_path / "next" / "teacher")


def test_the_teacher_is_trained_alone_and_then_loads_as_one(data: Path, tmp_path: Path) -> None:
    results = run(data, tmp_path, "--teacher-only", "--teacher", str(data / "dinov2"), "--lora", "2")
    assert "report" not in results
    assert set(results["curve"][-1]) == {"step", "teacher"}
    _, reads = classification.load_model("teacher", str(tmp_path / "teacher"), CLASSES, trained=True)
    assert reads.size == 8


def test_batchnorm_labels_a_target_batch_by_its_own_statistics(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(torch.optim.swa_utils.AveragedModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
            seen.extend((norm.training, norm.track_running_stats) for norm in norms)
            return super().forward(*args, **kwargs)

    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **NAMES)
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "resnet")
    monkeypatch.setattr(classification, "AveragedModel", Watched)
    run(data, tmp_path / "run", "--student", str(tmp_path / "resnet"))
    assert set(seen) == {(True, False)}


def save_of_timm(folder: Path, width: int, **config: Any) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": 2}
    told = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": len(CLASSES)}
    options = {"architecture": "vit_tiny_patch16_224", "model_args": tiny, "pretrained_cfg": told, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TimmWrapperForImageClassification(TimmWrapperConfig(**options)).save_pretrained(folder)


@pytest.mark.parametrize("more", [[], ["--lora", "2"]], ids=["whole", "lora"])
def test_models_of_timm_are_teacher_and_student(data: Path, tmp_path: Path, more: List[str]) -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises the second
        pytest.skip(f"models of timm need timm and a torchvision that fits torch: {error}")
    save_of_timm(tmp_path / "big", 16, **NAMES)
    save_of_timm(tmp_path / "small", 8)
    models = ["--teacher", str(tmp_path / "big"), "--student", str(tmp_path / "small"), *more]
    results = run(data, tmp_path / "on", *models)
    assert any(made["updated"] for made in results["report"]["rounds"])
    told = json.loads((tmp_path / "on" / "student" / "preprocessor_config.json").read_text())
    assert (told["size"]["height"], told["image_mean"], told["image_std"]) == (8, [0.5] * 3, [0.25] * 3), "timm's own"
    again = run(data, tmp_path / "next", *models[2:4], "--teacher", str(tmp_path / "on" / "teacher"), "--rounds", "off")
    assert again["curve"][0]["teacher"] == results["curve"][-1]["teacher"], "what was saved is read again"


def work(rank: int, port: int, data: str, folder: str, learners: List[CollaborativeLearner]) -> None:
    """One of two processes: a run, and the same interrupted and resumed; leaves what its models then hold."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for number, (output, more) in enumerate((("whole", []), ("parts", ["stop"]), ("parts", ["--resume"]))):
        os.environ["MASTER_PORT"] = str(port + number)
        saves = Checkpoints.save
        if more == ["stop"]:
            Checkpoints.save = stop_after_the_first_checkpoint(saves)
        try:
            options = [option for option in more if option != "stop"]
            reset()
            assert classification.main(arguments(Path(data), Path(folder, output), "--lora", "2", *options)) == 0
        except KeyboardInterrupt:
            torch.distributed.destroy_process_group()
        Checkpoints.save = saves
    held = [
        {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        for learner in learners
        for model in (learner.teacher, learner.student)
    ]
    Path(folder, f"rank{rank}").write_bytes(pickle.dumps(held))


def test_two_processes_hold_the_same_models_and_resume_bit_for_bit(
    data: Path, tmp_path: Path, learners: List[CollaborativeLearner]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, since each process would import the libraries for ten seconds; there are no threads of a device here.
    mp.start_processes(work, args=(port, str(data), str(tmp_path), learners), nprocs=2, start_method="fork")
    first, second = (pickle.loads((tmp_path / f"rank{rank}").read_bytes()) for rank in range(2))
    assert first == second
    whole, _, resumed = first[:2], first[2:4], first[4:]
    assert whole == resumed
    results = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert results["processes"] == 2
    assert [made["step"] for made in results["report"]["rounds"]] == [2, 4]


# ------------------------------------------------------------------------------------------------- refused at once


def refused(capsys: pytest.CaptureFixture, *given: str) -> str:
    capsys.readouterr()
    reset()
    assert classification.main(list(given)) == 2
    message: str = capsys.readouterr().err.splitlines()[-1]  # above it are bars and tables of transformers
    assert message.startswith("classification: ")
    assert "Fix: " in message
    return message


@pytest.mark.parametrize(
    ("folder", "received"),
    [
        ("nowhere", "received nothing there"),
        ("", "received no images in amazon, dinov2"),  # above the domains
        ("webcam/images/bike", "received no folders in it"),
        ("labels.txt", "received a file that is not there"),
        ("broken.txt", "received a line that is no path and label"),
        ("empty.txt", "received no images"),
    ],
)
def test_another_layout_is_refused(folder: str, received: str, data: Path, tmp_path: Path) -> None:
    (data / "labels.txt").write_text("webcam/images/bike/frame_0001.png 0\nwebcam/images/bike/frame_9999.png 0\n")
    (data / "broken.txt").write_text("webcam/images/bike/frame_0001.png\n")
    (data / "empty.txt").write_text("\n")
    with pytest.raises(CldaError, match=f"cannot be read as one domain.*{received}.*Fix: pass one domain's own folder"):
        image_folders.read_domain(data / folder)


def test_a_class_folder_without_images_is_named(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "amazon", tmp_path / "amazon")
    (tmp_path / "amazon" / "images" / "ruler").mkdir()
    with pytest.raises(CldaError, match="received no images in ruler"):
        image_folders.read_domain(tmp_path / "amazon")


def test_lists_of_domainnet_and_visda_are_read(data: Path, tmp_path: Path) -> None:
    folder = image_folders.read_domain(data / "webcam")
    shutil.copytree(data / "webcam" / "images", tmp_path / "clipart")
    lines = [f"clipart/{file.parent.name}/{file.name} {label}" for file, label in zip(folder.files, folder.labels)]
    (tmp_path / "clipart_train.txt").write_text("\n".join(lines))
    listed = image_folders.read_domain(tmp_path / "clipart_train.txt")
    assert (listed.labels, listed.classes) == (folder.labels, CLASSES)
    (tmp_path / "trunk").mkdir()
    for number, file in enumerate(folder.files):
        shutil.copy(str(file), str(tmp_path / "trunk" / f"{number}.png"))
    numbers = [f"trunk/{number}.png {label}" for number, label in enumerate(folder.labels)]
    (tmp_path / "image_list.txt").write_text("\n".join(numbers))
    unnamed = image_folders.read_domain(tmp_path / "image_list.txt")
    assert unnamed.classes == ["0", "1", "2"]
    assert image_folders.in_classes_of(folder, unnamed).classes == CLASSES


def test_labels_of_the_target_are_those_of_the_sources_classes() -> None:
    source, files = image_folders.Domain([], [], ["a", "b"]), [Path("1"), Path("2")]
    target = image_folders.Domain(files, [0, 1], ["b", "a"])
    assert image_folders.in_classes_of(source, target) == image_folders.Domain(files, [1, 0], ["a", "b"])
    with pytest.raises(CldaError, match=r"in the source only: \['a'\], in the target only: \['c'\]. Fix: remove"):
        image_folders.in_classes_of(source, target._replace(classes=["b", "c"]))


def test_a_teacher_that_is_not_trained_for_the_classes_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    for name, received in (("vit", "2 classes instead of 3"), ("dinov2", "2 classes instead of 3")):
        message = refused(capsys, *arguments(data, tmp_path, "--teacher", str(data / name)))
        assert "the teacher is not trained for these classes" in message
        assert received in message
        assert "Fix: train it first: --teacher-only --teacher" in message
    config = Dinov2Config.from_pretrained(data / "teacher")
    config.save_pretrained(tmp_path / "headless")
    shutil.copy(str(data / "dinov2" / "model.safetensors"), str(tmp_path / "headless"))
    message = refused(capsys, *arguments(data, tmp_path, "--teacher", str(tmp_path / "headless")))
    assert "with no weights for ['classifier.bias', 'classifier.weight']" in message
    config.update({"id2label": dict(enumerate(reversed(CLASSES)))})
    config.save_pretrained(tmp_path / "headless")
    message = refused(capsys, *arguments(data, tmp_path, "--teacher", str(tmp_path / "headless")))
    assert "the classes ['mug', 'bike', 'back_pack'], ... instead of" in message


def test_a_model_that_cannot_be_loaded_or_does_not_classify_images_is_refused(
    data: Path, tmp_path: Path, capsys: Any
) -> None:
    BertConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    for name in (str(tmp_path / "bert"), str(tmp_path / "nothing")):
        message = refused(capsys, *arguments(data, tmp_path, "--student", name))
        assert "the student cannot be loaded: expected name or folder of a model for AutoModel" in message
        assert name in message
    reads = classification.Reads(8, (0.5,) * 3, (0.5,) * 3)

    class Headless(nn.Module):
        def forward(self, pixel_values: Tensor) -> Any:
            return pixel_values

    with pytest.raises(CldaError, match=r"student does not classify images.*shape \(1, 3\).*received Tensor"):
        classification.check_logits("student", Headless(), reads, 3)


def test_lora_that_adapts_nothing_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    message = refused(capsys, *arguments(data, tmp_path, "--lora", "2", "--lora-targets", "to_q"))
    assert "LoRA finds no layer to adapt: expected linear layers named to_q" in message
    assert "'q_proj'" in message
    assert "Fix: name some of them with --lora-targets" in message
    teacher, _ = classification.load_model("teacher", str(data / "teacher"), CLASSES, trained=True)
    adapted = classification.with_adapters(teacher, 2, ["q_proj"], 3)
    classification.check_adapters(adapted)
    adapted.requires_grad_(False)
    with pytest.raises(
        CldaError, match="the teacher's adapters have no trainable parameters.*pass the local folder of the adapters"
    ):
        classification.check_adapters(adapted)


def test_only_the_run_that_was_saved_is_resumed(data: Path, tmp_path: Path, capsys: Any) -> None:
    settings = classification.settings_of(classification.parse(arguments(data, tmp_path)))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "run.json").write_text(json.dumps({**settings, "processes": 2, "step": 2}))
    message = refused(capsys, *arguments(data, tmp_path, "--resume"))
    assert "belongs to another run: expected processes=2, received processes=1. Fix: resume with" in message
    assert "expected processes=2, seed=0" in refused(capsys, *arguments(data, tmp_path, "--resume", "--seed", "1"))
    assert "holds a run already" in refused(capsys, *arguments(data, tmp_path))


def test_fsdp_is_refused_where_accelerate_would_not_shard_either(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch --use_fsdp` sets, on a CPU too
    assert "received FSDP" in refused(capsys, *arguments(data, tmp_path))


def test_a_missing_student_is_a_wrong_command(data: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        classification.parse(["--teacher", "t", "--source", "s", "--target", "t", "--output", "o"])
    assert "--student is missing" in capsys.readouterr().err
