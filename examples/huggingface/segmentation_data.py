"""GTA, SYNTHIA and Cityscapes folders as their download pages give them, and what is drawn from them in training."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from clda_core.checkpoint import atomically
from clda_core.errors import CldaError, problem

from .dacs import IGNORE

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""The 19 classes of the Cityscapes benchmark, in the order of its train ids."""

_UNKNOWN = 254
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)
_NOT_IN_SYNTHIA = ("terrain", "truck", "train")  # of which published figures on SYNTHIA leave out the IoU


def _table(ids: Sequence[int], void: Sequence[int]) -> np.ndarray:
    """Return the train id of each of 256 label ids."""
    table = np.full(256, _UNKNOWN, dtype=np.uint8)
    table[[*void, IGNORE]] = IGNORE
    table[list(ids)] = np.arange(len(ids))
    return table


LABEL_IDS = _table(_CITYSCAPES_IDS, range(35))
TRAIN_IDS = _table(range(len(CLASSES)), ())
SYNTHIA_IDS = _table(_SYNTHIA_IDS, range(23))

LAYOUTS = """GTA (images/*.png, labels/*.png), SYNTHIA RAND_CITYSCAPES (RGB/*.png, GT/LABELS/*.png) or Cityscapes \
(leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png)"""


@dataclass(frozen=True)
class Split:
    """Images, their label maps where they have any, the train id of each label id, and the classes that count."""

    name: str
    images: List[Path]
    labels: List[Path]
    table: np.ndarray
    classes: Tuple[int, ...] = tuple(range(len(CLASSES)))

    def read_labels(self, index: int) -> Image.Image:
        """Return a map of train ids, 255 where there is no class.

        Raises:
            CldaError: If the file holds colours, or ids that the map does not know.
        """
        path = self.labels[index]
        ids = _read_ids(path)
        trained = np.full(ids.shape, _UNKNOWN, np.uint8) if ids.max() > 255 else self.table[ids]
        if (trained == _UNKNOWN).any():
            raise problem(
                f"{path} has label ids outside the map of {self.name}",
                expected=f"ids among {', '.join(map(str, np.flatnonzero(self.table != _UNKNOWN)))}",
                received=", ".join(map(str, np.unique(ids[trained == _UNKNOWN])[:10])),
                fix=f"use the label files of {self.name}'s download page as they are",
            )
        return Image.fromarray(trained)


def _read_ids(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode == "RGB" and image.tile and image.tile[0][3] == "RGB;16B":
            # SYNTHIA's labels have 16 bits a channel, of which Pillow reads the high byte; the ids are in the low one.
            image.tile = [(*image.tile[0][:3], "RGB;16L")]
            return np.asarray(image)[..., 0]
        if image.mode in ("P", "L", "I", "I;16"):
            return np.asarray(image)
        raise problem(
            f"{path} is no map of label ids",
            expected="a PNG file with one id per pixel",
            received=f"an image of mode {image.mode}, colours perhaps",
            fix="use the files with ids: *_labelIds.png or *_labelTrainIds.png, not *_color.png",
        )


def source_split(root: Path) -> Split:
    """Return the labelled images of a folder, those of the training split where it has splits."""
    split = _any_split(root, "train")
    if not split.labels:
        raise _no_labels(root, split.images[0])
    return _checked(split)


def target_splits(root: Path) -> Tuple[Split, Split]:
    """Return the training split, of which only the images are read, and the labelled validation split."""
    if not (root / "leftImg8bit").is_dir():
        raise problem(
            f"{root} cannot be the target",
            expected="the layout of Cityscapes, with splits: leftImg8bit/train, leftImg8bit/val and gtFine/val",
            received=_described(root),
            fix="pass the folder into which leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip were unpacked",
        )
    train, validation = _any_split(root, "train"), _any_split(root, "val")
    if not validation.labels:
        raise _no_labels(root, validation.images[0])
    return Split(train.name, train.images, [], train.table), _checked(validation)


def _any_split(root: Path, split: str) -> Split:
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split)
    if (root / "RGB").is_dir() and (root / "GT").is_dir():
        classes = tuple(index for index, name in enumerate(CLASSES) if name not in _NOT_IN_SYNTHIA)
        return _pairs("SYNTHIA", root / "RGB", root / "GT" / "LABELS", SYNTHIA_IDS, classes)
    if (root / "images").is_dir():
        return _pairs("GTA", root / "images", root / "labels", LABEL_IDS, tuple(range(len(CLASSES))))
    raise problem(
        f"{root} is of no known layout",
        expected=LAYOUTS,
        received=_described(root),
        fix="pass the folder into which the data set's archives were unpacked",
    )


def _pairs(name: str, images: Path, labels: Path, table: np.ndarray, classes: Tuple[int, ...]) -> Split:
    found = _not_empty(sorted(images.glob("*.png")), images, "*.png")
    there = {path.name for path in labels.glob("*.png")}
    lacking = next((path for path in found if path.name not in there), None)
    if lacking is not None:
        raise _no_labels(labels, lacking)
    return Split(name, found, [labels / path.name for path in found], table, classes)


def _cityscapes(root: Path, split: str) -> Split:
    folder = root / "leftImg8bit" / split
    found = _not_empty(sorted(folder.glob("*/*_leftImg8bit.png")), folder, "CITY/*_leftImg8bit.png")
    for ending, table in (("labelTrainIds", TRAIN_IDS), ("labelIds", LABEL_IDS)):
        there = {path.name: path for path in (root / "gtFine" / split).glob(f"*/*_gtFine_{ending}.png")}
        labels = [there.get(path.name.replace("_leftImg8bit.png", f"_gtFine_{ending}.png")) for path in found]
        known = [path for path in labels if path is not None]
        if len(known) == len(found):
            return Split("Cityscapes", found, known, table)
    return Split("Cityscapes", found, [], LABEL_IDS)


def _not_empty(found: List[Path], folder: Path, pattern: str) -> List[Path]:
    if not found:
        raise problem(
            f"{folder} has no images",
            expected=f"{folder}/{pattern}",
            received=_described(folder),
            fix=f"unpack the data set there; known layouts are {LAYOUTS}",
        )
    return found


def _no_labels(folder: Path, image: Path) -> CldaError:
    return problem(
        f"an image has no labels: {image}",
        expected=f"a label map for every image, in {folder}",
        received=_described(folder),
        fix="unpack the labels too (GTA: *_labels.zip; SYNTHIA: GT/LABELS; Cityscapes: gtFine_trainvaltest.zip)",
    )


def _described(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"a folder with {', '.join(names[:6]) or 'nothing'}{' and others' if len(names) > 6 else ''}"


def _checked(split: Split, looks: int = 4) -> Split:
    """Return the split after a look at some of its label maps, spread over all of them."""
    for index in sorted({round(where) for where in np.linspace(0, len(split.labels) - 1, looks)}):
        with Image.open(split.images[index]) as image:
            size, of_labels = image.size, split.read_labels(index).size
        if size != of_labels:
            raise problem(
                f"{split.labels[index]} is of another size than its image",
                expected=f"{size[0]}x{size[1]}",
                received=f"{of_labels[0]}x{of_labels[1]}",
                fix="use images and labels of the same download",
            )
    return split


# ------------------------------------------------------------------------------------------------ rare-class sampling


def pixel_counts(split: Split, file: Path) -> np.ndarray:
    """Return the pixels of each class in each label map ``(N, 19)``, counted once and then read from ``file``."""
    names = np.array([path.name for path in split.labels])
    if file.exists():
        with np.load(file) as stored:
            if np.array_equal(stored["names"], names):
                return stored["counts"]

    def counted(index: int) -> np.ndarray:
        return np.bincount(np.asarray(split.read_labels(index)).ravel(), minlength=256)[: len(CLASSES)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = tqdm(pool.map(counted, range(len(names))), f"counting {split.name}'s classes", len(names), leave=False)
        counts = np.stack(list(rows))
    with atomically(file) as unfinished, open(unfinished, "wb") as opened:
        np.savez_compressed(opened, names=names, counts=counts)
    return counts


class RareClassSampling:
    """Draws a class, the rarer the likelier, and an image that has it (Hoyer et al., DAFormer, CVPR 2022, Eq. 7).

    Args:
        counts: Pixels of each class in each image ``(N, C)``.
        temperature: Of the softmax over the classes' rarity; larger is more uniform.
        least: Share of an image's pixels from which on it is taken to have a class.
    """

    def __init__(self, counts: np.ndarray, temperature: float, least: float = 0.0015) -> None:
        share = counts.sum(axis=0) / max(1, counts.sum())
        self.classes = np.flatnonzero(share)
        if not len(self.classes):
            raise problem(
                "the source's labels hold no class",
                expected=f"pixels of {', '.join(CLASSES[:3])}, ...",
                received="void alone",
                fix="check that the label files are those of the download page",
            )
        rarity = (1.0 - share[self.classes]) / temperature
        self.probabilities = np.exp(rarity - rarity.max())
        self.probabilities /= self.probabilities.sum()
        plenty = counts >= least * counts.sum(axis=1, keepdims=True).clip(1)
        self.images: Dict[int, np.ndarray] = {}
        for each in self.classes:
            enough = np.flatnonzero(plenty[:, each] & (counts[:, each] > 0))
            self.images[int(each)] = enough if len(enough) else np.flatnonzero(counts[:, each])

    def draw(self, rng: Generator) -> Tuple[int, int]:
        """Return the number of an image, and the class for which it was drawn."""
        drawn = int(rng.choice(self.classes, p=self.probabilities))
        return int(rng.choice(self.images[drawn])), drawn


# ------------------------------------------------------------------------------------------------------------ datasets


class Pairs(Dataset):
    """Number ``n`` is a labelled crop of the source and a crop of the target, both drawn by the seed and ``n`` alone.

    So a resumed run needs no state of a loader, and processes that take other numbers see other images.

    Args:
        source: Labelled.
        target: Only its images are read.
        crop: Side of the crops.
        heights: To which source and target are scaled down before; smaller images stay as they are.
        seed: Of everything that is drawn.
    """

    sampling: RareClassSampling  # of the source; counting its pixels takes minutes, and comes after the checks

    def __init__(self, source: Split, target: Split, crop: int, heights: Sequence[int], seed: int) -> None:
        self.source, self.target = source, target
        self.crop, self.heights, self.seed = crop, heights, seed
        for split, height in zip((source, target), heights):
            size = scaled(_read_image(split.images[0]), height).size
            if min(size) < crop:
                raise problem(
                    f"a crop does not fit into {split.name}'s images",
                    expected=f"images of at least {crop}x{crop}",
                    received=f"{size[0]}x{size[1]} once scaled to height {height}",
                    fix="pass a smaller --crop, or a larger --source-height or --target-height",
                )

    def __getitem__(self, number: int) -> Dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, number])
        index, rare = self.sampling.draw(rng)
        image = scaled(_read_image(self.source.images[index]), self.heights[0])
        labels = np.asarray(self.source.read_labels(index).resize(image.size, Image.NEAREST))
        for _ in range(10):  # until the class for which the image was drawn is in the crop
            where = self._window(image.size, rng)
            if (labels[where] == rare).mean() > 0.005:
                break
        source, of_source = _flipped(rng, np.asarray(image)[where], labels[where])
        image = scaled(_read_image(self.target.images[rng.integers(len(self.target.images))]), self.heights[1])
        (target,) = _flipped(rng, np.asarray(image)[self._window(image.size, rng)])
        return {
            "source": torch.from_numpy(source.transpose(2, 0, 1).copy()),
            "labels": torch.from_numpy(of_source.astype(np.int64)),
            "target": torch.from_numpy(target.transpose(2, 0, 1).copy()),
        }

    def _window(self, size: Tuple[int, int], rng: Generator) -> Tuple[slice, slice]:
        left, top = (int(rng.integers(length - self.crop + 1)) for length in size)
        return slice(top, top + self.crop), slice(left, left + self.crop)


class Whole(Dataset):
    """Whole images of a labelled split, scaled down to a height, with their labels as they are."""

    def __init__(self, split: Split, height: int) -> None:
        self.split, self.height = split, height

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor]:
        image = np.asarray(scaled(_read_image(self.split.images[index]), self.height))
        labels = np.asarray(self.split.read_labels(index)).astype(np.int64)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(labels)


def scaled(image: Image.Image, height: int) -> Image.Image:
    """Return the image at a height, if it is higher."""
    if image.height <= height:
        return image
    return image.resize((round(image.width * height / image.height), height), Image.BILINEAR)


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _flipped(rng: Generator, *arrays: np.ndarray) -> List[np.ndarray]:
    return [array[:, ::-1] for array in arrays] if rng.random() < 0.5 else list(arrays)
