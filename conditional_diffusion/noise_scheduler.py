"""The cosine noise schedule: forward process, training targets and DDPM posterior.

Timesteps are integers 0..T-1 and index 0 already carries one step of noise. The schedule is
computed in float64 and stored as float32 buffers.
"""

import math

import torch
from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def cosine_alphas_cumprod(
    num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999
) -> Tensor:
    """alphas_cumprod of Nichol & Dhariwal 2021, eq. 17, float64 (T,); betas capped at max_beta."""
    steps = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((steps + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    return torch.cumprod(1 - betas, dim=0)


def shift_log_snr(alphas_cumprod: Tensor, shift: float) -> Tensor:
    """Add `shift` to logSNR = ln(abar / (1 - abar)) at every timestep (Hoogeboom et al. 2023)."""
    return torch.sigmoid(torch.logit(alphas_cumprod) + shift)


def posterior_coefficients(abar_t: Tensor, abar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of q(x_prev | x_t, x_start), Ho et al. 2020, eq. 6 and 7.

    The two cumulative alphas may lie any number of steps apart: the alpha between them is their
    ratio, which is what makes respaced sampling exact. Returns (coefficient of x_start,
    coefficient of x_t, variance), each of the shape of the inputs.
    """
    alpha = abar_t / abar_prev
    beta = 1 - alpha
    x_start_coef = abar_prev.sqrt() * beta / (1 - abar_t)
    x_t_coef = alpha.sqrt() * (1 - abar_prev) / (1 - abar_t)
    variance = beta * (1 - abar_prev) / (1 - abar_t)
    return x_start_coef, x_t_coef, variance


class CosineNoiseScheduler(nn.Module):
    """Cosine schedule as a module of buffers, so that `.to(device)` moves it.

    Args:
        num_train_timesteps: T.
        image_size, reference_size: the schedule is that of Nichol & Dhariwal for images of
            reference_size, shifted by 2 ln(reference_size / image_size) in logSNR so that enlarged
            images lose their content at the same pace (Hoogeboom et al. 2023, eq. 4). Equal sizes,
            or none given, leave it unchanged.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
    """

    alphas_cumprod: Tensor  # (T,)
    snr: Tensor  # (T,), the signal-to-noise ratio abar / (1 - abar)

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        *,
        image_size: int | None = None,
        reference_size: int | None = None,
        prediction_type: str = "v_prediction",
    ):
        super().__init__()
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, not {num_train_timesteps}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {PREDICTION_TYPES}, not {prediction_type!r}"
            )
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type

        abar = cosine_alphas_cumprod(num_train_timesteps)
        if image_size and reference_size and image_size != reference_size:
            abar = shift_log_snr(abar, 2 * math.log(reference_size / image_size))
        # Sampling derives its coefficients from this one, where float32 would cost digits. Not a
        # buffer: it stays where it is made, on a CPU, where a GPU pays no kernels for them.
        self.alphas_cumprod_float64 = abar
        tables = {
            "alphas_cumprod": abar,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "snr": abar / (1 - abar),
        }
        for name, table in tables.items():
            # Derived from the config, hence not part of a checkpoint.
            self.register_buffer(name, table.float(), persistent=False)

    def rates(self, timesteps: Tensor, like: Tensor) -> list[Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at timesteps (B,), each (B, 1, ..., 1) to suit `like`."""
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return [table[timesteps].view(-1, *[1] * (like.ndim - 1)) for table in tables]

    def add_noise(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_start), Ho et al. 2020, eq. 4. Tensors (B, ...), timesteps (B,)."""
        signal, sigma = self.rates(timesteps, x_start)
        return signal * x_start + sigma * noise

    def get_velocity(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x_start, Salimans & Ho 2022, app. D."""
        signal, sigma = self.rates(timesteps, x_start)
        return signal * noise - sigma * x_start

    def training_target(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict from x_t under this prediction_type, shape of x_start."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        return self.get_velocity(x_start, noise, timesteps)

    def predict_x_start(self, model_output: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """x_start implied by the network's output at x_t: eq. 4 of Ho et al. solved for it."""
        signal, sigma = self.rates(timesteps, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * model_output) / signal
        if self.prediction_type == "sample":
            return model_output
        return signal * x_t - sigma * model_output
