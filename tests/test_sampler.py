"""The sampler against exact results: Gaussian data, for which the best denoiser is known."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conditional_diffusion import DDPMSampler
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.sampler import ddpm_step, guided_prediction, inference_timesteps


class GaussianDenoiser(nn.Module):
    """The exact prediction for independent pixels x_start ~ N(mean, std^2).

    x_t = a x_start + b noise is Gaussian too, and E[x_start | x_t] = mean + gain (x_t - a mean)
    with gain = cov(x_start, x_t) / var(x_t) = a std^2 / (a^2 std^2 + b^2).
    """

    def __init__(self, scheduler, mean: float, std: float):
        super().__init__()
        self.scheduler, self.mean, self.std = scheduler, mean, std

    def forward(self, x_t, timesteps, class_labels):
        abar = self.scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
        a, b, x = abar.sqrt(), (1 - abar).sqrt(), x_t.double()
        gain = a * self.std**2 / (a**2 * self.std**2 + b**2)
        x_start = self.mean + gain * (x - a * self.mean)
        noise = (x - a * x_start) / b
        outputs = {"sample": x_start, "epsilon": noise, "v_prediction": a * noise - b * x_start}
        return outputs[self.scheduler.prediction_type].float()


def exact_mean_and_std(alphas_cumprod: list[float], timesteps: list[int], mean, std):
    """Mean and std of ancestral sampling with GaussianDenoiser, without sampling.

    Every step is linear in x_t plus independent noise, so two numbers describe the whole chain.
    The step is Bayes' rule for x_prev: prior N(a_prev x_start, 1 - abar_prev), x_t ~
    N(sqrt(alpha) x_prev, 1 - alpha). Few steps and std < 1 lose a little variance; that is a
    property of the method, which this reproduces, so no tolerance has to allow for it.
    """
    m, variance = 0.0, 1.0
    for t, previous in zip(timesteps, [*timesteps[1:], None]):
        abar = alphas_cumprod[t]
        gain = math.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar)  # x_start = gain x_t + offset
        offset = mean * (1 - gain * math.sqrt(abar))
        if previous is None:
            return gain * m + offset, math.sqrt(gain**2 * variance)
        abar_prev = alphas_cumprod[previous]
        alpha = abar / abar_prev
        precision = 1 / (1 - abar_prev) + alpha / (1 - alpha)
        from_x_start = math.sqrt(abar_prev) / (1 - abar_prev) / precision
        from_x_t = math.sqrt(alpha) / (1 - alpha) / precision
        slope = from_x_start * gain + from_x_t
        m, variance = slope * m + from_x_start * offset, slope**2 * variance + 1 / precision


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
        kept = inference_timesteps(T, steps)
        assert len(kept) == steps and kept[0] == T - 1
        gaps = [a - b for a, b in zip(kept, kept[1:])]
        assert all(gap >= 1 for gap in gaps)  # descending, none twice
        if steps > 1:
            assert kept[-1] == 0
            assert max(gaps) - min(gaps) <= 1


def test_kept_timesteps_on_cases_done_by_hand():
    assert inference_timesteps(1000, 1) == [999]
    assert inference_timesteps(1000, 2) == [999, 0]
    assert inference_timesteps(1000, 4) == [999, 666, 333, 0]
    assert inference_timesteps(5, 5) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_impossible_number_of_steps_is_refused(schedule, steps):
    with pytest.raises(ValueError, match=rf"1\.\.50, not {steps}"):
        DDPMSampler(schedule(), num_inference_steps=steps)


@pytest.mark.parametrize("steps", [2, 10, 50, 250, 1000])
def test_alphas_between_kept_timesteps_multiply_to_alphas_cumprod(schedule, steps):
    """Adjacent-step alphas at skipped steps would multiply to a number far too large.

    The alpha of a step is read off the step itself: with x_start = 0 and no noise it scales x_t
    by sqrt(alpha) (1 - abar_prev) / (1 - abar_t).
    """
    scheduler = schedule(1000)
    abar = scheduler.alphas_cumprod_float64.tolist()
    kept = DDPMSampler(scheduler, num_inference_steps=steps).timesteps
    product = abar[kept[-1]]  # the last step goes from there to the clean image
    one = torch.ones(1, 1, 1, 1)
    for t, previous in zip(kept, kept[1:]):
        factor = ddpm_step(scheduler, 0 * one, one, t, previous, None).item()
        product *= (factor * (1 - abar[t]) / (1 - abar[previous])) ** 2
    # Up to 1000 squared float32 coefficients, 6e-8 each.
    assert product == pytest.approx(abar[999], rel=2e-4)


def test_last_step_returns_the_predicted_image(schedule):
    x_start, x_t = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0, 49):
        assert torch.equal(ddpm_step(schedule(), x_start, x_t, t, -1, None), x_start)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(("steps", "bias"), [(1000, 0.005), (100, 0.05), (10, 0.3)])
def test_samples_have_mean_and_std_of_gaussian_data(schedule, prediction_type, steps, bias):
    mean, std = 0.6, 0.4
    scheduler = schedule(1000, prediction_type=prediction_type)
    sampler = DDPMSampler(scheduler, num_inference_steps=steps, clip_x_start=False)
    images = sampler.sample(
        GaussianDenoiser(scheduler, mean, std), torch.zeros(4, dtype=torch.long), (1, 64, 64),
        range(4),
    ).double()  # fmt: skip
    abar = scheduler.alphas_cumprod.double().tolist()
    exact_mean, exact_std = exact_mean_and_std(abar, sampler.timesteps, mean, std)
    # Five standard errors of the n = 16384 independent pixels.
    n = images.numel()
    assert images.mean().item() == pytest.approx(exact_mean, abs=5 * exact_std / math.sqrt(n))
    assert images.std().item() == pytest.approx(exact_std, rel=5 / math.sqrt(2 * n))
    # The chain itself approaches the data as its steps grow: share of the std that is lost.
    assert exact_mean == pytest.approx(mean, abs=1e-3)
    assert 0 < 1 - exact_std / std < bias


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


def test_a_picture_depends_on_its_seed_and_label_not_on_its_company(awake_model, schedule):
    model = awake_model()
    sampler = DDPMSampler(schedule(), num_inference_steps=5, guidance_scale=2.0)
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

    def interrupt(done, x_t):
        raise Interrupted

    with pytest.raises(Interrupted):
        sampler.sample(model, torch.tensor([1]), (1, 4, 4), [0], callback=interrupt)
    assert model.training is training


@pytest.mark.parametrize(("clip", "expected"), [(True, 1.0), (False, 3.0)])
def test_prediction_beyond_one_survives_unless_clipped(schedule, clip, expected):
    sampler = DDPMSampler(
        schedule(prediction_type="sample"), num_inference_steps=10, clip_x_start=clip
    )
    images = sampler.sample(Constant(3.0), torch.tensor([0, 1]), (1, 4, 4), [0, 1])
    assert_close(images, torch.full((2, 1, 4, 4), expected), rtol=0, atol=0)


def test_nothing_but_the_predicted_image_is_clipped(schedule):
    """With a prediction inside [-1, 1] clipping changes no step, and x_t keeps its tails."""
    scheduler, trajectories = schedule(prediction_type="sample"), {}
    for clip in (True, False):
        steps = trajectories[clip] = []
        DDPMSampler(scheduler, num_inference_steps=10, clip_x_start=clip).sample(
            Constant(0.9), torch.tensor([0]), (1, 32, 32), [0],
            callback=lambda done, x_t, steps=steps: steps.append((done, x_t.clone())),
        )  # fmt: skip
    assert [done for done, _ in trajectories[True]] == list(range(1, 11))
    for (_, clipped), (_, free) in zip(trajectories[True], trajectories[False]):
        assert torch.equal(clipped, free)
    # 1024 draws of about unit variance: one beyond 2.5 is missing with probability 3e-6.
    assert trajectories[True][0][1].abs().max() > 2.5


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
    assert "drawing 1 pictures at a time" in caplog.text


def test_out_of_memory_with_one_picture_is_a_sentence(schedule):
    def model(x_t, timesteps, class_labels):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    network = torch.nn.Module()
    network.forward = model
    sampler = DDPMSampler(schedule(), num_inference_steps=3)
    with pytest.raises(OutOfMemory, match="a single picture"):
        sampler.sample(network, torch.arange(4), (3, 4, 4), range(4))
