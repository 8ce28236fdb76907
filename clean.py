"""Remove what the product made: `make clean`, `make clean-all`, `make clean-cuda`.

Lists everything with its size before it goes, asks where a full run or what other programs use is
among it, and refuses while a run is alive. Downloads and pictures that the user put into data/ are
never touched.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from command_line import Parser, exit_with

from gpu_status import format_processes, query_processes
from run_directory import LOCK, RUN_DIRECTORIES, RunInUse, claim, read_json
from run_status import is_alive

RUNS = ("checkpoints*", "generated_images")
OURS = re.compile(r"checkpoints(_overfit|_demo)?(_\d+)?")  # as runs and those moved aside are named
CACHES = ("data/prepared", "data/classifiers", "data/inception", ".venv", ".pytest_cache",
          ".ruff_cache", "__pycache__", "*/__pycache__")
SCRIPTS = ("train_model.py", "generate_samples.py", "evaluate_samples.py", "benchmark.py",
           "doctor.py")
# Where results are written, if nothing there says so yet.
WRITTEN = (*RUN_DIRECTORIES.values(), Path("generated_images"), Path("data/prepared"))
GRACE_SECONDS = 10  # between asking a process to end and ending it
CUDA_CACHES = (Path.home() / ".nv" / "ComputeCache", Path.home() / ".triton" / "cache")


def size_mib(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if f.is_symlink() or f.is_file()) / 2**20


def existing(patterns: tuple[str, ...]) -> list[Path]:
    """What matches, without folders that the user named."""
    return sorted({
        path for pattern in patterns for path in Path().glob(pattern)
        if not pattern.startswith("checkpoints") or OURS.fullmatch(path.name)
    })


def confirmed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def claim_all(paths: list[Path], locks: dict[Path, TextIO]) -> None:
    """Claim every folder among or below the paths in which results are written."""
    found = {lock.parent for path in paths for lock in path.rglob(LOCK)}
    for folder in sorted({*found, *(path for path in paths if path in WRITTEN)}):
        if folder.resolve() not in locks and (lock := claim(folder)):
            locks[folder.resolve()] = lock


def remove(paths: list[Path], what: str, *, ask: bool) -> int:
    """Remove them; `what` they are besides, where it has to be asked.

    Raises RunInUse where something is being written there, and keeps others from it while asking.
    """
    locks: dict[Path, TextIO] = {}
    claim_all(paths, locks)
    if not paths:
        print("nothing to remove")
        return 0
    for path in paths:
        print(f"{size_mib(path):10.1f} MiB  {path}")
    if ask:
        if not sys.stdin.isatty():
            sys.exit(f"error: these are {what}; say CONFIRM=yes to remove them")
        if not confirmed(f"these are {what}; remove them?"):
            print("nothing was removed")
            return 1
    claim_all(paths, locks)  # once more: below them something may have begun meanwhile
    for path in paths:
        for folder in [folder for folder in locks if folder.is_relative_to(path.resolve())]:
            locks.pop(folder).close()  # NFS would keep an open file, and with it the folder
        # A link is removed, never what it points to.
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    print(f"removed {len(paths)} entries")
    return 0


def is_leftover(pid: int) -> bool:
    """Whether a process is a script of this repository that nobody waits for.

    Its parent has died, and it is not a run that goes on in the background: that one holds the lock
    of its directory.
    """
    try:
        folder = Path(f"/proc/{pid}/cwd").resolve(strict=True)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # gone, or another user's
        return False
    ours = folder == Path.cwd() and any(Path(word).name in SCRIPTS for word in words)
    live = [read_json(folder / "run.json").get("pid")
            for folder in RUN_DIRECTORIES.values() if is_alive(folder)]
    return ours and is_orphan(status) and pid not in live


def is_orphan(status: str) -> bool:
    """Whether init or a desktop session's systemd, which adopt what is left, is the parent."""
    parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1]
    try:
        return parent == "1" or Path(f"/proc/{parent}/comm").read_text() == "systemd\n"
    except OSError:  # it has just ended
        return False


def end(pid: int) -> None:
    """Ask a process to end, and make it end after GRACE_SECONDS."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)


def clean_cuda(*, ask: bool) -> int:
    """Show who holds GPU memory, end our own leftovers, remove kernel and compile caches."""
    processes = query_processes()
    print(format_processes(processes) or "the NVIDIA driver shows no process on a GPU")
    pids = {int(pid) for pid, _, _ in processes}
    for pid in sorted(filter(is_leftover, pids)):
        print(f"process {pid} is a script of this repository whose parent has ended: a leftover, "
              "unless you put it into the background")
        if not ask or (sys.stdin.isatty() and confirmed("end it?")):
            end(pid)
            print(f"ended process {pid}")
        else:
            print("left alone; CONFIRM=yes ends it")
    print("memory held by other processes is theirs: it comes back when they end")
    # Inductor's default place, whose name ends in some form of the user's.
    inductor = [path for path in Path(tempfile.gettempdir()).glob("torchinductor_*")
                if path.stat().st_uid == os.getuid()]
    caches = [path for path in (*CUDA_CACHES, *inductor) if path.exists()]
    return remove(caches, "compile caches of all your programs, which may be running", ask=ask)


def main() -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("runs", "all", "cuda"), help="what to remove")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    args = parser.parse_args()
    if args.what == "cuda":
        return clean_cuda(ask=not args.yes)
    patterns = RUNS + (CACHES if args.what == "all" else ())
    paths = existing(patterns)
    full_run = any(path.name.startswith("checkpoints") and any(path.rglob("*.pt"))
                   and not path.name.startswith(("checkpoints_overfit", "checkpoints_demo"))
                   for path in paths)
    return remove(paths, "results with checkpoints of a full run", ask=full_run and not args.yes)


if __name__ == "__main__":
    exit_with(main, (RunInUse,))
