"""The second held-out benchmark: utterances depend on their seed alone, views keep frames in place, UDA runs."""

from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("sklearn", reason="the self-training is that of the digits example")

from benchmarks.evidence import runs, vowels
from benchmarks.evidence.tasks import task as task_of
from benchmarks.evidence.variants import UDA
from benchmarks.vowels.spectra import (
    BANDS,
    CLASSES,
    FRAMES,
    MEN,
    SILENCE,
    VOWELS,
    WOMEN,
    source_vowels,
    strong_view,
    target_vowels,
)


@pytest.mark.parametrize("make", [source_vowels, target_vowels])
def test_utterances_are_a_function_of_the_seed(make: object) -> None:
    utterances, labels = make(0, 20)
    assert utterances.shape == (20, BANDS, FRAMES)
    assert labels.shape == (20, FRAMES)
    assert bool(utterances.isfinite().all())
    assert torch.allclose(utterances.mean(dim=(1, 2)), torch.zeros(20), atol=1e-4, rtol=0)
    assert torch.allclose(utterances.std(dim=(1, 2)), torch.ones(20), atol=1e-4, rtol=0)
    assert torch.equal(utterances, make(0, 20)[0])
    assert not torch.equal(utterances, make(1, 20)[0])
    share = torch.bincount(make(0, 200)[1].flatten(), minlength=len(CLASSES)).float() / (200 * FRAMES)
    assert share.min() > 0.03
    assert 0.05 < share[SILENCE] < 0.3


def test_voices_are_higher_in_the_smaller_vocal_tract() -> None:
    assert len(MEN) == len(WOMEN) == len(VOWELS)
    for men, women in zip(MEN, WOMEN):
        assert all(low < high for low, high in zip(men, women))
        assert list(men) == sorted(men)
        assert list(women) == sorted(women)


def test_vowels_can_be_told_apart_within_a_domain_and_less_across() -> None:
    (source, labels), (target, truth) = source_vowels(0, 200), target_vowels(0, 200)
    frames, of_frames = source.transpose(1, 2).reshape(-1, BANDS), labels.flatten()
    means = torch.stack([frames[of_frames == label].mean(dim=0) for label in range(len(CLASSES))])

    def right(utterances: torch.Tensor, wanted: torch.Tensor) -> float:
        nearest = torch.cdist(utterances.transpose(1, 2).reshape(-1, BANDS), means).argmin(dim=1)
        return float((nearest == wanted.flatten()).float().mean())

    assert right(source, labels) > 0.6
    assert right(target, truth) < right(source, labels) - 0.15


def test_the_strong_view_masks_and_keeps_frames_in_place() -> None:
    utterances = source_vowels(0, 50)[0]
    view = strong_view(utterances, torch.Generator().manual_seed(0), masked=0.25)
    assert view.shape == utterances.shape
    assert 0.35 < float((view == 0).float().mean()) < 0.5  # bands or frames: 1 - 0.75 ** 2
    plain = strong_view(utterances, torch.Generator().manual_seed(0), masked=0.0)
    assert float((plain == 0).float().mean()) < 0.01
    loudness, changed = utterances.mean(dim=1), plain.mean(dim=1)
    for one, other in zip(loudness, changed):
        assert numpy.corrcoef(one.numpy(), other.numpy())[0, 1] > 0.7


def test_a_run_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    for name, count in (("SOURCE", 40), ("TARGET", 40), ("EVALUATION", 20)):
        monkeypatch.setattr(vowels, name, count)
    for cached in (vowels._source, vowels._target, vowels._evaluation):
        cached.cache_clear()
    task = task_of("vowels")
    task.steps, task.teacher_steps = 20, 1
    record = runs.run(task, 100, UDA)
    for cached in (vowels._source, vowels._target, vowels._evaluation):
        cached.cache_clear()
    assert 0 <= record["student"]["accuracy"] <= 100
    assert record["setting"] == "vowels-1-20"
