"""The checks: what must hold of the host with us, each judged from the runs it names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .runs import FIRST_SAVED_AFTER, Laboratory, Run, RunFailed


@dataclass(frozen=True)
class Result:
    """What a check found: whether it holds (``None``: figures only, nothing to hold), and the figures."""

    holds: Optional[bool]
    figures: str


def host_repeats(lab: Laboratory) -> Result:
    """Two runs of the host alone are bitwise equal; otherwise nothing can be compared bit by bit."""
    found = compare(lab.run("host"), lab.run("host again"))
    if not found.holds:
        return Result(False, f"the host does not repeat itself, so nothing can be compared ({found.figures})")
    return Result(not ours_in(lab.run("host")), found.figures + "; nothing of ours was imported")


def off_is_the_host(lab: Laboratory) -> Result:
    """``enabled=False`` trains bit by bit as the host alone."""
    return _as_alone(lab, "off")


def weightless_is_the_host(lab: Laboratory) -> Result:
    """With teacher, KD of weight 0 and rounds, the host still trains bit by bit as alone."""
    found = _as_alone(lab, "without weight")
    rounds = len(lab.run("without weight").state()["learner"]["history"])
    return Result(found.holds and rounds > 0, f"{found.figures}; {rounds} rounds meanwhile")


def first_losses_are_the_hosts(lab: Laboratory) -> Result:
    """On, the losses before the first step are those of the host alone."""
    host, on = lab.run("host").losses[0], lab.run("on").losses[0]
    wrong = differing(host, on)
    shown = ", ".join(f"{name}={value:.5f}" for name, value in list(host.items())[:2])
    return Result(not wrong, f"{len(host)} losses, {shown}, …" if not wrong else f"differing: {', '.join(wrong)}")


def names_are_the_hosts(lab: Laboratory) -> Result:
    """On, the checkpoint has the host's tensors and optimizer groups, and none of ours."""
    host, on = lab.run("host").checkpoint(), lab.run("on").checkpoint()
    names = sorted(set(host["state_dict"]) ^ set(on["state_dict"]))
    groups, ours = groups_of(host), groups_of(on)
    figures = f"{len(host['state_dict'])} tensors, {len(groups)} optimizer groups"
    return Result(not names and groups == ours, figures if not names else f"differing: {', '.join(names[:5])}")


def kd_loss_falls(lab: Laboratory) -> Result:
    """The KD loss is finite, and lower in the last third of the run than in the first."""
    losses = [entry["clda.loss_kd"] for entry in lab.run("on").log if "clda.loss_kd" in entry]
    first, last = thirds(losses)
    figures = f"{first:.4f} in the first third of {len(losses)} iterations, {last:.4f} in the last"
    return Result(all(map(math.isfinite, losses)) and last < first, figures)


def rounds_change_what_they_say(lab: Laboratory) -> Result:
    """Rounds happen, and of the teacher only layers change that the report names; KD alone leaves it as it was."""
    layers = lab.ask_host()["layers"]
    before = network(lab.run("teacher").checkpoint())
    state = lab.run("on").state()
    rounds = state["learner"]["history"]
    named = sorted({layer for record in rounds for layer in record["updated"]})
    changed = differing(before, state["teacher"])
    logged = [int(entry["clda.rounds"]) for entry in lab.run("on").log if "clda.rounds" in entry][-1]
    unnamed = sorted(set(changed) - {tensor for layer in named for tensor in layers[layer]})
    frozen = differing(before, lab.run("frozen").state()["teacher"])
    figures = (
        f"{len(rounds)} rounds ({logged} in the log) updated {len(named)} of {len(layers)} layers: {len(changed)} of "
        f"{len(before)} tensors changed, {len(unnamed)} of them outside these; {len(frozen)} changed with rounds=False"
    )
    told = len(rounds) - logged in (0, 1)
    return Result(bool(named) and bool(changed) and told and not unnamed and not frozen, figures)


def resuming_restores(lab: Laboratory) -> Result:
    """A resumed run goes on with the saved teacher and rounds, and says what the host itself loses."""
    at = lab.resumed_at
    saved, resumed = lab.run("on").state(at), lab.run("resumed")
    return judge_resume(saved, resumed.state(at + FIRST_SAVED_AFTER), resumed.state(), resumed.output)


def student_tests_alone(lab: Laboratory) -> Result:
    """The student's checkpoint is evaluated by the host's own test command, which imports nothing of ours."""
    on = lab.run("on")
    during = [100.0 * entry["mIoU"] for entry in on.log if "mIoU" in entry][-1]
    tested = lab.test(on.folder / "latest.pth")
    after = mean_iou(tested.output)
    same = after is not None and abs(after - during) < 0.02
    return Result(
        same and not ours_in(tested), f"mIoU {after} from the test command, {during:.2f} at the end of training"
    )


def recipes_load(lab: Laboratory) -> Result:
    """Our recipes for this host load in it, from a folder copied as a user copies it."""
    recipes: Dict[str, Optional[str]] = lab.ask_host()["recipes"]
    faults = [f"{Path(name).name}: {fault}" for name, fault in recipes.items() if fault]
    return Result(bool(recipes) and not faults, "; ".join(faults) or f"{len(recipes)} recipes")


def cost(lab: Laboratory) -> Result:
    """Time of a training step (the fastest) and peak memory, as multiples of the host alone."""
    on, memory = lab.run("on"), {name: lab.run(name).report["peak_mib"] for name in ("host", "frozen", "on")}
    rounds = {record["step"] for record in on.state()["learner"]["history"]}
    alone = min(lab.run("host").report["seconds"])
    steps = list(enumerate(on.report["seconds"], start=1))
    kd = min(seconds for step, seconds in steps if step not in rounds)
    both = min(seconds for step, seconds in steps if step in rounds)
    what = "of the process" if lab.device == "cpu" else "of tensors"
    return Result(
        None,
        f"with KD time x{kd / alone:.2f}, memory x{memory['frozen'] / memory['host']:.2f}; where a round is made time "
        f"x{both / alone:.2f}, memory x{memory['on'] / memory['host']:.2f}; alone {alone:.2f} s a step, "
        f"{memory['host']:.0f} MiB {what}",
    )


CHECKS: Dict[str, Callable[[Laboratory], Result]] = {
    "host-repeats": host_repeats,
    "off-is-host": off_is_the_host,
    "weight-0-is-host": weightless_is_the_host,
    "first-losses": first_losses_are_the_hosts,
    "names": names_are_the_hosts,
    "kd-falls": kd_loss_falls,
    "rounds": rounds_change_what_they_say,
    "resume": resuming_restores,
    "test-command": student_tests_alone,
    "recipes": recipes_load,
    "cost": cost,
}


def run_check(name: str, lab: Laboratory) -> Result:
    """Run a check; a run that ends with an error, or leaves something unreadable, fails it."""
    try:
        return CHECKS[name](lab)
    except RunFailed as error:
        return Result(False, str(error))
    except Exception as error:  # the host left something else than it should have
        return Result(False, f"cannot be judged: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------ how to judge


def compare(first: Run, second: Run) -> Result:
    """Compare two runs bit by bit: networks, BatchNorm statistics, optimizer state and logged losses."""
    one, other = first.checkpoint(), second.checkpoint()
    found = {
        "tensors": differing(one["state_dict"], other["state_dict"]),
        "optimizer values": differing(flat(one["optimizer"]), flat(other["optimizer"])),
        "logged losses": differing(flat(first.losses), flat(second.losses)),
    }
    sizes = {
        "tensors": len(one["state_dict"]),
        "optimizer values": len(flat(one["optimizer"])),
        "logged losses": len(flat(first.losses)),
    }
    if not any(found.values()):
        return Result(min(sizes.values()) > 0, ", ".join(f"{sizes[what]} {what}" for what in sizes) + " equal")
    return Result(
        False,
        "; ".join(
            f"{len(names)} of {sizes[what]} {what} differ, e.g. {names[0]}" for what, names in found.items() if names
        ),
    )


def _as_alone(lab: Laboratory, name: str) -> Result:
    """Compare a run with the host alone, if the host repeats itself."""
    found = compare(lab.run("host"), lab.run(name))
    if not found.holds and not compare(lab.run("host"), lab.run("host again")).holds:
        return Result(False, "cannot be told, since the host does not repeat itself here; try --device cpu")
    return found


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> List[str]:
    """Return the names whose values differ in any bit, or that only one has; NaN equals NaN."""
    return [
        name for name in {**one, **other} if name not in one or name not in other or not _equal(one[name], other[name])
    ]


def flat(nested: Any, name: str = "") -> Dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by their path."""
    if isinstance(nested, Mapping):
        pairs: Iterable[Tuple[Any, Any]] = nested.items()
    elif isinstance(nested, (list, tuple)):
        pairs = enumerate(nested)
    else:
        return {name: nested}
    return {
        path: leaf for key, value in pairs for path, leaf in flat(value, f"{name}.{key}" if name else str(key)).items()
    }


def groups_of(checkpoint: Mapping[str, Any]) -> List[Tuple[List[int], float]]:
    """Return each optimizer group's parameters, and its weight decay; learning rates depend on a run's length."""
    return [(group["params"], group["weight_decay"]) for group in checkpoint["optimizer"]["param_groups"]]


def thirds(losses: Sequence[float]) -> Tuple[float, float]:
    """Return the means of the first and of the last third."""
    size = len(losses) // 3
    if size == 0:
        raise ValueError(f"{len(losses)} KD losses in the log")
    return sum(losses[:size]) / size, sum(losses[-size:]) / size


def network(checkpoint: Mapping[str, Any], name: str = "model") -> Dict[str, Tensor]:
    """Return the tensors of one network of the decorator."""
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}


def judge_resume(saved: Mapping[str, Any], first: Mapping[str, Any], last: Mapping[str, Any], output: str) -> Result:
    """Judge a resumed run by the state it was resumed from, the first and the last state it saved, and what it printed.

    No round is due between the first two, so the teacher and the rounds must be equal; one is until the last. An exact
    comparison of what the student does is not possible: the host itself loses random state and ``local_iter``.
    """
    rounds = [len(state["learner"]["history"]) for state in (saved, first, last)]
    steps = [state["learner"]["steps"] for state in (saved, first, last)]
    faults = []
    if differing(saved["teacher"], first["teacher"]):
        faults.append("the teacher is another one")
    if first["learner"]["history"] != saved["learner"]["history"]:
        faults.append("the rounds so far are others")
    if not steps[0] < steps[1] < steps[2]:
        faults.append(f"steps went {steps[0]}, {steps[1]}, {steps[2]}")
    if rounds[2] != rounds[0] + 1:
        faults.append(f"{rounds[2] - rounds[0]} rounds followed instead of 1")
    if "local_iter" not in output:
        faults.append("no warning that the host loses local_iter")
    figures = f"step {steps[0]} with {rounds[0]} rounds saved and restored, step {steps[2]} with {rounds[2]} at the end"
    return Result(not faults, "; ".join(faults) or f"{figures}; warned of local_iter")


def mean_iou(output: str) -> Optional[float]:
    """Read the mIoU from the summary table that the host's test command prints."""
    found = re.search(r"mIoU[^\n]*\n[+\-| ]+\n\|\s*[\d.]+\s*\|\s*([\d.]+)", output)
    return float(found.group(1)) if found else None


def ours_in(run: Run) -> List[str]:
    """Return the modules of this repository that the run's process imported."""
    return list(run.report["ours"])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and (one == other or (one != one and other != other))
