"""Our state beside the host's checkpoints: what :mod:`.plugin` puts in front of mmcv's checkpoint hook."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from .collaboration import SUFFIX, Collaboration


class StateBesideCheckpoint:
    """Mixed into mmcv's ``CheckpointHook``, it saves an ``iter_N.clda.pth`` for each ``iter_N.pth``.

    When the host resumes, our file is found by the student's weights, not by its number, which mmcv's versions count
    differently.
    """

    def before_run(self, runner: Any) -> None:
        """Restore our state if the host has resumed."""
        host: Any = super()
        host.before_run(runner)
        dacs = getattr(runner.model, "module", runner.model)
        if getattr(dacs, "clda", None) is not None:
            dacs.clda.saved = True
            if runner.iter > 0:
                self._resume(runner, dacs)

    def _resume(self, runner: Any, dacs: Any) -> None:
        clda: Collaboration = dacs.clda
        state = clda.resume(dacs.get_model(), self.out_dir)
        if state is None:
            return
        rounds = clda.learner(dacs.get_model()).report().made
        runner.logger.info(f"clda: teacher and learner resumed, after {rounds} rounds")
        if clda.options.restore_local_iter:
            dacs.local_iter = state["local_iter"]
            return
        warnings.warn(
            f"clda: the host does not save local_iter, which was {state['local_iter']}, and starts it from 0: its "
            "first step overwrites the host EMA by the student. That is so without CLDA too; set "
            "clda.restore_local_iter=True to give it the counter back",
            stacklevel=2,
        )

    def _save_checkpoint(self, runner: Any) -> None:
        """Save the host's checkpoint, then ours beside it, and drop ours where the host has dropped its own."""
        host: Any = super()
        host._save_checkpoint(runner)
        dacs = getattr(runner.model, "module", runner.model)
        if runner.rank != 0 or getattr(dacs, "clda", None) is None:
            return
        clda: Collaboration = dacs.clda
        name = self.args.get("filename_tmpl", "iter_{}.pth").format(runner.iter + 1)
        clda.save(os.path.join(self.out_dir, Path(name).stem + SUFFIX), dacs.get_model(), dacs.local_iter)
        for path in Path(self.out_dir).glob(f"*{SUFFIX}"):
            if not path.with_name(path.name[: -len(SUFFIX)] + ".pth").exists():
                path.unlink()
        if clda.options.rounds:
            runner.logger.info(f"clda: {clda.learner(dacs.get_model()).report()}")
