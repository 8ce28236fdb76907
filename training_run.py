"""One training run: its parts, and the periodic actions that connect them."""

import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import config as settings
from build import build_model, build_sampler, switched_on, training_dtype
from conditional_diffusion import TrainingEngine, save_checkpoint
from conditional_diffusion.checkpoint import require_weights
from conditional_diffusion.cuda_graphs import RecordingError
from conditional_diffusion.memory import OutOfMemory, fitting_batch_size
from conditional_diffusion.processes import Processes
from conditional_diffusion.sampler import autocast
from config import AUTO_BATCH, CLASS_NAMES, Config, ConfigError
from data import Split, TrainingBatches, fingerprint, live_on, spread, to_arrays, to_x_start
from gpu_status import EnergyMeter, first_line
from health import loss_findings, picture_findings, validation_findings
from run_directory import by_kind, sample_path, write_json
from scores import nearest_images
from training_monitor import TrainingMonitor, labelled_grid, save_image, say

PASS_PSNR = 20.0  # dB to the nearest training image; the overfit run's pass mark
LARGEST_TRAINING_BATCH = 1024  # beyond it each image teaches less
MEASURED_IMAGES = 1000  # from which the power of every frequency is taken
GRID_ROWS = 4  # pictures per class in a grid, unless there are fewer training images


def peak_memory_gib(device) -> float:
    """Peak memory so far: of the GPU on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # The maximum that getrusage knows also counts the process that started this one.
    status = Path("/proc/self/status").read_text()
    # The highest so far; some containers know only the present one.
    return int(re.search(r"Vm(?:HWM|RSS):\s+(\d+)", status)[1]) / 2**20


def compiler_problem(work: Callable[[], object]) -> str:
    """What stops work that compiles something, in one line; empty where it gets through."""
    try:
        work()
    except OutOfMemory:
        raise
    except Exception as error:  # whatever a compiler and its tools may raise
        return first_line(error) or type(error).__name__
    return ""


def missing_compiler(device: torch.device) -> str:
    """What stops torch.compile here, in one line; empty where it works."""
    return compiler_problem(
        lambda: torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    )


def compile_training(engine: TrainingEngine, batch: tuple[Tensor, Tensor]) -> None:
    """Compile the training step, or say why not: a run must not depend on a compiler."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as compiler

    # Of several processes too the network is compiled as a whole, in whatever shape it comes.
    dynamo.optimize_ddp = False
    # Backward runs outside autocast, as without a compiler: what is float32 in the network has
    # float32 gradients.
    compiler.backward_pass_autocast = "off"
    # That float32 is not TensorFloat32 is meant.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    plain = engine.network
    say("compiling the network, which takes a minute or two; --train.compile false leaves it out")

    def compiled_step() -> None:
        engine.network = torch.compile(plain, dynamic=False)  # batches have one size
        engine.rehearse(*batch)

    reason = compiler_problem(compiled_step)
    if engine.processes.extreme(len(reason), largest=True):  # what one lacks, none uses
        engine.network = plain
        reason = reason or "another process has no compiler"
        say(f"torch.compile does not work here ({reason[:200]}); training goes on without it, "
            "--train.compile false does so at once")


def records_training(config: Config, engine: TrainingEngine) -> bool:
    on_cuda = engine.device.type == "cuda"
    return config.train.cuda_graphs and on_cuda and not engine.processes.several


def recording_problem(
    config: Config, engine: TrainingEngine, batch: tuple[Tensor, Tensor]
) -> str:
    """Make the training step a CUDA graph where one is wanted; what stops it, in one line."""
    if not records_training(config, engine):
        return ""
    try:
        engine.record(*batch)
    except RecordingError as error:
        return str(error)[:200]
    return ""


def record_training(config: Config, engine: TrainingEngine, batch: tuple[Tensor, Tensor]) -> None:
    """Make the training step a CUDA graph where one is wanted, or say why not."""
    if problem := recording_problem(config, engine, batch):
        say(f"training goes on without CUDA graphs ({problem})")


class Run:
    """One training run: its parts, and the periodic actions that connect them."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        splits: dict[str, Split],
        device: torch.device,
        saved: dict | None,
        processes: Processes | None = None,
    ):
        self.processes = processes or Processes()
        self.model, self.scheduler = build_model(config, device)
        self.folder, self.splits, self.device = folder, splits, device
        self.fingerprint = fingerprint(splits)
        if config.train.batch_size == AUTO_BATCH:
            config = self.with_fitting_batch(config, device)
        self.config = config
        train = config.train
        self.batches = TrainingBatches(
            splits["train"], config.data, train.batch_size, train.seed, device,
            self.processes.share,
        )
        if self.batches.batch_size < self.processes.world_size:
            raise ConfigError(
                f"a batch of {self.batches.batch_size} images is too small for "
                f"{self.processes.world_size} processes; raise train.batch_size or start fewer"
            )
        if saved is None:  # else it comes with the weights
            self.model.measure(self.spread_images(splits["train"], MEASURED_IMAGES)[0])
        self.engine = TrainingEngine(
            self.model, self.scheduler,
            total_steps=train.epochs * self.batches.steps_per_epoch,
            learning_rate=train.learning_rate, warmup_steps=train.warmup_steps,
            final_lr_fraction=train.final_lr_fraction, optimizer=train.optimizer,
            weight_decay=train.weight_decay, grad_clip=train.grad_clip,
            class_dropout_prob=train.class_dropout_prob,
            min_snr_gamma=config.diffusion.min_snr_gamma,
            ema_halflife_images=train.ema_halflife_images,
            ema_rampup_ratio=train.ema_rampup_ratio,
            max_skipped_steps=train.max_skipped_steps, seed=train.seed,
            autocast_dtype=training_dtype(config, device), processes=self.processes,
        )
        self.monitor: TrainingMonitor | None = None  # of the process that leads
        self.stop_signal = 0  # that asked this process, and so all, to stop
        self.saved_at = time.monotonic()
        self.best_loss = math.inf  # validation loss of best.pt
        self.validated = (-1, math.inf)  # step and EMA loss of the last validation
        if saved is not None:
            require_weights(f"the run in {folder}", saved["model"], self.model)
            self.engine.load_state_dict(saved)
            self.best_loss = saved["best_loss"]
        on_cuda = device.type == "cuda"
        uuid = str(torch.cuda.get_device_properties(device).uuid) if on_cuda else None
        self.energy_meter = EnergyMeter(uuid)
        self.reported_skips = self.engine.skipped_steps
        self.validation = self.spread_images(splits["test"], train.validation_images)

    def with_fitting_batch(self, config: Config, device: torch.device) -> Config:
        """The config with the largest batch, a multiple of 8, whose training step fits."""
        size = config.data.image_size

        def trial(n: int) -> None:
            x_t = torch.zeros(n, 3, size, size, device=device)
            labels = torch.zeros(n, dtype=torch.long, device=device)
            with autocast(device, training_dtype(config, device)):
                self.model(x_t, labels, labels).float().sum().backward()
            self.model.zero_grad()

        train = self.splits["train"]
        images = len(train) * config.data.repeats
        # In the place of average, momenta and the pictures, which come after it.
        later = 3 * sum(parameter.nbytes for parameter in self.model.parameters())
        later += train.images.nbytes * live_on(train.images, device)
        held = torch.empty(later, dtype=torch.uint8, device=device)
        fitting = fitting_batch_size(trial, size**2, device, LARGEST_TRAINING_BATCH)
        del held
        torch.cuda.empty_cache()  # or the pictures would not find the place that was held for them
        fitting = self.processes.extreme(fitting, largest=False) * self.processes.world_size
        fitting = min(fitting, LARGEST_TRAINING_BATCH)
        batch_size = min(images, fitting - fitting % 8 if fitting >= 8 else fitting)
        say(f"batch size {batch_size}, chosen for this device")
        return replace(config, train=replace(config.train, batch_size=batch_size))

    def spread_images(self, split: Split, most: int) -> tuple[Tensor, Tensor]:
        """(x_start, labels) of at most so many images, spread over a split."""
        index = spread(min(most, len(split)), split.labels)
        x_start = to_x_start(split.images[index].to(self.device), self.config.data.image_size)
        return x_start, split.labels[index].to(self.device)

    def sample(self, model, rows: int, *, grid: bool) -> Tensor:
        """Pictures (rows * classes, 3, H, W), classes taking turns; all of row r have seed r.

        Several processes draw a share each, and all get all.
        """
        size = self.config.data.image_size
        sampler = build_sampler(self.config, self.scheduler, grid=grid)
        labels = torch.arange(len(CLASS_NAMES), device=self.device).repeat(rows)
        seeds = [row for row in range(rows) for _ in CLASS_NAMES]
        share = self.processes.share(len(seeds))
        pictures = torch.zeros(len(seeds), 3, size, size, device=self.device)
        if seeds[share]:
            pictures[share] = sampler.sample(
                model, labels[share], (3, size, size), seeds[share],
                batch_size=self.config.sample.batch_size,
            )
        return self.processes.sum(pictures)

    def energy_joules(self) -> float | None:
        """Of all processes' GPUs since the last call; None if any of them does not know."""
        joules = self.energy_meter.joules()
        total = torch.tensor(math.nan if joules is None else joules, dtype=torch.float64)
        total = self.processes.sum(total).item()
        return None if math.isnan(total) else total

    def log(self) -> None:
        metrics, energy_joules = self.engine.take_metrics(), self.energy_joules()
        if not self.monitor:
            return
        monitor, step, loss = self.monitor, self.engine.step, metrics["loss"]
        # Loss scaling skips steps by design, to find its scale.
        scaling = self.engine.scaler.is_enabled()
        if metrics["skipped_steps"] > self.reported_skips and not scaling:
            self.reported_skips = metrics["skipped_steps"]
            monitor.warn(step, f"{self.reported_skips} batches so far were skipped because loss or "
                         "gradient was not finite")
        if loss is None:
            return
        monitor.record_training(**metrics, peak_memory_gib=peak_memory_gib(self.device),
                                energy_joules=energy_joules)
        for warning in loss_findings(*by_kind(monitor.records, "train")):
            monitor.warn(step, warning)

    def validate(self) -> None:
        if not len(self.validation[1]):
            return  # a set too small to hold anything out
        x_start, labels = self.validation

        def loss_of(model, labels: Tensor) -> float:
            return self.engine.validation_loss(model, x_start, labels, self.batches.batch_size)

        ema = self.engine.ema_model
        record = {"step": self.engine.step, "loss": loss_of(self.model, labels),
                  "loss_ema": loss_of(ema, labels)}
        if self.config.train.class_dropout_prob > 0:
            record["loss_null"] = loss_of(ema, torch.full_like(labels, ema.null_label))
        self.validated = (self.engine.step, record["loss_ema"])
        if not self.monitor:
            return
        if self.config.mode == "full":  # the others memorise on purpose
            train, validation = by_kind(self.monitor.records, "train", "validation")
            for finding in validation_findings(train, [*validation, record]):
                self.monitor.warn(self.engine.step, finding)
        self.monitor.record_validation(**record)

    @property
    def grid_rows(self) -> int:
        """Pictures per class in a grid: at most as many as every class has training images."""
        return min(GRID_ROWS, int(self.splits["train"].labels.bincount().min()))

    def draw(self) -> None:
        for name, model in (("raw", self.model), ("ema", self.engine.ema_model)):
            images = self.sample(model, self.grid_rows, grid=True)
            if self.monitor:
                self.monitor.draw_samples(self.engine.step, name, to_arrays(images), CLASS_NAMES)
        # In the short runs young pictures say nothing.
        if self.monitor and self.config.mode == "full" and len(self.validation[0]):
            for finding in picture_findings(images, self.validation[0]):  # of the EMA
                self.monitor.warn(self.engine.step, finding)

    def lacks_grid(self) -> bool:
        """Whether a kill came between the checkpoint of this step and the grid due with it."""
        step = self.engine.step
        due = self.engine.complete or step % self.config.train.sample_every == 0
        path = sample_path(self.folder, step, "ema")
        return self.processes.from_leader(lambda: due and step > 0 and not path.exists())

    def draw_originals(self) -> None:
        """The first training images of every class, to lie beside the samples."""
        rows = self.grid_rows
        first = self.splits["train"].first_per_class(rows)
        by_row = first.labels.argsort(stable=True).view(-1, rows).T.flatten()
        images = to_x_start(first.images[by_row], self.config.data.image_size)
        self.monitor.draw_samples(0, "originals", to_arrays(images), CLASS_NAMES)

    def save(self) -> None:
        """A checkpoint of this step; of a full run the best by validation loss is kept too."""
        state = self.engine.state_dict()
        self.saved_at = time.monotonic()
        step, loss = self.validated
        best = self.config.mode == "full" and step == self.engine.step and loss < self.best_loss
        if best:
            self.best_loss = loss
        if not self.processes.leads:
            return
        save_checkpoint(
            self.folder,
            {
                "config": settings.to_dict(self.config),
                "class_names": list(CLASS_NAMES),
                "total_steps": self.engine.total_steps,
                "best_loss": self.best_loss,
                "data": self.fingerprint,
                **state,
            },
            keep=self.config.train.keep_checkpoints,
            best=best,
        )

    def train(self) -> bool:
        """Train to the end, a signal or the time limit; returns whether the run is complete.

        Either way the last step is saved.
        """
        train, engine, monitor = self.config.train, self.engine, self.monitor
        deadline = time.monotonic() + 3600 * (train.max_hours or math.inf)

        def due(steps: int) -> bool:
            return engine.step % steps == 0 or engine.complete

        if self.lacks_grid():
            self.draw()
        if not engine.complete:
            first = next(self.batches.starting_at(engine.step))
            if switched_on(train.compile, self.device):
                compile_training(engine, first)
            record_training(self.config, engine, first)
            if self.processes.several and engine.network is engine.model:
                engine.rehearse(*first)
        for step in engine.train(self.batches.starting_at(engine.step)):
            if monitor:
                monitor.advance()
            now = time.monotonic()
            # One clock counts: two, a step apart, would save twice.
            overdue = self.processes.leads and now > self.saved_at + 60 * train.save_minutes
            if overdue:
                self.saved_at = now  # asking once is enough
            # Clocks and signals differ between processes; what follows from them must not.
            ending = self.stop_signal > 0 or now > deadline
            stop, overdue = self.processes.agree(ending, overdue)

            # The first step of all is logged at once; a resumed run keeps to the rhythm.
            if step == 1 or due(train.log_every):
                self.log()
            if due(train.validate_every):
                self.validate()
            # Drawing comes last: what takes time must not stand before a save.
            if overdue or stop or due(train.save_every):
                self.save()
            if stop and not engine.complete:
                break  # a grid that is due comes when the run goes on
            if monitor and due(train.log_every) and monitor.curves_are_old:
                monitor.draw_curves()
            if due(train.sample_every):
                self.draw()
        self.processes.answers()  # to the last step's wishes, which change nothing any more
        if monitor:
            monitor.draw_curves()
            monitor.end("finished" if engine.complete else "interrupted")
        return engine.complete

    def verdict(self) -> bool:
        """Whether every class's samples reproduce one of its own training images.

        Writes verdict.json and verdict.png: nearest training images above, samples below.
        """
        config, train, classes = self.config, self.splits["train"], len(CLASS_NAMES)
        rows = self.grid_rows
        pictures = self.sample(self.engine.ema_model, rows, grid=False)
        originals = to_x_start(train.images.to(self.device), config.data.image_size)
        index, decibels = nearest_images(pictures, originals)
        results = []
        for i, (nearest, psnr) in enumerate(zip(index.tolist(), decibels.tolist())):
            wanted, found = CLASS_NAMES[i % classes], CLASS_NAMES[train.labels[nearest]]
            good = wanted == found and psnr >= PASS_PSNR
            results.append({"class": wanted, "nearest": found, "psnr": round(psnr, 2), "ok": good})
            say(f"  {wanted:<11} {psnr:5.1f} dB to a training image of class {found:<11} "
                f"{'ok' if good else 'FAILED'}")
        passed = all(result["ok"] for result in results)
        if not self.processes.leads:
            return passed
        write_json(self.folder / "verdict.json", {"passed": passed, "pictures": results})
        pairs = torch.stack([originals[index], pictures])  # (2, rows * classes, 3, H, W)
        pairs = pairs.unflatten(1, (rows, classes)).transpose(0, 1).flatten(0, 2)
        grid = labelled_grid(to_arrays(pairs), CLASS_NAMES, "nearest training image, sample below")
        save_image(grid, self.folder / "verdict.png")
        cure = "; several images per class need more epochs (EPOCHS=)"
        say(f"{'PASS' if passed else 'FAIL'}: every class must be right at {PASS_PSNR:g} dB or "
            f"better; picture: {self.folder / 'verdict.png'}"
            + (cure if config.data.samples_per_class > 1 and not passed else ""))
        return passed
