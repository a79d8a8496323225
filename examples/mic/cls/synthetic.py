"""A tiny data set in VisDA-2017's layout on disk, drawn here, to try the host without any download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLASSES = (
    "aeroplane",
    "bicycle",
    "bus",
    "car",
    "horse",
    "knife",
    "motorcycle",
    "person",
    "plant",
    "skateboard",
    "train",
    "truck",
)


def write_visda(root: Path, *, images_per_class: int = 3, size: int = 64, seed: int = 0) -> None:
    """Write ``train`` (Synthetic) and ``validation`` (Real) with their image lists.

    A class is a colour and the direction of stripes; the target domain has less contrast and noise.
    """
    from PIL import Image  # the host's torchvision brings it; nothing else here needs it

    random = np.random.RandomState(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    (root / "image_list").mkdir(parents=True, exist_ok=True)
    for domain, contrast, noise in (("train", 1.0, 0.0), ("validation", 0.6, 0.1)):
        lines = []
        for label, name in enumerate(CLASSES):
            folder = root / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            angle = np.pi * label / len(CLASSES)
            colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / len(CLASSES) + np.arange(3) / 3))
            for number in range(images_per_class):
                phase = random.rand()
                stripes = np.sin(2 * np.pi * (4 * (np.cos(angle) * rows + np.sin(angle) * columns) + phase))
                image = colour * (0.5 + 0.5 * contrast * stripes[..., None])
                image = np.clip(image + noise * random.randn(size, size, 3), 0, 1)
                Image.fromarray((255 * image).astype(np.uint8)).save(str(folder / f"{number}.png"))
                lines.append(f"{domain}/{name}/{number}.png {label}\n")
        (root / "image_list" / f"{domain}.txt").write_text("".join(lines), encoding="utf-8")
