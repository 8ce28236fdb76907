"""The files of a run directory: where they lie, how they are read, written and locked.

It holds config.json, run.json (who runs what since when), metrics.jsonl, to which records are only
appended, training_curves.png, samples/ and the checkpoints. Only the standard library is imported,
so that reading a run's state starts instantly.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

RUN_DIRECTORIES = {
    "full": Path("checkpoints"),
    "overfit": Path("checkpoints_overfit"),
    "demo": Path("checkpoints_demo"),
    "quick-test": Path("checkpoints_overfit/quick-test"),
}  # in the order in which `make generate` looks for a checkpoint
LOCK = "run.lock"  # in a folder of results; held by the process that writes there
PACE = 20  # records from which the time left is worked out
# What readers of a record count on, beside its kind and step.
RECORD_PARTS = {
    "train": {"epoch", "time", "loss", "loss_quarters", "images_seen", "images_per_second",
              "learning_rate", "grad_norm"},
    "validation": {"loss", "loss_ema"},
    "warning": {"message"},
}


class RunInUse(Exception):
    """Another live process writes to this folder."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError without a file's name, as of a full disk, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else the name would take the place of the reason
            error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which to write what then takes path's place: no reader sees half a file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a run directory, whose lock is held."""
    for unfinished in (*folder.glob("*.tmp"), *(folder / "samples").glob("*.tmp")):
        unfinished.unlink()


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Its content; nothing where the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(errors="replace"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_records(path: Path) -> list[dict]:
    """The JSON objects of a JSON Lines file; other lines, as one cut short, are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def append_record(path: Path, record: dict) -> None:
    """One more line in a JSON Lines file, also behind a line that was cut short."""
    with naming(path), open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write((start + json.dumps(record) + "\n").encode())


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; what lacks a part is left out, as in read_records."""
    records = read_records(Path(folder) / "metrics.jsonl")
    return [
        record for record in records
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
        and record.keys() >= RECORD_PARTS.get(record["kind"], set())
    ]


def by_kind(records: Sequence[dict], *kinds: str) -> list[list[dict]]:
    """The records of each of these kinds."""
    return [[record for record in records if record["kind"] == kind] for kind in kinds]


def sample_path(folder: Path, step: int, name: str) -> Path:
    return folder / "samples" / f"step_{step:08d}_{name}.png"


def ema_grids(folder: Path) -> list[Path]:
    """The grids drawn so far from the EMA, in the order of their steps."""
    return sorted((folder / "samples").glob(f"step_{8 * '[0-9]'}_ema.png"))


def acquire_lock(folder: Path) -> TextIO:
    """The open lock file of a folder of results; the system frees it when the process ends.

    Raises RunInUse if another live process holds it.
    """
    path = folder / LOCK
    for _ in range(20):  # a reader that looks whether the run lives holds it for an instant
        lock = open(path, "a")
        try:
            with naming(path):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):  # none took its place
                return lock
        except BlockingIOError:
            time.sleep(0.01)
        lock.close()
    raise RunInUse(f"{folder} is in use by {owner(folder)}; wait for it or stop it")


def owner(folder: Path) -> str:
    """Who runs there, from run.json, which a run that is starting has not written yet."""
    facts = read_json(folder / "run.json")
    if not facts.keys() >= {"started", "pid", "host", "state"} or facts["state"] != "running":
        return "another process"
    return f"process {facts['pid']} on {facts['host']} since {moment(facts['started'])}"


def claim(folder: Path) -> TextIO | None:
    """The lock of a folder of results, as acquire_lock; None where there is no folder yet.

    A run there that was killed is noted as such. Raises RunInUse if a live process holds the lock,
    or if that cannot be told.
    """
    if folder.is_symlink() and not folder.exists():
        raise RunInUse(f"{folder} is a link to {os.readlink(folder)}, which is not there; mount "
                       "that disk, or remove the link")
    if not folder.is_dir():
        return None
    lock, facts = acquire_lock(folder), read_json(folder / "run.json")
    if facts.get("state") == "running":  # as it says of itself, but the lock is free
        with suppress(OSError):  # on a full disk `make clean` must get on
            write_json(folder / "run.json", facts | {"state": "died"})
    return lock


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min" if minutes > 0 else f"{max(0, int(seconds))} s"
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def time_left(train: Sequence[dict], started: float, total_steps: int) -> float | None:
    """Seconds, at the pace of the last training records; None where that is not known."""
    # Records from before this start are a resumed run's: the pause is no time per step.
    records = [record for record in train if record["time"] >= started]
    if len(records) < 2:
        return None
    first, last = records[-PACE:][0], records[-1]
    step_seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
    return (total_steps - last["step"]) * step_seconds
