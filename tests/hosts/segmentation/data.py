"""A tiny synthetic GTA and Cityscapes in the hosts' on-disk format: streets of coloured shapes, in two styles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 256, 128

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = 0, 1, 2, 5, 8, 10, 11, 13
IGNORED = 255

_COLOURS = {
    ROAD: (90, 85, 95),
    SIDEWALK: (200, 120, 190),
    BUILDING: (120, 80, 60),
    POLE: (230, 230, 90),
    VEGETATION: (40, 140, 50),
    SKY: (110, 170, 240),
    PERSON: (220, 40, 50),
    CAR: (30, 40, 160),
    IGNORED: (0, 0, 0),
}


def write_data(folder: Path, *, source_frames: int = 8, target_frames: int = 8, seed: int = 0) -> None:
    """Write ``folder/gta`` and ``folder/cityscapes``; equal arguments give equal files.

    Args:
        folder: Made if missing.
        source_frames: Labelled frames of the source.
        target_frames: Frames of the target to train on; a quarter as many are for validation.
        seed: Of everything random.
    """
    random = np.random.RandomState(seed)
    gta = folder / "gta"
    labels = {}
    for index in range(source_frames):
        name = f"{index:05d}"
        image, label = street(random, darker=0.0)
        _write(image, gta / "images" / f"{name}.png")
        labels[_write(label, gta / "labels" / f"{name}_labelTrainIds.png")] = label
    _write_class_statistics(gta, labels)
    cityscapes = folder / "cityscapes"
    for split, frames in (("train", target_frames), ("val", max(1, target_frames // 4))):
        for index in range(frames):
            name = f"{split}town/{split}town_{index:06d}_000019"
            image, label = street(random, darker=0.35)
            _write(image, cityscapes / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
            _write(label, cityscapes / "gtFine" / split / f"{name}_gtFine_labelTrainIds.png")


def street(random: np.random.RandomState, *, darker: float) -> Tuple[np.ndarray, np.ndarray]:
    """Draw a street scene: its image ``(H, W, 3)`` and train ids ``(H, W)``, both uint8.

    Args:
        random: What varies between frames comes from it.
        darker: How far colours fade to a cold grey, in [0, 1]: the domain shift.
    """
    label = np.full((HEIGHT, WIDTH), SKY, dtype=np.uint8)
    horizon = HEIGHT // 2 + random.randint(-8, 9)
    for left in range(0, WIDTH, 32):
        kind = (BUILDING, VEGETATION)[random.randint(2)]
        label[horizon - random.randint(15, 50) : horizon, left : left + 32] = kind
    label[horizon:] = SIDEWALK
    label[horizon + 12 :] = ROAD
    # Cars and people so large that cells of 32 pixels are wholly theirs: the hosts' feature distance is on these.
    left = random.randint(0, WIDTH - 100)
    label[horizon - 10 : horizon + 54, left : left + 100] = CAR
    left = random.randint(0, WIDTH - 48)
    label[horizon - 24 : horizon + 48, left : left + 48] = PERSON
    left = random.randint(0, WIDTH - 6)
    label[horizon - 45 : horizon + 14, left : left + 6] = POLE
    label[-3:] = IGNORED

    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float64)
    for kind, colour in _COLOURS.items():
        image[label == kind] = colour
    image = (1.0 - darker) * image + darker * np.array([70.0, 80.0, 100.0])
    image += random.normal(scale=12.0, size=image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def _write(pixels: np.ndarray, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(str(path))
    return str(path)


def _write_class_statistics(folder: Path, labels: Dict[str, np.ndarray]) -> None:
    """Write the three files of which rare class sampling reads how many pixels of a class each frame has."""
    counts: Dict[str, Dict[int, int]] = {}
    frames: Dict[int, List[Tuple[str, int]]] = {}
    for path, label in labels.items():
        classes, pixels = np.unique(label[label != IGNORED], return_counts=True)
        counts[path] = {int(kind): int(count) for kind, count in zip(classes, pixels)}
        for kind, count in counts[path].items():
            frames.setdefault(kind, []).append((path, count))
    by_pixels = {kind: sorted(found, key=lambda pair: pair[1]) for kind, found in sorted(frames.items())}
    for name, content in (
        ("sample_class_stats.json", [{"file": path, **of_frame} for path, of_frame in counts.items()]),
        ("sample_class_stats_dict.json", counts),
        ("samples_with_class.json", by_pixels),
    ):
        (folder / name).write_text(json.dumps(content))
