"""The mathematics of scores: what pictures or their features say about samples.

Features are whatever a classifier makes of a picture, one row each; images are uint8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # rows of a distance matrix held at a time
NEIGHBOURS, COPY_RATIO = 50, 0.5  # n and alpha of Carlini et al. 2023, sec. 5.1


@dataclass(frozen=True)
class Neighbours:
    """index int64 (N, k) and distances float32 (N, k) of the nearest rows, nearest first."""

    index: Tensor
    distances: Tensor


def nearest(rows: Tensor, references: Tensor, k: int) -> Neighbours:
    """The k nearest references (M, D) of each row (N, D) by Euclidean distance, on the CPU."""
    k, references = min(k, len(references)), references.float().to(rows.device)
    indices, distances = [], []
    for chunk in rows.float().split(CHUNK):
        # A matrix product finds them; where they are small such distances lack digits, so the few
        # that count are measured again.
        index = torch.cdist(chunk, references).topk(k, largest=False).indices  # (n, k)
        exact = (references[index] - chunk[:, None]).norm(dim=2)
        exact, order = exact.sort(dim=1)
        indices.append(index.gather(1, order).cpu())
        distances.append(exact.cpu())
    return Neighbours(torch.cat(indices), torch.cat(distances))


def nearest_images(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture (N, C, H, W) its nearest reference (M, C, H, W) by mean squared error.

    Returns (index int64 (N,), peak signal-to-noise ratio in dB float32 (N,)), both on the CPU. The
    ratio is 10 log10(peak^2 / error), the peak of images in [-1, 1] being 2.
    """
    found = nearest(pictures.flatten(1), references.flatten(1), 1)
    squares = found.distances[:, 0].square() / pictures[0].numel()
    return found.index[:, 0], 10 * torch.log10(4 / squares)


def near_copies(neighbours: Neighbours) -> Tensor:
    """Whether each row is suspiciously near to one reference, bool (N,).

    Its nearest one lies within COPY_RATIO of the mean distance of its nearest NEIGHBOURS, which
    adapts to dense and sparse regions (Carlini et al. 2023, sec. 5.1).
    """
    distances = neighbours.distances
    return distances[:, 0] < COPY_RATIO * distances.mean(dim=1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features (N, D) and (M, D), as Gaussians, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, eq. 6. The trace of the root is
    the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which exists for singular
    covariances too. Needs at least two rows each.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least two rows")
    first, second = first.double(), second.double()
    shift = first.mean(0) - second.mean(0)
    C1, C2 = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(C1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Rounding leaves eigenvalues that are zero slightly negative.
    cross = torch.linalg.eigvalsh(root @ C2 @ root).clamp(min=0).sqrt().sum()
    return (shift.square().sum() + C1.trace() + C2.trace() - 2 * cross).item()


def confusion_matrix(wanted: Tensor, found: Tensor, num_classes: int) -> Tensor:
    """Counts int64 (num_classes, num_classes): row the wanted class, column the found one."""
    flat = torch.bincount(wanted * num_classes + found, minlength=num_classes**2)
    return flat.view(num_classes, num_classes)


def colour_statistics(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of red, green and blue over images uint8 (N, 3, H, W)."""
    counts = [colour.flatten().bincount(minlength=256) for colour in images.unbind(1)]
    share, levels = torch.stack(counts).double(), torch.arange(256).double()
    share /= share.sum(1, keepdim=True)  # (3, 256)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist()}
