"""training_run.py: that a run's parts get its settings, its data and the right weights."""

import json
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SETTINGS
from torch.testing import assert_close

import training_run
from conditional_diffusion import DDPMSampler, SDEDPMSolverSampler
from conditional_diffusion.checkpoint import load_checkpoint
from conditional_diffusion.processes import Processes
from config import CLASS_NAMES, apply_overrides, full
from data import Split, to_arrays, to_x_start
from training_run import Run

SMALL = {**TINY_SETTINGS, "train.device": "cpu", "train.batch_size": 10,
         "train.validation_images": 20}


class Notes:
    """Stands for the monitor: keeps what it is told."""

    def __init__(self):
        self.validations, self.drawn = [], []

    def record_validation(self, **values):
        self.validations.append(values)

    def draw_samples(self, step, name, images, class_names):
        self.drawn.append(name)


@pytest.fixture
def splits() -> dict[str, Split]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Split(torch.randint(256, (n, 3, 16, 16), generator=generator).byte(),
                    torch.arange(n) * 10 // n)
        for name, n in (("train", 40), ("test", 20))
    }


@pytest.fixture
def make_run(tmp_path, splits):
    """make_run(saved=None, settings): a run of 40 images, four batches an epoch."""

    def make(saved=None, **settings) -> Run:
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        config = apply_overrides(full(), SMALL | changes)
        return Run(config, tmp_path, splits, torch.device("cpu"), saved)

    return make


def test_every_setting_reaches_the_engine(make_run):
    changes = {
        "train__learning_rate": 0.3, "train__warmup_steps": 7, "train__final_lr_fraction": 0.4,
        "train__weight_decay": 0.5, "train__grad_clip": 0.6, "train__class_dropout_prob": 0.7,
        "diffusion__min_snr_gamma": 8.0, "train__ema_halflife_images": 9,
        "train__ema_rampup_ratio": 0.11, "train__max_skipped_steps": 12, "train__seed": 13,
        "train__optimizer": "adamw",
    }
    engine = make_run(**changes, train__epochs=3, train__precision="bf16").engine
    for name, value in changes.items():
        assert getattr(engine, name.split("__")[1]) == value, name
    assert engine.total_steps == 12 and engine.autocast_dtype is torch.bfloat16


def test_the_largest_batch_leaves_room_for_what_comes_after_it(make_run, splits, monkeypatch):
    empty, made, held = torch.empty, [], []

    def kept(*size, **options):
        made.append(weakref.ref(tensor := empty(*size, **options)))
        return tensor

    def fitting(*arguments):
        held.extend(tensor.nbytes for known in made if (tensor := known()) is not None)
        return 8

    monkeypatch.setattr(training_run, "live_on", lambda images, device: True)
    monkeypatch.setattr(training_run, "fitting_batch_size", fitting)
    monkeypatch.setattr(torch, "empty", kept)
    model = make_run(train__batch_size=0).model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 3 * weights + splits["train"].images.nbytes in held


def test_the_largest_batch_of_several_is_what_fits_on_each(tmp_path, splits, monkeypatch):
    class First(Processes):
        """Of two; on the other one eight images fit."""

        def extreme(self, value, *, largest):
            return max(value, 8) if largest else min(value, 8)

    monkeypatch.setattr(training_run, "fitting_batch_size", lambda *arguments: 16)
    config = apply_overrides(full(), SMALL | {"train.batch_size": "auto"})
    run = Run(config, tmp_path, splits, torch.device("cpu"), None, First(0, 2))
    assert run.batches.batch_size == 16


def test_validation_images_are_held_out_and_spread(make_run, splits):
    run = make_run(train__validation_images=10)
    index = torch.arange(0, 20, 2)
    assert_close(run.validation[0], to_x_start(splits["test"].images[index], 16))
    assert run.validation[1].tolist() == splits["test"].labels[index].tolist()


def test_network_and_average_have_seen_all_training_images(make_run, splits):
    run = make_run()
    x_start = to_x_start(splits["train"].images, 16)
    expected = run.model.wiener.spectrum(x_start).square().mean(0).sqrt()
    for model in (run.model, run.engine.ema_model):
        assert_close(model.wiener.std, expected, rtol=1e-4, atol=1e-4)


def test_validation_losses_are_of_the_named_weights_and_labels(make_run):
    run = make_run()
    run.monitor, run.config = Notes(), replace(run.config, mode="demo")
    torch.manual_seed(0)
    for parameter in run.engine.ema_model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    run.validate()

    x_start, labels = run.validation

    def loss_of(model, labels):
        return run.engine.validation_loss(model, x_start, labels, 10)

    ema = run.engine.ema_model
    expected = {"loss": loss_of(run.model, labels), "loss_ema": loss_of(ema, labels),
                "loss_null": loss_of(ema, torch.full_like(labels, 10))}
    (record,) = run.monitor.validations
    assert len(set(expected.values())) == 3
    assert {name: record[name] for name in expected} == expected


@pytest.mark.parametrize("images, rows", [(1, 1), (2, 2), (4, 3)])
def test_grids_and_verdict_are_of_the_named_weights(make_run, monkeypatch, images, rows):
    run, asked = make_run(), []
    run.splits["train"] = run.splits["train"].first_per_class(images)

    def sample(model, rows, *, grid):
        asked.append((model, rows, grid))
        return torch.zeros(10 * rows, 3, 16, 16)

    monkeypatch.setattr(training_run, "GRID_ROWS", 3)
    monkeypatch.setattr(run, "sample", sample)
    run.monitor, run.config = Notes(), replace(run.config, mode="demo")
    run.draw()
    run.verdict()
    ema = run.engine.ema_model
    assert asked == [(run.model, rows, True), (ema, rows, True), (ema, rows, False)]
    assert run.monitor.drawn == ["raw", "ema"]


def test_grids_have_a_sampler_of_their_own(make_run, monkeypatch):
    run, drawn = make_run(), []

    def sample(self, model, labels, shape, seeds, **options):
        drawn.append((type(self), self.num_inference_steps, seeds))
        return torch.zeros(len(seeds), *shape)

    for sampler in (DDPMSampler, SDEDPMSolverSampler):
        monkeypatch.setattr(sampler, "sample", sample)
    for grid in (True, False):
        run.sample(run.model, 2, grid=grid)
    seeds = [0] * 10 + [1] * 10
    assert drawn == [(SDEDPMSolverSampler, 3, seeds), (DDPMSampler, 5, seeds)]


def test_the_best_loss_survives_an_interruption(make_run, tmp_path):
    run, best = make_run(), tmp_path / "best.pt"
    run.validated = (0, 0.25)
    run.save()
    again, before = make_run(load_checkpoint(best)), best.read_bytes()
    again.validated = (0, 0.5)
    again.save()
    assert again.best_loss == 0.25 and best.read_bytes() == before


def test_hours_minutes_and_the_number_of_checkpoints(make_run, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now[0])
    never = {f"train__{what}_every": 999 for what in ("log", "validate", "sample", "save")}
    run = make_run(train__max_hours=1.0, train__save_minutes=10.0, train__keep_checkpoints=99,
                   train__epochs=99, **never)
    for action in ("log", "draw", "validate"):
        monkeypatch.setattr(run, action, lambda: None)
    steps_of = run.engine.train

    def slow_steps(batches):
        for step in steps_of(batches):
            now[0] += 450  # seconds
            yield step

    monkeypatch.setattr(run.engine, "train", slow_steps)
    assert not run.train() and run.engine.step == 9  # the first beyond an hour
    saved = [int(path.stem[-8:]) for path in sorted(tmp_path.glob("checkpoint_*.pt"))]
    assert saved == [2, 4, 6, 8, 9]


def test_a_stop_saves_at_once_and_leaves_a_grid_to_the_next_start(make_run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Run, "draw", lambda run: drawn.append(run.engine.step))
    often = {"train__sample_every": 1, "train__epochs": 1}
    run = make_run(**often)
    run.stop_signal = signal.SIGTERM
    assert not run.train()
    assert drawn == []
    (path,) = tmp_path.glob("*.pt")
    assert make_run(load_checkpoint(path), **often).train()
    assert drawn == [1, 2, 3, 4]


def test_every_picture_of_a_grid_is_of_the_class_it_stands_under(make_run, monkeypatch):
    def sample(self, model, labels, shape, seeds, **options):
        values = 10 * torch.tensor(seeds) + labels  # tells seed and class apart
        return values.float().view(-1, 1, 1, 1).expand(-1, *shape)

    monkeypatch.setattr(SDEDPMSolverSampler, "sample", sample)
    run = make_run()
    grid = run.sample(run.model, 3, grid=True)[:, 0, 0, 0].view(3, 10)
    assert_close(grid, (10 * torch.arange(3)[:, None] + torch.arange(10)).float())


def taking_turns(rows: int) -> list[int]:
    """Of the fixture's images, sorted by class, four each, the first ones, classes in turns."""
    return [4 * label + row for row in range(rows) for label in range(10)]


def test_originals_stand_under_their_classes(make_run, splits):
    run, drawn = make_run(), []
    run.monitor = Notes()
    run.monitor.draw_samples = lambda step, name, images, class_names: drawn.append(images)
    run.draw_originals()
    expected = splits["train"].images[taking_turns(4)].permute(0, 2, 3, 1)
    assert np.array_equal(drawn[0], expected.numpy())


def test_a_verdict_of_two_rows_names_and_shows_each_with_its_original(
    make_run, splits, monkeypatch, tmp_path
):
    run, shown = make_run(), []
    originals = to_x_start(splits["train"].images[taking_turns(2)], 16)
    run.splits["train"] = splits["train"].first_per_class(2)
    monkeypatch.setattr(run, "sample", lambda *args, **options: originals + 0.02)
    draw = training_run.labelled_grid
    monkeypatch.setattr(
        training_run, "labelled_grid",
        lambda images, *rest: shown.append(images) or draw(images, *rest),
    )
    assert run.verdict()
    found = json.loads((tmp_path / "verdict.json").read_text())["pictures"]
    assert [p["class"] for p in found] == [p["nearest"] for p in found] == 2 * list(CLASS_NAMES)
    assert {p["psnr"] for p in found} == {40.0}  # 20 log10(2 / 0.02)
    drawn = shown[0].reshape(4, 10, 16, 16, 3)  # originals above, samples below
    assert np.array_equal(drawn[0::2].reshape(20, 16, 16, 3), to_arrays(originals))
    assert np.array_equal(drawn[1::2].reshape(20, 16, 16, 3), to_arrays(originals + 0.02))


def test_best_is_by_the_average_and_only_of_a_step_that_was_validated(
    make_run, monkeypatch, tmp_path
):
    run = make_run()
    losses = {id(run.model): 0.125, id(run.engine.ema_model): 0.25}
    monkeypatch.setattr(run.engine, "validation_loss", lambda model, *rest: losses[id(model)])
    run.validate()
    assert run.validated == (0, 0.25)
    run.engine.step = 1  # whose weights nobody has looked at
    run.save()
    assert not (tmp_path / "best.pt").exists()
    run.engine.step = 0
    run.save()
    assert (tmp_path / "best.pt").exists() and run.best_loss == 0.25


@pytest.mark.parametrize("status", [
    "VmPeak:\t 9 kB\nVmHWM:\t 3145728 kB\nVmRSS:\t 8 kB\n", "VmRSS:\t 3145728 kB\n",
])
def test_peak_memory_is_in_gib(monkeypatch, status):
    monkeypatch.setattr(Path, "read_text", lambda self: status)
    assert training_run.peak_memory_gib(torch.device("cpu")) == 3


@pytest.mark.parametrize("fits, taken", [(27, 24), (8, 8), (7, 7), (99, 40)])
def test_a_chosen_batch_is_a_multiple_of_eight_of_at_most_all_images(
    make_run, monkeypatch, fits, taken
):
    monkeypatch.setattr(training_run, "fitting_batch_size", lambda *arguments: fits)
    assert make_run(train__batch_size=0).config.train.batch_size == taken


def test_what_looks_wrong_is_said(make_run, monkeypatch):
    run, said = make_run(), []
    run.monitor = Notes()
    run.monitor.warn = lambda step, message: said.append(message)
    run.monitor.records = []
    for kind, name in (("train", "record_training"), ("validation", "record_validation")):
        setattr(run.monitor, name, lambda kind=kind, **values: run.monitor.records.append(
            {"kind": kind, **values}
        ))
    findings = {
        "loss_findings": lambda train: [f"{len(train)} losses"],
        "validation_findings": lambda train, validation: [f"{len(validation)} validations"],
        "picture_findings": lambda pictures, data: ["pictures"],
    }
    for name, found in findings.items():
        monkeypatch.setattr(training_run, name, found)
    run.engine.train_step(*next(run.batches.starting_at(0)))
    run.log()
    run.validate()
    run.draw()
    assert said == ["1 losses", "1 validations", "pictures"]
