"""Writing, checking, finding and reading checkpoints.

A checkpoint is one torch file: a dict of tensors and plain values, written to a temporary name,
flushed to disk, read back and renamed, so that a file with a checkpoint's name is always complete.
The checksums that the format holds for every tensor are verified when it is loaded.
"""

import errno
import lzma
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .memory import is_out_of_memory

FORMAT = "conditional_diffusion"
FORMAT_VERSION = 5
REQUIRED_KEYS = {"config", "class_names", "step", "images_seen", "model", "ema", "optimizers"}
# What torch.load and zipfile raise for files that are cut short, altered or something else.
DAMAGED = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
           AssertionError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           pickle.UnpicklingError)
BEST = "best.pt"
NAME = re.compile(r"best\.pt|checkpoint_\d{8}\.pt")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the cure."""


class WriteError(CheckpointError, OSError):
    """A checkpoint that the disk does not take; later it may."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return Path(folder) / f"checkpoint_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, best.pt, then oldest first; an absent folder has none."""
    try:
        names = os.listdir(folder)  # which does not keep silent about a folder that is closed to us
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(folder, name) for name in sorted(names) if NAME.fullmatch(name)]


def expected_bytes(model: torch.nn.Module) -> int:
    """Size of a model's checkpoint, near enough: weights, EMA and at most two moments."""
    return 4 * sum(parameter.nbytes for parameter in model.parameters())


def require_space(folder: Path, needed: int) -> None:
    """Raise WriteError unless the folder's disk has this many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB free, but a checkpoint needs "
            f"{needed / 2**20:.0f} MiB; free some space"
        )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors inside nested dicts and lists."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def require_finite(state: dict) -> None:
    """Raise CheckpointError if weights, average or moments have gone wrong: nobody wants them."""
    for name in ("model", "ema", "optimizers"):
        for tensor in tensors_in(state[name]):
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"step {state['step']} is not saved, because numbers in its {name} are not "
                    "finite; earlier checkpoints are intact. Lower train.learning_rate or set "
                    "train.precision to fp32, then run again"
                )


def verify_checksums(path: Path) -> None:
    """Raise ValueError or BadZipFile if any part of a checkpoint is not what was written."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")


def save_checkpoint(folder: Path, state: dict, *, keep: int, best: bool = False) -> Path:
    """Write state as the checkpoint of state["step"], then prune to the `keep` newest.

    With `best` it also becomes best.pt, which pruning leaves alone. Raises WriteError where it
    cannot be written, CheckpointError where it holds numbers that are not finite; older checkpoints
    are then untouched.
    """
    require_finite(state)
    path = checkpoint_path(folder, state["step"])
    unfinished, copy = path.with_suffix(".tmp"), path.with_suffix(".best.tmp")
    state = {"format": FORMAT, "version": FORMAT_VERSION, "torch": str(torch.__version__), **state}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, sum(tensor.nbytes for tensor in tensors_in(state)))
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        verify_checksums(unfinished)
        if best:  # first: a checkpoint that knows of a best loss must not exist without its weights
            try:
                copy.hardlink_to(unfinished)  # takes no space of its own while both exist
            except OSError:  # a file system without links
                shutil.copyfile(unfinished, copy)
                with open(copy, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(copy, path.with_name(BEST))
        os.replace(unfinished, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        # torch.save reports a failed write as RuntimeError, with the cause in its context.
        raise WriteError(write_failure(path, error)) from error
    finally:
        for leftover in (unfinished, copy):
            with suppress(OSError):  # gone already unless something failed, which is then the news
                leftover.unlink()
    others = [other for other in list_checkpoints(folder) if other.name not in (path.name, BEST)]
    for old in others[: max(0, len(others) + 1 - keep)]:
        old.unlink()
    return path


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(path: Path, error: Exception) -> str:
    """One sentence on why path could not be written."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if getattr(cause, "errno", None) == errno.ENOSPC:
        return (
            f"cannot write {path}: the disk is full; free some space and run the same command "
            "again. Earlier checkpoints are intact"
        )
    reason = getattr(cause, "strerror", None) or str(error).partition("\n")[0]
    return f"cannot write {path}: {reason}; check the folder's permissions and its disk"


def load_checkpoint(path: Path) -> dict:
    """Read and check one checkpoint; its tensors are on the CPU.

    Raises CheckpointError for a missing or damaged file, for a torch file that is something else
    and for a format version this code does not know. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file; check the path")
    try:
        if zipfile.is_zipfile(path):
            verify_checksums(path)  # torch.load does not
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except DAMAGED as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint; use another one (`make status` lists them)"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a torch file, but not a checkpoint of this program; "
            "`make status` lists those that are"
        )
    if state.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state.get('version')}, this program reads "
            f"{FORMAT_VERSION}; use the version of the program that wrote it, or train anew"
        )
    if missing := REQUIRED_KEYS - state.keys():
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    return state


def require_classes(path: Path, trained: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise CheckpointError unless a checkpoint's classes are those of these names."""
    if list(class_names) != list(trained):
        raise CheckpointError(
            f"{path} was trained on the classes {', '.join(trained)}, in this order, but "
            "CLASS_NAMES in config.py is another list; restore it, or train anew with --fresh "
            "(make train FRESH=1)"
        )


def require_weights(where: object, weights: dict, model: torch.nn.Module) -> None:
    """Raise CheckpointError unless these weights are those of such a model."""
    found, expected = ({name: tuple(value.shape) for name, value in values.items()}
                       for values in (weights, model.state_dict()))
    if different := dict(expected.items() ^ found.items()):
        raise CheckpointError(
            f"{where} holds another network than this code builds (they differ in "
            f"{min(different)}); go back to the code that trained it, or train anew"
        )


def load_newest(
    folders: list[Path], *, warn: Callable[[str], None]
) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of the first folder that has one, or None.

    Each damaged one passed over is reported to `warn`.
    """
    for folder in folders:
        for path in reversed(list_checkpoints(folder)):
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                warn(f"{error}; looking for an older one")
    return None
