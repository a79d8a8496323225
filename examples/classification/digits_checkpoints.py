"""A trained teacher and student of the digits job, so that ``teach`` and ``saliency_rates`` can be tried in seconds.

    python -m examples.classification.digits_checkpoints   # trains the two anew and writes the file, 2 minutes

The teacher was adapted by self-training, the student by self-training and KD from the frozen teacher, with the settings
and the seed of ``digits``. The weights are kept as float16 in ``checkpoints/digits.pt``; the accuracies are of these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from clda_core.checkpoint import atomically, read

from .digits_data import target_digits
from .digits_models import BIG, SMALL, residual_network

FILE = Path(__file__).with_name("checkpoints") / "digits.pt"
BLOCKS = {"teacher": BIG, "student": SMALL}


class Trained(NamedTuple):
    """Both networks, in eval mode.

    Attributes:
        teacher: The big one.
        student: The small one, which leads.
        accuracy: Of each by its name, on the 1,797 handwritten digits, in percent.
    """

    teacher: nn.Module
    student: nn.Module
    accuracy: Dict[str, float]


def load(file: Path = FILE) -> Trained:
    """Return the trained teacher and student."""
    stored = read(file)
    networks = {name: _network(name, stored[name]) for name in BLOCKS}
    return Trained(networks["teacher"], networks["student"], stored["accuracy"])


def target_batches(count: int, *, size: int = 64, seed: int = 0) -> Tuple[Tensor, ...]:
    """Return batches of handwritten digits without labels, drawn at random."""
    images, generator = target_digits()[0].images, torch.Generator().manual_seed(seed)
    return tuple(images[torch.randint(len(images), (size,), generator=generator)] for _ in range(count))


def make(file: Path = FILE, *, seed: int = 0, threads: int = 2, **config: Any) -> Trained:
    """Train both networks as ``digits`` does, write the file, and return what it holds."""
    from .digits import FROZEN_KD, Config, learners, run  # here, so that loading needs no part of the job

    with tempfile.TemporaryDirectory() as folder:
        only = {"student": learners()[FROZEN_KD]}  # under a name without a second turn
        run(Config(seed=seed, threads=threads, **config), make_learners=only, folder=Path(folder))
        states = {name: read(Path(folder) / f"{name}.pt")["state"]["model"] for name in BLOCKS}
    write(states, file, seed=seed)
    return load(file)


def write(states: Dict[str, Dict[str, Tensor]], file: Path, *, seed: int) -> None:
    """Write the networks' states in float16, and the accuracies that they have so."""
    half = {
        name: {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        for name, state in states.items()
    }
    evaluation = target_digits()[1]
    accuracy = {name: round(evaluation.accuracy(_network(name, half[name])), 2) for name in BLOCKS}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomically(file) as unfinished:
        torch.save({**half, "accuracy": accuracy, "seed": seed}, unfinished)


def _network(name: str, state: Dict[str, Tensor]) -> nn.Module:
    network = residual_network(BLOCKS[name], seed=0)
    network.load_state_dict(state)
    return network.eval()


def main() -> int:
    """Train, write the file, and print the accuracies."""
    parser = argparse.ArgumentParser(prog="digits_checkpoints", description="Train both and write their file.")
    parser.add_argument("--output", type=Path, default=FILE, help="file (default: that of the examples)")
    options = parser.parse_args()
    accuracy = make(options.output).accuracy
    print(f"teacher {accuracy['teacher']} %, student {accuracy['student']} %, written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
