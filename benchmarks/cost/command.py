"""Command line: measure and judge, or make the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch

from benchmarks.cost.distillation import distillation
from benchmarks.cost.figures import Figure, table
from benchmarks.cost.imports import imports
from benchmarks.cost.iteration import iteration
from benchmarks.cost.memory import memory
from benchmarks.cost.others import other_versions
from benchmarks.cost.saliency import saliency
from benchmarks.cost.scaling import LAYERS, PARAMETERS, scaling
from benchmarks.cost.settings import settings
from benchmarks.cost.synchronisation import synchronisation
from benchmarks.cost.weights import weights
from benchmarks.evidence.runs import versions
from clda_core import CldaError

PARTS = ("iteration", "weights", "saliency", "distillation", "memory", "scaling", "imports", "synchronisation")
SMALL = ("digits", "street")
FULL = {"cpu": (*SMALL, "mit-b3-b0"), "cuda": ("street", "mit-b5-b3", "mit-b5-b0", "dinov2-l-s")}


def main(arguments: Optional[List[str]] = None) -> int:
    """Run from the command line; return 1 if a budget is missed."""
    options = _parser().parse_args(arguments)
    try:
        if options.name == "report":
            from benchmarks.cost.report import write_report

            return write_report(check=options.check)
        return _measure(options)
    except CldaError as error:
        print(f"cost: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncost: interrupted", file=sys.stderr)
        return 130


def _measure(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CldaError("--device cuda, but torch finds no GPU. Fix: --device cpu")
    torch.set_num_threads(options.threads)
    path = options.record or Path("runs/cost") / f"{device.type}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures: List[Figure] = []
    with open(path, "w", encoding="utf-8") as file:
        _write(file, _provenance(options, device))
        for name, part in _parts(options, device).items():
            began = time.perf_counter()
            for one in part():
                figures.append(one)
                _write(file, one.to_dict())
            print(f"cost: {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(table(figures))
    missed = [one for one in figures if one.missed]
    print(f"\n{sum(one.judged for one in figures)} budgets, {len(missed)} missed; written to {path}")
    for one in missed:
        print(f"cost: missed: {one.what} ({one.where})", file=sys.stderr)
    return 1 if missed else 0


def _parts(options: argparse.Namespace, device: torch.device) -> Dict[str, Callable[[], Iterator[Figure]]]:
    """Return what was asked for, by a name for the progress."""
    known = settings(device, options.crop)
    names = options.models.split(",") if options.models else SMALL if options.quick else FULL[device.type]
    # What the kernel does to tensors that fit into the processor's cache says little; and this part takes seconds.
    of_weights = names if options.models else FULL[device.type]
    wanted = options.parts.split(",") if options.parts else PARTS
    for name in (*[name for name in names if name not in known], *[name for name in wanted if name not in PARTS]):
        raise CldaError(f"{name!r} is unknown. Models: {', '.join(known)}. Parts: {', '.join(PARTS)}")
    repeats = options.repeats or (7 if options.quick else 15)
    parameters, layers = (PARAMETERS[:-1], LAYERS[:-1]) if options.quick else (PARAMETERS, LAYERS)
    once: Dict[str, Callable[[], Iterator[Figure]]] = {
        "distillation": lambda: distillation(device, repeats),
        "scaling": lambda: scaling(device, max(3, repeats // 3), parameters, layers),
        "imports": lambda: imports(repeats),
        "synchronisation": lambda: synchronisation(device),
    }
    each: Dict[str, Callable[[Any], Iterator[Figure]]] = {
        "iteration": lambda setting: iteration(setting, device, repeats),
        "weights": lambda setting: weights(setting, device, repeats),
        "saliency": lambda setting: saliency(setting, device, repeats),
        "memory": lambda setting: memory(setting, device, options.crop),
    }
    parts = {}
    for name in (name for name in PARTS if name in wanted):
        if name in once:
            parts[name] = once[name]
        else:
            models = of_weights if name == "weights" else names
            parts.update({f"{name}, {of}": lambda n=name, of=of: each[n](known[of]) for of in models})
    return parts


def _provenance(options: argparse.Namespace, device: torch.device) -> Dict[str, Any]:
    machine = f"{os.cpu_count()} cores, {options.threads} used; {_processor()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return {
        "run": " ".join(["python -m benchmarks.cost", *_asked(options)]),
        "device": device.type,
        "machine": machine,
        "load": round(os.getloadavg()[0], 1),
        "note": options.note,
        "versions": {**versions(), **other_versions()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _asked(options: argparse.Namespace) -> List[str]:
    """Return the options that the figures depend on."""
    asked = ["--quick"] if options.quick else []
    for name in ("device", "models", "parts", "crop", "repeats", "threads"):
        value = getattr(options, name)
        asked += [f"--{name} {value}"] if value not in (None, _parser().get_default(name)) else []
    return asked


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(file: Any, record: Dict[str, Any]) -> None:
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--quick", action="store_true", help="small models and few repeats: minutes on two cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", help="with commas between: digits, street, mit-b5-b3, mit-b5-b0, dinov2-l-s, ...")
    parser.add_argument("--parts", help=f"with commas between, of {', '.join(PARTS)}")
    parser.add_argument("--crop", type=int, help="the MiT pairs' images; 512 on a GPU, 128 on a CPU")
    parser.add_argument("--repeats", type=int, help="samples of each time")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; with one, processor time is measured")
    parser.add_argument("--record", type=Path, help="file for the JSON lines; runs/cost/DEVICE.jsonl by default")
    parser.add_argument("--note", default="", help="goes into the record: what else ran, for example")
    parser.add_argument("--check", action="store_true", help="report: fail if docs/cost.md is not up to date")
    return parser
