"""Samplers: from noise to pictures by DDPM, DDIM or DPM-Solver++(2M), with guidance.

All have one signature. Every picture has a generator of its own, so it depends on its seed and
class alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from .memory import in_parts
from .noise_scheduler import CosineNoiseScheduler, posterior_coefficients


def inference_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Kept timesteps, descending, evenly spaced, with T - 1 and 0 among them ("linspace").

    One step keeps T - 1 alone.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must lie in 1..{num_train_timesteps}, not {num_inference_steps}"
        )
    last = torch.tensor(num_train_timesteps - 1, dtype=torch.float64)
    spaced = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
    return (last * (1 - spaced)).round().long().tolist()


def guided_prediction(
    model: nn.Module, x_t: Tensor, timesteps: Tensor, class_labels: Tensor, guidance_scale: float
) -> Tensor:
    """uncond + guidance_scale (cond - uncond), Ho & Salimans 2022; shape of x_t (B, C, H, W).

    Scale 1 is the conditional prediction alone; any other scale costs one call of twice the batch.
    """
    if guidance_scale == 1:
        return model(x_t, timesteps, class_labels)
    null_labels = torch.full_like(class_labels, model.null_label)
    labels = torch.cat([class_labels, null_labels])
    both = model(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), labels)
    cond, uncond = both.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """torch.autocast with this dtype; None leaves everything in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside, the mode it had before outside."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@dataclass(eq=False)
class Sampler:
    """What the samplers share: the kept timesteps, guidance, batches and the loop over steps."""

    scheduler: CosineNoiseScheduler  # the schedule the model was trained with
    _: KW_ONLY
    num_inference_steps: int  # kept timesteps, evenly spaced
    guidance_scale: float = 1.0  # see guided_prediction
    # (low, high) in fractions of the chain, 0 the clean end; timesteps outside are not guided,
    # which also halves their cost (Kynkaanniemi et al. 2024, sec. 3).
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    clip_x_start: bool = True  # the predicted clean image to [-1, 1], the only clamp there is
    autocast_dtype: torch.dtype | None = None  # as of TrainingEngine; the state stays float32

    def __post_init__(self):
        T = self.scheduler.num_train_timesteps
        self.timesteps = inference_timesteps(T, self.num_inference_steps)

    def update(
        self,
        x_start: Tensor,
        x_t: Tensor,
        timestep: int,
        previous_timestep: int,
        draw_noise: Callable[[], Tensor],
        earlier: tuple[int, Tensor] | None,
    ) -> Tensor:
        """x at previous_timestep, the next kept and smaller one, or -1 for the clean image.

        Args:
            x_start: the predicted clean image (B, C, H, W). x_t: the state, of the same shape.
            draw_noise: standard normal noise of that shape, from the pictures' own generators.
            earlier: (timestep, x_start) of the step before, None at the first.
        """
        raise NotImplementedError

    def alpha_bar(self, timestep: int) -> Tensor:
        """The cumulative alpha in float64, 0-dimensional; 1 at timestep -1, the clean image."""
        alphas_cumprod = self.scheduler.alphas_cumprod_float64
        return alphas_cumprod[timestep] if timestep >= 0 else alphas_cumprod.new_ones(())

    def scale_at(self, timestep: int) -> float:
        """The guidance scale at a timestep: 1 outside the interval."""
        low, high = self.guidance_interval
        fraction = timestep / max(1, self.scheduler.num_train_timesteps - 1)
        return self.guidance_scale if low <= fraction <= high else 1.0

    def sample(self, *arguments, **options) -> Tensor:
        """All pictures of sample_parts, (N, *shape)."""
        return torch.cat(list(self.sample_parts(*arguments, **options)))

    def sample_parts(
        self,
        model: nn.Module,
        class_labels: Tensor,
        shape: tuple[int, int, int],
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """Pictures, batch by batch: (n, *shape), float32, on the device of class_labels.

        They lie in [-1, 1] where clipped. Where memory runs out batches become smaller.

        Args:
            model: `model(x_t, timesteps, class_labels)`, with `null_label` if guided.
            class_labels: int64 (N,).
            shape: (C, H, W).
            seeds: one per picture; it fixes the picture whatever else is drawn with it.
            batch_size: pictures denoised together; None means all.
            callback: called with (steps done in this batch, x_t, x_start) after each step.
        """
        @torch.no_grad()
        def draw(part: slice) -> Tensor:
            # One autocast for all steps: it casts weights that require gradients only once.
            with evaluating(model), autocast(class_labels.device, self.autocast_dtype):
                return self._sample_batch(model, class_labels[part], shape, seeds[part], callback)

        return in_parts(draw, len(seeds), batch_size or len(seeds), "pictures")

    def _sample_batch(self, model, class_labels, shape, seeds, callback) -> Tensor:
        device = class_labels.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def draw_noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

        x_t = draw_noise()  # (B, C, H, W)
        earlier = None
        previous_timesteps = [*self.timesteps[1:], -1]
        for done, (t, previous) in enumerate(zip(self.timesteps, previous_timesteps), start=1):
            timesteps = torch.full((len(x_t),), t, device=device)
            output = guided_prediction(model, x_t, timesteps, class_labels, self.scale_at(t))
            x_start = self.scheduler.predict_x_start(output.float(), x_t, timesteps)
            if self.clip_x_start:
                x_start = x_start.clamp(-1, 1)
            x_t = self.update(x_start, x_t, t, previous, draw_noise, earlier)
            earlier = (t, x_start)
            if callback is not None:
                callback(done, x_t, x_start)
        return x_t


class DDPMSampler(Sampler):
    """Ancestral sampling, Ho et al. 2020, alg. 2: each step is a draw from the posterior.

    Between kept timesteps the alpha is the ratio of their cumulative alphas.
    """

    def update(self, x_start, x_t, timestep, previous_timestep, draw_noise, earlier):
        """Ho et al. 2020, eq. 6 and 7; the step to the clean image takes no noise."""
        abar_t, abar_prev = self.alpha_bar(timestep), self.alpha_bar(previous_timestep)
        x_start_coef, x_t_coef, variance = posterior_coefficients(abar_t, abar_prev)
        mean = x_start_coef.float() * x_start + x_t_coef.float() * x_t
        return mean if previous_timestep < 0 else mean + variance.sqrt().float() * draw_noise()


@dataclass(eq=False, kw_only=True)
class DDIMSampler(Sampler):
    """Song et al. 2021: eta 0 is deterministic, eta 1 has the variance of DDPM."""

    eta: float = 0.0

    def update(self, x_start, x_t, timestep, previous_timestep, draw_noise, earlier):
        """Song et al. 2021, eq. 12, with the standard deviation of eq. 16.

        The noise is that of x_t under x_start, so that both agree where x_start was clipped.
        """
        abar_t, abar_prev = self.alpha_bar(timestep), self.alpha_bar(previous_timestep)
        sigma = self.eta * posterior_coefficients(abar_t, abar_prev)[2].sqrt()
        noise_coef = (1 - abar_prev - sigma**2).clamp(min=0).sqrt()  # rounding, at eta 1
        noise = (x_t - abar_t.sqrt().float() * x_start) / (1 - abar_t).sqrt().float()
        mean = abar_prev.sqrt().float() * x_start + noise_coef.float() * noise
        if self.eta == 0 or previous_timestep < 0:
            return mean
        return mean + sigma.float() * draw_noise()


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M), Lu et al. 2022: second order, deterministic, for few steps."""

    def half_log_snr(self, timestep: int) -> Tensor:
        """lambda = ln(alpha / sigma) of Lu et al. 2022, 0-dimensional, float64."""
        return 0.5 * torch.logit(self.alpha_bar(timestep))

    def update(self, x_start, x_t, timestep, previous_timestep, draw_noise, earlier):
        """Lu et al. 2022 (DPM-Solver++), alg. 2; first order at the first step and the last.

        Timesteps are even in t, so the step to timestep 0 is many times longer in lambda than the
        one before: extrapolating from that one would overshoot.
        """
        if previous_timestep < 0:
            return x_start  # lambda is infinite there, and the update becomes its data term
        abar_t, abar_prev = self.alpha_bar(timestep), self.alpha_bar(previous_timestep)
        h = self.half_log_snr(previous_timestep) - self.half_log_snr(timestep)
        D = x_start
        if earlier is not None and previous_timestep != self.timesteps[-1]:
            earlier_timestep, earlier_x_start = earlier
            r = (self.half_log_snr(timestep) - self.half_log_snr(earlier_timestep)) / h
            weight = (1 / (2 * r)).float()
            D = (1 + weight) * x_start - weight * earlier_x_start
        x_t_coef = ((1 - abar_prev) / (1 - abar_t)).sqrt()
        D_coef = -abar_prev.sqrt() * torch.expm1(-h)
        return x_t_coef.float() * x_t + D_coef.float() * D


SAMPLERS = {"ddpm": DDPMSampler, "ddim": DDIMSampler, "dpm-solver++": DPMSolverSampler}
