"""health.py: which losses call for a warning."""

import random

import pytest

from health import LossWatch


def course(*losses: float) -> list[str]:
    watch = LossWatch()
    return [sentence for loss in losses for sentence in watch.warnings(loss)]


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
    assert course(*flat[:19]) == []  # too early to tell


def test_a_plateau_below_the_start_is_no_dead_run():
    assert course(*falling(30), *[0.06] * 100) == []


def test_a_continued_run_remembers_what_was_usual():
    assert LossWatch(falling(50)).warnings(0.5)
    assert not LossWatch([0.5] * 50).warnings(0.5)  # said before the interruption
