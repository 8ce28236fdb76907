"""Whether training will work here, tried in small: `make doctor`."""

import importlib
import math
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from command_line import Parser, add_config_flags, config_overrides, exit_with

import config as settings
from config import Config, ConfigError, DataConfig
from gpu_status import diagnose, first_line, gather_facts
from run_directory import RUN_DIRECTORIES

# And what to import of each; first those that others import.
PACKAGES = {"numpy": "numpy", "pillow": "PIL.Image", "torch": "torch", "torchvision": "torchvision",
            "matplotlib": "matplotlib", "tqdm": "tqdm"}
OLDEST_TORCH = (2, 11)
TRIAL_IMAGES = 2
DATA_BYTES = 4 * 2**30  # for archive, arrays (2.8 GiB of 128x128 pictures) and caches
PROCESS_BYTES = 4 * 2**30  # of main memory, for torch, the pictures and a batch on a CPU
USER_ERRORS = (ConfigError,)
WIDTH = 79


@dataclass(frozen=True)
class Finding:
    """Whether it is well, what was found, and the cure where it is not.

    Well with a cure is a note: training runs, but slower or otherwise than it could.
    """

    well: bool
    text: str
    cure: str = ""


def check_packages() -> Finding:
    python = sys.version.split()[0]
    versions = {}
    for name, module in PACKAGES.items():
        try:
            versions[name] = metadata.version(name)
            importlib.import_module(module)
        except metadata.PackageNotFoundError:
            return Finding(False, f"{name} is not installed", "`rm -rf .venv; make install`")
        except Exception as error:  # whatever a half installed package may raise
            reason = first_line(error) or type(error).__name__
            return Finding(False, f"{name} cannot be imported ({reason})",
                           "`rm -rf .venv; make install`")
    found = f"Python {python}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
    if tuple(map(int, versions["torch"].split(".")[:2])) < OLDEST_TORCH:
        return Finding(False, found, "torch 2.11 or later is needed: `rm -rf .venv; make install`")
    return Finding(True, found)


def check_gpu(config: Config) -> Finding:
    """A GPU that does not work is no obstacle where training then goes on without."""
    facts = gather_facts()
    well, sentence = diagnose(facts)
    text, _, cure = sentence.partition("Cure: ")
    if facts.torch_version and config.train.device in ("auto", "cpu"):
        import torch

        well |= config.train.device == "cpu" or not torch.cuda.is_available()
    return Finding(well, text.strip().removesuffix("."), cure)


def check_disk(needed: dict[str, int]) -> Finding:
    """needed: bytes that a full run takes below each folder, which may be a link."""
    by_disk: dict[int, list[tuple[Path, str]]] = {}
    for folder in needed:
        real = Path(folder).resolve()
        place = next(path for path in (real, *real.parents) if path.exists())
        by_disk.setdefault(place.stat().st_dev, []).append((place, folder))
    found = [
        (shutil.disk_usage(places[0][0]).free, sum(needed[folder] for _, folder in places),
         " and ".join(f"{folder}/" for _, folder in places))
        for places in by_disk.values()
    ]
    text = "; ".join(f"{free / 2**30:.1f} GiB free for {folders}, where a full run takes about "
                     f"{size / 2**30:.1f} GiB more" for free, size, folders in found)
    full = [folders for free, size, folders in found if free <= size]
    return Finding(not full, text, f"free some space for {', '.join(full)}" if full else "")


def check_memory() -> Finding:
    from conditional_diffusion.memory import available_cpu_memory

    free = available_cpu_memory()
    scarce = f"below {PROCESS_BYTES / 2**30:.0f} GiB runs may end early; end other programs"
    text = f"{free / 2**30:.1f} GiB of main memory available"
    return Finding(True, text, scarce if free < PROCESS_BYTES else "")


def check_writing() -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir="."):
            pass
    except OSError as error:
        return Finding(False, f"this folder cannot be written to ({error.strerror})",
                       "clone the repository to a place that is yours")
    return Finding(True, f"results can be written to {Path.cwd()}")


def examined(data: DataConfig) -> tuple | None:
    """The source of the pictures and what cifar10.examine finds there; None without any."""
    from cifar10 import examine, find_source

    source = find_source(data.data_dir)
    return None if source is None else (source, *examine(source, data))


def check_data(config: Config) -> Finding:
    from cifar10 import DataError, assign_splits

    if config.data.dataset == "pictograms":
        return Finding(True, "the built-in pictograms")
    try:
        found = examined(config.data)
        if found is None:
            return Finding(True, "no pictures found", "`make data` tries to download CIFAR-10 "
                           "(170 MB) now, as `make train` will; DATA_DIR= uses your own")
        source, archive, pictures, folder = found
        if not archive:
            assign_splits(pictures, source)
    except (DataError, OSError) as error:
        return Finding(False, str(error), "see README, Data")
    prepared = "prepared" if (folder / "info.json").exists() else "to be prepared by the first run"
    count = "the published archive" if archive else f"{len(pictures)} pictures"
    return Finding(True, f"{source}: {count}, {prepared} in {folder}")


def check_step(config: Config) -> Finding:
    """One training step and one sampled picture of the configured network, on its device."""
    import torch

    from build import (
        build_model,
        build_sampler,
        choose_device,
        precision_name,
        switched_on,
        training_dtype,
    )
    from conditional_diffusion import TrainingEngine
    from training_run import missing_compiler, peak_memory_gib, recording_problem

    try:
        device = choose_device(config)
    except ConfigError as error:
        return Finding(False, str(error))
    try:
        model, scheduler = build_model(config, device)
        dtype = training_dtype(config, device)
        engine = TrainingEngine(
            model, scheduler, total_steps=2, learning_rate=1e-4, autocast_dtype=dtype,
            optimizer=config.train.optimizer, max_skipped_steps=2,
        )
        size = config.data.image_size
        batch = torch.rand(TRIAL_IMAGES, 3, size, size, device=device) * 2 - 1
        labels = torch.zeros(TRIAL_IMAGES, dtype=torch.long, device=device)
        engine.train_step(batch, labels)
        engine.take_metrics()
        began = time.perf_counter()
        engine.train_step(batch, labels)
        loss = engine.take_metrics()["loss"]
        seconds = time.perf_counter() - began
        sample = replace(config.sample, num_inference_steps=2, guidance_scale=1.0)
        sampler = build_sampler(replace(config, sample=sample), scheduler)
        picture = sampler.sample(model, labels[:1], (3, size, size), [0])
        unrecorded = recording_problem(config, engine, (batch, labels))
    except Exception as error:  # whatever goes wrong here would go wrong in training
        reason = first_line(error) or type(error).__name__
        return Finding(False, f"a training step failed: {reason}",
                       "see the GPU line above; --device cpu works anywhere"
                       if device.type == "cuda" else "choose smaller settings")
    if loss is None or not math.isfinite(picture.sum().item()):
        return Finding(False, f"numbers are not finite in {precision_name(dtype)}",
                       "--train.precision fp32")
    text = (f"on {device} in {precision_name(dtype)}: a step of {TRIAL_IMAGES} images took "
            f"{seconds:.2g} s, a picture could be drawn, {peak_memory_gib(device):.1f} GiB at most")
    problem = missing_compiler(device) if switched_on(config.train.compile, device) else ""
    if problem:
        return Finding(True, f"{text}; torch.compile does not work ({problem})",
                       "training goes on without it, only slower; it needs a C compiler and "
                       "Python's headers")
    if unrecorded:
        return Finding(True, f"{text}; steps do not work as CUDA graphs ({unrecorded})",
                       "training goes on without them, only slower")
    return Finding(True, text)


def space_needed(config: Config) -> dict[str, int]:
    """Bytes that a full run takes beside what is there already, by the folder it writes to.

    They are of the newest checkpoints, best.pt, one being written; of data and caches.
    """
    import torch

    from build import build_model
    from cifar10 import REPOSITORY_DATA, DataError
    from conditional_diffusion.checkpoint import expected_bytes

    with torch.device("meta"):
        model, _ = build_model(config, "meta")
    folder = RUN_DIRECTORIES["full"]
    checkpoints = (config.train.keep_checkpoints + 2) * expected_bytes(model)
    # best.pt is as a rule a link to the newest one and takes no space of its own.
    there = {file.st_ino: file.st_size for file in map(Path.stat, folder.glob("*.pt"))}
    checkpoints -= sum(there.values())
    prepared = config.data.dataset == "pictograms"
    with suppress(DataError, OSError):  # of which check_data tells
        found = examined(config.data)
        prepared |= found is not None and (found[-1] / "info.json").exists()
    return {str(folder): max(0, checkpoints), str(REPOSITORY_DATA): 0 if prepared else DATA_BYTES}


def show(what: str, finding: Finding) -> None:
    word = "FAIL" if not finding.well else "note" if finding.cure else "ok"
    indent = " " * 17
    text = finding.text + (f". Cure: {finding.cure}" if finding.cure else "")
    first, *others = text.splitlines()  # commands to copy stand on lines of their own
    print(textwrap.fill(f"{word:<6}{what:<11}{first}", WIDTH, subsequent_indent=indent,
                        break_on_hyphens=False, break_long_words=False),
          *(indent + line.strip() for line in others), sep="\n", flush=True)


def main() -> int:
    parser = Parser(description=__doc__)
    add_config_flags(parser)
    config = settings.apply_overrides(settings.full(), config_overrides(parser.parse_args()))
    checks: dict[str, Callable[[], Finding]] = {
        "packages": check_packages,
        "GPU": lambda: check_gpu(config),
        "writing": check_writing,
        "disk": lambda: check_disk(space_needed(config)),
        "memory": check_memory,
        "data": lambda: check_data(config),
        "training": lambda: check_step(config),
    }
    failed = 0
    for what, check in checks.items():
        finding = check()
        show(what, finding)
        failed += not finding.well
        if what == "packages" and failed:
            break  # nothing else can be tried
    print(f"{failed} of these would stop training" if failed else "training will work here")
    return 1 if failed else 0


if __name__ == "__main__":
    exit_with(main, USER_ERRORS)
