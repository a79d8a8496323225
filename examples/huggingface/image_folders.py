"""Images of two domains in the layouts of Office-31, VisDA-2017 and DomainNet, and two views of them."""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Tuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from clda_core import CldaError
from clda_core.errors import problem

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class Domain(NamedTuple):
    """Image files, their labels, and the names of the classes; numbers for names where a list has no names."""

    files: List[Path]
    labels: List[int]
    classes: List[str]


def read_domain(path: Path) -> Domain:
    """Read a folder with a folder per class, or a list of files and labels."""
    domain = read_list(path) if path.is_file() else read_folder(path)
    if not domain.files:
        raise wrong_layout(path, "no images")
    return domain


def read_folder(path: Path) -> Domain:
    if not path.is_dir():
        raise wrong_layout(path, "nothing there")
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    if [folder.name for folder in folders] == ["images"]:  # Office-31 as it is unpacked
        return read_folder(path / "images")
    images = {folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES) for folder in folders}
    empty = [name for name, files in images.items() if not files]
    if empty or not images:
        raise wrong_layout(path, f"no images in {', '.join(empty[:5])}" if empty else "no folders in it")
    labelled = [(file, label) for label, files in enumerate(images.values()) for file in files]
    return Domain([file for file, _ in labelled], [label for _, label in labelled], list(images))


def read_list(path: Path) -> Domain:
    lines = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(len(line) == 2 and line[1].isdigit() for line in lines):
        raise wrong_layout(path, "a line that is no path and label")
    files, labels = [path.parent / line[0] for line in lines], [int(line[1]) for line in lines]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise wrong_layout(path, f"a file that is not there, {missing}")
    names = sorted({(label, file.parent.name) for file, label in zip(files, labels)})
    named = [label for label, _ in names] == list(range(len({name for _, name in names})))
    classes = [name for _, name in names] if named else [str(label) for label in range(max(labels, default=-1) + 1)]
    return Domain(files, labels, classes)


def wrong_layout(path: Path, received: str) -> CldaError:
    return problem(
        f"{path} cannot be read as one domain",
        expected="a folder that holds a folder of images for each class, or a text file of paths and labels",
        received=received,
        fix="pass one domain's own folder, such as office31/amazon or visda/train, or domainnet/clipart_train.txt",
    )


def in_classes_of(source: Domain, target: Domain) -> Domain:
    """Return the target with the labels of the source's classes."""
    if all(name.isdigit() for name in target.classes) and max(target.labels) < len(source.classes):
        return target._replace(classes=source.classes)  # a list without names, as VisDA's of the test images
    if sorted(source.classes) != sorted(target.classes):
        only = [
            sorted(set(a) - set(b))[:5] for a, b in ((source.classes, target.classes), (target.classes, source.classes))
        ]
        raise problem(
            "source and target have different classes",
            expected=f"the same {len(source.classes)} classes in both",
            received=f"in the source only: {only[0]}, in the target only: {only[1]}",
            fix="remove the classes that are not shared from both folders or lists",
        )
    return Domain(
        target.files, [source.classes.index(target.classes[label]) for label in target.labels], source.classes
    )


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)


def weak_view(path: Path, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop a square at random, and flip it or not."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size) * rng.uniform(0.8, 1.0)
    left, top = (rng.uniform(0, length - side) for length in image.size)
    image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + side, top + side))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def strong_view(image: Image.Image, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, colour and sharpness, and cut a square out."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.4, 1.6))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * image.width / 224))
    changed, side = tensor(image), int(image.width * rng.uniform(0.1, 0.5))
    top, left = rng.integers(0, image.width - side + 1, 2)
    changed[:, top : top + side, left : left + side] = 0.5
    return changed


class Pairs(Dataset):
    """Item ``i`` depends on the seed and on ``i`` alone, so a resumed run needs no state of a loader."""

    def __init__(self, source: Domain, target: Domain, size: int, seed: int, first: int, end: int) -> None:
        self.source, self.target, self.size, self.seed, self.first, self.end = source, target, size, seed, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> Tuple[Tensor, int, Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, self.first + index))
        s, t = rng.integers(len(self.source.files)), rng.integers(len(self.target.files))
        source, target = (weak_view(path, self.size, rng) for path in (self.source.files[s], self.target.files[t]))
        return tensor(source), self.source.labels[s], tensor(target), strong_view(target, rng)


class Whole(Dataset):
    """All images of a domain, for an evaluation."""

    def __init__(self, domain: Domain, size: int) -> None:
        self.domain, self.size = domain, size

    def __len__(self) -> int:
        return len(self.domain.files)

    def __getitem__(self, index: int) -> Tuple[Tensor, int]:
        with Image.open(self.domain.files[index]) as file:
            image = file.convert("RGB").resize((self.size, self.size), Image.BILINEAR)
        return tensor(image), self.domain.labels[index]
