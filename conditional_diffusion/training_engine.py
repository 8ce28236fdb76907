"""The hand-written training loop: loss, step, moving average, learning rate, resume.

All randomness of step n derives from (seed, n), so a run continued from a checkpoint takes the
same steps as one that was never interrupted, without any random state being stored.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .memory import (
    MEMORY_ERRORS,
    OutOfMemory,
    empty_caches,
    in_parts,
    logger,
    reraise_unless_out_of_memory,
)
from .noise_scheduler import CosineNoiseScheduler
from .sampler import evaluating

# Running sums since the last record, by attribute; durations are not among them.
SUMS = ("_losses", "_counts", "_grad_norms", "_summed_steps")
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


def stratified_timesteps(batch_size: int, num_train_timesteps: int, device) -> Tensor:
    """Uniform timesteps (B,) that together cover 0..T-1 evenly (Kingma et al. 2021, app. I.1)."""
    strata = torch.arange(batch_size, device=device) / batch_size
    position = (torch.rand((), device=device) + strata) % 1.0
    return (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def min_snr_weights(
    scheduler: CosineNoiseScheduler, timesteps: Tensor, gamma: float
) -> Tensor:
    """Loss weights (B,), Hang et al. 2023, sec. 3.4, in terms of the prediction; gamma 0: ones."""
    snr = scheduler.snr(timesteps)
    if gamma == 0:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=gamma)
    if scheduler.prediction_type == "epsilon":
        return clipped / snr
    if scheduler.prediction_type == "sample":
        return clipped
    return clipped / (snr + 1)


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


class TrainingEngine:
    """Trains a model and its moving average, step by step.

    Args:
        model: `model(x_t, timesteps, class_labels)` with `null_label`, on its device.
        scheduler: noise schedule, on the same device.
        total_steps: length of the run; the learning rate ends its decay there.
        learning_rate, warmup_steps, final_lr_fraction: see learning_rate_at.
        weight_decay: of AdamW. grad_clip: largest gradient norm.
        class_dropout_prob: see drop_labels. min_snr_gamma: see min_snr_weights.
        ema_halflife_images, ema_rampup_ratio: see ema_decay.
        max_skipped_steps: consecutive steps without a finite gradient that are left out.
        seed: of all randomness inside the steps.
        autocast_dtype: torch.bfloat16 for mixed precision, None for float32.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: CosineNoiseScheduler,
        *,
        total_steps: int,
        learning_rate: float,
        warmup_steps: int = 0,
        final_lr_fraction: float = 1.0,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        class_dropout_prob: float = 0.1,
        min_snr_gamma: float = 5.0,
        ema_halflife_images: float = 500_000,
        ema_rampup_ratio: float = 0.1,
        max_skipped_steps: int = 0,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ):
        self.model, self.scheduler = model, scheduler
        self.device = next(model.parameters()).device
        self.total_steps, self.learning_rate = total_steps, learning_rate
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.grad_clip, self.class_dropout_prob = grad_clip, class_dropout_prob
        self.min_snr_gamma, self.seed = min_snr_gamma, seed
        self.ema_halflife_images, self.ema_rampup_ratio = ema_halflife_images, ema_rampup_ratio
        self.autocast_dtype = autocast_dtype
        self.max_skipped_steps, self.micro_batches = max_skipped_steps, 1
        self.step = self.images_seen = 0
        self.skipped_steps = self._skipped_in_a_row = 0
        self.stop_requested = False
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self._ema_decay = 0.0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        self._reset_sums()

    @property
    def ema_model(self) -> nn.Module:
        """The moving average of the model: same architecture, smoother weights."""
        return self._averaged.module

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self._ema_decay)

    def _autocast(self):
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled)

    def train_step(self, x_start: Tensor, class_labels: Tensor) -> None:
        """One optimizer step on x_start (B, C, H, W) in [-1, 1] with class_labels (B,).

        A batch whose loss or gradient is not finite is left out; the weights do not see it. Raises
        TrainingDiverged, weights still untouched, once more than max_skipped_steps follow each
        other.
        """
        batch_size = len(x_start)
        while True:
            try:
                losses, timesteps = self._compute_gradients(x_start, class_labels)
                break
            except MEMORY_ERRORS as error:
                reraise_unless_out_of_memory(error)
            # Out here nothing holds on to the memory of the attempt any more.
            self.optimizer.zero_grad()
            self._split_further(batch_size)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        # A loss that is not finite makes the norm so too: one check, one device read.
        if not torch.isfinite(grad_norm):
            self._skip_step(losses.mean().item())
            return
        self._skipped_in_a_row = 0
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.step += 1
        self.images_seen += batch_size
        self._ema_decay = ema_decay(
            batch_size, self.images_seen, self.ema_halflife_images, self.ema_rampup_ratio
        )
        self._averaged.update_parameters(self.model)
        self._add_to_sums(losses, timesteps, grad_norm)

    def _compute_gradients(self, x_start: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the weighted mean loss; returns (losses (B,), timesteps (B,)).

        The batch goes through the network in `micro_batches` parts with the same gradients: all
        randomness but dropout is drawn for the whole batch.
        """
        batch_size = len(x_start)
        torch.manual_seed(step_seed(self.seed, self.step))  # dropout included, hence global
        T = self.scheduler.num_train_timesteps
        timesteps = stratified_timesteps(batch_size, T, self.device)
        noise = torch.randn_like(x_start)
        if self.class_dropout_prob > 0:
            class_labels = drop_labels(
                class_labels, self.class_dropout_prob, self.model.null_label
            )

        self.model.train()
        weights = min_snr_weights(self.scheduler, timesteps, self.min_snr_gamma)
        size = -(-batch_size // self.micro_batches)
        parts = []
        for start in range(0, batch_size, size):
            part = slice(start, start + size)
            with self._autocast():
                losses = diffusion_loss(
                    self.model, self.scheduler, x_start[part], noise[part], timesteps[part],
                    class_labels[part],
                )  # fmt: skip
            ((weights[part] * losses).sum() / batch_size).backward()
            parts.append(losses.detach())
        return torch.cat(parts), timesteps

    def _split_further(self, batch_size: int) -> None:
        """After running out of memory: twice as many parts per batch, for the rest of the run."""
        if self.micro_batches >= batch_size:
            raise OutOfMemory(
                "out of memory with a single image at a time; use a smaller model or image size"
            )
        empty_caches()
        self.micro_batches = min(batch_size, 2 * self.micro_batches)
        logger.warning(
            "out of memory at step %d: each batch of %d now goes through the network in %d parts, "
            "with the same gradients", self.step, batch_size, self.micro_batches,
        )  # fmt: skip

    def _skip_step(self, loss: float) -> None:
        self.optimizer.zero_grad()
        if self._skipped_in_a_row >= self.max_skipped_steps:
            precision = "float32" if self.autocast_dtype is None else str(self.autocast_dtype)
            raise TrainingDiverged(
                f"loss or gradient is not finite at step {self.step}, after {self.skipped_steps} "
                f"skipped steps (loss {loss:g}, learning rate {self.current_learning_rate:g}, "
                f"{precision}); the last checkpoint is unharmed. Lower train.learning_rate or set "
                "train.precision to fp32, then run again"
            )
        self._skipped_in_a_row += 1
        self.skipped_steps += 1
        self.step += 1  # the data order and the schedule go on as if it had been taken

    @property
    def current_learning_rate(self) -> float:
        return learning_rate_at(
            self.step, peak=self.learning_rate, warmup_steps=self.warmup_steps,
            total_steps=self.total_steps, final_fraction=self.final_lr_fraction,
        )  # fmt: skip

    def _reset_sums(self) -> None:
        self._losses = torch.zeros(QUARTERS, device=self.device)
        self._counts = torch.zeros(QUARTERS, device=self.device)
        self._grad_norms = torch.zeros((), device=self.device)
        self._summed_steps = self._summed_images = 0
        self._seconds = self._data_seconds = 0.0

    def _add_to_sums(self, losses: Tensor, timesteps: Tensor, grad_norm: Tensor) -> None:
        quarters = timesteps * QUARTERS // self.scheduler.num_train_timesteps
        self._losses.index_add_(0, quarters, losses)
        self._counts.index_add_(0, quarters, torch.ones_like(losses))
        self._grad_norms += grad_norm
        self._summed_steps += 1
        self._summed_images += len(losses)

    def take_metrics(self) -> dict:
        """Means since the last call: loss, loss_quarters (least noise first), grad_norm, speed.

        The loss is None if every step since was skipped.
        Speed counts training steps alone; data_wait is the share of it spent waiting for batches.
        Reading the sums waits for the device, so they are read on logging steps only.
        """
        losses, counts = self._losses.tolist(), self._counts.tolist()
        metrics = {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": sum(losses) / sum(counts) if sum(counts) else None,
            "loss_quarters": [a / n if n else None for a, n in zip(losses, counts)],
            "grad_norm": self._grad_norms.item() / max(1, self._summed_steps),
            "learning_rate": self.current_learning_rate,
            "images_per_second": self._summed_images / max(self._seconds, 1e-9),
            "data_wait": self._data_seconds / max(self._seconds, 1e-9),
            "skipped_steps": self.skipped_steps,
        }
        self._reset_sums()
        return metrics

    @torch.no_grad()
    def validation_loss(
        self, model: nn.Module, x_start: Tensor, class_labels: Tensor, batch_size: int
    ) -> float:
        """Unweighted loss on fixed (x_start, noise, timestep) triples, N of each.

        Noise and timesteps are the same at every call: small differences are real differences.
        """
        generator = torch.Generator().manual_seed(step_seed(self.seed, -1))
        N, T = len(x_start), self.scheduler.num_train_timesteps
        # Every class meets every noise level: labels often come sorted, timesteps must not.
        timesteps = (torch.randperm(N, generator=generator) * T // N).to(self.device)
        # One draw per image, so that the noise does not depend on the batch size.
        noise = torch.stack([torch.randn(x.shape, generator=generator) for x in x_start])

        def loss_of(part: slice) -> Tensor:
            return diffusion_loss(
                model, self.scheduler, x_start[part], noise[part].to(self.device), timesteps[part],
                class_labels[part],
            )  # fmt: skip

        with evaluating(model), self._autocast():
            size = -(-batch_size // self.micro_batches)
            losses = in_parts(loss_of, N, size, "validation images")
        return torch.cat(losses).mean().item()

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        on_step: Callable[[], None] = lambda: None,
        periodic: Sequence[tuple[Callable[[int], bool], Callable[[], None]]] = (),
    ) -> bool:
        """Train until total_steps or until stop_requested; returns whether the run is complete.

        Args:
            batches: (x_start, class_labels), the first one belonging to the current step.
            on_step: called after every step.
            periodic: (is it due after this step?, action) pairs, in order; all are due at the end.
        """
        batches = iter(batches)
        while self.step < self.total_steps and not self.stop_requested:
            began = time.perf_counter()
            x_start, class_labels = next(batches)
            waited = time.perf_counter()
            self.train_step(x_start, class_labels)
            self._data_seconds += waited - began
            self._seconds += time.perf_counter() - began
            on_step()
            for due, action in periodic:
                if due(self.step) or self.step == self.total_steps:
                    action()
        return self.step >= self.total_steps

    def state_dict(self) -> dict:
        """Everything a later process needs to continue as if it were this one."""
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_steps": self.skipped_steps,
            # So that the record a resumed run writes next equals that of an uninterrupted one.
            "sums": {name: getattr(self, name) for name in SUMS},
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of state_dict."""
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema"])
        self._averaged.n_averaged.fill_(state["step"])
        # What belongs to this process's settings and device is not taken from the saved one.
        groups = [
            {**saved, "weight_decay": own["weight_decay"], "fused": own["fused"]}
            for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups)
        ]
        saved_state = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": saved_state, "param_groups": groups})
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.skipped_steps = state["skipped_steps"]
        for name, value in state["sums"].items():
            setattr(self, name, value.to(self.device) if torch.is_tensor(value) else value)
