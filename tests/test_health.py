"""health.py: which losses call for a warning."""

import math
import random

import pytest
import torch

from health import JUDGED, loss_findings, picture_findings, quarter_words, validation_findings

WARMUP = 5  # records


def course(*losses: float) -> list[str]:
    train = records(losses)
    return [sentence for n in range(len(train)) for sentence in loss_findings(train[: n + 1])]


def records(losses, **more) -> list[dict]:
    """Training records of these mean losses, every quarter at the same loss."""
    return [{"step": 10 * n, "loss": loss, "loss_quarters": [loss] * 4, "grad_norm": 1.0,
             "learning_rate": 1e-4 * min(n, WARMUP), **more}
            for n, loss in enumerate(losses, start=1)]


def falling(count: int) -> list[float]:
    """A loss as of a healthy run: it falls by a tenth per record to a floor, with noise of 20 %."""
    noise = random.Random(0)
    return [(0.05 + 0.9**n) * noise.uniform(0.8, 1.2) for n in range(count)]


def test_a_healthy_run_is_left_in_peace():
    assert course(*falling(300)) == []


@pytest.mark.parametrize("at", [10, 250])
def test_a_jump_is_reported_each_time(at):
    losses = falling(300)
    usual = sorted(losses[max(0, at - 20) : at])
    jump = 3 * (usual[len(usual) // 2] + usual[(len(usual) - 1) // 2]) / 2
    (sentence,) = course(*losses[:at], jump, *losses[at:])
    assert sentence.startswith(f"loss {jump:.4g} is 3.0 times")
    assert len(course(*losses[:at], jump, jump, *losses[at:])) == 2


def test_the_first_records_have_nothing_to_be_compared_with():
    assert course(0.1, 0.1, 0.9, 0.1) == []


def test_a_loss_that_never_falls_is_reported_once():
    noise = random.Random(0)
    flat = [0.5 * noise.uniform(0.99, 1.01) for _ in range(100)]
    (sentence,) = course(*flat)
    assert "still where it began" in sentence
    assert len(course(*flat[: WARMUP + JUDGED])) == 1
    assert course(*flat[: WARMUP + JUDGED - 1]) == []  # too early to tell


def test_a_run_that_begins_well_and_learns_slowly_is_left_in_peace():
    """As measured on CIFAR-10: from 0.0835 down by 1 % over 20 records and by 6 % over 40."""
    assert course(*[0.0835 * 0.9985**n for n in range(80)]) == []


def test_a_plateau_below_the_start_is_no_dead_run():
    assert course(*falling(30), *[0.06] * 100) == []


def test_every_noise_level_has_a_word():
    train = records([0.5] * 60)
    for n, record in enumerate(train):
        grows = 0.1 + 0.02 * max(0, n - 40)
        record["loss_quarters"] = [0.9**n + 0.1, 0.5, grows, None if n < 45 else 0.3]
    assert quarter_words(train) == ["normal", "stuck", "diverging", "too early"]
    assert quarter_words(train[: WARMUP + JUDGED - 1]) == ["too early"] * 4
    assert quarter_words([]) == []


def validation(*losses, ema=None) -> list[dict]:
    return [{"step": 100 * n, "loss": loss, "loss_ema": ema or loss}
            for n, loss in enumerate(losses, start=1)]


def test_a_good_validation_finds_nothing():
    assert validation_findings(records(falling(60)), validation(0.2, 0.1, 0.105)) == []
    assert validation_findings([], validation(0.2)) == []


def test_an_average_that_lags_is_found():
    (finding,) = validation_findings(records(falling(60)), validation(0.2, 0.1, ema=0.12))
    assert "EMA weights lag" in finding and "ema_rampup_ratio" in finding


def test_a_null_label_that_is_not_trained_is_found():
    last = {"step": 100, "loss": 0.1, "loss_ema": 0.1}
    assert validation_findings([], [last | {"loss_null": 0.105}]) == []
    (finding,) = validation_findings([], [last | {"loss_null": 0.15}])
    assert "null label is not trained" in finding and "train.class_dropout_prob" in finding


def test_overfitting_is_found_but_not_where_training_gets_worse_too():
    falling_on = [1 / n for n in range(1, 61)]
    (finding,) = validation_findings(records(falling_on), validation(0.2, 0.1, 0.15))
    assert "rose from 0.1 (step 200) to 0.15" in finding and "best.pt" in finding
    (finding,) = validation_findings(records(falling_on), validation(math.nan, 0.1, 0.15))
    assert "rose from 0.1" in finding
    rising = [0.1] * 20 + [0.5] * 40
    assert validation_findings(records(rising), validation(0.2, 0.1, 0.15)) == []


def test_growing_gradients_are_found():
    train = records(falling(80))
    for record in train[60:]:
        record["grad_norm"] = 7.0
    (finding,) = validation_findings(train, validation(0.1))
    assert "gradients have grown to 7 from 1" in finding


def test_flat_and_tinted_pictures_are_found():
    data = torch.rand(50, 3, 8, 8, generator=torch.manual_seed(0)) * 2 - 1
    assert picture_findings(data[:20], data) == []
    black = data[:20].clone()
    black[3:5] = -1
    (finding,) = picture_findings(black, data)
    assert "2 of 20 pictures are of a single colour" in finding
    green = data[:20] + torch.tensor([0, 0.5, 0]).view(3, 1, 1)
    (finding,) = picture_findings(green, data)
    assert "pictures have green at +0.5" in finding


def test_a_missing_colour_is_named():
    x_start = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.2
    (finding,) = picture_findings(x_start[:20] - torch.tensor([0, 0, 0.5]).view(3, 1, 1), x_start)
    assert "blue at -0.2" in finding
