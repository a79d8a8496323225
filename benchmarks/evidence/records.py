"""One JSON record a run, appended to a file that may be cut short, killed in the middle or shared by processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

Record = Dict[str, Any]
Key = Tuple[str, int, str]
FOLDER = Path(__file__).resolve().parents[1] / "records"


class Records:
    """The records of one benchmark.

    A line is written with one call under a lock, so that lines of two processes do not mix. A line that was cut short
    is left where it is, reported, and counted as not run.

    Args:
        path: The file, one JSON object a line; made when the first record is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> List[Record]:
        """Return all whole records in the order of writing."""
        if not self.path.exists():
            return []
        records, broken = [], []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                key_of(record)
                records.append(record)
            except (ValueError, KeyError, TypeError):
                broken.append(number)
        if broken:
            warnings.warn(
                f"{self.path.name}: line {', '.join(map(str, broken))} is no whole record (cut short?) and is left "
                "out; that run is made again when asked for",
                stacklevel=2,
            )
        return records

    def standing(self) -> List[Record]:
        """Return the records that are not withdrawn, in the order of writing."""
        return standing(self.read())

    def done(self) -> Dict[Key, Record]:
        """Return the latest record of each run; a withdrawn run counts as not made."""
        return {key_of(record): record for record in self.standing()}

    def add(self, record: Record) -> None:
        """Append a record, whole or not at all."""
        key_of(record)
        line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def validator_records(folder: Path) -> Dict[str, List[Record]]:
    """Return the records of the validators' study by task, from a folder of records."""
    found = {path.stem: Records(path).standing() for path in sorted((folder / "validators").glob("*.jsonl"))}
    return {task: records for task, records in found.items() if records}


def standing(records: Sequence[Record]) -> List[Record]:
    """Return the records whose figures count: those without a reason under ``"withdrawn"``."""
    return [record for record in records if not record.get("withdrawn")]


def key_of(record: Record) -> Key:
    """Return what makes a run: settings that are none of the variant's, its seed, its variant."""
    return str(record["setting"]), int(record["seed"]), str(record["variant"])


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Give ``True`` if no other process works on ``name`` now; a killed process's claim ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
