"""Scores against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from scores import (
    NEIGHBOURS,
    Neighbours,
    colour_statistics,
    confusion_matrix,
    frechet_distance,
    near_copies,
    nearest,
    nearest_images,
)


def rows_with(mean, covariance, n=50):
    """n rows whose sample mean and sample covariance are exactly these."""
    z = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    root = torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64))
    return z @ root.T + torch.as_tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_gaussians_with_independent_components():
    first = rows_with([0.0, 1.0, 2.0], np.diag([4.0, 1.0, 9.0]))
    second = rows_with([1.0, 1.0, 0.0], np.diag([1.0, 1.0, 16.0]))
    # |m1 - m2|^2 + sum (s1 - s2)^2
    expected = (1 + 4) + ((2 - 1) ** 2 + 0 + (3 - 4) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_correlated_gaussians():
    """The trace of the root from the eigenvalues of the product itself, which need not commute."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 5, 5))
    C1, C2 = a @ a.T + np.eye(5), b @ b.T + np.eye(5)
    assert not np.allclose(C1 @ C2, C2 @ C1)
    mean = generator.normal(size=5)
    root = np.sqrt(np.linalg.eigvals(C1 @ C2)).sum()
    expected = mean @ mean + np.trace(C1 + C2) - 2 * root.real
    found = frechet_distance(rows_with(mean, C1), rows_with(np.zeros(5), C2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_rows_than_dimensions():
    rows = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    # The same cloud moved: only the mean counts.
    assert frechet_distance(rows, rows + 0.5) == pytest.approx(20 * 0.25, rel=1e-5)
    # Of others the trace of the root is the nuclear norm of the product of the centred rows.
    others = torch.rand(7, 20, generator=torch.Generator().manual_seed(1))
    a, b = ((x - x.mean(0)).double() / math.sqrt(len(x) - 1) for x in (rows, others))
    expected = (rows.mean(0) - others.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert frechet_distance(rows, others) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(rows[:1], rows)


def test_nearest_rows_are_those_of_a_plain_search():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 6, generator=generator)  # more than one chunk
    references = torch.randn(40, 6, generator=generator)
    found = nearest(rows, references, 3)
    for row, index, distances in zip(rows, found.index, found.distances):
        every = [math.dist(row.tolist(), reference.tolist()) for reference in references]
        wanted = sorted(range(40), key=every.__getitem__)[:3]
        assert index.tolist() == wanted
        assert_close(distances, torch.tensor([every[i] for i in wanted]), rtol=1e-4, atol=1e-4)
    assert nearest(rows, references, 99).index.shape == (300, 40)


def test_nearest_image_and_its_psnr():
    references = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = references[[4, 2]] + 0.01
    index, decibels = nearest_images(pictures, references)
    assert index.tolist() == [4, 2]
    # A constant error of 0.01 where the peak is 2.
    assert_close(decibels, torch.full((2,), 20 * math.log10(2 / 0.01)), rtol=0, atol=0.01)


def test_a_copy_is_much_nearer_than_its_neighbourhood():
    distances = torch.tensor([
        [0.1, 1.0, 1.0, 1.0],  # one reference hit, the others far
        [0.9, 1.0, 1.0, 1.0],  # an ordinary place
        [0.1, 0.1, 0.1, 0.1],  # near to all of a dense place
        [0.0, 1.0, 1.0, 1.0],
    ])
    index = torch.zeros(4, 4, dtype=torch.long)
    assert near_copies(Neighbours(index, distances)).tolist() == [True, False, False, True]


def test_confusion_by_hand():
    wanted, found = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 2, 2, 2])
    assert confusion_matrix(wanted, found, 3).tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 1]]


def test_colours_are_those_of_numpy():
    images = torch.randint(0, 256, (300, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    images[:, 2] = 7
    found = colour_statistics(images.byte())
    values = images.numpy().astype(np.float64)
    assert found["mean"] == pytest.approx(values.mean((0, 2, 3)))
    assert found["std"] == pytest.approx(values.std((0, 2, 3)))


def test_a_copy_is_nearer_than_half_the_mean_of_fifty_neighbours():
    assert NEIGHBOURS == 50
    # Half the means of these rows are 0.4275 and 0.43.
    distances = torch.tensor([[0.42, 1.0, 1.0, 1.0], [0.44, 1.0, 1.0, 1.0]])
    found = near_copies(Neighbours(torch.zeros(2, 4).long(), distances))
    assert found.tolist() == [True, False]


def test_small_distances_far_from_the_origin_keep_their_digits():
    rows = 100 + torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    found = nearest(rows + 1e-3, rows, 1)
    assert found.index[:, 0].tolist() == list(range(40))
    assert_close(found.distances[:, 0], torch.full((40,), 8e-3), rtol=0.01, atol=0)
