"""Street frames as GTA, SYNTHIA and Cityscapes lie on a disk: to try a training on folders without their data.

    python -m benchmarks.street.folders DEST --frames 40

writes DEST/gta, DEST/synthia (the same frames) and DEST/cityscapes.
"""

from __future__ import annotations

import argparse
import struct
import zlib
from pathlib import Path
from typing import Dict

import numpy as np
from PIL import Image

from benchmarks.street.scenes import CLASSES, LARGE, SMALL, Frame, Resolution, game_frame, photo_frame

_CITYSCAPES = dict(
    zip(("road", "sidewalk", "building", "wall", "vegetation", "sky", "pole", "sign"), (7, 8, 11, 12, 21, 23, 17, 20)),
    person=24,
    car=26,
)
_SYNTHIA = dict(
    zip(("road", "sidewalk", "building", "wall", "vegetation", "sky", "pole", "sign"), (3, 4, 2, 21, 6, 1, 7, 9)),
    person=10,
    car=8,
)


def write(folder: Path, frames: int, validation: int, resolution: Resolution = SMALL) -> None:
    """Write ``frames`` frames of each domain, and ``validation`` further ones of the target."""
    for number in range(frames):
        frame, name = game_frame(number, resolution=resolution), f"{number + 1:05d}.png"
        _save(frame.image, folder / "gta/images" / name)
        _save(frame.image, folder / "synthia/RGB" / name)
        _save(_ids(frame, _CITYSCAPES), folder / "gta/labels" / name)
        _save_16_bit(_ids(frame, _SYNTHIA), folder / "synthia/GT/LABELS" / name)
    for split, count, seed in (("train", frames, 0), ("val", validation, 1)):
        for number in range(count):
            frame = photo_frame(number, seed, resolution)
            name = f"{split}/street/street_{number:06d}_000019"
            _save(frame.image, folder / "cityscapes/leftImg8bit" / f"{name}_leftImg8bit.png")
            _save(_ids(frame, _CITYSCAPES), folder / "cityscapes/gtFine" / f"{name}_gtFine_labelIds.png")


def _ids(frame: Frame, ids: Dict[str, int]) -> np.ndarray:
    return np.array([ids[name] for name in CLASSES], dtype=np.uint8)[frame.labels]


def _save(values: np.ndarray, path: Path) -> None:
    if values.ndim == 3:
        values = (values * 255).round().astype(np.uint8).transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _save_16_bit(ids: np.ndarray, path: Path) -> None:
    """Write ids as SYNTHIA has them, a PNG of three channels of 16 bits, which Pillow cannot write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = ids.shape
    pixels = np.zeros((height, width, 3), dtype=">u2")
    pixels[..., 0] = ids
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each after the byte of its filter, none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write into")
    parser.add_argument("--frames", type=int, default=40, help="of each domain")
    parser.add_argument("--validation", type=int, default=20, help="labelled frames of the target beside them")
    parser.add_argument("--large", action="store_true", help="256x512 instead of 64x128")
    args = parser.parse_args()
    write(args.folder, args.frames, args.validation, LARGE if args.large else SMALL)
    print(f"written: {args.folder}/gta, {args.folder}/synthia, {args.folder}/cityscapes")


if __name__ == "__main__":
    main()
