"""Scores of pictures against the images a model was trained on."""

import torch
from torch import Tensor

PEAK = 2.0  # of images in [-1, 1]


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(peak^2 / mse), for images in [-1, 1]."""
    return 10 * torch.log10(PEAK**2 / mean_squared_error)


def nearest_images(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture (N, C, H, W) its nearest reference (M, C, H, W) by mean squared error.

    Returns (index int64 (N,), PSNR in dB float32 (N,)).
    """
    errors = torch.stack([((references - p) ** 2).flatten(1).mean(1) for p in pictures])  # (N, M)
    best = errors.min(dim=1)
    return best.indices, psnr(best.values)
