"""Pictures from a checkpoint: what drawing them and scoring them share."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import config as settings
from build import build_model, build_sampler, choose_device, config_of, precision_name
from conditional_diffusion.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    require_weights,
)
from conditional_diffusion.memory import fitting_batch_size
from conditional_diffusion.processes import Processes
from config import Config, ConfigError
from run_directory import RUN_DIRECTORIES
from training_monitor import say


def open_checkpoint(name: str | None) -> tuple[Path, dict]:
    """The checkpoint asked for, or the newest usable one: full before overfit before demo.

    name: a checkpoint file or a run directory. The state also gets the file's "hash", for processes
    that do not see the file.
    """
    asked = Path(os.path.expanduser(name)) if name else None
    if asked and not asked.is_dir():
        found = asked, load_checkpoint(asked)
    else:
        folders = [asked] if asked else list(RUN_DIRECTORIES.values())
        found = load_newest(folders, warn=say)
    if found is None:
        searched = ", ".join(f"{folder}/" for folder in folders)
        raise CheckpointError(
            f"no usable checkpoint in {searched}; train one first: make demo, make train"
        )
    path, state = found
    return path, state | {"hash": file_hash(path)}


def usable_folder(name: str | Path) -> Path:
    """The output folder, created if need be and tried before anything is drawn."""
    folder = Path(os.path.expanduser(name))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def file_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Drawing:
    """The model of the checkpoint that open_checkpoint finds by this name, and how it is sampled.

    Args:
        overrides: of settings, {"sample.guidance_scale": 3, ...}; else they are the checkpoint's.
            Without a number for the batch size it is what fits.
        raw: the checkpoint's raw weights instead of their EMA.
        quick: sampler and steps of the grids drawn during training, unless overridden.
        processes: that draw together; the one that leads reads the file.
    """

    def __init__(self, name: str | None = None, overrides: dict | None = None, *,
                 raw: bool = False, quick: bool = False,
                 processes: Processes | None = None):
        processes, overrides = processes or Processes(), dict(overrides or {})
        if overrides.get("sample.batch_size") == "auto":
            del overrides["sample.batch_size"]
        self.path, state = processes.from_leader(lambda: open_checkpoint(name))
        config = config_of(state, self.path)
        if quick:
            overrides = {"sample.sampler": config.sample.grid_sampler,
                         "sample.num_inference_steps": config.sample.grid_steps, **overrides}
        config = settings.apply_overrides(config, {"train.device": "auto", **overrides})
        if "sample.eta" in overrides and config.sample.sampler != "ddim":
            raise ConfigError(f"--sample.eta means nothing to {config.sample.sampler}; it needs "
                              "--sampler ddim")
        self.device, self.raw = choose_device(config, processes), raw
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.hash, self.class_names = state["hash"], tuple(state["class_names"])
        self.model, self.scheduler = build_model(config, self.device, len(self.class_names))
        weights = state["model" if raw else "ema"]
        require_weights(self.path, weights, self.model)
        self.model.load_state_dict(weights)
        self.configure(config)
        given = config.sample.batch_size if "sample.batch_size" in overrides else None
        self.batch_size = given or self.fitting_batch_size()

    def configure(self, config: Config) -> None:
        """Sample with the settings of this config from now on."""
        self.config, self.size = config, config.data.image_size
        self.sampler = build_sampler(config, self.scheduler)

    def fitting_batch_size(self) -> int:
        """What fits, from a trial of the sampler in two steps, guided where any step will be."""
        sample = replace(
            self.config.sample, num_inference_steps=2, guidance_interval=(0.0, 1.0)
        )
        sampler = build_sampler(replace(self.config, sample=sample), self.scheduler)

        def trial(n: int) -> None:
            labels = torch.zeros(n, dtype=torch.int64, device=self.device)
            sampler.sample(self.model, labels, (3, self.size, self.size), range(n))

        return fitting_batch_size(trial, self.size**2, self.device)

    def facts(self) -> dict:
        """What the pictures depend on beside class and seed; JSON-able."""
        sample, on_cuda = self.config.sample, self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if on_cuda else self.device.type
        return {
            "checkpoint": str(self.path), "hash": self.hash, "step": self.step,
            "images_seen": self.images_seen, "weights": "raw" if self.raw else "EMA",
            "sampler": sample.sampler, "num_inference_steps": sample.num_inference_steps,
            **({"eta": sample.eta} if sample.sampler == "ddim" else {}),
            "guidance_scale": sample.guidance_scale,
            "guidance_interval": list(sample.guidance_interval),
            "clip_x_start": sample.clip_x_start, "image_size": self.size,
            "precision": precision_name(self.sampler.autocast_dtype),
            "device": device, "torch": str(torch.__version__),
        }

    def __str__(self) -> str:
        facts = self.facts()
        return (
            f"{self.path} (step {self.step}, {facts['weights']}) on {self.device}: "
            f"{facts['sampler']}, {facts['num_inference_steps']} steps, guidance "
            f"{facts['guidance_scale']:g}, {self.batch_size} at a time"
        )

    def draw(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pictures (N, 3, S, S) of labels int64 (N,), as Sampler.sample returns them."""
        return torch.cat(list(self.draw_parts(labels, seeds)))

    def draw_parts(
        self, labels: Tensor, seeds: Sequence[int],
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """The same, batch by batch, so that memory need not hold all."""
        return self.sampler.sample_parts(
            self.model, labels.to(self.device), (3, self.size, self.size), seeds,
            batch_size=self.batch_size, callback=callback,
        )
