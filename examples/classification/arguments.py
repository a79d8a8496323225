"""What the jobs on the digits read from the command line: values of options, and what is wrong with them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Callable

import torch


def an_integer(least: int, below: float = float("inf")) -> Callable[[str], int]:
    """Return what reads an integer from ``least`` on and below ``below``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, received {text!r}") from None
        if not least <= value < below:
            limit = "" if below == float("inf") else f" and < {below:.0f}"
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}{limit}, received {value}")
        return value

    return parse


def a_device(text: str) -> str:
    """Return the name of a device that torch can use."""
    try:
        torch.zeros(1, device=text)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"torch cannot use device {text!r}: {reason}") from None
    return text


def a_folder(text: str) -> Path:
    """Return the path of a folder that is there or can be made, and written to."""
    path = Path(text)
    existing = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not existing.is_dir() or not os.access(str(existing), os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a folder that can be written, received {text!r}")
    return path
