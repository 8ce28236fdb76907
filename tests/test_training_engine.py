"""The training engine: its formulas, what one step does, and exact resume."""

import copy
import io
import math

import pytest
import torch
from conftest import assert_identical
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from conditional_diffusion import DDPMSampler, TrainingEngine, training_engine
from conditional_diffusion.memory import OutOfMemory, is_out_of_memory
from conditional_diffusion.processes import Processes
from conditional_diffusion.training_engine import (
    TrainingDiverged,
    drop_labels,
    ema_decay,
    importance_sampling,
    learning_rate_at,
    min_snr_weights,
    step_seed,
    stratified_timesteps,
)
from config import DataConfig
from data import Split, TrainingBatches
from training_run import compile_training


class Probe(nn.Module):
    """Predicts one number, its only parameter, everywhere; keeps the inputs of every call."""

    null_label = 10

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x_t, timesteps, class_labels):
        self.calls.append((x_t.detach().clone(), timesteps.clone(), class_labels.clone()))
        return self.value.expand_as(x_t)


def images(batch_size: int, seed: int = 0):
    """Smooth pictures in [-1, 1]: one colour each, brighter to one side."""
    generator = torch.Generator().manual_seed(seed)
    color = torch.rand(batch_size, 3, 1, 1, generator=generator) * 1.2 - 0.6
    ramp = torch.linspace(-0.4, 0.4, 16).view(1, 1, 1, 16)
    return (color + ramp).expand(-1, -1, 16, -1).contiguous(), torch.arange(batch_size) % 10


def endless(batch):
    while True:
        yield batch


def engine_for(model, scheduler, **options):
    return TrainingEngine(
        model, scheduler, **{"total_steps": 10, "learning_rate": 1e-3, **options}
    )


def through_a_file(state: dict) -> dict:
    """As a checkpoint stores it; also cuts the ties to the live tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Formulas

# Peak 2, 4 steps of warm-up, 9 steps in all, ending at a tenth of the peak. After the warm-up the
# cosine falls from 2 to 0.2 over steps 4..8: 0.2 + 1.8 (1 + cos(k pi / 4)) / 2 for k = 0..4.
LEARNING_RATES = [0.5, 1.0, 1.5, 2.0, 2.0, 1.7363961, 1.1, 0.4636039, 0.2]


def test_learning_rate_follows_the_table():
    schedule = {"peak": 2.0, "warmup_steps": 4, "total_steps": 9, "final_fraction": 0.1}
    rates = [learning_rate_at(step, **schedule) for step in range(9)]
    assert rates == pytest.approx(LEARNING_RATES, rel=1e-6)
    assert learning_rate_at(1000, **schedule) == pytest.approx(0.2)


def test_records_hold_the_learning_rate_of_the_next_step(schedule):
    engine = engine_for(Probe(), schedule(), learning_rate=2.0, warmup_steps=4, total_steps=9,
                        final_lr_fraction=0.1)
    found = []
    for _ in range(8):
        engine.train_step(*images(2))
        found.append(engine.take_metrics()["learning_rate"])
    assert found == pytest.approx(LEARNING_RATES[1:], rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_steps_draw_timesteps_by_the_root_of_their_weight(schedule, gamma):
    scheduler, model = schedule(48), Probe()
    engine = engine_for(model, scheduler, min_snr_gamma=gamma)
    engine.train_step(torch.zeros(4800, 1, 1, 1), torch.zeros(4800, dtype=torch.long))
    _, timesteps, _ = model.calls[0]
    roots = min_snr_weights(scheduler, gamma).double().sqrt()
    share = timesteps.bincount(minlength=48).double() / len(timesteps)
    assert_close(share, roots / roots.sum(), rtol=0, atol=1.01 / len(timesteps))


def test_every_validation_image_has_noise_of_its_own(schedule):
    model = Probe()
    engine = engine_for(model, schedule())
    engine.validation_loss(model, torch.zeros(40, 3, 4, 4), torch.zeros(40, dtype=torch.long), 40)
    noise = nn.functional.normalize(model.calls[0][0].flatten(1))  # the images are black
    assert (noise @ noise.T - torch.eye(40)).abs().max() < 0.9


def test_learning_rate_without_warmup_or_decay():
    constant = {"peak": 2.0, "warmup_steps": 0, "total_steps": 3, "final_fraction": 1.0}
    assert [learning_rate_at(step, **constant) for step in range(3)] == [2.0] * 3
    all_warmup = {"peak": 2.0, "warmup_steps": 2, "total_steps": 2, "final_fraction": 0.0}
    assert [learning_rate_at(step, **all_warmup) for step in range(2)] == [1.0, 2.0]


def test_all_optimizers_step_at_the_scheduled_learning_rate(schedule, tiny_model):
    engine = engine_for(
        tiny_model(), schedule(), total_steps=9, learning_rate=2.0, warmup_steps=4,
        final_lr_fraction=0.1,
    )
    applied = [[] for _ in engine.optimizers]
    for optimizer, rates in zip(engine.optimizers, applied):
        optimizer.register_step_pre_hook(
            lambda optimizer, *_, rates=rates: rates.append(float(optimizer.param_groups[0]["lr"]))
        )
    list(engine.train(endless(images(4))))
    assert len(applied) == 2
    for rates in applied:
        assert rates == pytest.approx(LEARNING_RATES, rel=1e-6)


@pytest.mark.parametrize("optimizer, kinds", [("muon", 2), ("adamw", 1)])
def test_every_weight_belongs_to_one_optimizer(schedule, tiny_model, optimizer, kinds):
    engine = engine_for(tiny_model(), schedule(), optimizer=optimizer)
    weights = [id(weight) for each in engine.optimizers for group in each.param_groups
               for weight in group["params"]]
    assert sorted(weights) == sorted(map(id, engine.model.parameters()))
    assert len(engine.optimizers) == kinds
    with pytest.raises(ValueError, match="'sgd' is unknown"):
        engine_for(tiny_model(), schedule(), optimizer="sgd")


def test_ema_decay_halves_over_its_halflife():
    # 100 of 500 images: a fifth of the half-life, so five such steps leave one half.
    assert ema_decay(100, 10**9, 500, 0.1) ** 5 == pytest.approx(0.5)
    # Early on the half-life is 0.05 * 2000 = 100 images: one step leaves one half.
    assert ema_decay(100, 2000, 500, 0.05) == pytest.approx(0.5)
    # The batch size does not change what a number of images does.
    assert ema_decay(10, 10**9, 500, 0.1) ** 10 == pytest.approx(ema_decay(100, 10**9, 500, 0.1))


def test_autocast_casts_the_weights_of_the_average_once_in_a_chain(schedule):
    class Network(nn.Linear):
        null_label = 10

        def forward(self, x_t, timesteps, class_labels):
            return super().forward(x_t).float()

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and args[0].shape == (16, 16)
            return function(*args, **(kwargs or {}))

    average = engine_for(Network(16, 16), schedule()).ema_model
    sampler = DDPMSampler(schedule(), num_inference_steps=5, autocast_dtype=torch.bfloat16)
    with Casts() as casts:
        sampler.sample(average, torch.arange(2), (3, 8, 16), [0, 1])
    assert casts.count == 1


def test_ema_is_the_closed_form_weighted_sum_of_the_weights(schedule):
    batch_size, halflife, ramp = 4, 20, 0.5
    model = Probe()
    engine = engine_for(
        model, schedule(), learning_rate=0.1, ema_halflife_images=halflife, ema_rampup_ratio=ramp
    )
    history = []
    for _ in range(15):
        engine.train_step(*images(batch_size))
        history.append(model.value.item())
    # decay_k = 2^(-4 / min(20, 0.5 * 4 k)): ramp until k = 10, half-life after. The average starts
    # as the weights after the first step.
    decays = [0.0] + [2 ** (-4 / min(20, 2 * k)) for k in range(2, 16)]
    expected = sum(
        weight * (1 - decays[i]) * math.prod(decays[i + 1 :]) for i, weight in enumerate(history)
    )
    assert max(history) - min(history) > 0.02  # else any average would do
    assert engine.ema_model.value.item() == pytest.approx(expected, rel=1e-5)


def test_labels_are_dropped_at_the_given_rate():
    labels = torch.arange(100_000) % 10
    torch.manual_seed(0)
    dropped = drop_labels(labels, 0.3, 10)
    hit = dropped == 10
    # Five standard deviations of a binomial: 5 sqrt(0.3 * 0.7 / 100000) = 0.0072.
    assert hit.double().mean().item() == pytest.approx(0.3, abs=0.0072)
    assert torch.equal(dropped[~hit], labels[~hit])
    assert torch.equal(labels, torch.arange(100_000) % 10)  # the caller's tensor is left alone
    assert torch.equal(drop_labels(labels, 0.0, 10), labels)
    assert (drop_labels(labels, 1.0, 10) == 10).all()


@pytest.mark.parametrize("batch_size", [4, 12, 128])
def test_stratified_timesteps_fill_every_quarter_equally(batch_size):
    uniform = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for seed in range(50):
        torch.manual_seed(seed)
        timesteps = stratified_timesteps(batch_size, uniform)
        assert timesteps.dtype == torch.long
        assert timesteps.min() >= 0 and timesteps.max() <= 999
        assert (timesteps // 250).bincount(minlength=4).tolist() == [batch_size // 4] * 4


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_place_in_the_batch_gets_timesteps_as_often_as_asked_for(batch_size):
    torch.manual_seed(0)
    n, wanted = 4000, torch.tensor([0.3, 0.2, 0.0, 0.05, 0.45], dtype=torch.float64)
    # A sum that falls short of one by rounding, as of many small numbers.
    cumulative = wanted.cumsum(0) - 1e-9
    draws = torch.stack([stratified_timesteps(batch_size, cumulative) for _ in range(n)])
    for place in range(batch_size):
        shares = draws[:, place].bincount(minlength=5).double() / n
        # Five standard deviations of a binomial: 5 sqrt(0.5 * 0.5 / 4000) = 0.0395 at most.
        assert_close(shares, wanted, rtol=0, atol=0.0395)
        assert shares[2] == 0


def test_drawing_timesteps_by_importance_leaves_expectations_as_they_are():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    weights[7] = 0
    cumulative, counts = importance_sampling(weights)
    shares = cumulative.diff(prepend=torch.zeros(1))
    assert cumulative[-1].item() == pytest.approx(1) and shares[7] == 0
    # In proportion to the root of the weight.
    assert_close(shares.square() / shares.square().sum(), weights / weights.sum())
    expected = (weights * gradients).mean().item()  # under uniform timesteps
    assert (shares * counts * gradients).sum().item() == pytest.approx(expected, rel=1e-6)
    assert_close(importance_sampling(torch.ones(4))[1], torch.ones(4))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_are_the_formulas_of_the_paper(schedule, prediction_type):
    scheduler = schedule(prediction_type=prediction_type)
    timesteps = torch.tensor([0, 3, 10, 20, 30, 49])
    snrs = [abar / (1 - abar) for abar in scheduler.alphas_cumprod.double()[timesteps].tolist()]
    assert sum(snr > 5 for snr in snrs) == 3  # both sides of the clip are there
    formula = {  # Hang et al. 2023, sec. 3.4
        "epsilon": lambda snr: min(1, 5 / snr),
        "sample": lambda snr: min(snr, 5),
        "v_prediction": lambda snr: min(snr, 5) / (snr + 1),
    }[prediction_type]
    expected = torch.tensor([formula(snr) for snr in snrs])
    assert_close(min_snr_weights(scheduler, 5.0)[timesteps], expected, rtol=1e-4, atol=0)
    assert_close(min_snr_weights(scheduler, 0.0), torch.ones(50), rtol=0, atol=0)


def test_step_seeds_are_valid_and_do_not_collide():
    seeds = [step_seed(seed, step) for seed in range(30) for step in range(-1, 100)]
    assert len(set(seeds)) == len(seeds)  # an added or shifted mix would repeat itself
    assert all(0 <= seed < 2**63 for seed in seeds)


# One step


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_loss_quarters_and_gradient_follow_from_what_the_network_saw(schedule, gamma):
    """x_start = 0 makes everything known: noise = x_t / b and v = a noise, prediction 0."""
    scheduler, model = schedule(48), Probe()
    engine = engine_for(model, scheduler, min_snr_gamma=gamma)
    every_abar = scheduler.alphas_cumprod.double()
    every_weight = (every_abar / (1 - every_abar)).clamp(max=5) * (1 - every_abar)
    root = every_weight.sqrt() if gamma else torch.ones(50)
    losses, quarters, gradients = [], [], []
    for _ in range(2):
        value = model.value.item()  # of this step's prediction: zero in the first step only
        engine.train_step(torch.zeros(64, 3, 4, 4), torch.zeros(64, dtype=torch.long))
        x_t, timesteps, _ = model.calls[-1]
        abar = every_abar[timesteps]
        target = (abar / (1 - abar)).sqrt()[:, None] * x_t.double().flatten(1)
        weights = root[timesteps] * root.mean()
        losses.append(((value - target) ** 2).mean(1))
        quarters.append(timesteps // 12)
        gradients.append((2 * weights * (value - target).mean(1)).mean().abs().item())
    losses, quarters = torch.cat(losses), torch.cat(quarters)
    metrics = engine.take_metrics()
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)  # unweighted
    assert metrics["loss_quarters"] == pytest.approx(
        [losses[quarters == q].mean().item() for q in range(4)], rel=1e-4
    )
    assert metrics["grad_norm"] == pytest.approx(sum(gradients) / 2, rel=1e-4)
    assert (metrics["step"], metrics["images_seen"]) == (2, 128)
    # Sums start afresh; what was not seen is not reported as zero.
    assert engine.take_metrics()["loss_quarters"] == [None] * 4


def test_long_gradients_are_scaled_to_the_limit(schedule, tiny_model):
    engine = engine_for(tiny_model(), schedule(), grad_clip=1e-3, optimizer="adamw")
    engine.train_step(*images(4))
    assert engine.take_metrics()["grad_norm"] > 1e-2  # reported before clipping
    # After one step Adam's first moment is (1 - beta1) times the gradient it was given.
    moments = [state["exp_avg"] for state in engine.optimizers[0].state.values()]
    length = sum(moment.double().square().sum().item() for moment in moments) ** 0.5
    assert length == pytest.approx((1 - 0.9) * 1e-3, rel=1e-4)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_training_drops_labels_and_validation_does_not(schedule, probability):
    model = Probe()
    engine = engine_for(model, schedule(), class_dropout_prob=probability)
    x_start, labels = torch.zeros(400, 1, 2, 2), torch.arange(400) % 10
    engine.train_step(x_start, labels)
    seen = model.calls[-1][2]
    share = (seen == 10).double().mean().item()
    # Five standard deviations: 5 sqrt(0.25 / 400) = 0.125; exact at 0 and 1.
    assert share == pytest.approx(probability, abs=0.125 if probability == 0.5 else 0)
    assert torch.equal(seen[seen != 10], labels[seen != 10])
    engine.validation_loss(model, x_start, labels, 400)
    assert torch.equal(model.calls[-1][2], labels)


def test_one_batch_can_be_overfitted(schedule, tiny_model):
    model = tiny_model()
    engine = engine_for(
        model, schedule(), total_steps=120, learning_rate=1e-2, warmup_steps=5,
        final_lr_fraction=0.05, class_dropout_prob=0.0, min_snr_gamma=0.0,
    )
    # White pictures, about which the linear guess knows nothing.
    x_start = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    many = (x_start.repeat(8, 1, 1, 1), labels.repeat(8))  # 32 noise levels of the same pictures
    before = engine.validation_loss(model, *many, 32)
    assert list(engine.train(endless((x_start, labels)))) == list(range(1, 121))
    # Measured 0.27; without learning it stays at 1.
    for trained in (model, engine.ema_model):
        assert engine.validation_loss(trained, *many, 32) < 0.5 * before


def test_bfloat16_autocast_trains_float32_weights(schedule, awake_model):
    losses = {}
    for dtype in (None, torch.bfloat16):
        engine = engine_for(awake_model(), schedule(), autocast_dtype=dtype)
        engine.train_step(*images(8))
        losses[dtype] = engine.take_metrics()["loss"]
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
        assert {p.dtype for p in engine.ema_model.parameters()} == {torch.float32}
    # bfloat16 has 8 bits: close, but a run that ignored the setting would be equal.
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.02)
    assert losses[torch.bfloat16] != losses[None]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_divergence_is_raised_and_no_weight_has_moved(
    schedule, tiny_model, optimizer, poison, good_steps
):
    def trained():
        engine = engine_for(
            tiny_model(dropout=0.2), schedule(), warmup_steps=3, optimizer=optimizer
        )
        for _ in range(good_steps):
            engine.train_step(*images(4))
        return engine

    engine, unharmed = trained(), trained()
    x_start, labels = images(4)
    x_start[2, 1, 3, 3] = poison
    with pytest.raises(TrainingDiverged, match=f"step {good_steps + 1}.*learning_rate"):
        engine.train_step(x_start, labels)
    assert_identical(engine.model.state_dict(), unharmed.model.state_dict())
    # Nor does the bad gradient linger: the next step is the one an unharmed engine takes.
    unharmed.step, unharmed.images_seen = engine.step, engine.images_seen
    for each in (engine, unharmed):
        each.train_step(*images(4))
    for part in ("model", "optimizers"):
        assert_identical(engine.state_dict()[part], unharmed.state_dict()[part])
    assert engine.take_metrics()["loss"] == unharmed.take_metrics()["loss"]


def test_batches_without_finite_gradient_are_skipped_within_a_budget(schedule, tiny_model):
    engine = engine_for(tiny_model(), schedule(), max_skipped_steps=2)
    engine.train_step(*images(4))
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    x_start, labels = images(4)
    for _ in range(2):
        engine.train_step(x_start * math.nan, labels)
    assert_identical(engine.model.state_dict(), before)
    assert (engine.step, engine.skipped_steps) == (3, 2)
    engine.train_step(x_start, labels)  # a good one in between renews the budget
    for _ in range(2):
        engine.train_step(x_start * math.nan, labels)
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    with pytest.raises(TrainingDiverged, match="after 5 skipped steps"):
        engine.train_step(x_start * math.nan, labels)
    assert_identical(engine.model.state_dict(), before)


def test_a_budget_that_is_looked_at_only_with_the_metrics_counts_what_was_before(
    schedule, tiny_model, monkeypatch
):
    """As on CUDA, where no step waits for the device: a good step has come since."""
    engine = engine_for(tiny_model(), schedule(), max_skipped_steps=2)
    x_start, labels = images(4)
    with monkeypatch.context() as unseen:
        unseen.setattr(engine, "_check_budget", lambda: None)
        for _ in range(3):
            engine.train_step(x_start * math.nan, labels)
        engine.train_step(x_start, labels)
    with pytest.raises(TrainingDiverged, match="after 3 skipped steps"):
        engine.take_metrics()
    engine.take_metrics()  # said once; since then nothing has been skipped


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("bad", ["position", "stem.weight"])
def test_one_bad_gradient_holds_back_all_optimizers(schedule, awake_model, dtype, bad):
    """AdamW has the position map, Muon the stem."""
    model = awake_model()
    engine = engine_for(model, schedule(), max_skipped_steps=1, autocast_dtype=dtype)
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 2.0**8})
    engine.train_step(*images(4))
    before = through_a_file({part: engine.state_dict()[part] for part in ("model", "optimizers")})
    hook = model.get_parameter(bad).register_hook(lambda gradient: gradient * math.inf)
    engine.train_step(*images(4))
    assert engine.skipped_steps == 1
    after = engine.state_dict()
    for optimizer in (*before["optimizers"], *after["optimizers"]):
        for group in optimizer["param_groups"]:
            group.pop("lr")
    assert_identical({part: after[part] for part in before}, before)
    hook.remove()
    engine.train_step(*images(4))
    assert engine.skipped_steps == 1


def test_loss_scaling_may_halve_its_scale_down_to_one_before_the_budget_counts(
    schedule, tiny_model
):
    engine = engine_for(
        tiny_model(), schedule(), max_skipped_steps=1, autocast_dtype=torch.float16
    )
    halvings = round(math.log2(engine.scaler.get_scale()))
    x_start, labels = images(4)
    for _ in range(halvings + 1):
        engine.train_step(x_start * math.nan, labels)
    with pytest.raises(TrainingDiverged):
        engine.train_step(x_start * math.nan, labels)


def test_metrics_leave_skipped_steps_out(schedule, tiny_model):
    engine, unharmed = (engine_for(tiny_model(), schedule(), max_skipped_steps=9) for _ in "ab")
    x_start, labels = images(4)
    for each in (engine, unharmed):
        each.train_step(x_start, labels)
    engine.train_step(x_start * math.nan, labels)
    found, expected = engine.take_metrics(), unharmed.take_metrics()
    assert found["skipped_steps"] == 1
    for name in ("loss", "loss_quarters", "grad_norm"):
        assert found[name] == expected[name]
    engine.train_step(x_start * math.nan, labels)
    assert engine.take_metrics()["loss"] is None


def test_loss_scaling_trains_in_float16_and_finds_its_scale(schedule, awake_model):
    """A scale far too high overflows: those steps are left out while it halves."""
    engine = engine_for(awake_model(), schedule(), autocast_dtype=torch.float16)
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 2.0**40})
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    engine.train_step(*images(8))
    assert_identical(engine.model.state_dict(), before)
    assert engine.skipped_steps == 1 and engine.scaler.get_scale() == 2.0**39
    engine.scaler.update(2.0**10)
    engine.train_step(*images(8))
    assert engine.skipped_steps == 1
    assert not torch.equal(engine.model.out.weight, before["out.weight"])
    exact = engine_for(awake_model(), schedule())
    exact.step = 1
    exact.train_step(*images(8))
    found, wanted = engine.take_metrics(), exact.take_metrics()
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.01)  # float16 has 11 bits
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_run_continues_in_another_memory_layout(schedule, awake_model, dtype, before, after):
    """As one that goes on in the layout it had, to rounding: fused kernels go by memory."""

    def engine(channels_last: bool):
        model = awake_model()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        return engine_for(model, schedule(), learning_rate=0.01, autocast_dtype=dtype)

    first = engine(before)
    for _ in range(3):
        first.train_step(*images(4))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    results = []
    for channels_last in (before, after):
        saved.seek(0)
        continued = engine(channels_last)
        continued.load_state_dict(torch.load(saved, weights_only=True))
        assert continued.scaler.state_dict() == first.scaler.state_dict()
        for _ in range(2):
            continued.train_step(*images(4))
        results.append(continued.model.state_dict())
    first.train_step(*images(4))
    first.train_step(*images(4))
    assert_identical(results[0], first.model.state_dict())
    if dtype is None:  # Adam makes much of what float16 rounds
        for name, value in results[0].items():
            assert_close(results[1][name], value, rtol=0, atol=1e-4, msg=name)


def test_a_restart_does_not_renew_the_budget_of_skipped_steps(schedule, tiny_model):
    engine = engine_for(tiny_model(), schedule(), max_skipped_steps=2)
    x_start, labels = images(4)
    for _ in range(2):
        engine.train_step(x_start * math.nan, labels)
    continued = engine_for(tiny_model(), schedule(), max_skipped_steps=2)
    continued.load_state_dict(engine.state_dict())
    with pytest.raises(TrainingDiverged, match="after 3 skipped steps"):
        continued.train_step(x_start * math.nan, labels)


def test_a_rehearsal_leaves_no_trace_but_the_number_of_parts(schedule, awake_model):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    plain = engine_for(awake_model(), schedule())
    rehearsed = engine_for(out_of_memory_above(awake_model(), 3, error), schedule())
    before = copy.deepcopy(rehearsed.state_dict())
    rehearsed.rehearse(*images(10))
    assert_identical(rehearsed.state_dict(), before)
    assert rehearsed.micro_batches == 4
    calls = []

    def fails_late(x_t, timesteps, class_labels):
        calls.append(len(x_t))
        if len(calls) == 3:
            raise RuntimeError("a compiler")
        return rehearsed.model(x_t, timesteps, class_labels)

    rehearsed.network = fails_late
    with pytest.raises(RuntimeError, match="a compiler"):
        rehearsed.rehearse(*images(10))
    rehearsed.network = rehearsed.model
    plain.micro_batches = 4
    for engine in (plain, rehearsed):
        engine.train_step(*images(10))
    assert_identical(rehearsed.model.state_dict(), plain.model.state_dict())


def out_of_memory_above(model, largest: int, error: Exception):
    """The model, failing as an allocator does on batches above `largest`."""
    forward = model.forward

    def limited(x_t, timesteps, class_labels):
        if len(x_t) > largest:
            raise error
        return forward(x_t, timesteps, class_labels)

    model.forward = limited
    return model


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
     RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")],
)
def test_out_of_memory_splits_the_batch_with_the_same_gradients(
    schedule, awake_model, error, caplog
):
    whole = engine_for(awake_model(), schedule(), class_dropout_prob=0.5)
    split = engine_for(
        out_of_memory_above(awake_model(), 3, error), schedule(), class_dropout_prob=0.5
    )
    for _ in range(3):
        for engine in (whole, split):
            engine.train_step(*images(10))
    assert split.micro_batches == 4 and whole.micro_batches == 1
    assert sum("out of memory at step 0" in message for message in caplog.messages) == 2
    for a, b in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        # Adam's first steps divide by the gradient, which magnifies rounding.
        assert_close(a, b, rtol=0, atol=1e-4)
    assert split.take_metrics()["loss"] == pytest.approx(whole.take_metrics()["loss"], rel=1e-4)
    assert split.images_seen == 30


@pytest.mark.parametrize("free, full", [(2**29, True), (2**31, False)])
@pytest.mark.parametrize("error", [  # torch's own words
    "GET was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
])
def test_some_errors_mean_out_of_memory_on_a_full_gpu_only(monkeypatch, error, free, full):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 16 * 2**30))
    assert is_out_of_memory(RuntimeError(error)) is full


def test_micro_batches_add_up_to_the_gradient_of_the_batch(schedule, awake_model):
    gradients = []
    for parts in (1, 4):
        engine = engine_for(awake_model(), schedule(), min_snr_gamma=5.0)
        engine.micro_batches = parts
        engine._compute_gradients(*images(10))
        gradients.append([parameter.grad for parameter in engine.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_out_of_memory_with_one_image_is_a_sentence_and_other_errors_pass(schedule, tiny_model):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    engine = engine_for(out_of_memory_above(tiny_model(), 0, error), schedule())
    with pytest.raises(OutOfMemory, match="single image"):
        engine.train_step(*images(4))
    other = engine_for(out_of_memory_above(tiny_model(), 0, RuntimeError("a bug")), schedule())
    with pytest.raises(RuntimeError, match="a bug"):
        other.train_step(*images(4))
    assert other.micro_batches == 1


def test_randomness_of_a_step_depends_on_seed_and_step_alone(schedule):
    def seen(seed, step, disturbance):
        model = Probe()
        engine = engine_for(model, schedule(), seed=seed, class_dropout_prob=0.5)
        engine.step = step
        torch.manual_seed(disturbance)
        engine.train_step(torch.zeros(16, 1, 4, 4), torch.arange(16) % 10)
        return model.calls[0]

    reference = seen(3, 8, disturbance=0)
    assert_identical(seen(3, 8, disturbance=1), reference)
    for other in (seen(4, 8, disturbance=0), seen(3, 9, disturbance=0), seen(8, 3, disturbance=0)):
        assert not torch.allclose(other[0], reference[0], atol=0.1)
        assert not torch.equal(other[2], reference[2])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_five_steps_saved_and_five_more_are_ten_steps_bit_for_bit(
    schedule, tiny_model, optimizer
):
    """With dropout and label dropout on, a moving learning rate, and weight decay."""

    def new_engine(model_seed):
        return engine_for(
            tiny_model(model_seed, dropout=0.3), schedule(), learning_rate=1e-2, warmup_steps=3,
            final_lr_fraction=0.1, weight_decay=0.1, class_dropout_prob=0.5,
            ema_halflife_images=20, ema_rampup_ratio=0.5, seed=5, optimizer=optimizer,
        )

    batches = [images(4, seed) for seed in range(10)]
    whole = new_engine(0)
    list(whole.train(batches))

    first = new_engine(0)
    for batch in batches[:5]:
        first.train_step(*batch)
    first.validation_loss(first.model, *batches[0], 4)  # looking does not touch
    state = through_a_file(first.state_dict())
    second = new_engine(1)  # its own weights must leave no trace
    second.load_state_dict(state)
    assert_identical(second.state_dict(), first.state_dict())
    assert list(second.train(batches[5:])) == [6, 7, 8, 9, 10]
    assert (second.step, second.images_seen) == (10, 40)
    assert_identical(second.state_dict(), whole.state_dict())


# Validation


def test_validation_loss_repeats_itself_and_ignores_the_batch_size(schedule, awake_model):
    model = awake_model(dropout=0.5).train()
    engine = engine_for(model, schedule())
    batch = images(13)
    random_state = torch.get_rng_state()
    reference = engine.validation_loss(model, *batch, 13)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(99)
    assert engine.validation_loss(model, *batch, 13) == reference
    for batch_size in (1, 4, 50):
        # The order of float32 sums is all that may differ.
        assert engine.validation_loss(model, *batch, batch_size) == pytest.approx(
            reference, rel=1e-4
        )
    assert model.training and all(p.grad is None for p in model.parameters())
    other_seed = engine_for(awake_model(), schedule(), seed=1)
    assert other_seed.validation_loss(model, *batch, 13) != reference


def test_validation_that_runs_out_of_memory_goes_on_in_parts(schedule, awake_model, caplog):
    batch = images(13)
    expected = engine_for(awake_model(), schedule()).validation_loss(awake_model(), *batch, 13)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    limited = out_of_memory_above(awake_model(), 4, error)
    found = engine_for(awake_model(), schedule()).validation_loss(limited, *batch, 13)
    assert found == pytest.approx(expected, rel=1e-4)
    assert "validation images go 3 at a time" in caplog.text


def test_validation_noise_of_odd_sized_images_ignores_the_batch_size(schedule):
    """torch draws random numbers in groups of 16, which 75 numbers an image do not fill."""
    model = Probe()
    engine = engine_for(model, schedule())
    x_start, labels = torch.zeros(6, 3, 5, 5), torch.arange(6)
    for batch_size in (6, 1, 4):
        engine.validation_loss(model, x_start, labels, batch_size)
    seen = torch.cat([x_t for x_t, _, _ in model.calls])
    assert_close(seen[6:12], seen[:6], rtol=0, atol=1e-6)
    assert_close(seen[12:], seen[:6], rtol=0, atol=1e-6)


def test_validation_covers_all_noise_levels_in_an_order_unrelated_to_the_labels(schedule):
    model = Probe()
    engine = engine_for(model, schedule(1000))
    labels = torch.arange(10).repeat_interleave(50)  # sorted by class
    engine.validation_loss(model, torch.zeros(500, 1, 1, 1), labels, 500)
    timesteps = model.calls[0][1]
    assert timesteps.sort().values.tolist() == list(range(0, 1000, 2))
    # Per class a mean of 50 draws without replacement, std 289 / sqrt(50) = 41: five of those.
    means = timesteps.double().view(10, 50).mean(1)
    assert_close(means, torch.full_like(means, 499.0), rtol=0, atol=205)


def test_validation_loss_of_a_zero_prediction_is_the_mean_square_of_the_target(schedule):
    engine = engine_for(Probe(), schedule(prediction_type="epsilon"))
    loss = engine.validation_loss(engine.model, torch.zeros(50, 3, 16, 16), torch.arange(50), 8)
    # Five standard errors of n = 50 * 768 squares of variance 2: 5 sqrt(2 / 38400) = 0.036.
    assert loss == pytest.approx(1.0, abs=0.036)


# The loop


def counted(batch, taken: list):
    while True:
        taken.append(batch)
        yield batch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_no_training_step_waits_for_the_gpu(tiny_model, schedule, dtype):
    engine = engine_for(tiny_model().cuda(), schedule().cuda(), autocast_dtype=dtype)
    batches = TrainingBatches(
        Split(torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20) % 10),
        DataConfig(image_size=16), 4, 0, "cuda",
    ).starting_at(0)
    engine.train_step(*next(batches))  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.train_step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # That mode does not see a copy that waits.
    torch.cuda._sleep(10**10)  # cycles: seconds
    asleep = torch.cuda.Event()
    asleep.record()
    next(batches)
    assert not asleep.query()
    assert engine.take_metrics()["loss"] > 0


@pytest.mark.gpu
def test_compiled_training_on_the_gpu_resumes_where_it_was(awake_model, schedule):
    """Compiled, in bfloat16 and channels_last, as a full run; 4 steps are 2, a checkpoint and 2."""

    def start() -> TrainingEngine:
        model = awake_model().to(memory_format=torch.channels_last).cuda()
        engine = engine_for(model, schedule().cuda(), autocast_dtype=torch.bfloat16)
        compile_training(engine, batch)
        assert engine.network is not engine.model
        return engine

    batch = tuple(part.cuda() for part in images(8))
    whole, half = start(), start()
    for _ in range(4):
        whole.train_step(*batch)
    for _ in range(2):
        half.train_step(*batch)
    continued = start()
    continued.load_state_dict(half.state_dict())
    for _ in range(2):
        continued.train_step(*batch)
    for name in ("model", "ema_model"):
        ours, theirs = (
            dict(getattr(engine, name).named_parameters()) for engine in (continued, whole)
        )
        for key in ours:
            a, b = ours[key], theirs[key]
            if key.endswith("qkv.bias"):  # the same for all keys, which softmax ignores: all noise
                a, b = (torch.cat(bias.chunk(3)[::2]) for bias in (a, b))
            assert_close(a, b, rtol=0, atol=1e-3)  # kernels may add up in another order
    loss = continued.take_metrics()["loss"]
    assert loss == pytest.approx(whole.take_metrics()["loss"], rel=1e-2)


def test_training_ends_at_total_steps(schedule):
    engine, taken = engine_for(Probe(), schedule(), total_steps=7), []
    steps = []
    for step in engine.train(counted(images(2), taken)):
        assert step == engine.step == len(taken) and engine.complete == (step == 7)
        steps.append(step)
    assert steps == [1, 2, 3, 4, 5, 6, 7] and engine.images_seen == 14
    assert list(engine.train(counted(images(2), taken))) == [] and len(taken) == 7


def test_training_can_be_left_after_any_step(schedule):
    engine, taken = engine_for(Probe(), schedule(), total_steps=7), []
    for step in engine.train(counted(images(2), taken)):
        if step == 3:
            break
    assert not engine.complete and (engine.step, len(taken)) == (3, 3)
    assert list(engine.train(counted(images(2), taken))) == [4, 5, 6, 7]


def test_first_step_is_that_of_adamw(schedule):
    """Kingma & Ba 2015, alg. 1, with decays of 0.9 and 0.99 and epsilon 1e-8."""
    engine = engine_for(Probe(), schedule(), grad_clip=1e9, learning_rate=0.1)
    before = engine.model.value.item()
    engine.train_step(*images(8))
    g = engine.take_metrics()["grad_norm"]
    (moments,) = engine.optimizers[0].state.values()
    assert abs(moments["exp_avg"].item()) == pytest.approx(0.1 * g, rel=1e-5)
    assert moments["exp_avg_sq"].item() == pytest.approx(0.01 * g**2, rel=1e-5)
    moved = abs(engine.model.value.item() - before)
    assert moved == pytest.approx(0.1 * g / (g + 1e-8), rel=1e-6)


def test_validation_has_the_precision_of_training(schedule):
    seen = []

    class Multiplying(Probe):
        def forward(self, x_t, timesteps, class_labels):
            seen.append(torch.mm(x_t[0, 0], x_t[0, 0]).dtype)
            return super().forward(x_t, timesteps, class_labels)

    engine = engine_for(Multiplying(), schedule(), autocast_dtype=torch.bfloat16)
    engine.validation_loss(engine.model, torch.zeros(2, 3, 4, 4), torch.arange(2), 2)
    assert seen == [torch.bfloat16]


def test_processes_have_dropout_of_their_own(schedule):
    drawn = []

    class Drawing(Probe):
        def forward(self, *inputs):
            drawn.append(torch.rand(8))
            return super().forward(*inputs)

    for rank in range(3):
        engine = engine_for(
            Drawing(), schedule(), class_dropout_prob=0.0, processes=Processes(rank, 3, rank)
        )
        engine._compute_gradients(torch.zeros(2, 3, 4, 4), torch.arange(6))
    assert len(torch.stack(drawn).unique(dim=0)) == 3


def test_neither_noise_nor_losses_are_clipped(schedule):
    model = Probe()
    model.value.data.fill_(3.0)  # far off: losses near 10
    engine = engine_for(model, schedule(), min_snr_gamma=0.0, class_dropout_prob=0.0)
    engine.train_step(torch.zeros(64, 3, 16, 16), torch.zeros(64, dtype=torch.long))
    assert model.calls[0][0].abs().max() > 3.2  # of 49152 normal draws
    assert engine.take_metrics()["loss"] > 5


def test_speed_counts_training_steps_and_the_wait_for_their_batches(schedule, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_engine.time, "perf_counter", lambda: now[0])
    engine = engine_for(Probe(), schedule(), total_steps=3)
    step = engine.train_step

    def slow_batches():
        while True:
            now[0] += 1
            yield images(8)

    def slow_step(*batch):
        now[0] += 3
        step(*batch)

    monkeypatch.setattr(engine, "train_step", slow_step)
    for _ in engine.train(slow_batches()):
        now[0] += 100  # what the caller does between two steps
    metrics = engine.take_metrics()
    assert metrics["images_per_second"] == pytest.approx(8 / 4)
    assert metrics["data_wait"] == pytest.approx(1 / 4)
