"""Tiny made-up GTA, Cityscapes and other sets as the zip archives that VFM-UDA and VFM-UDA++ read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from PIL import Image

from tests.hosts.segmentation.data import street

IDS = {0: 7, 1: 8, 2: 11, 5: 17, 8: 21, 10: 23, 11: 24, 13: 26, 255: 0}
"""Cityscapes' ids of the classes that a street has, by their train ids."""

_MAPILLARY = (
    "An_o5cmHOsS1VbLdaKx_zfMdi0No5LUpL2htRxMwCjY_bophtOkM0-6yTKB2T2sa0yo1oP086sqiaCjmNEw5d_pofWyaE9LysYJagH8yXw_GZPzK2"
    "wfiQ9u4uAKrVcEIrkJiVuTn7JBumrA.zip"
)
# Archive of the image and of its label, and their names in these.
_FRAMES: List[Tuple[str, str, str, str]] = [
    *((f"{i:02}_images.zip", f"{i:02}_labels.zip", f"images/{i:05}.png", f"labels/{i:05}.png") for i in range(1, 11)),
    *(
        (
            "leftImg8bit_trainvaltest.zip",
            "gtFine_trainvaltest.zip",
            f"leftImg8bit/{split}/town/town_{i:06}_000019_leftImg8bit.png",
            f"gtFine/{split}/town/town_{i:06}_000019_gtFine_labelIds.png",
        )
        for split, frames in (("train", 6), ("val", 2))
        for i in range(frames)
    ),
    *(
        ("wilddash.zip", "wilddash.zip", f"wilddash/{s}/images/a.jpg", f"wilddash/{s}/labels/a.png")
        for s in ("train", "val")
    ),
    *(
        (
            "bdd100k_images_10k.zip",
            "bdd100k_sem_seg_labels_trainval.zip",
            f"bdd100k/images/10k/{split}/a.jpg",
            f"bdd100k/labels/sem_seg/masks/{split}/a.png",
        )
        for split in ("train", "val")
    ),
    *((_MAPILLARY, _MAPILLARY, f"{s}/images/a.jpg", f"{s}/labels/a.png") for s in ("training", "validation")),
    *(
        (
            f"acdc_rgb_anon_{split}.zip",
            f"acdc_gt_{split}.zip",
            f"acdc_rgb_anon_{split}/rgb_anon/fog/a_rgb_anon.png",
            f"acdc_gt_{split}/gt/fog/a_gt_labelTrainIds.png",
        )
        for split in ("train", "val")
    ),
    ("Dark_Zurich_train_anon.zip", "", "rgb_anon/train/a_rgb_anon.png", ""),
    (
        "Dark_Zurich_val_anon.zip",
        "Dark_Zurich_val_anon.zip",
        "rgb_anon/val/night/a_rgb_anon.png",
        "gt/val/night/a_gt_labelTrainIds.png",
    ),
    ("synscapes.zip", "synscapes.zip", "Synscapes/img/rgb-2k/1.png", "Synscapes/img/class/1.png"),
    (
        "SYNTHIA_RAND_CITYSCAPES.zip",
        "SYNTHIA_RAND_CITYSCAPES.zip",
        "RAND_CITYSCAPES/RGB/1.png",
        "RAND_CITYSCAPES/GT/LABELS/1.png",
    ),
]


def write_data(folder: Path, statistics: Path) -> None:
    """Write all archives into ``folder``, and where the host looks for them the class statistics of the source."""
    random = np.random.RandomState(0)
    folder.mkdir(parents=True)
    archives: Dict[str, zipfile.ZipFile] = {}
    labels = []
    try:
        for image_zip, label_zip, image_name, label_name in _FRAMES:
            image, label = street(random, darker=0.0 if image_zip[:2].isdigit() else 0.35)
            trained = "TrainIds" in label_name or "bdd100k" in label_name  # BDD's masks are train ids too
            ids = label if trained else np.vectorize(IDS.__getitem__, otypes=[np.uint8])(label)
            for archive, name, pixels in ((image_zip, image_name, image), (label_zip, label_name, ids)):
                if archive and archive not in archives:
                    archives[archive] = zipfile.ZipFile(str(folder / archive), "w")
                if archive:
                    archives[archive].writestr(name, _encoded(pixels, name))
            if image_zip[:2].isdigit():
                labels.append(label)
    finally:
        for archive in archives.values():
            archive.close()
    _write_statistics(statistics / "gta5", labels)


def _encoded(pixels: np.ndarray, name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if name.endswith(".jpg") else "PNG")
    return file.getvalue()


def _write_statistics(folder: Path, labels: List[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    counts = [{int(c): int(n) for c, n in zip(*np.unique(label, return_counts=True)) if c != 255} for label in labels]
    # The host draws a class, then a frame with more than 3000 of its pixels.
    common = {c for count in counts for c, n in count.items() if n > 3000}
    stats = [{"file": str(i), **{str(c): n for c, n in count.items() if c in common}} for i, count in enumerate(counts)]
    (folder / "sample_class_stats.json").write_text(json.dumps(stats))
    with_class = {str(c): [[i, count.get(c, 0)] for i, count in enumerate(counts)] for c in sorted(common)}
    (folder / "samples_with_class.json").write_text(json.dumps(with_class))
