"""The samplers against exact results: Gaussian data, for which the best denoiser is known."""

import math

import pytest
import torch
from test_noise_scheduler import published_alphas_cumprod
from torch import nn
from torch.testing import assert_close

from conditional_diffusion import (
    CosineNoiseScheduler,
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    SDEDPMSolverSampler,
)
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.sampler import SAMPLERS, even_in_log_snr, even_in_time, guided_prediction

EVERY_SAMPLER = pytest.mark.parametrize("sampler_class", SAMPLERS.values(), ids=SAMPLERS)


class GaussianDenoiser(nn.Module):
    """The exact prediction for independent pixels x_start ~ N(mean, std^2).

    x_t = a x_start + b noise is Gaussian too, and E[x_start | x_t] = mean + gain (x_t - a mean)
    with gain = cov(x_start, x_t) / var(x_t) = a std^2 / (a^2 std^2 + b^2).
    """

    def __init__(self, scheduler, mean: float, std: float):
        super().__init__()
        self.scheduler, self.mean, self.std = scheduler, mean, std

    def denoised(self, x_t, timesteps):
        abar = self.scheduler.alphas_cumprod_float64[timesteps].view(-1, 1, 1, 1)
        gain = abar.sqrt() * self.std**2 / (abar * self.std**2 + 1 - abar)
        return self.mean + gain * (x_t - abar.sqrt() * self.mean)

    def forward(self, x_t, timesteps, class_labels):
        abar = self.scheduler.alphas_cumprod_float64[timesteps].view(-1, 1, 1, 1)
        a, b, x = abar.sqrt(), (1 - abar).sqrt(), x_t.double()
        x_start = self.denoised(x, timesteps)
        noise = (x - a * x_start) / b
        outputs = {"sample": x_start, "epsilon": noise, "v_prediction": a * noise - b * x_start}
        return outputs[self.scheduler.prediction_type].float()


def step_coefficients(method: str, eta: float, abar: list[float], kept: list[int], i: int):
    """(of x_start, of x_t, of the earlier x_start, std of the noise) of step i, in float64.

    Each formula comes from another place than the code's: DDPM from Bayes' rule, DDIM from the
    marginal it must keep (a^2 c^2 + ... = 1 - abar), DPM-Solver++(2M) and SDE-DPM-Solver++(2M) from
    their paper in alpha, sigma and h.
    """
    a_t, a_prev = abar[kept[i]], abar[kept[i + 1]]
    if method == "ddpm":
        # Prior N(sqrt(a_prev) x_start, 1 - a_prev), likelihood x_t ~ N(sqrt(alpha) x, 1 - alpha).
        alpha = a_t / a_prev
        precision = 1 / (1 - a_prev) + alpha / (1 - alpha)
        from_x_start = math.sqrt(a_prev) / (1 - a_prev) / precision
        return from_x_start, math.sqrt(alpha) / (1 - alpha) / precision, 0.0, precision**-0.5
    if method == "ddim":
        # x_prev = sqrt(a_prev) x_start + c (x_t - sqrt(a_t) x_start) + std z, where c and std keep
        # its variance given x_start at 1 - a_prev: c^2 (1 - a_t) + std^2 = 1 - a_prev.
        std = eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
        c = math.sqrt((1 - a_prev - std**2) / (1 - a_t))
        return math.sqrt(a_prev) - c * math.sqrt(a_t), c, 0.0, std

    def half_log_snr(abar_t):
        return math.log(math.sqrt(abar_t) / math.sqrt(1 - abar_t))

    h = half_log_snr(a_prev) - half_log_snr(a_t)
    data = -math.sqrt(a_prev) * (math.exp(-h) - 1)
    state, std = math.sqrt((1 - a_prev) / (1 - a_t)), 0.0
    if method == "sde-dpm-solver++":
        data = math.sqrt(a_prev) * (1 - math.exp(-2 * h))
        state, std = state * math.exp(-h), math.sqrt((1 - a_prev) * (1 - math.exp(-2 * h)))
    share = 0.0  # of the difference between the last two predictions
    if i > 0:  # first order at the beginning
        share = h / (half_log_snr(a_t) - half_log_snr(abar[kept[i - 1]])) / 2
    return data * (1 + share), state, -data * share, std


def exact_mean_and_std(method: str, eta: float, abar: list[float], kept: list[int], mean, std):
    """Mean and std of samples drawn with GaussianDenoiser, without sampling.

    Every step is linear in the state and in the noises drawn so far, so a mean and one coefficient
    per noise describe the whole chain. Few steps lose or gain a little variance; that is a property
    of the methods, which this reproduces, so no tolerance has to allow for it.
    """

    def denoised(m, noises, t):
        gain = math.sqrt(abar[t]) * std**2 / (abar[t] * std**2 + 1 - abar[t])
        return mean + gain * (m - math.sqrt(abar[t]) * mean), [gain * n for n in noises]

    m, noises = 0.0, [1.0]
    earlier_m, earlier_noises = 0.0, []
    for i, t in enumerate(kept[:-1]):
        x_m, x_noises = denoised(m, noises, t)
        from_x, from_state, from_earlier, added = step_coefficients(method, eta, abar, kept, i)
        earlier_noises += [0.0] * (len(noises) - len(earlier_noises))
        m = from_x * x_m + from_state * m + from_earlier * earlier_m
        noises = [
            from_x * x + from_state * n + from_earlier * e
            for x, n, e in zip(x_noises, noises, earlier_noises)
        ]
        noises += [added] if added else []
        earlier_m, earlier_noises = x_m, x_noises
    m, noises = denoised(m, noises, kept[-1])
    return m, math.sqrt(sum(n**2 for n in noises))


class LabelField(nn.Module):
    """An algebraic stand-in for the network; writes down what it is called with."""

    null_label = 10

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, timesteps, class_labels):
        self.calls.append((len(x_t), class_labels.tolist(), self.training))
        return self.expected(x_t, timesteps, class_labels)

    @staticmethod
    def expected(x_t, timesteps, class_labels):
        label, t = (v.float()[:, None, None, None] for v in (class_labels, timesteps))
        return 0.1 * x_t + (1 + label) * (0.03 + 0.001 * t) + 0.02 * label * x_t**2


class Constant(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x_t, timesteps, class_labels):
        return torch.full_like(x_t, self.value)


@pytest.mark.parametrize("T", [1, 2, 50])
def test_every_number_of_steps_keeps_both_ends_and_even_gaps(T):
    for steps in range(1, T + 1):
        kept = even_in_time(T, steps)
        assert len(kept) == steps and kept[0] == T - 1
        gaps = [a - b for a, b in zip(kept, kept[1:])]
        assert all(gap >= 1 for gap in gaps)  # descending, none twice
        if steps > 1:
            assert kept[-1] == 0
            assert max(gaps) - min(gaps) <= 1


def test_kept_timesteps_on_cases_done_by_hand():
    assert even_in_time(1000, 1) == [999]
    assert even_in_time(1000, 2) == [999, 0]
    assert even_in_time(1000, 4) == [999, 666, 333, 0]
    assert even_in_time(5, 5) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("T", [1, 2, 50, 300])
def test_any_number_of_steps_keeps_so_many_timesteps_down_to_zero(schedule, T):
    alphas_cumprod = schedule(T).alphas_cumprod_float64
    for steps in range(1, T + 1):
        kept = even_in_log_snr(alphas_cumprod, steps)
        assert len(kept) == steps and kept[0] < T and (kept[-1] == 0 or steps == 1)
        assert all(a > b for a, b in zip(kept, kept[1:]))
    assert kept == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("steps", [5, 10, 20, 30])
@pytest.mark.parametrize("shift", [0.0, 2 * math.log(32 / 128)])
def test_kept_timesteps_are_even_in_log_snr(schedule, steps, shift):
    """Against the inverse of the cosine schedule, which does not know of its shift."""
    s, T = 0.008, 1000
    alphas_cumprod = torch.sigmoid(torch.logit(schedule(T).alphas_cumprod_float64) + shift)

    def angle(t: float) -> float:  # of Nichol & Dhariwal 2021, eq. 17; index t carries t + 1 steps
        return ((t + 1) / T + s) / (1 + s) * math.pi / 2

    start = math.cos(angle(-1)) ** 2

    def log_snr(t: float) -> float:
        abar = math.cos(angle(t)) ** 2 / start
        return math.log(abar / (1 - abar))

    first, last = log_snr(994), log_snr(0)  # 0.9946 T - 1 in whole timesteps
    kept = even_in_log_snr(alphas_cumprod, steps)
    for i, t in enumerate(kept):
        wanted = first + (last - first) * i / (steps - 1)
        abar = 1 / (1 + math.exp(-wanted))
        exact = math.acos(math.sqrt(abar * start)) * (1 + s) * 2 / math.pi * T - s * T - 1
        # Whole timesteps; where they are too few the last ones are neighbours.
        assert t == pytest.approx(exact, abs=1.1) or t == steps - 1 - i


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_impossible_number_of_steps_is_refused(schedule, steps):
    with pytest.raises(ValueError, match=rf"1\.\.50, not {steps}"):
        DDPMSampler(schedule(), num_inference_steps=steps)


def no_noise():
    raise AssertionError("this step draws no noise")


@pytest.mark.parametrize("steps", [2, 10, 50, 250, 1000])
def test_alphas_between_kept_timesteps_multiply_to_alphas_cumprod(schedule, steps):
    """Adjacent-step alphas at skipped steps would multiply to a number far too large.

    The alpha of a step is read off the step itself: with x_start = 0 and no noise it scales x_t
    by sqrt(alpha) (1 - abar_prev) / (1 - abar_t).
    """
    scheduler = schedule(1000)
    abar = scheduler.alphas_cumprod_float64.tolist()
    sampler = DDPMSampler(scheduler, num_inference_steps=steps)
    kept = sampler.timesteps
    product = abar[kept[-1]]  # the last step goes from there to the clean image
    one = torch.ones(1, 1, 1, 1)
    for t, previous in zip(kept, kept[1:]):
        factor = sampler.update(0 * one, one, t, previous, lambda: 0 * one, None).item()
        product *= (factor * (1 - abar[t]) / (1 - abar[previous])) ** 2
    # Up to 1000 squared float32 coefficients, 6e-8 each.
    assert product == pytest.approx(abar[999], rel=2e-4)


@EVERY_SAMPLER
def test_last_step_returns_the_predicted_image(schedule, sampler_class):
    x_start, x_t = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = sampler_class(schedule(), num_inference_steps=5)
    for t in (0, 49):
        for earlier in (None, (t + 1, 0 * x_start)):
            assert torch.equal(sampler.update(x_start, x_t, t, -1, no_noise, earlier), x_start)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(
    ("method", "eta", "steps", "bias"),
    [
        ("ddpm", 1.0, 1000, 0.005), ("ddpm", 1.0, 100, 0.05), ("ddpm", 1.0, 10, 0.3),
        ("ddim", 0.0, 100, 0.02), ("ddim", 0.0, 10, 0.2), ("ddim", 0.5, 20, 0.2),
        ("ddim", 1.0, 100, 0.05), ("dpm-solver++", 0.0, 100, 0.005),
        ("dpm-solver++", 0.0, 10, 0.15), ("sde-dpm-solver++", 1.0, 100, 0.005),
        ("sde-dpm-solver++", 1.0, 10, 0.15),
    ],
)
def test_samples_have_mean_and_std_of_gaussian_data(
    schedule, prediction_type, method, eta, steps, bias
):
    mean, std = 0.6, 0.4
    scheduler = schedule(1000, prediction_type=prediction_type)
    options = {"eta": eta} if method == "ddim" else {}
    sampler = SAMPLERS[method](
        scheduler, num_inference_steps=steps, clip_x_start=False, **options
    )
    images = sampler.sample(
        GaussianDenoiser(scheduler, mean, std), torch.zeros(4, dtype=torch.long), (1, 64, 64),
        range(4),
    ).double()
    abar = scheduler.alphas_cumprod_float64.tolist()
    exact_mean, exact_std = exact_mean_and_std(method, eta, abar, sampler.timesteps, mean, std)
    # Five standard errors of the n = 16384 independent pixels.
    n = images.numel()
    assert images.mean().item() == pytest.approx(exact_mean, abs=5 * exact_std / math.sqrt(n))
    assert images.std().item() == pytest.approx(exact_std, rel=5 / math.sqrt(2 * n))
    # The chain itself approaches the data as its steps grow.
    assert exact_mean == pytest.approx(mean, abs=2e-3)
    assert abs(1 - exact_std / std) < bias


@pytest.mark.parametrize("std", [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0])
@pytest.mark.parametrize(
    ("method", "steps", "lost"),
    [("dpm-solver++", 10, 0.08), ("dpm-solver++", 20, 0.04), ("sde-dpm-solver++", 20, 0.04),
     ("sde-dpm-solver++", 50, 0.025)],
)
def test_few_steps_keep_the_power_of_every_frequency_of_enlarged_pictures(method, steps, lost, std):
    """Their frequencies have standard deviations from below 0.1 to about 60 at 128x128."""
    scheduler = CosineNoiseScheduler(1000, image_size=128, reference_size=32)
    sampler = SAMPLERS[method](scheduler, num_inference_steps=steps)
    abar = scheduler.alphas_cumprod_float64.tolist()
    _, exact_std = exact_mean_and_std(method, 0.0, abar, sampler.timesteps, 0.0, std)
    assert exact_std == pytest.approx(std, rel=lost)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm-solver++", 2)])
def test_halving_the_step_cuts_the_error_as_the_order_says(schedule, method, order):
    """Against the exact solution of the probability flow of Gaussian data.

    There x_t - a mean keeps its number of standard deviations sqrt(a^2 std^2 + b^2).
    """
    mean, std, T = 0.6, 0.4, 2**13 + 1  # so that halved steps fall on whole timesteps
    scheduler = schedule(T)
    abar = scheduler.alphas_cumprod_float64.tolist()

    def spread(t):
        return math.sqrt(abar[t] * std**2 + 1 - abar[t])

    # Between the ends, where the schedule is steep; the state stays in float64.
    first, last = 6 * (T - 1) // 8, 3 * (T - 1) // 8
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    model, errors = GaussianDenoiser(scheduler, mean, std), []
    for steps in (16, 32, 64):
        kept = [first - i * (first - last) // steps for i in range(steps + 1)]
        sampler, earlier = SAMPLERS[method](scheduler, num_inference_steps=2), None
        x = math.sqrt(abar[first]) * mean + spread(first) * z
        for t, previous in zip(kept, kept[1:]):
            x_start = model.denoised(x, t)
            new = sampler.update(x_start, x, t, previous, no_noise, earlier)
            x, earlier = new, (t, x_start)
        exact = math.sqrt(abar[last]) * mean + spread(last) * z
        errors.append((x - exact).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_ddim_with_eta_one_has_the_variance_of_ddpm(schedule):
    """Song et al. 2021, sec. 4.1: the same posterior, hence the same update of the same inputs."""
    x_start, x_t, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = schedule(1000)
    ddpm = DDPMSampler(scheduler, num_inference_steps=10)
    ddim = DDIMSampler(scheduler, num_inference_steps=10, eta=1.0)
    for t, previous in ((999, 888), (500, 499), (111, 0)):
        expected = ddpm.update(x_start, x_t, t, previous, lambda: noise, None)
        found = ddim.update(x_start, x_t, t, previous, lambda: noise, None)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def diffusers_scheduler(name, scheduler, **options):
    diffusers = pytest.importorskip("diffusers")
    abar = scheduler.alphas_cumprod_float64
    return getattr(diffusers, name)(
        num_train_timesteps=scheduler.num_train_timesteps, prediction_type="v_prediction",
        trained_betas=(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist(), **options,
    )


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddpm_and_ddim_updates_agree_with_diffusers(schedule, eta):
    scheduler, steps = schedule(1000), 20
    generator = torch.Generator().manual_seed(0)
    x_t, output, noise = torch.randn(3, 2, 3, 8, 8, generator=generator)
    for t, previous in ((999, 949), (549, 499), (99, 49)):
        timesteps = torch.full((2,), t)
        x_start = scheduler.predict_x_start(output, x_t, timesteps)
        ddim = DDIMSampler(scheduler, num_inference_steps=steps, eta=eta)
        peer = diffusers_scheduler("DDIMScheduler", scheduler, clip_sample=False)
        peer.set_timesteps(steps)
        wanted = peer.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample
        found = ddim.update(x_start, x_t, t, previous, lambda: noise, None)
        # Their cumulative products are float32.
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)

        peer = diffusers_scheduler("DDPMScheduler", scheduler, clip_sample=False)
        peer.set_timesteps(timesteps=[t, previous])
        # It draws its noise itself; the same generator draws ours.
        wanted = peer.step(output, t, x_t, torch.Generator().manual_seed(1)).prev_sample
        drawn = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
        ddpm = DDPMSampler(scheduler, num_inference_steps=steps)
        found = ddpm.update(x_start, x_t, t, previous, lambda: drawn, None)
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize(
    ("sampler_class", "algorithm"),
    [(DPMSolverSampler, "dpmsolver++"), (SDEDPMSolverSampler, "sde-dpmsolver++")],
)
def test_dpm_solver_chains_agree_with_diffusers(schedule, sampler_class, algorithm, steps):
    scheduler = schedule(1000)
    peer = diffusers_scheduler(
        "DPMSolverMultistepScheduler", scheduler, algorithm_type=algorithm, solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero", lower_order_final=True,
    )
    sampler = sampler_class(scheduler, num_inference_steps=steps, clip_x_start=False)
    peer.set_timesteps(timesteps=sampler.timesteps)
    model = GaussianDenoiser(scheduler, 0.6, 0.4)
    labels = torch.zeros(1, dtype=torch.long)
    generator, states = torch.Generator().manual_seed(3), []
    x_t = torch.randn((1, 8, 8), generator=generator)[None]
    sampler.sample(
        model, labels, (1, 8, 8), [3], callback=lambda done, x_t, x_start: states.append(x_t)
    )
    for t, state in zip(peer.timesteps, states):
        noise = torch.randn((1, 8, 8), generator=generator)[None]
        output = model(x_t, t.repeat(1), labels)
        x_t = peer.step(output, t, x_t, variance_noise=noise).prev_sample
        assert_close(state, x_t, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_extrapolates_from_null_to_class(scale):
    model = LabelField()
    x_t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([4, 0, 9]), torch.tensor([2, 7, 0])
    cond = model.expected(x_t, t, labels)
    uncond = model.expected(x_t, t, torch.full_like(labels, 10))
    wanted = {0.0: uncond, 1.0: cond, 2.0: 2 * cond - uncond}[scale]
    assert_close(guided_prediction(model, x_t, t, labels, scale), wanted, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [2, 7, 0]
    assert [size for size, _, _ in model.calls] == [3 if scale == 1 else 6]


def test_sampler_hands_its_guidance_to_every_step(schedule):
    labels, nulls, seeds = torch.tensor([2, 7]), torch.tensor([10, 10]), [5, 6]

    def draw(scale, labels):
        model = LabelField()
        sampler = DDPMSampler(schedule(), num_inference_steps=7, guidance_scale=scale)
        return sampler.sample(model, labels, (1, 4, 4), seeds), model.calls

    conditional, calls = draw(1.0, labels)
    assert [(size, label) for size, label, _ in calls] == [(2, [2, 7])] * 7
    unconditional, calls = draw(0.0, labels)
    assert [size for size, _, _ in calls] == [4] * 7  # one call a step, of twice the batch
    assert_close(unconditional, draw(1.0, nulls)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unconditional, conditional, atol=1e-3)


def test_guidance_stays_inside_its_interval(schedule):
    sampler = DDIMSampler(
        schedule(101), num_inference_steps=11, guidance_scale=3.0, guidance_interval=(0.2, 0.7)
    )
    model = LabelField()
    sampler.sample(model, torch.tensor([2]), (1, 4, 4), [0])
    assert sampler.timesteps == list(range(100, -1, -10))
    # Timesteps 70 to 20 are guided, in calls of twice the batch.
    assert [size for size, _, _ in model.calls] == [1] * 3 + [2] * 6 + [1] * 2


@EVERY_SAMPLER
def test_a_picture_depends_on_its_seed_and_label_not_on_its_company(
    awake_model, schedule, sampler_class
):
    model = awake_model()
    sampler = sampler_class(schedule(), num_inference_steps=5, guidance_scale=2.0)
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), [11, 12, 13, 14, 2**40]

    def draw(order, **options):
        return sampler.sample(
            model, labels[order], (3, 16, 16), [seeds[i] for i in order], **options
        )

    together = draw([0, 1, 2, 3, 4])
    # Only the order of float32 sums may differ between batch sizes.
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    for batch_size in (1, 2, 5, 9):
        assert_close(draw([0, 1, 2, 3, 4], batch_size=batch_size), together, **tolerance)
    assert_close(draw([3, 0]), together[[3, 0]], **tolerance)
    assert not torch.allclose(together[1], together[3], atol=0.1)  # same label, other seed


def test_same_seed_same_picture_whatever_else_draws_random_numbers(awake_model, schedule):
    model, sampler = awake_model(), DDPMSampler(schedule(), num_inference_steps=5)

    def draw(seed, label=3):
        return sampler.sample(model, torch.tensor([label]), (3, 16, 16), [seed])

    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(draw(0), first)
    assert not torch.allclose(draw(1), first, atol=0.1)
    assert not torch.allclose(draw(0, label=4), first, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_restored(schedule, training):
    model = LabelField().train(training)
    sampler = DDPMSampler(schedule(), num_inference_steps=3)
    sampler.sample(model, torch.tensor([1]), (1, 4, 4), [0])
    assert [mode for _, _, mode in model.calls] == [False] * 3
    assert model.training is training

    class Interrupted(Exception):
        pass

    def interrupt(done, x_t, x_start):
        raise Interrupted

    with pytest.raises(Interrupted):
        sampler.sample(model, torch.tensor([1]), (1, 4, 4), [0], callback=interrupt)
    assert model.training is training


@EVERY_SAMPLER
@pytest.mark.parametrize(("clip", "expected"), [(True, 1.0), (False, 3.0)])
def test_prediction_beyond_one_survives_unless_clipped(schedule, sampler_class, clip, expected):
    sampler = sampler_class(
        schedule(prediction_type="sample"), num_inference_steps=10, clip_x_start=clip
    )
    images = sampler.sample(Constant(3.0), torch.tensor([0, 1]), (1, 4, 4), [0, 1])
    assert_close(images, torch.full((2, 1, 4, 4), expected), rtol=0, atol=0)


@EVERY_SAMPLER
def test_nothing_but_the_predicted_image_is_clipped(schedule, sampler_class):
    """With a prediction inside [-1, 1] clipping changes no step, and x_t keeps its tails."""
    scheduler, trajectories = schedule(prediction_type="sample"), {}
    for clip in (True, False):
        steps = trajectories[clip] = []
        sampler_class(scheduler, num_inference_steps=10, clip_x_start=clip).sample(
            Constant(0.9), torch.tensor([0]), (1, 32, 32), [0],
            callback=lambda done, x_t, x_start, steps=steps: steps.append((done, x_t.clone())),
        )
    assert [done for done, _ in trajectories[True]] == list(range(1, 11))
    for (_, clipped), (_, free) in zip(trajectories[True], trajectories[False]):
        assert torch.equal(clipped, free)
    # 1024 draws of about unit variance: one beyond 2.5 is missing with probability 3e-6.
    assert trajectories[True][0][1].abs().max() > 2.5


def test_pictures_come_batch_by_batch_and_leave_the_caller_as_it_was(awake_model, schedule):
    sampler, model = DDIMSampler(schedule(), num_inference_steps=2), awake_model()
    arguments = model, torch.arange(5), (3, 16, 16), list(range(5))
    parts, done = [], []
    options = {"batch_size": 2, "callback": lambda *step: done.append(step)}
    for pictures in sampler.sample_parts(*arguments, **options):
        parts.append(pictures)
        assert len(done) == 2 * len(parts), "the next batch is not drawn before it is asked for"
        # Between batches other code runs.
        assert model.training and torch.is_grad_enabled()
    assert [len(part) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), sampler.sample(*arguments), rtol=0, atol=1e-4)


def test_out_of_memory_draws_fewer_at_a_time_and_the_same_pictures(awake_model, schedule, caplog):
    sampler = DDPMSampler(schedule(), num_inference_steps=3)
    labels, seeds = torch.arange(7), list(range(7))
    model = awake_model()
    expected = sampler.sample(model, labels, (3, 16, 16), seeds)
    forward = model.forward

    def limited(x_t, timesteps, class_labels):
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x_t, timesteps, class_labels)

    model.forward = limited
    found = sampler.sample(model, labels, (3, 16, 16), seeds)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert "pictures go 1 at a time" in caplog.text


def test_out_of_memory_with_one_picture_is_a_sentence(schedule):
    def model(x_t, timesteps, class_labels):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    network = torch.nn.Module()
    network.forward = model
    sampler = DDPMSampler(schedule(), num_inference_steps=3)
    with pytest.raises(OutOfMemory, match="pictures one at a time"):
        sampler.sample(network, torch.arange(4), (3, 4, 4), range(4))


def test_samplers_walk_the_shifted_schedule(schedule):
    sampler = DDIMSampler(schedule(50, image_size=128, reference_size=32), num_inference_steps=5)
    for t, plain in enumerate(published_alphas_cumprod(50)):
        odds = plain / (1 - plain) / 16  # the signal-to-noise ratio times (32 / 128)^2
        assert sampler.alpha_bar(t).item() == pytest.approx(odds / (1 + odds), rel=1e-9)


def test_sampling_keeps_no_graph(schedule, awake_model):
    sampler = DDPMSampler(schedule(), num_inference_steps=2)
    assert not sampler.sample(awake_model(), torch.tensor([1]), (3, 16, 16), [0]).requires_grad
