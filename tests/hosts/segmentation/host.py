"""Which repository a host is, and whether a folder holds it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from clda_core.errors import problem

_DAFORMER = "configs/daformer/gta2cs_uda_warm_fdthings_rcs_croppl_a999_daformer_mitb5_s0.py"
_DACS = "mmseg/models/uda/dacs.py"
_MASKING = "mmseg/models/uda/masking_consistency_module.py"


@dataclass(frozen=True)
class Host:
    """A repository that we plug into.

    Attributes:
        name: As users call it.
        url: Where it is from.
        commit: The one that was verified.
        models: Recipe of the host that is made tiny, by the name of its model; the first is the default.
        ours: Our recipes for this host, a pattern in ``examples/daformer``.
        has: Files that tell this host from others.
        lacks: Files that another host has in their place.
    """

    name: str
    url: str
    commit: str
    models: Dict[str, str]
    ours: str
    has: Tuple[str, ...]
    lacks: Tuple[str, ...] = ()


DAFORMER = Host(
    name="DAFormer",
    url="https://github.com/lhoyer/DAFormer",
    commit="e6f6e04",
    models={"daformer": _DAFORMER},
    ours="configs/*.py",
    has=(_DACS, "tools/train.py", _DAFORMER),
    lacks=(_MASKING,),
)

MIC_SEG = Host(
    name="MIC/seg",
    url="https://github.com/lhoyer/MIC",
    commit="2f932a9",
    models={"hrda": "configs/mic/gtaHR2csHR_mic_hrda.py", "daformer": _DAFORMER},
    ours="configs/mic/*.py",
    has=(_DACS, "tools/train.py", _MASKING),
)


def check_folder(host: Host, root: Path) -> None:
    """Raise unless ``root`` holds the host.

    Raises:
        CldaError: If the folder is missing or is another repository.
    """
    fix = f"git clone {host.url}, and pass its folder{' seg' if host is MIC_SEG else ''} as --host"
    if not root.is_dir():
        raise problem("the host is not there", expected=f"the folder of {host.name}", received=str(root), fix=fix)
    missing = [name for name in host.has if not (root / name).is_file()]
    foreign = [name for name in host.lacks if (root / name).is_file()]
    if missing or foreign:
        found = [f"without {name}" for name in missing] + [f"with {name}" for name in foreign]
        raise problem(
            "the host is another repository, or of an unknown version",
            expected=f"{host.name} at commit {host.commit}",
            received=f"{root}, {', '.join(found)}",
            fix=fix,
        )


def version_of(host: Host, root: Path) -> Tuple[str, List[str]]:
    """Return the checkout's commit, and warnings if it is not the one that was verified."""
    commit = _git(root, "rev-parse", "HEAD")[:7]
    if not commit:
        return "unknown", [f"the commit of {root} cannot be read with git; {host.commit} was verified"]
    warnings = []
    if commit != host.commit:
        warnings.append(f"commit {host.commit} was verified, this is {commit}")
    changed = _git(root, "status", "--porcelain", "--", "mmseg", "tools", "configs")
    if changed:
        warnings.append(f"changed against its commit: {'; '.join(changed.splitlines()[:5])}")
    return commit, warnings


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout.decode().strip() if done.returncode == 0 else ""
