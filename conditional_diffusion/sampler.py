"""Samplers: from noise to pictures by DDPM, DDIM or their second order, with guidance.

All have one signature. Every picture has a generator of its own, so on one kind of device it
depends on its seed and class alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .cuda_graphs import Recording, RecordingError, record
from .memory import in_parts, logger
from .noise_scheduler import CosineNoiseScheduler, posterior_coefficients

# Of the timesteps, where sampling begins: beyond, the log-SNR of a cosine schedule falls so steeply
# that a step there would be a leap (Lu et al. 2022, in their code).
FIRST_TIMESTEP = 0.9946
FEWEST_RECORDED = 20  # steps for which a CUDA graph is made, which takes the time of some


def even_in_time(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Kept timesteps, descending, evenly spaced, with T - 1 and 0 among them ("linspace").

    One step keeps T - 1 alone.
    """
    last = torch.tensor(num_train_timesteps - 1, dtype=torch.float64)
    spaced = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
    return (last * (1 - spaced)).round().long().tolist()


def even_in_log_snr(alphas_cumprod: Tensor, num_inference_steps: int) -> list[int]:
    """Kept timesteps, descending, evenly spaced in log-SNR (Lu et al. 2022, sec. 3.3), down to 0.

    Where whole timesteps are too few for that, as near 0, neighbours are kept: of T steps each.
    alphas_cumprod is that of the schedule, (T,), float64. One step keeps the first alone.
    """
    T, N = len(alphas_cumprod), num_inference_steps
    log_snr = torch.logit(alphas_cumprod.cpu())
    first = max(round(FIRST_TIMESTEP * T), N) - 1
    wanted = torch.lerp(log_snr[first], log_snr[0], torch.linspace(0, 1, N, dtype=torch.float64))
    nearest = (log_snr - wanted[:, None]).abs().argmin(dim=1)
    # kept + step does not rise where kept falls with every step, and N - 1 of it leaves a timestep
    # for each step to come.
    step = torch.arange(N)
    kept = (nearest + step).cummin(dim=0).values.clamp(min=N - 1) - step
    return kept.tolist()


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


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool = True
) -> torch.autocast:
    """torch.autocast with this dtype; None leaves everything in float32."""
    return torch.autocast(
        device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache_enabled
    )


def worth_recording(device: torch.device, steps: int) -> bool:
    return device.type == "cuda" and steps >= FEWEST_RECORDED


class RecordedPredictions:
    """guided_prediction(model, ...) by CUDA graphs, of one shape of x_t at a time.

    What cannot be recorded goes on as it is, said in the log.
    """

    def __init__(self, model: nn.Module, autocast_dtype: torch.dtype | None):
        self.model, self.dtype = model, autocast_dtype
        self.shape: torch.Size | None = None
        self.by_scale: dict[float, Recording | None] = {}

    def __call__(self, x_t, timesteps, class_labels, guidance_scale: float) -> Tensor:
        inputs = x_t, timesteps, class_labels
        if x_t.shape != self.shape:
            self.shape = x_t.shape
            self.by_scale.clear()
        if guidance_scale not in self.by_scale:
            self.by_scale[guidance_scale] = self._record(inputs, guidance_scale)
        if recording := self.by_scale[guidance_scale]:
            return recording(*inputs)[0].clone()  # a step may keep it
        return guided_prediction(self.model, *inputs, guidance_scale)

    def _record(self, inputs: Sequence[Tensor], guidance_scale: float) -> Recording | None:
        x_t, timesteps, class_labels = inputs

        def work(*inputs: Tensor) -> list[Tensor]:
            # Without the cache, because cast weights in it would not stay where they are.
            with autocast(x_t.device, self.dtype, cache_enabled=False):
                return [guided_prediction(self.model, *inputs, guidance_scale)]

        other = x_t.flip(-1), torch.zeros_like(timesteps), class_labels.roll(1)
        try:
            return record(work, other, inputs)
        except RecordingError as error:
            logger.warning("sampling goes on without CUDA graphs (%s)", error)
            return None


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
    num_inference_steps: int  # kept timesteps
    guidance_scale: float = 1.0  # see guided_prediction
    # (low, high) in fractions of the chain, 0 the clean end; timesteps outside are not guided,
    # which also halves their cost (Kynkaanniemi et al. 2024, sec. 3).
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    clip_x_start: bool = True  # the predicted clean image to [-1, 1], the only clamp there is
    autocast_dtype: torch.dtype | None = None  # as of TrainingEngine; the state stays float32
    cuda_graphs: bool = False  # on CUDA the network by CUDA graphs, if there are enough steps

    def __post_init__(self):
        T, N = self.scheduler.num_train_timesteps, self.num_inference_steps
        if not 1 <= N <= T:
            raise ValueError(f"num_inference_steps must lie in 1..{T}, not {N}")
        self.timesteps = self.kept_timesteps()

    def kept_timesteps(self) -> list[int]:
        return even_in_time(self.scheduler.num_train_timesteps, self.num_inference_steps)

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
        device, predict = class_labels.device, partial(guided_prediction, model)
        if self.cuda_graphs and worth_recording(device, len(self.timesteps)):
            predict = RecordedPredictions(model, self.autocast_dtype)

        @torch.no_grad()
        def draw(part: slice) -> Tensor:
            # One autocast for all steps: it casts weights that require gradients only once.
            with evaluating(model), autocast(device, self.autocast_dtype):
                return self._sample_batch(predict, class_labels[part], shape, seeds[part], callback)

        return in_parts(draw, len(seeds), batch_size or len(seeds), "pictures")

    def _sample_batch(self, predict, class_labels, shape, seeds, callback) -> Tensor:
        device = class_labels.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def draw_noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

        x_t = draw_noise()  # (B, C, H, W)
        earlier = None
        previous_timesteps = [*self.timesteps[1:], -1]
        for done, (t, previous) in enumerate(zip(self.timesteps, previous_timesteps), start=1):
            timesteps = torch.full((len(x_t),), t, device=device)
            output = predict(x_t, timesteps, class_labels, self.scale_at(t))
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


class SecondOrder(Sampler):
    """What "2M" of Lu et al. 2022 (DPM-Solver++), alg. 2, adds to a sampler of first order.

    That one takes the predicted image for constant during a step, this for linear in lambda, in
    which its steps are of one length.
    """

    def kept_timesteps(self):
        return even_in_log_snr(self.scheduler.alphas_cumprod_float64, self.num_inference_steps)

    def half_log_snr(self, timestep: int) -> Tensor:
        """lambda = ln(alpha / sigma) of Lu et al. 2022, 0-dimensional, float64."""
        return 0.5 * torch.logit(self.alpha_bar(timestep))

    def update(self, x_start, x_t, timestep, previous_timestep, draw_noise, earlier):
        """The step of first order from the predicted image at its middle, by extrapolation.

        Not at the first step, which knows of no other, nor at the last, where lambda is infinite.
        """
        if earlier is not None and previous_timestep >= 0:
            earlier_timestep, earlier_x_start = earlier
            now = self.half_log_snr(timestep)
            h = self.half_log_snr(previous_timestep) - now
            weight = (h / (now - self.half_log_snr(earlier_timestep)) / 2).float()
            x_start = (1 + weight) * x_start - weight * earlier_x_start
        return super().update(x_start, x_t, timestep, previous_timestep, draw_noise, earlier)


class DPMSolverSampler(SecondOrder, DDIMSampler):
    """DPM-Solver++(2M), Lu et al. 2022: deterministic, for few steps; of first order it is DDIM."""


class SDEDPMSolverSampler(SecondOrder, DDPMSampler):
    """SDE-DPM-Solver++(2M), Lu et al. 2022: of first order it is DDPM, which needs more steps."""


SAMPLERS = {
    "ddpm": DDPMSampler, "ddim": DDIMSampler,
    "dpm-solver++": DPMSolverSampler, "sde-dpm-solver++": SDEDPMSolverSampler,
}
