"""The Wiener filter against least squares, closed forms and a plain cosine transform."""

import math

import pytest
import torch
from torch.testing import assert_close

from conditional_diffusion.wiener import (
    WienerFilter,
    dct_matrix,
    linear_prediction,
)


def gaussian(std: float, alphas_cumprod: float, prediction_type: str, n: int = 200_000):
    """(x_t, target) of independent values with this std under this much noise, float64 (n,)."""
    generator = torch.Generator().manual_seed(0)
    values, noise = torch.randn(2, n, dtype=torch.float64, generator=generator)
    values, a, b = values * std, math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)
    targets = {"epsilon": noise, "sample": values, "v_prediction": a * noise - b * values}
    return a * values + b * noise, targets[prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("alphas_cumprod", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("std", [0.01, 0.5, 2.0])
def test_linear_prediction_is_that_of_least_squares(std, alphas_cumprod, prediction_type):
    x_t, target = gaussian(std, alphas_cumprod, prediction_type)
    found = linear_prediction(
        torch.tensor(alphas_cumprod).double(), torch.tensor(std).double(), prediction_type
    )
    slope = (x_t @ target) / (x_t @ x_t)
    residual = target - slope * x_t
    # n = 200000: five standard errors are a little more than 0.01 of the spread.
    assert abs(found[0] - slope) * x_t.std() < 0.012 * target.std()
    assert found[1].item() == pytest.approx(residual.std().item(), rel=0.02)


def test_linear_prediction_of_v_for_unit_data_is_nothing():
    """Salimans & Ho 2022: v of unit-variance data has unit variance and no correlation with x."""
    abar = torch.linspace(0.001, 0.999, 9)
    slope, error = linear_prediction(abar, torch.ones(()), "v_prediction")
    for found, expected in ((slope, 0.0), (error, 1.0)):
        assert_close(found, torch.full_like(abar, expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_cosine_transform_is_orthonormal_and_orders_frequencies(size):
    matrix = dct_matrix(size)
    assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    # Row k changes its sign k times.
    assert (matrix.sign().diff(dim=1) != 0).sum(1).tolist() == list(range(size))


@pytest.fixture
def make(schedule):
    def build(prediction_type="v_prediction", size=8, largest_unit=2.0):
        return WienerFilter(schedule().alphas_cumprod, prediction_type, size, 3, largest_unit)

    return build


def images(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)


def test_spectrum_is_undone_and_keeps_the_length(make):
    wiener, x = make(), images(2)
    spectrum = wiener.spectrum(x)
    assert_close(wiener.picture(spectrum), x, rtol=0, atol=1e-5)
    assert_close(spectrum.norm(), x.norm())


def test_a_pattern_has_its_power_at_its_own_frequency(make):
    wiener = make()
    rows = torch.cos(math.pi / 8 * (torch.arange(8) + 0.5) * 3).view(1, 1, 8, 1)
    grey = rows.expand(5, 3, 8, 8) * 2
    red_blue = rows.expand(5, 1, 8, 8) * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    for pictures, place in ((grey, (0, 3, 0)), (red_blue, (1, 3, 0))):
        wiener.measure(pictures)
        assert wiener.std[place].item() == pytest.approx(pictures[0].norm().item(), rel=1e-5)
        rest = wiener.std.clone()
        rest[place] = 1e-3
        assert_close(rest, torch.full_like(rest, 1e-3))  # the least there is


def test_measured_power_is_the_mean_over_all_images(make):
    wiener, x = make(), images(100)  # more than are looked at together
    wiener.measure(x)
    expected = torch.stack([wiener.spectrum(image[None])[0] for image in x]).square().mean(0)
    assert_close(wiener.std, expected.sqrt())


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_guess_is_the_best_linear_one(make, schedule, prediction_type):
    """On stationary Gaussian pictures no linear function of x_t comes nearer to the target."""
    scheduler = schedule(prediction_type=prediction_type)
    wiener = make(prediction_type)
    shape = torch.linspace(2, 0.05, 3 * 64).view(3, 8, 8)
    x_start = wiener.picture(shape * wiener.spectrum(images(4000)))
    wiener.measure(x_start)
    noise, timesteps = images(4000, seed=1), torch.full((4000,), 20)
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    target = scheduler.training_target(x_start, noise, timesteps)
    guess = wiener(x_t, timesteps, torch.zeros_like(x_t))
    error = (guess - target).square().mean()
    # The same data decide on the best matrix: it fits them slightly better, by 192 / 4000.
    best = torch.linalg.lstsq(x_t.flatten(1).double(), target.flatten(1).double()).solution
    least = (x_t.flatten(1).double() @ best - target.flatten(1).double()).square().mean()
    assert 0.98 * least <= error <= 1.08 * least


def test_linear_path_stays_in_full_precision_under_autocast(make):
    """bfloat16 would leave three digits of the noise that has to cancel."""
    wiener, x_t, timesteps = make(), images(3), torch.tensor([0, 20, 49])
    wiener.measure(0.01 * images(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = wiener(x_t, timesteps, x_t)
    assert output.dtype == torch.float32
    assert torch.equal(output, wiener(x_t, timesteps, x_t))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("strength", [0.3, 8.0])
def test_rest_counts_in_units_of_what_the_guess_leaves_open(
    make, schedule, prediction_type, strength
):
    """Guess and a rest of unit variance have the spread of the target, where units are not cut."""
    scheduler, wiener = schedule(prediction_type=prediction_type), make(prediction_type)
    x_start, noise, rest = strength * images(4000), images(4000, seed=1), images(4000, seed=2)
    wiener.measure(x_start)
    timesteps = torch.full((4000,), 20)
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    guess = wiener(x_t, timesteps, torch.zeros_like(x_t))
    open_ = (scheduler.training_target(x_start, noise, timesteps) - guess).std()
    unit = (wiener(x_t, timesteps, rest) - guess).std()
    assert unit.item() == pytest.approx(min(open_.item(), 2.0), rel=0.02)


def test_large_units_are_cut(schedule):
    """v of data eight times as strong: what the guess leaves open is 8 / sqrt(variance of x_t)."""
    abar = schedule().alphas_cumprod
    wiener = WienerFilter(abar, "v_prediction", 8, 3, 2.0)
    wiener.std.fill_(8.0)
    rest = images(1)
    opened = [8 / math.sqrt(64 * abar[t] + 1 - abar[t]) for t in (20, 45)]
    assert opened[0] < 2 < opened[1]
    for t, error in zip((20, 45), opened):
        found = wiener(torch.zeros_like(rest), torch.tensor([t]), rest)
        assert_close(found, min(error, 2.0) * rest, rtol=1e-4, atol=1e-4)


def test_units_are_those_of_each_frequency(make):
    wiener, x_t = make(), torch.zeros(1, 3, 8, 8)
    wiener.std.fill_(1e-3)
    wiener.std[0, 2, 1] = 1.0
    timesteps, flat = torch.tensor([20]), torch.ones(1, 3, 8, 8)
    found = wiener.spectrum(wiener(x_t, timesteps, wiener.picture(flat)))[0]
    a = wiener.alphas_cumprod[20].item()
    assert found[0, 2, 1].item() == pytest.approx(1.0, rel=1e-4)
    small = 1e-3 / math.sqrt(a * 1e-6 + 1 - a)  # of v_prediction
    assert found[1, 5, 5].item() == pytest.approx(small, rel=0.01)
