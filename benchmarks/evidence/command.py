"""Command line: train what is missing, or make the report."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from benchmarks.evidence.observation import NETWORKS, TRAININGS, observe
from benchmarks.evidence.records import FOLDER, Record, Records, claimed, validator_records
from benchmarks.evidence.runs import WORK, run, trained_teacher
from benchmarks.evidence.tables import FORMER, runs_of, tables, withdrawn_of
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
        if options.name == "validators":
            return _validators(options)
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
    of_runs = {f"{name} {seed}": (_run, options.name, seed, name, records) for seed, name in missing}
    failed = _make(options.jobs, [(options.name, seed) for seed, _ in missing], of_runs)
    runs, withdrawn = (of(records.read(), seeds).get(benchmark.setting(), {}) for of in (runs_of, withdrawn_of))
    print(tables(runs, withdrawn, alike=not set(seeds) <= set(FORMER)))
    for line in failed:
        print(f"evidence: {line}", file=sys.stderr)
    return 1 if failed else 0


def _make(jobs: int, teachers: Sequence[Tuple[str, int]], runs: Dict[str, Tuple[Any, ...]]) -> List[str]:
    """Make runs in several processes and return what failed.

    Args:
        jobs: Processes.
        teachers: Task and seed of those that the runs start from; they are trained first.
        runs: By what they are called: a function that returns how it went, and its arguments.
    """
    if not runs:
        return []
    context = multiprocessing.get_context("spawn")
    failed = []
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        trained = [pool.submit(_teacher, *teacher) for teacher in sorted(set(teachers))]
        for future in tqdm(as_completed(trained), total=len(trained), desc="teachers", unit="seed"):
            future.result()
        futures = {pool.submit(*run): name for name, run in runs.items()}
        with tqdm(total=len(futures), desc="runs", unit="run") as bar:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None:
                    failed.append(f"{futures[future]}: {type(error).__name__}: {error}")
                bar.set_postfix_str(f"{futures[future]}: {future.result() if error is None else 'failed'}")
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


def _validators(options: argparse.Namespace) -> int:
    """Make what is missing of the validators' study, and print what all its records say."""
    from benchmarks.evidence import validator_tables, validators

    seeds, teachers, runs = seeds_in(options.seeds), [], {}
    for name in options.tasks.split(",") if options.tasks else validators.TASKS:
        benchmark, records = task(name), Records(options.records / "validators" / f"{name}.jsonl")
        done = records.done()
        for seed in seeds:
            for kind in validators.kinds(benchmark):
                if (benchmark.setting(), seed, kind) not in done:
                    teachers.append((name, seed))
                    runs[f"{name} {kind} {seed}"] = (_scored, name, seed, kind, records, options.looks)
    failed = _make(options.jobs, teachers, runs)
    print(validator_tables.tables(validator_records(options.records)))
    for line in failed:
        print(f"evidence: {line}", file=sys.stderr)
    return 1 if failed else 0


def _scored(name: str, seed: int, kind: str, records: Records, looks: int) -> str:
    from benchmarks.evidence.validators import scored

    benchmark = task(name)
    with claimed(WORK / benchmark.setting() / "claims", f"validators-{seed}-{kind}") as free:
        if not free:
            return "another process is at it"
        if (benchmark.setting(), seed, kind) in records.done():
            return "recorded meanwhile"
        records.add(scored(benchmark, seed, kind, looks=looks))
    return "recorded"


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
    parser.add_argument(
        "name",
        choices=[*TASKS, "validators", "report"],
        help="a benchmark, the study of validators, or the report from the records",
    )
    parser.add_argument("--seeds", default="20-29", help="20-29 are reported, 100-199 are for tuning")
    parser.add_argument("--variants", default="main", help="names or groups, with commas between; all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--records", type=Path, default=FOLDER, help="folder of the records")
    parser.add_argument(
        "--study",
        choices=["observation", "teaching"],
        help="LSR of both networks with and without UDA, or which layers a student teaches, instead of variants",
    )
    parser.add_argument("--tasks", default="", help="validators: benchmarks, with commas between")
    parser.add_argument("--looks", type=int, default=8, help="validators: how often a student is scored")
    parser.add_argument("--check", action="store_true", help="report: fail if a page is not up to date")
    return parser
