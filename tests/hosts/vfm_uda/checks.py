"""The checks: what must hold of the host with us, each judged from the runs it names."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, List, Mapping

from torch import Tensor

from examples.vfm_uda.export import KEY
from tests.hosts.segmentation.checks import Result, differing, flat
from tests.hosts.segmentation.runs import RunFailed

from .runs import SAVED, STEPS, VFM_UDA_PLUSPLUS, Laboratory, Run


def host_repeats(lab: Laboratory) -> Result:
    """Two runs of the host alone are bitwise equal; otherwise nothing can be compared bit by bit."""
    found, ours = compare(lab.run("host"), lab.run("host again")), lab.run("host").ours
    return Result(found.holds and not ours, f"{found.figures}; {len(ours)} modules of ours imported")


def off_is_the_host(lab: Laboratory) -> Result:
    """``enabled: false`` trains bit by bit as the host alone, and needs no teacher's file."""
    return compare(lab.run("host"), lab.run("off"))


def weightless_is_the_host(lab: Laboratory) -> Result:
    """With teacher, KD of weight 0 and rounds, student, host EMA and optimizer are still those of the host alone."""
    found, rounds = compare(lab.run("host"), lab.run("without weight")), rounds_of(lab.run("without weight"))
    return Result(found.holds and rounds > 0, f"{found.figures}; {rounds} rounds meanwhile")


def checkpoints_are_the_hosts(lab: Laboratory) -> Result:
    """On, a checkpoint has the host's keys, tensors and optimizer groups, and beside them the state of our callback."""
    host, on = lab.run("host").checkpoint(), lab.run("on").checkpoint()
    faults = [
        what
        for what, same in (
            ("keys", list(host) == list(on)),
            ("tensors", list(host["state_dict"]) == list(on["state_dict"])),
            ("optimizer groups", groups(host) == groups(on)),
            ("callbacks", set(on["callbacks"]) - set(host["callbacks"]) == {KEY}),
            ("hyper-parameters", set(on["hyper_parameters"]) - set(host["hyper_parameters"]) == {"clda"}),
        )
        if not same
    ]
    figures = f"{len(host['state_dict'])} tensors, {len(groups(host))} optimizer groups, and our callback's state"
    return Result(not faults, f"differing: {', '.join(faults)}" if faults else figures)


def rounds_change_the_teacher(lab: Laboratory) -> Result:
    """Rounds change the teacher; KD alone leaves it as it was."""
    before = network(lab.run("teacher").checkpoint(SAVED))
    changed = differing(before, teacher_of(lab.run("on").checkpoint()))
    frozen = differing(before, teacher_of(lab.run("frozen").checkpoint()))
    student = differing(network(lab.run("host").checkpoint()), network(lab.run("frozen").checkpoint()))
    return Result(
        bool(changed) and not frozen and bool(student),
        f"{rounds_of(lab.run('on'))} rounds changed {len(changed)} of {len(before)} tensors; with rounds: false "
        f"{len(frozen)}, and KD changed {len(student)} of the student",
    )


def resuming_goes_on(lab: Laboratory) -> Result:
    """A run that was interrupted and resumed ends bit by bit as the one that was not: student, teacher and rounds."""
    on, resumed = lab.run("on"), lab.run("resumed")
    found = compare(on, resumed, losses=False)
    faults = differing(flat(on.checkpoint()["callbacks"][KEY]), flat(resumed.checkpoint()["callbacks"][KEY]))
    values = len(flat(on.checkpoint()["callbacks"][KEY]))
    return Result(found.holds and not faults, f"{found.figures}; {len(faults)} of {values} values of ours differ")


def other_ways(lab: Laboratory) -> Result:
    """Blanked blocks as the view, and autocast where the host's CPU code is fast enough."""
    precision = "float32" if lab.host is VFM_UDA_PLUSPLUS else "bf16"
    rounds = rounds_of(lab.run("masked view, bf16"))
    return Result(rounds > 0, f"{rounds} rounds in {precision}")


def processes_agree(lab: Laboratory) -> Result:
    """Two gloo processes on other batches end with the same student and teacher; a resume with another number stops."""
    if lab.host is VFM_UDA_PLUSPLUS:
        return Result(None, "not run: the host's SyncBatchNorm needs a GPU for every process")
    ranks = [(rank["student"], rank["teacher"], rank["rounds"]) for rank in lab.run("two processes").found]
    try:
        lab.run("two, resumed")
        stopped = ""
    except RunFailed as error:
        stopped = str(error) if "another number of processes" in str(error) else ""
    return Result(
        len(ranks) == 2 and ranks[0] == ranks[1] and ranks[0][2] > 0 and bool(stopped),
        f"{len(ranks)} ranks, {len(set(ranks))} outcome, {ranks[0][2]} rounds; resumed with another number: "
        + ("refused" if stopped else "not refused"),
    )


def export_validates(lab: Laboratory) -> Result:
    """The exported teacher loads in the host's own ``validate``, with all its tensors as the run left them."""
    run, exported = lab.run("on"), lab.folder / "exported.ckpt"
    lab.command("export", "clda_vfm_uda.export", [str(run.folder / f"step={STEPS}.ckpt"), str(exported)])
    model = "--model.init_args.network.init_args."
    configs = ["-c", str(lab.root / lab.host.models["vit"]), "-c", str(lab.folder / "host.yaml")]
    arguments = [*configs, f"{model}model_name=dinov2_vitl14", f"{model}ckpt_path={exported}"]
    validated = lab.host_command("validate", "validate", [*arguments, "--trainer.limit_val_batches=1"], ours=False)
    score = re.search(r"val_cityscapes_miou\D+([\d.]+)", validated.output)
    whole = validated.output.count("1.0x of keys match")
    return Result(
        score is not None and whole == 3 and not validated.ours,
        f"val_cityscapes_miou {score.group(1) if score else 'not printed'}; {whole} of 3 parts match by name",
    )


def recipes_train(lab: Laboratory) -> Result:
    """The other recipes for this host train and make rounds."""
    found = {recipe.stem: rounds_of(lab.run(recipe.stem)) for recipe in lab.recipes()[1:]}
    shown = ", ".join(f"{name}: {rounds} rounds" for name, rounds in found.items())
    return Result(all(found.values()), shown or "there is one recipe, which the other checks used")


def cost(lab: Laboratory) -> Result:
    """Processor time of a step, in the median, as multiples of the host alone."""
    names = ("host", "frozen", "on")
    alone, frozen, on = (sorted(lab.run(name).found[0]["seconds"][1:])[STEPS // 2 - 1] for name in names)
    return Result(
        None, f"with KD x{frozen / alone:.2f}, with a round every 2 steps x{on / alone:.2f}; alone {alone:.2f} s"
    )


CHECKS: Dict[str, Callable[[Laboratory], Result]] = {
    "host-repeats": host_repeats,
    "off-is-host": off_is_the_host,
    "weight-0-is-host": weightless_is_the_host,
    "checkpoints": checkpoints_are_the_hosts,
    "rounds": rounds_change_the_teacher,
    "resume": resuming_goes_on,
    "export": export_validates,
    "masked-bf16": other_ways,
    "two-processes": processes_agree,
    "recipes": recipes_train,
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


def compare(one: Run, other: Run, *, losses: bool = True) -> Result:
    """Compare two runs bit by bit: student, host EMA and buffers, optimizer state and, if wanted, logged losses."""
    first, second = one.checkpoint(), other.checkpoint()
    pairs: Dict[str, Any] = {
        "tensors": (first["state_dict"], second["state_dict"]),
        "optimizer values": (flat(first["optimizer_states"]), flat(second["optimizer_states"])),
    }
    if losses:
        pairs["logged values"] = (flat(one.found[0]["losses"]), flat(other.found[0]["losses"]))
    found = {what: differing(*pair) for what, pair in pairs.items()}
    holds = not any(found.values()) and all(len(pair[0]) > 0 for pair in pairs.values())
    counts = [f"{len(names)} of {len(pairs[what][0])} {what} differ" for what, names in found.items()]
    return Result(holds, ", ".join(counts))


def groups(checkpoint: Mapping[str, Any]) -> List[Any]:
    """Return each optimizer group without its present learning rate."""
    (state,) = checkpoint["optimizer_states"]
    return [(group["params"], group["weight_decay"], group["initial_lr"]) for group in state["param_groups"]]


def network(checkpoint: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Return the tensors of the network that the host trained."""
    tensors = checkpoint["state_dict"]
    return {name[len("network.") :]: value for name, value in tensors.items() if name.startswith("network.")}


def teacher_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the teacher's tensors."""
    return checkpoint["callbacks"][KEY]["teacher"]  # type: ignore[no-any-return]


def rounds_of(run: Run) -> int:
    """Return how many rounds rank 0 made."""
    return int(run.found[0]["rounds"])
