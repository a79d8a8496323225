"""Starting the ranks of a test on this machine, and giving up on them after a while."""

import os
import pathlib
import pickle
import time
import traceback
from datetime import timedelta
from typing import Any, Callable, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[..., Any]
"""Called as ``work(rank, ranks, *arguments)`` in every process; importable, and with a result that can be pickled.

An exception may be a result, where the ranks are not expected to work together any more.
"""


def run(
    work: Work, *arguments: Any, ranks: int, folder: pathlib.Path, seconds: float = 600.0, patience: float = 300.0
) -> List[Any]:
    """Run ``work`` on ``ranks`` processes joined by gloo, and return what each rank returned, in order.

    Args:
        work: What each process does.
        arguments: Passed on.
        ranks: How many processes.
        folder: For what they exchange.
        seconds: After these all of them are killed.
        patience: Timeout of the process group, in seconds.

    Raises:
        AssertionError: If they had to be killed. An exception of a rank passes.
    """
    context = mp.spawn(_main, args=(work, arguments, ranks, str(folder), patience), nprocs=ranks, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < end, f"{ranks} ranks are not done after {seconds:g} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(ranks)]


def _main(rank: int, work: Work, arguments: Any, ranks: int, folder: str, patience: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=patience)
    )
    try:
        result = work(rank, ranks, *arguments)
    except Exception:
        traceback.print_exc()
        raise
    pathlib.Path(folder, f"rank{rank}").write_bytes(pickle.dumps(result))
    if isinstance(result, Exception):
        os._exit(0)  # at an orderly end old versions of gloo may abort over a collective that never came about
    dist.barrier()
    dist.destroy_process_group()
