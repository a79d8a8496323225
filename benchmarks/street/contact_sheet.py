"""The figure of the documentation: frames of both domains above their labels."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.street.scenes import CLASSES, COLOURS, game_frame, photo_frame

PATH = Path(__file__).resolve().parents[2] / "docs/assets/evidence/street.png"
COLUMNS = 6


def draw(path: Path = PATH) -> None:
    """Draw the first frames of each domain into ``path``."""
    figure, axes = plt.subplots(4, COLUMNS, figsize=(2 * COLUMNS, 4.6), constrained_layout=True)
    for row, (title, frame) in enumerate((("source", game_frame), ("target", photo_frame))):
        for column in range(COLUMNS):
            image, labels = frame(column)
            axes[2 * row, column].imshow(image.transpose(1, 2, 0), interpolation="nearest")
            axes[2 * row + 1, column].imshow(COLOURS[labels], interpolation="nearest")
        axes[2 * row, 0].set_ylabel(title)
        axes[2 * row + 1, 0].set_ylabel("labels")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [Patch(color=colour / 255, label=name) for name, colour in zip(CLASSES, COLOURS)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES), fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
