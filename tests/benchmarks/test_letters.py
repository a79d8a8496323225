"""The held-out benchmark: letters that depend on their seed alone, and a run of a few steps."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the networks are transformers' ViT")
pytest.importorskip("sklearn", reason="the self-training is that of the digits example")

from benchmarks.evidence import letters, runs
from benchmarks.letters.images import (
    LETTERS,
    SIZE,
    SOURCE_FONTS,
    TARGET_FONTS,
    source_letters,
    strong_view,
    target_letters,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("make", [source_letters, target_letters])
def test_letters_are_a_function_of_the_seed(make: object) -> None:
    images, labels = make(0, 60)
    assert images.shape == (60, 1, SIZE, SIZE)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(labels, torch.arange(60) % len(LETTERS))
    assert torch.equal(images, make(0, 60)[0])
    assert not torch.equal(images, make(1, 60)[0])


def test_domains_share_no_font_and_look_different() -> None:
    assert not set(SOURCE_FONTS) & set(TARGET_FONTS)
    source, target = source_letters(0, 260)[0], target_letters(0, 260)[0]
    assert source.flatten(1).max(dim=1).values.mean() > target.flatten(1).max(dim=1).values.mean()
    background = [images.flatten(1).median(dim=1).values.mean() for images in (source, target)]
    assert background[1] > background[0] + 0.05


def test_letters_can_be_told_apart() -> None:
    images, labels = source_letters(0, 520)
    means = torch.stack([images[labels == letter].mean(dim=0).flatten() for letter in range(len(LETTERS))])
    nearest = torch.cdist(images.flatten(1), means).argmin(dim=1)
    assert float((nearest == labels).float().mean()) > 0.8


def test_strong_view_masks_about_its_share() -> None:
    images = torch.full((50, 1, SIZE, SIZE), 0.5)
    view = strong_view(images, torch.Generator().manual_seed(0), masked=0.3)
    patches = view.view(50, SIZE // 4, 4, SIZE // 4, 4).abs().sum(dim=(2, 4))
    assert 0.2 < float((patches == 0).float().mean()) < 0.4


def test_a_run_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(letters, "EVALUATION", 52)
    letters._evaluation.cache_clear()
    task = letters.Letters()
    task.steps, task.teacher_steps = 20, 1
    record = runs.run(task, 100, "after-half")
    letters._evaluation.cache_clear()
    assert record["rounds"]["made"] == 1
    assert 0 <= record["student"]["accuracy"] <= 100
