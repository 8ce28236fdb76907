"""The Wiener filter: the network learns only what the best linear guess leaves open.

Pictures are far from white: in enlarged ones nearly all the power lies in a few low frequencies,
and in brightness rather than colour. Given the power of every frequency of the data, the training
target has a best linear guess from x_t in closed form. This is c_skip of Karras et al. 2022,
sec. 5, with one sigma_data per frequency instead of one for all, and the error of the guess is its
c_out.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALLEST_STD = 1e-3  # of a frequency: data may lack it, a network must still be able to draw it


def root_mean_square(
    frequencies: Callable[[Tensor], Tensor], x_start: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """Of the frequencies of images (N, ...), over these dimensions; at least SMALLEST_STD."""
    # A few images at a time: their frequencies take several times their memory.
    squares = sum(frequencies(part).square().mean(dims) * len(part) for part in x_start.split(64))
    return (squares / len(x_start)).sqrt().clamp(min=SMALLEST_STD)


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II (size, size), float64: row k is the cosine of frequency k."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def linear_prediction(
    alphas_cumprod: Tensor, std: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The best linear guess of the training target from x_t alone, and what it leaves open.

    For a quantity c of mean 0 and this std, seen as x = a c + b n with a^2 = alphas_cumprod, b^2 =
    1 - a^2 and n of unit variance, the target is p c + q n. Then

        variance of x:  V = a^2 std^2 + b^2
        guess:          x (p a std^2 + q b) / V
        its error:      std |p b - q a| / sqrt(V), as a standard deviation.

    Returns (factor of x, error), the shapes broadcast.
    """
    a, b = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    p, q = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-b, a)}[prediction_type]
    variance = a**2 * std**2 + b**2
    slope = (p * a * std**2 + q * b) / variance
    return slope, std * abs(p * b - q * a) / variance.sqrt()


class WienerFilter(nn.Module):
    """Guesses the training target from pictures x_t (B, C, S, S), and adds what a network knows.

    Until `measure` has seen data, every frequency counts as of unit variance.

    Args:
        alphas_cumprod: of the noise schedule, (T,).
        prediction_type: the training target, as of CosineNoiseScheduler.
        image_size: S. channels: C.
        largest_unit: in larger ones a small step of the network would be a leap in the few
            frequencies of which most is open, the lowest.
    """

    std: Tensor  # (C, S, S), by frequency of colour, row and column

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str,
        image_size: int,
        channels: int,
        largest_unit: float,
    ):
        super().__init__()
        self.prediction_type, self.largest_unit = prediction_type, largest_unit
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.register_buffer("space", dct_matrix(image_size).float(), persistent=False)
        self.register_buffer("colour", dct_matrix(channels).float(), persistent=False)
        self.register_buffer("std", torch.ones(channels, image_size, image_size))

    def spectrum(self, x: Tensor) -> Tensor:
        """Frequencies of x, of the same shape (B, C, S, S); white noise stays white noise."""
        x = torch.einsum("kc,bchw->bkhw", self.colour, x)
        return self.space @ x @ self.space.T

    def picture(self, spectrum: Tensor) -> Tensor:
        """Inverse of spectrum."""
        x = self.space.T @ spectrum @ self.space
        return torch.einsum("kc,bkhw->bchw", self.colour, x)

    @torch.no_grad()
    def measure(self, x_start: Tensor) -> None:
        """Take the power of each frequency from images (N, C, S, S)."""
        self.std.copy_(root_mean_square(self.spectrum, x_start, (0,)))

    def forward(self, x_t: Tensor, timesteps: Tensor, rest: Tensor) -> Tensor:
        """The best linear guess from x_t, plus the rest in units of the guess's error.

        x_t, rest and the result, which is float32, are pictures (B, C, S, S). The units are
        those of each frequency, at most largest_unit.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        slope, error = linear_prediction(alphas_cumprod, self.std, self.prediction_type)
        unit = error.clamp(max=self.largest_unit)
        # Most of the guess may be the input's own noise, which has to cancel: no autocast.
        with torch.autocast(x_t.device.type, enabled=False):
            spectrum = slope * self.spectrum(x_t.float()) + unit * self.spectrum(rest.float())
            return self.picture(spectrum)
