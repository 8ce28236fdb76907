"""The hand-written training loop: loss, step, moving average, learning rate, resume.

All randomness of step n derives from (seed, n), so a run continued from a checkpoint takes the
same steps as one that was never interrupted, without any random state being stored. Several
processes draw it for the whole batch and take their share, so that their number changes nothing
either. On CUDA no step waits for the device: what a step needs to know of its own result, it keeps
there.
"""

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cuda_graphs import Recording, RecordingError, record
from .memory import MEMORY_ERRORS, OutOfMemory, in_parts, is_out_of_memory, logger
from .muon import Muon, matrix_weights
from .noise_scheduler import CosineNoiseScheduler
from .processes import Processes, average_gradients
from .sampler import autocast, evaluating

# Running sums since the last record, by attribute; durations are not among them.
SUMS = ("_losses", "_counts", "_grad_norms", "_summed_steps")
SKIPS = ("_skipped", "_skipped_in_a_row", "_most_in_a_row")
# Of the free memory, which a recorded step keeps; validation and grids need the rest.
RECORDED_SHARE = 0.5
DISTURBANCE = 0.02  # standard deviation of what is added to the weights in the trial of a recording
FP16_HALVINGS = 16  # from the scale that loss scaling starts with down to 1
# Room on each GPU for what several processes exchange, beside one more copy of the gradients.
NCCL_BYTES = 2**29
QUARTERS = 4  # of the timesteps, from least to most noise, for which losses are reported apart


class TrainingDiverged(RuntimeError):
    """Losses or gradients are not finite; nothing of these steps reached the weights."""


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step; mixed, so that (0, 1) and (1, 0) have nothing in common."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, final_fraction: float
) -> float:
    """Learning rate of step (counted from 0): linear warm-up, then half a cosine.

    It reaches `peak` after warmup_steps and final_fraction * peak at the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


def ema_decay(batch_size: int, images_seen: int, halflife_images: float, ramp: float) -> float:
    """Decay of one step under a half-life in images, at most `ramp` of the images seen.

    Half-life ramp-up as in Karras et al. 2022 (EDM), training code; without it a short run would
    be sampled from its initialisation.
    """
    halflife = min(halflife_images, ramp * images_seen)
    return 0.5 ** (batch_size / halflife)


def drop_labels(class_labels: Tensor, probability: float, null_label: int) -> Tensor:
    """Each label (B,) replaced by null_label with this probability (Ho & Salimans 2022, alg. 1)."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return torch.where(dropped, null_label, class_labels)


def min_snr_weights(scheduler: CosineNoiseScheduler, gamma: float) -> Tensor:
    """Loss weights (T,), Hang et al. 2023, sec. 3.4, in terms of the prediction; gamma 0: ones."""
    snr = scheduler.snr
    if gamma == 0:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=gamma)
    if scheduler.prediction_type == "epsilon":
        return clipped / snr
    if scheduler.prediction_type == "sample":
        return clipped
    return clipped / (snr + 1)


def importance_sampling(weights: Tensor) -> tuple[Tensor, Tensor]:
    """How often each timestep is drawn, and what its loss then counts, for loss weights (T,).

    Half of the weight, its root, decides how often, the other half stays with the loss. The
    expected gradient is that of uniform timesteps with all of the weight (Nichol & Dhariwal 2021,
    sec. 3.3), but fewer images go where losses hardly count. Returns (cumulative probabilities,
    float64 (T,); weights of the losses, float32 (T,)).
    """
    roots = weights.double().sqrt()
    return roots.cumsum(0) / roots.sum(), (roots * roots.mean()).float()


def stratified_timesteps(batch_size: int, cumulative: Tensor) -> Tensor:
    """Timesteps (B,) with these cumulative probabilities (T,), which together follow them evenly.

    One random number for all (Kingma et al. 2021, app. I.1), through the inverse of the cumulative.
    """
    strata = torch.arange(batch_size, dtype=cumulative.dtype, device=cumulative.device) / batch_size
    position = (torch.rand((), device=cumulative.device) + strata) % 1.0
    timesteps = torch.searchsorted(cumulative, position, right=True)
    return timesteps.clamp(max=len(cumulative) - 1)  # the last probability may round to below one


def diffusion_loss(
    model: nn.Module,
    scheduler: CosineNoiseScheduler,
    x_start: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    class_labels: Tensor,
) -> Tensor:
    """Mean squared error of the prediction per image, float32 (B,), unweighted."""
    prediction = model(scheduler.add_noise(x_start, noise, timesteps), timesteps, class_labels)
    target = scheduler.training_target(x_start, noise, timesteps)
    return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


@dataclass(eq=False, repr=False)
class TrainingEngine:
    """Trains a model and its moving average, step by step."""

    model: nn.Module  # model(x_t, timesteps, class_labels) with null_label, on its device
    scheduler: CosineNoiseScheduler  # on the same device
    _: KW_ONLY
    total_steps: int  # of the run; the learning rate ends its decay there
    learning_rate: float  # the peak; see learning_rate_at, as for the next two
    warmup_steps: int = 0
    final_lr_fraction: float = 1.0
    optimizer: str = "muon"  # for matrices, AdamW for the rest; or "adamw" for all
    weight_decay: float = 0.0  # decoupled
    grad_clip: float = 1.0  # largest gradient norm
    class_dropout_prob: float = 0.1  # see drop_labels
    min_snr_gamma: float = 5.0  # see min_snr_weights and importance_sampling
    ema_halflife_images: float = 500_000  # see ema_decay, as for the next one
    ema_rampup_ratio: float = 0.1
    max_skipped_steps: int = 0  # steps in a row that may be left out for want of a finite gradient
    seed: int = 0  # of all randomness inside the steps
    # For mixed precision torch.bfloat16 or, with loss scaling, torch.float16; None: float32.
    autocast_dtype: torch.dtype | None = None
    processes: Processes = field(default_factory=Processes)  # each works on its share of a batch

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.step = self.images_seen = 0
        self.micro_batches = 1  # parts of a batch, or of this process's share of it
        # Of the present step; on the device, where a recording can read it.
        self._rate = torch.zeros((), device=self.device)
        self._draws: dict[tuple, tuple[Tensor, Tensor]] = {}  # of validations, by their shape
        self.optimizers = self._make_optimizers()
        self._share_rate()
        self.scaler = self._make_scaler()
        # torch's AveragedModel would wait for the device at every step. It keeps requires_grad, or
        # autocast would cast its weights anew at every step of a chain.
        self.ema_model = copy.deepcopy(self.model)
        self._weights = list(self.model.parameters())
        self._averages = list(self.ema_model.parameters())
        # What the training steps call: the model or its compiled form; once tied, inside what
        # averages its gradients over the processes.
        self.network, self.tied = self.model, False
        self._recording: Recording | None = None  # of a step, see record
        self._skipped = torch.zeros((), dtype=torch.long, device=self.device)
        self._skipped_in_a_row = torch.zeros_like(self._skipped)
        self._most_in_a_row = torch.zeros_like(self._skipped)  # since the budget was last checked
        weights = min_snr_weights(self.scheduler, self.min_snr_gamma)
        self._cumulative, self._loss_weights = importance_sampling(weights)
        self._losses = torch.zeros(QUARTERS, device=self.device)
        self._counts = torch.zeros_like(self._losses)
        self._grad_norms = torch.zeros((), device=self.device)
        self._summed_steps = torch.zeros_like(self._grad_norms)
        self._reset_sums()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r} is unknown; valid: muon, adamw")
        options = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        matrices = matrix_weights(self.model) if self.optimizer == "muon" else []
        chosen = {id(weight) for weight in matrices}
        rest = [weight for weight in self.model.parameters() if id(weight) not in chosen]
        # Of all kinds of AdamW the fused one can be told by a tensor to leave a step out.
        optimizers: list[torch.optim.Optimizer] = []
        if rest:
            optimizers.append(torch.optim.AdamW(
                rest, betas=(0.9, 0.99), fused=True, capturable=True, **options
            ))
        return optimizers + ([Muon(matrices, **options)] if matrices else [])

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(
            self.device.type, enabled=self.autocast_dtype is torch.float16
        )

    def _share_rate(self) -> None:
        """Make the learning rate of all optimizers one tensor."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                self._rate.fill_(float(group["lr"]))
                group["lr"] = self._rate

    def train_step(self, x_start: Tensor, class_labels: Tensor) -> None:
        """One optimizer step on x_start (B, C, H, W) in [-1, 1] with class_labels (B,).

        Of several processes each gives the images of its share of the batch, but all the labels.
        A batch whose loss or gradient is not finite is left out; the weights do not see it. Raises
        TrainingDiverged, weights still untouched, once more than max_skipped_steps follow each
        other; on CUDA not before the next take_metrics, which is the first to look.
        """
        if self.processes.several and not self.tied:
            self._tie()
        self._rate.fill_(self.current_learning_rate)
        self._seed()
        if self._recording:
            self._recording(x_start, class_labels)
        else:
            self._update(*self._compute_gradients_in_parts(x_start, class_labels))
        self.step += 1
        self.images_seen += len(class_labels)
        self._update_average(len(class_labels))
        self._summed_images += len(class_labels)
        if self.device.type != "cuda":
            self._check_budget()

    def _seed(self) -> None:
        torch.manual_seed(step_seed(self.seed, self.step))  # dropout included, hence global

    def _update(self, losses: Tensor, timesteps: Tensor) -> None:
        """Weights, optimizers and sums by the gradients that came with these losses (b,)."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._weights, self.grad_clip)
        finite = torch.isfinite(grad_norm)  # a loss that is not finite makes the norm so too
        found_inf = (~finite).float()
        for optimizer in self.optimizers:
            # Not by the scaler, which would judge the gradients of each by themselves.
            optimizer.found_inf = found_inf
            optimizer.step()
        self.scaler.update()
        self.model.zero_grad()
        self._skipped += ~finite
        self._skipped_in_a_row.add_(1).mul_(~finite)
        self._most_in_a_row.copy_(torch.maximum(self._most_in_a_row, self._skipped_in_a_row))
        self._add_to_sums(losses, timesteps, grad_norm, finite)

    def record(self, x_start: Tensor, class_labels: Tensor) -> None:
        """Take steps, but for their average, as one CUDA graph from the next on; not for several.

        All batches must then have this shape. Raises RecordingError, with nothing changed, unless
        the graph does what is done without it.
        """
        def work(x_start: Tensor, class_labels: Tensor) -> list[Tensor]:
            self._update(*self._compute_gradients(x_start, class_labels))
            return []

        def prepare() -> None:
            torch.manual_seed(step_seed(self.seed, self.step + 1))
            # Or an untrained network would hardly have a gradient.
            disturbance = [torch.randn_like(weight) for weight in self._weights]
            with torch.no_grad():
                torch._foreach_add_(self._weights, disturbance, alpha=DISTURBANCE)
            self._rate.fill_(self.learning_rate)
            if scaling:
                self.scaler.load_state_dict(scaling | {"scale": 1.0})  # at first it is too large

        self.rehearse(x_start, class_labels)  # in how many parts
        scaling = self.scaler.state_dict()
        try:
            self._recording = record(
                work, (x_start, class_labels), (x_start.flip(-1), class_labels.roll(1)),
                prepare=prepare, state=self._state, memory_share=RECORDED_SHARE,
            )
        except RecordingError:
            self.scaler = self._make_scaler()  # which may be between two of its calls
            raise
        finally:
            self.model.zero_grad()
            self.scaler.load_state_dict(scaling)

    @property
    def recorded(self) -> bool:
        return self._recording is not None

    def _state(self) -> dict[str, list[Tensor]]:
        """The tensors that steps change, by kind, but for the average."""
        kinds = {name: [getattr(self, name)] for name in (*SUMS, *SKIPS, "_rate")}
        for optimizer in self.optimizers:
            kinds[type(optimizer).__name__] = optimizer.param_groups[0]["params"]
            for moments in optimizer.state.values():
                for name, value in moments.items():
                    kinds.setdefault(name, []).append(value)
        return kinds

    def _tie(self) -> None:
        """Make one step of what the processes do; the number of parts must then be the same.

        Later none of them could split a batch that the others have not split.
        """
        torch.cuda.empty_cache()  # NCCL takes its buffers from what is free, not from torch's cache
        self.micro_batches = self.processes.extreme(self.micro_batches, largest=True)
        self.network, self.tied = average_gradients(self.network), True

    @torch.no_grad()
    def _update_average(self, batch_size: int) -> None:
        """One step of the average; after a skipped one it moves towards the unchanged weights."""
        decay = 0.0 if self.step == 1 else ema_decay(
            batch_size, self.images_seen, self.ema_halflife_images, self.ema_rampup_ratio
        )
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    def _compute_gradients_in_parts(
        self, x_start: Tensor, class_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """_compute_gradients, in more parts where memory runs out."""
        while True:
            try:
                return self._compute_gradients(x_start, class_labels)
            except MEMORY_ERRORS as error:
                if not is_out_of_memory(error):
                    raise
            # Out here nothing holds on to the memory of the attempt any more.
            if self.tied:
                # The others are already waiting for the gradients of the whole share.
                raise OutOfMemory(
                    f"out of memory at step {self.step} in process {self.processes.rank} of "
                    f"{self.processes.world_size}; end what else uses its device, then run again"
                )
            self.model.zero_grad()
            self._seed()
            self._split_further(len(x_start))

    def _compute_gradients(self, x_start: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted mean loss over the batch, of all processes' images.

        Returns (losses (b,), timesteps (b,)) of this process's share. It goes through the network
        in `micro_batches` parts with the same gradients: all randomness but dropout is drawn for
        the whole batch.
        """
        batch_size, share = len(class_labels), self.processes.share(len(class_labels))
        timesteps = stratified_timesteps(batch_size, self._cumulative)[share]
        noise = torch.randn(batch_size, *x_start.shape[1:], device=self.device)[share]
        if self.class_dropout_prob > 0:
            class_labels = drop_labels(
                class_labels, self.class_dropout_prob, self.model.null_label
            )
        class_labels = class_labels[share]
        if not self.processes.leads:
            # For dropout of its own.
            torch.manual_seed(step_seed(self.seed, self.step) + self.processes.rank)

        if not self.model.training:
            self.model.train()
        weights = self._loss_weights[timesteps]
        size = -(-len(x_start) // self.micro_batches)
        results = []
        for start in range(0, len(x_start), size):
            part = slice(start, start + size)
            # Between processes gradients travel once per step, with its last part: the sum of all.
            waits = self.tied and part.stop < len(x_start)
            with self.network.no_sync() if waits else contextlib.nullcontext():
                with autocast(self.device, self.autocast_dtype):
                    losses = diffusion_loss(
                        self.network, self.scheduler, x_start[part], noise[part],
                        timesteps[part], class_labels[part],
                    )
                # Gradients are averaged over the processes, of which each has only its share.
                mean = (weights[part] * losses).sum() / (batch_size / self.processes.world_size)
                self.scaler.scale(mean).backward()
            results.append(losses.detach())
        return torch.cat(results), timesteps

    def rehearse(self, x_start: Tensor, class_labels: Tensor) -> None:
        """Forward and backward as in the next step, without taking it.

        Finds out how many parts memory needs and whether a compiled network works, which several
        processes do before their first step, each for itself.
        """
        reserve = None
        if self.processes.several and self.device.type == "cuda":
            size = sum(weight.nbytes for weight in self._weights) + NCCL_BYTES
            reserve = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._seed()
        try:
            self._compute_gradients_in_parts(x_start, class_labels)
        finally:
            del reserve
            self.model.zero_grad()

    def _split_further(self, batch_size: int) -> None:
        """After running out of memory: twice as many parts per batch, for the rest of the run."""
        if self.micro_batches >= batch_size:
            raise OutOfMemory(
                "out of memory with a single image at a time; use a smaller model or image size"
            )
        torch.cuda.empty_cache()
        self.micro_batches = min(batch_size, 2 * self.micro_batches)
        logger.warning(
            "out of memory at step %d: each batch of %d now goes through the network in %d parts, "
            "with the same gradients", self.step, batch_size, self.micro_batches,
        )

    @property
    def skipped_steps(self) -> int:
        """Steps so far whose gradient was not finite; on CUDA this waits for the device."""
        return int(self._skipped)

    def _check_budget(self) -> None:
        # Loss scaling begins too high on purpose and halves the scale at every such step.
        budget = self.max_skipped_steps + (FP16_HALVINGS if self.scaler.is_enabled() else 0)
        most_in_a_row = int(self._most_in_a_row)
        self._most_in_a_row.zero_()  # the count in a row goes on
        if most_in_a_row <= budget:
            return
        precision = "float32" if self.autocast_dtype is None else str(self.autocast_dtype)
        raise TrainingDiverged(
            f"loss or gradient is not finite at step {self.step}, after {self.skipped_steps} "
            f"skipped steps (learning rate {self.current_learning_rate:g}, {precision}); the last "
            "checkpoint is unharmed. Lower train.learning_rate or set train.precision to fp32, "
            "then run again"
        )

    @property
    def current_learning_rate(self) -> float:
        return learning_rate_at(
            self.step, peak=self.learning_rate, warmup_steps=self.warmup_steps,
            total_steps=self.total_steps, final_fraction=self.final_lr_fraction,
        )

    def _reset_sums(self) -> None:
        for name in SUMS:
            getattr(self, name).zero_()
        self._summed_images = 0
        self._seconds = self._data_seconds = 0.0

    def _add_to_sums(
        self, losses: Tensor, timesteps: Tensor, grad_norm: Tensor, finite: Tensor
    ) -> None:
        quarters = timesteps * QUARTERS // self.scheduler.num_train_timesteps
        self._losses.index_add_(0, quarters, torch.where(finite, losses, 0))
        self._counts.index_add_(0, quarters, finite.float().expand(len(losses)))
        self._grad_norms += torch.where(finite, grad_norm, 0)
        self._summed_steps += finite

    def take_metrics(self) -> dict:
        """Means since the last call: loss, loss_quarters (least noise first), grad_norm, speed.

        Losses are unweighted, over the timesteps that were drawn; the loss is None if every step
        since was skipped. Raises TrainingDiverged, see train_step.
        Speed counts training steps alone; data_wait is the share of it spent waiting for batches.
        Reading the sums waits for the device, so they are read on logging steps only; that wait
        belongs to the steps.
        """
        began = time.perf_counter()
        self._check_budget()
        self._seconds += time.perf_counter() - began
        losses, counts = self._sums_of_all().tolist()
        metrics = {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": sum(losses) / sum(counts) if sum(counts) else None,
            "loss_quarters": [a / n if n else None for a, n in zip(losses, counts)],
            "grad_norm": (self._grad_norms / self._summed_steps.clamp(min=1)).item(),
            "learning_rate": self.current_learning_rate,
            "images_per_second": self._summed_images / max(self._seconds, 1e-9),
            "data_wait": self._data_seconds / max(self._seconds, 1e-9),
            "skipped_steps": self.skipped_steps,
        }
        self._reset_sums()
        return metrics

    def _sums_of_all(self) -> Tensor:
        """Losses and counts by quarter (2, QUARTERS), of all processes."""
        return self.processes.sum(torch.stack([self._losses, self._counts]))

    @torch.no_grad()
    def validation_loss(
        self, model: nn.Module, x_start: Tensor, class_labels: Tensor, batch_size: int
    ) -> float:
        """Unweighted loss on fixed (x_start, noise, timestep) triples, N of each.

        Noise and timesteps are the same at every call: small differences are real differences.
        Several processes divide the images.
        """
        share = self.processes.share(len(x_start))
        timesteps, noise = self._fixed_draws(*x_start.shape)
        own_x_start, own_labels = x_start[share], class_labels[share]
        losses = torch.zeros(len(x_start), device=self.device)

        def loss_of(part: slice) -> Tensor:
            return diffusion_loss(
                model, self.scheduler, own_x_start[part], noise[part], timesteps[part],
                own_labels[part],
            )

        with evaluating(model), autocast(self.device, self.autocast_dtype):
            size = -(-batch_size // self.micro_batches)
            parts = list(in_parts(loss_of, len(own_labels), size, "validation images"))
        if parts:  # there may be fewer images than processes
            losses[share] = torch.cat(parts)
        return self.processes.sum(losses).mean().item()

    def _fixed_draws(self, count: int, *shape: int) -> tuple[Tensor, Tensor]:
        """Timesteps (n,) and noise (n, *shape) of this process's share of validation images.

        Kept on the device: on the CPU, the same everywhere, they take longer than a validation.
        """
        if (count, *shape) not in self._draws:
            generator = torch.Generator().manual_seed(step_seed(self.seed, -1))
            share, T = self.processes.share(count), self.scheduler.num_train_timesteps
            # Every class meets every noise level: labels often come sorted, timesteps must not.
            timesteps = torch.randperm(count, generator=generator) * T // count
            noise = torch.zeros(count, *shape)
            for image in noise:
                image.normal_(generator=generator)
            draws = timesteps[share].to(self.device), noise[share].to(self.device)
            self._draws[count, *shape] = draws
        return self._draws[count, *shape]

    @property
    def complete(self) -> bool:
        return self.step >= self.total_steps

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[int]:
        """Train to total_steps, yielding the number of steps taken after each of them.

        Of several processes all must stop after the same step. The batches are (x_start,
        class_labels), the first one belonging to the current step.
        """
        batches = iter(batches)
        while not self.complete:
            began = time.perf_counter()
            x_start, class_labels = next(batches)
            waited = time.perf_counter()
            self.train_step(x_start, class_labels)
            self._data_seconds += waited - began
            self._seconds += time.perf_counter() - began
            yield self.step

    def state_dict(self) -> dict:
        """Everything a later process needs to continue as if it were this one.

        All processes have to ask for it together; the leader's is the one that counts for all.
        """
        losses, counts = self._sums_of_all()
        own = {name: getattr(self, name).clone() for name in SUMS}  # they go back to zero
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": int(self._skipped_in_a_row),
            "scaler": self.scaler.state_dict(),
            # So that the record a resumed run writes next equals that of an uninterrupted one.
            "sums": own | {"_losses": losses, "_counts": counts},
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of state_dict."""
        self._recording = None  # of what lay elsewhere
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Settings and device are this process's.
            groups = [
                {**own, "lr": group["lr"], "params": group["params"]}
                for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True)
            ]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            # Both optimizers pair numbers by their place in memory, and the saved ones may lie in
            # another layout than this process's weights.
            for parameter, moments in optimizer.state.items():
                for name, value in moments.items():
                    own = parameter if value.shape == parameter.shape else value
                    moments[name] = torch.empty_like(own).copy_(value)
        self._share_rate()
        self.step, self.images_seen = state["step"], state["images_seen"]
        self._skipped.fill_(state["skipped_steps"])
        self._skipped_in_a_row.fill_(state["skipped_in_a_row"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in SUMS:
            getattr(self, name).copy_(state["sums"][name])
        if not self.processes.leads:  # the leader has them all
            self._losses.zero_()
            self._counts.zero_()
