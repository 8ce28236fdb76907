"""The noise schedule against formulas written out here, in float64 and plain Python."""

import math

import pytest
import torch
from torch.testing import assert_close

from conditional_diffusion import CosineNoiseScheduler
from conditional_diffusion.noise_scheduler import posterior_coefficients

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def published_alphas_cumprod(T: int) -> list[float]:
    """Nichol & Dhariwal 2021, eq. 17 and the cap below it, one number at a time."""

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    product, products = 1.0, []
    for t in range(1, T + 1):
        product *= 1 - min(1 - f(t) / f(t - 1), 0.999)
        products.append(product)
    return products


def log_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    return alphas_cumprod.double().log() - (1 - alphas_cumprod.double()).log()


@pytest.mark.parametrize("T", [1, 2, 50, 1000, 4000])
def test_alphas_cumprod_is_the_published_cosine(T):
    expected = torch.tensor(published_alphas_cumprod(T), dtype=torch.float64)
    actual = CosineNoiseScheduler(T).alphas_cumprod
    assert actual.dtype == torch.float32  # stored, after a product in float64
    assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_stored_snr_follows_from_alphas_cumprod_and_beta_is_capped():
    scheduler = CosineNoiseScheduler(50)
    abar = torch.tensor(published_alphas_cumprod(50), dtype=torch.float64)
    before_last, last = scheduler.alphas_cumprod_float64[-2:].tolist()
    assert 1 - last / before_last == pytest.approx(0.999, rel=1e-9)  # the cap acts at the end
    t = torch.tensor([49, 0, 20])
    assert_close(scheduler.snr[t].double(), (abar / (1 - abar))[t], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("image_size", "reference_size"), [(128, 32), (64, 32), (16, 32)])
def test_resolution_shift_moves_log_snr_by_a_constant(image_size, reference_size):
    # Hoogeboom et al. 2023, eq. 4. The float32 table knows abar near 1 to 6e-8, where 1 - abar is
    # as small as 1e-5.
    plain = log_snr(torch.tensor(published_alphas_cumprod(1000), dtype=torch.float64))
    shifted = CosineNoiseScheduler(1000, image_size=image_size, reference_size=reference_size)
    shift = 2 * math.log(reference_size / image_size)
    assert_close(log_snr(shifted.alphas_cumprod), plain + shift, rtol=0, atol=1e-2)
    assert_close(log_snr(shifted.alphas_cumprod)[100:], plain[100:] + shift, rtol=0, atol=1e-4)
    # The ratio of the two SNRs keeps its precision in the snr table: (reference / image)^2.
    ratio = shifted.snr.double() / plain.exp()
    assert_close(ratio, torch.full_like(ratio, (reference_size / image_size) ** 2),
                 rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [{}, {"image_size": 64, "reference_size": 64}])
def test_schedule_is_unchanged_without_a_difference_in_size(sizes):
    expected = torch.tensor(published_alphas_cumprod(50), dtype=torch.float64)
    actual = CosineNoiseScheduler(50, **sizes).alphas_cumprod
    assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_forward_process_and_targets_on_numbers_done_by_hand():
    """abar forced to 0.64 and 0.36, so that signal and noise take the factors 0.8 and 0.6."""
    scheduler = CosineNoiseScheduler(2)
    for name, values in {
        "sqrt_alphas_cumprod": (0.8, 0.6), "sqrt_one_minus_alphas_cumprod": (0.6, 0.8),
    }.items():
        getattr(scheduler, name).copy_(torch.tensor(values))
    x_start = torch.tensor([1.0, -0.5]).view(2, 1, 1, 1)
    noise = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1)
    t = torch.tensor([0, 1])
    # t = 0: 0.8 * 1 + 0.6 * 2 = 2 and v = 0.8 * 2 - 0.6 * 1 = 1.
    # t = 1: 0.6 * -0.5 + 0.8 * 1 = 0.5 and v = 0.6 * 1 - 0.8 * -0.5 = 1.
    assert_close(scheduler.add_noise(x_start, noise, t).flatten(), torch.tensor([2.0, 0.5]))
    assert_close(scheduler.get_velocity(x_start, noise, t).flatten(), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_start_comes_back_from_x_t_and_target(prediction_type):
    scheduler = CosineNoiseScheduler(1000, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 250, 500, 750, 950])
    x_start = torch.rand(6, 3, 4, 5, generator=generator) * 2 - 1
    noise = torch.randn(6, 3, 4, 5, generator=generator)
    x_t = scheduler.add_noise(x_start, noise, t)
    target = scheduler.training_target(x_start, noise, t)
    # Rounding is amplified by 1 / sqrt(abar) <= 13 for epsilon at t = 950, and by
    # 1 / sqrt(1 - abar) <= 156 for sample at t = 0: 156 * 6e-8 * |x_t| < 1e-4.
    assert_close(scheduler.predict_x_start(target, x_t, t), x_start, rtol=0, atol=1e-4)
    expected = {"epsilon": noise, "sample": x_start,
                "v_prediction": scheduler.get_velocity(x_start, noise, t)}
    assert_close(target, expected[prediction_type], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("t", "previous"), [(1, 0), (30, 29), (49, 48), (30, 10), (49, 0), (40, 3)]
)
def test_posterior_is_bayes_rule_on_scalar_gaussians(t, previous):
    """p(x_prev | x_t, x_start) from prior and likelihood by adding precisions, no DDPM formula."""
    abar = published_alphas_cumprod(50)
    x_start, x_t = 0.7, -1.3
    alpha = math.prod(  # of the steps between the two, one by one
        abar[i] / abar[i - 1] for i in range(previous + 1, t + 1)
    )
    prior_mean, prior_precision = math.sqrt(abar[previous]) * x_start, 1 / (1 - abar[previous])
    likelihood_precision = alpha / (1 - alpha)  # of x_prev, from x_t ~ N(sqrt(alpha) x_prev, .)
    precision = prior_precision + likelihood_precision
    mean = (
        prior_precision * prior_mean + likelihood_precision * x_t / math.sqrt(alpha)
    ) / precision

    pair = torch.tensor([abar[t], abar[previous]], dtype=torch.float64)
    x_start_coef, x_t_coef, variance = (c.item() for c in posterior_coefficients(*pair))
    assert x_start_coef * x_start + x_t_coef * x_t == pytest.approx(mean, rel=1e-9)
    assert variance == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_of_the_clean_image_is_certain():
    abar = torch.tensor([0.9, 1.0], dtype=torch.float64)  # the first timestep's, the clean image's
    assert [c.item() for c in posterior_coefficients(*abar)] == [1, 0, 0]


def test_schedule_is_no_part_of_a_checkpoint():
    assert CosineNoiseScheduler(50).state_dict() == {}


@pytest.mark.parametrize("T", [0, -1])
def test_a_chain_without_timesteps_is_refused(T):
    with pytest.raises(ValueError, match=f"num_train_timesteps.*{T}"):
        CosineNoiseScheduler(T)


def test_unknown_prediction_type_is_refused_by_name():
    with pytest.raises(ValueError, match="'velocity'"):
        CosineNoiseScheduler(50, prediction_type="velocity")


def test_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        clip_sample=False, variance_type="fixed_small",
    )
    ours = CosineNoiseScheduler(1000)
    # Theirs is a float32 product of 1000 factors, good to about 1000 * 6e-8.
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)
    x_start, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 100, 500, 999])
    for name in ("add_noise", "get_velocity"):
        mine, other = (getattr(s, name)(x_start, noise, t) for s in (ours, theirs))
        assert_close(mine, other, rtol=0, atol=1e-4)
