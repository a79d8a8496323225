"""Command line: train what is missing, or make the report."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple

import torch
from tqdm import tqdm

from benchmarks.evidence.observation import NETWORKS, TRAININGS, observe
from benchmarks.evidence.records import FOLDER, Record, Records, claimed
from benchmarks.evidence.runs import WORK, run, trained_teacher
from benchmarks.evidence.tables import runs_of, tables, withdrawn_of
from benchmarks.evidence.tasks import TASKS, task
from benchmarks.evidence.teaching import teach
from benchmarks.evidence.variants import named
from clda_core import CldaError


def main(arguments: Optional[List[str]] = None) -> int:
    """Run from the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.name == "report":
            from benchmarks.evidence.report import write_report

            return write_report(check=options.check)
        return _study(options) if options.study else _train(options)
    except CldaError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("evidence: a process was killed (out of memory?); the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nevidence: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def seeds_in(text: str) -> List[int]:
    """Return the seeds named by ``"0-3,7"``.

    Raises:
        CldaError: If the text names no seeds.
    """
    seeds: List[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        seeds = []
    if not seeds:
        raise CldaError(f"--seeds {text!r} names no seeds; expected for example 20-29 or 100,101")
    return seeds


def _train(options: argparse.Namespace) -> int:
    benchmark = task(options.name)
    records = Records(options.records / f"{options.name}.jsonl")
    seeds, chosen = seeds_in(options.seeds), named(options.variants.split(","))
    names = [name for name, variant in chosen.items() if benchmark.dense or not variant.dense]
    done = records.done()
    missing = [(seed, name) for seed in seeds for name in names if (benchmark.setting(), seed, name) not in done]
    print(f"{options.name}: {len(seeds) * len(names) - len(missing)} runs are recorded, {len(missing)} are to be made")
    failed = _make(options, records, missing) if missing else []
    runs, withdrawn = (of(records.read(), seeds).get(benchmark.setting(), {}) for of in (runs_of, withdrawn_of))
    print(tables(runs, withdrawn))
    for line in failed:
        print(f"evidence: {line}", file=sys.stderr)
    return 1 if failed else 0


def _make(options: argparse.Namespace, records: Records, missing: List[Tuple[int, str]]) -> List[str]:
    """Make the missing runs and return what failed."""
    context = multiprocessing.get_context("spawn")
    failed = []
    with ProcessPoolExecutor(options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        teachers = [pool.submit(_teacher, options.name, seed) for seed in sorted({seed for seed, _ in missing})]
        for future in tqdm(as_completed(teachers), total=len(teachers), desc="teachers", unit="seed"):
            future.result()
        futures = {pool.submit(_run, options.name, seed, name, records): (seed, name) for seed, name in missing}
        with tqdm(total=len(futures), desc=options.name, unit="run") as bar:
            for future in as_completed(futures):
                seed, name = futures[future]
                error = future.exception()
                if error is not None:
                    failed.append(f"seed {seed}, {name}: {type(error).__name__}: {error}")
                bar.set_postfix_str(f"{name} {seed}: {future.result() if error is None else 'failed'}")
                bar.update(1)
    return failed


def _study(options: argparse.Namespace) -> int:
    """Make what is missing of a study, in this process."""
    benchmark, seeds = task(options.name), seeds_in(options.seeds)
    records = Records(options.records / options.study / f"{options.name}.jsonl")
    of_seed: Dict[str, Callable[[int], Record]] = {"teaching": partial(teach, benchmark)}
    if options.study == "observation":
        of_seed = {
            f"{network}-{how}": partial(observe, benchmark, network=network, training=how)
            for network in NETWORKS
            for how in TRAININGS
        }
    done = records.done()
    wanted = [(seed, name) for seed in seeds for name in of_seed if (benchmark.setting(), seed, name) not in done]
    torch.set_num_threads(1)
    for seed, name in tqdm(wanted, desc=f"{options.name}: {options.study}", unit="network"):
        records.add(of_seed[name](seed))
    return 0


def _teacher(name: str, seed: int) -> None:
    benchmark = task(name)
    with claimed(WORK / benchmark.teacher_setting() / "claims", f"teacher-{seed}") as free:
        if free:
            trained_teacher(benchmark, seed)


def _run(name: str, seed: int, variant: str, records: Records) -> str:
    benchmark = task(name)
    with claimed(WORK / benchmark.setting() / "claims", f"{seed}-{variant}") as free:
        if not free:
            return "another process is at it"
        if (benchmark.setting(), seed, variant) in records.done():
            return "recorded meanwhile"
        record = run(benchmark, seed, variant, records.read())
        records.add(record)
    figures = [record[role] and round(record[role][benchmark.metric], 1) for role in ("student", "teacher")]
    return f"student {figures[0]}, teacher {figures[1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", choices=[*TASKS, "report"], help="a benchmark, or the report from the records")
    parser.add_argument("--seeds", default="20-29", help="20-29 are reported, 100-199 are for tuning")
    parser.add_argument("--variants", default="main", help="names or groups, with commas between; all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--records", type=type(FOLDER), default=FOLDER, help="folder of the records")
    parser.add_argument(
        "--study",
        choices=["observation", "teaching"],
        help="LSR of both networks with and without UDA, or which layers a student teaches, instead of variants",
    )
    parser.add_argument("--check", action="store_true", help="report: fail if docs/evidence.md is not up to date")
    return parser
