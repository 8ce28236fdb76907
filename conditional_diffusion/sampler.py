"""The DDPM sampler: from noise to pictures in any number of steps, with guidance.

Every picture has a generator of its own, so it depends on its seed and class alone.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .memory import MEMORY_ERRORS, OutOfMemory, logger, reraise_unless_out_of_memory
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


def ddpm_step(
    scheduler: CosineNoiseScheduler,
    x_start: Tensor,
    x_t: Tensor,
    timestep: int,
    previous_timestep: int,
    noise: Tensor | None,
) -> Tensor:
    """A draw from q(x_prev | x_t, x_start), Ho et al. 2020, eq. 6 and 7, tensors (B, C, H, W).

    previous_timestep is the next kept, smaller timestep, or -1 for the clean image, which takes no
    noise. The alpha between the two is the ratio of their cumulative alphas.
    """
    alphas_cumprod = scheduler.alphas_cumprod_float64
    abar_t = alphas_cumprod[timestep]
    abar_prev = alphas_cumprod[previous_timestep] if previous_timestep >= 0 else abar_t.new_ones(())
    x_start_coef, x_t_coef, variance = posterior_coefficients(abar_t, abar_prev)
    mean = x_start_coef.float() * x_start + x_t_coef.float() * x_t
    return mean if noise is None else mean + variance.sqrt().float() * noise


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside, the mode it had before outside."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def smaller_batch(batch_size: int) -> int:
    """Half the batch, said aloud; OutOfMemory if it was a single picture."""
    if batch_size == 1:
        raise OutOfMemory("out of memory while drawing a single picture; use another device")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("out of memory: drawing %d pictures at a time", batch_size // 2)
    return batch_size // 2


class DDPMSampler:
    """Ancestral sampling (Ho et al. 2020, alg. 2) over evenly spaced timesteps.

    Args:
        scheduler: the schedule the model was trained with.
        num_inference_steps: kept timesteps; T gives the original chain.
        guidance_scale: see guided_prediction.
        clip_x_start: clip the predicted clean image to [-1, 1], the only clamp there is.
    """

    def __init__(
        self,
        scheduler: CosineNoiseScheduler,
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        clip_x_start: bool = True,
    ):
        self.scheduler = scheduler
        self.timesteps = inference_timesteps(scheduler.num_train_timesteps, num_inference_steps)
        self.guidance_scale = guidance_scale
        self.clip_x_start = clip_x_start

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        class_labels: Tensor,
        shape: tuple[int, int, int],
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Pictures (N, *shape) in [-1, 1] where clipped, float32, on the device of class_labels.

        Args:
            model: `model(x_t, timesteps, class_labels)`, with `null_label` if guided.
            class_labels: int64 (N,).
            shape: (C, H, W).
            seeds: one per picture; it fixes the picture whatever else is drawn with it.
            batch_size: pictures denoised together; None means all.
            callback: called with (steps done in this batch, x_t) after each step.
        """
        batch_size = batch_size or len(seeds)
        pictures: list[Tensor] = []
        with evaluating(model):
            while (start := sum(map(len, pictures))) < len(seeds):
                part = slice(start, start + batch_size)
                try:
                    batch = self._sample_batch(
                        model, class_labels[part], shape, seeds[part], callback
                    )
                except MEMORY_ERRORS as error:
                    reraise_unless_out_of_memory(error)
                    batch_size = smaller_batch(min(batch_size, len(seeds)))
                else:
                    pictures.append(batch)
        return torch.cat(pictures)

    def _sample_batch(self, model, class_labels, shape, seeds, callback) -> Tensor:
        device = class_labels.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def draw_noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

        x_t = draw_noise()  # (B, C, H, W)
        previous_timesteps = [*self.timesteps[1:], -1]
        for done, (t, previous) in enumerate(zip(self.timesteps, previous_timesteps), start=1):
            timesteps = torch.full((len(x_t),), t, device=device)
            output = guided_prediction(model, x_t, timesteps, class_labels, self.guidance_scale)
            x_start = self.scheduler.predict_x_start(output.float(), x_t, timesteps)
            if self.clip_x_start:
                x_start = x_start.clamp(-1, 1)
            noise = draw_noise() if previous >= 0 else None
            x_t = ddpm_step(self.scheduler, x_start, x_t, t, previous, noise)
            if callback is not None:
                callback(done, x_t)
        return x_t
