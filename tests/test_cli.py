"""The scripts as a user runs them: whole small runs, resuming, and every kind of bad input."""

import errno
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PICTOGRAMS, TINY_FLAGS, assert_identical, assert_one_sentence
from PIL import Image

import generate_samples
import prepare_data
import train_model
import training_run
from cifar10 import DataError
from conditional_diffusion import CosineNoiseScheduler, TrainingEngine
from conditional_diffusion.checkpoint import load_newest
from conditional_diffusion.processes import Processes
from config import CLASS_NAMES, OPTIONS, ConfigError, full
from data import TrainingBatches
from run_directory import read_metrics
from run_status import is_alive

ROOT = Path(__file__).parents[1]
QUICK = ["--quick-test", *PICTOGRAMS]


pytestmark = pytest.mark.usefixtures("own_directory")


def test_quick_test_then_generate(call):
    status, said = call(train_model, *QUICK)
    assert status == 0 and "next: make generate" in said
    run = Path("checkpoints_overfit/quick-test")
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert json.loads((run / "config.json").read_text())["data"]["dataset"] == "pictograms"
    records = read_metrics(run)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 11))
    assert {"loss_quarters", "grad_norm", "images_per_second"} <= records[0].keys()
    assert [r["step"] for r in records if r["kind"] == "validation"] == [5, 10]
    originals = "samples/step_00000000_originals.png"
    for picture in ("training_curves.png", "samples/step_00000010_ema.png", originals):
        with Image.open(run / picture) as image:
            assert min(image.size) > 50
    assert not (run / "best.pt").exists()  # of a full run alone

    status, said = call(generate_samples, "--samples", 2, "--classes", "cat,9", "--seed", 7)
    assert status == 0, said
    out = Path("generated_images")
    names = {"cat_0007.png", "cat_0008.png", "truck_0007.png", "truck_0008.png"}
    assert names | {"grid.png", "samples.json", "run.lock"} == {path.name for path in out.iterdir()}
    facts = json.loads((out / "samples.json").read_text())
    assert facts["step"] == 10 and facts["weights"] == "EMA"
    assert facts["pictures"][1] == {"class": "truck", "seed": 7, "file": "truck_0007.png"}
    with Image.open(out / "cat_0007.png") as image:
        assert image.size == (16, 16) and image.text["class"] == "cat"


@pytest.mark.parametrize("mode, given, epochs", [
    ("overfit", {}, 15), ("overfit", {"data.samples_per_class": "3"}, 45),
    ("overfit", {"data.samples_per_class": 3, "train.epochs": "2"}, 2),
    ("overfit", {"data.samples_per_class": 50}, 60),
    ("quick-test", {"data.samples_per_class": 3}, 2), ("full", {"data.samples_per_class": 3}, 100),
])
def test_overfit_takes_more_epochs_for_more_images_unless_told(mode, given, epochs):
    config = train_model.resolve_config(mode, given, None)
    assert config.train.epochs == epochs
    assert train_model.resolve_config(mode, {}, config).train.epochs == epochs, "continued"


def test_overfit_verdict_decides_the_exit_status(call, monkeypatch):
    arguments = ["--overfit", *PICTOGRAMS, "--train.log_every", 1]
    status, said = call(train_model, *arguments, "--epochs", 1)
    assert status == 1 and "FAIL" in said
    verdict = json.loads(Path("checkpoints_overfit/verdict.json").read_text())
    assert [p["class"] for p in verdict["pictures"]] == list(CLASS_NAMES)
    with Image.open("checkpoints_overfit/verdict.png") as image:
        assert image.size[0] > 10 * 64

    # A complete run is followed by a new one, and kept. Here every picture is near its original.
    def perfect(pictures, originals, wrong=0, decibels=20.0):
        index = torch.arange(10)
        index[wrong] = 0
        return index, torch.full((10,), decibels)

    monkeypatch.setattr(training_run, "nearest_images", perfect)
    status, said = call(train_model, *arguments, "--epochs", 1)
    assert Path("checkpoints_overfit_1/verdict.json").exists()
    assert status == 0 and "PASS" in said
    assert json.loads(Path("checkpoints_overfit/verdict.json").read_text())["passed"]
    for worse in ({"wrong": 5}, {"decibels": 19.9}):
        monkeypatch.setattr(training_run, "nearest_images", partial(perfect, **worse))
        status, said = call(train_model, *arguments, "--epochs", 1)
        assert status == 1 and "FAIL" in said


def test_what_a_kill_after_the_last_step_took_comes_again(call):
    full = ["--full", *PICTOGRAMS, "--samples", 10, "--batch-size", 20, "--epochs", 1]
    assert "lies within the 500 steps of its warm-up" in call(train_model, *full)[1]
    run = Path("checkpoints")
    grid, curves, report = (run / "samples" / "step_00000005_ema.png",
                            run / "training_curves.png", run / "report.html")

    def damage(*lost: Path) -> None:
        for path in lost:
            path.unlink()
        for folder in (run, run / "samples"):
            (folder / "samples.gif.123.tmp").touch()

    damage(grid, curves, report)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": "running"}))
    status, said = call(train_model, *full)
    assert status == 0 and "continuing at step 5" in said
    assert grid.exists() and curves.exists() and report.exists()
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert not list(run.rglob("*.tmp"))

    damage(report)  # a kill while it was written
    status, said = call(train_model, *full)
    assert status == 0 and "is complete" in said
    assert "finished" in report.read_text() and not list(run.rglob("*.tmp"))


def test_a_short_run_killed_before_its_verdict_is_not_trained_anew(call):
    overfit = ["--overfit", *PICTOGRAMS, "--epochs", 1]
    assert "FAIL" in call(train_model, *overfit)[1]
    path = Path("checkpoints_overfit/run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running"}))
    said = call(train_model, *overfit)[1]
    assert "continuing at step" in said and "FAIL" in said and "moved" not in said
    assert "moved to checkpoints_overfit_1" in call(train_model, *overfit)[1]  # it was complete


def test_a_verdict_that_was_interrupted_is_given_by_the_same_command(call, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    overfit = ["--overfit", *PICTOGRAMS, "--epochs", 1]
    with monkeypatch.context() as patch:
        patch.setattr(training_run.Run, "verdict", interrupted)
        assert call(train_model, *overfit)[0] == 130
    assert json.loads(Path("checkpoints_overfit/run.json").read_text())["state"] == "interrupted"
    said = call(train_model, *overfit)[1]
    assert "continuing at step" in said and "FAIL" in said and "moved" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_run_continues_to_the_same_weights(call, number):
    full = ["--full", *PICTOGRAMS, "--samples", 10, "--batch-size", 20, "--epochs", 2,
            "--train.log_every", 1]
    call(train_model, *full)
    whole = torch.load("checkpoints/checkpoint_00000010.pt", weights_only=True)
    assert call(train_model, *full)[1].count("is complete") == 1
    status, said = call(train_model, *full, "--fresh", "--epochs", 1)
    assert status == 0 and "checkpoints_1" in said
    command = [sys.executable, str(ROOT / "train_model.py"), *map(str, full), "--fresh",
               "--train.sample_every", "1"]  # slowly enough for a signal to arrive before the end
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    signal.signal(signal.SIGHUP, earlier)
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 128 + number, rest
    assert "--fresh continues: " in rest and "--fresh" not in rest.split("continues: ")[1]
    state = json.loads(Path("checkpoints/run.json").read_text())
    assert state["state"] == "interrupted"
    status, said = call(train_model, *full)
    assert status == 0 and "continuing at step" in said
    resumed = torch.load("checkpoints/checkpoint_00000010.pt", weights_only=True)
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            torch.testing.assert_close(resumed[part][name], value, rtol=0, atol=0)
    steps = [r["step"] for r in read_metrics(Path("checkpoints")) if r["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_deterministic_run_uses_deterministic_algorithms(call, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1]
    try:
        assert call(train_model, *arguments, "--train.deterministic", "true")[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_training_goes_on_where_the_compiler_fails(call, monkeypatch):
    """And ends where it would have ended without one."""
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1]
    call(train_model, *arguments)
    plain = load_newest([Path("checkpoints")], warn=pytest.fail)[1]

    def broken(model, **options):
        def network(*inputs):
            raise RuntimeError("Failed to find C compiler.\nLong advice.")

        return network

    monkeypatch.setattr(torch, "compile", broken)
    status, said = call(train_model, *arguments, "--fresh", "--train.compile", "true")
    assert status == 0
    assert "torch.compile does not work here (Failed to find C compiler.); training goes on" in said
    found = load_newest([Path("checkpoints")], warn=pytest.fail)[1]
    assert_identical(found["model"], plain["model"])


def test_training_goes_on_where_a_step_cannot_be_recorded(call, monkeypatch):
    """And ends where it would have ended without trying."""
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1]
    call(train_model, *arguments)
    plain = load_newest([Path("checkpoints")], warn=pytest.fail)[1]
    records_training = training_run.records_training
    monkeypatch.setattr(training_run, "records_training", lambda config, engine: records_training(
        config, SimpleNamespace(device=torch.device("cuda"), processes=engine.processes)
    ))
    said = call(train_model, *arguments, "--fresh")[1]
    assert "training goes on without CUDA graphs (" in said
    found = load_newest([Path("checkpoints")], warn=pytest.fail)[1]
    assert_identical(found["model"], plain["model"])
    said = call(train_model, *arguments, "--fresh", "--train.cuda_graphs", "false")[1]
    assert "CUDA graphs" not in said


def test_compiled_network_takes_the_training_steps_and_no_others(call, monkeypatch):
    calls = []

    def counting(model, **options):
        def network(*inputs):
            calls.append((model.training, len(inputs[0])))
            return model(*inputs)

        return network

    monkeypatch.setattr(torch, "compile", counting)
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--batch-size", 10, "--epochs", 1]
    status, said = call(train_model, *arguments, "--train.compile", "true")
    assert status == 0 and "compiling the network" in said
    assert calls == 3 * [(True, 10)]  # the rehearsal and two steps
    assert "compiling" not in call(train_model, *arguments, "--fresh")[1]


def test_compiling_changes_no_gradient(awake_model, monkeypatch):
    """In mixed precision too: what the network computes in float32 has float32 gradients."""
    compile_ = torch.compile
    # The same operations one by one, so that rounding is the same: generated code fuses them.
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options)
    )
    gradients, batch = [], (torch.rand(4, 3, 16, 16) * 2 - 1, torch.arange(4))
    for compiled in (False, True):
        engine = TrainingEngine(awake_model(), CosineNoiseScheduler(50), total_steps=1,
                                learning_rate=1e-3, autocast_dtype=torch.bfloat16)
        if compiled:
            training_run.compile_training(engine, batch)
            assert engine.network is not engine.model
        monkeypatch.setattr(engine.model, "zero_grad", lambda: None)
        engine.train_step(*batch)
        gradients.append({name: p.grad for name, p in engine.model.named_parameters()})
    assert_identical(gradients[1], gradients[0])


def test_a_run_of_other_classes_is_not_continued(call, monkeypatch):
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 2]
    call(train_model, *arguments, "--train.max_hours", 1e-9)
    monkeypatch.setattr(train_model, "CLASS_NAMES", ("boat", *CLASS_NAMES[1:]))
    status, said = call(train_model, *arguments)
    assert status == 1
    assert_one_sentence(said, "was trained on the classes airplane, ", "--fresh")


def test_batch_size_auto_is_what_fits_and_is_remembered(call, monkeypatch):
    arguments = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1]
    status, said = call(train_model, *arguments, "--batch-size", "auto")
    assert status == 0
    batch_size = int(re.search(r"batch size (\d+), chosen for this device", said)[1])
    assert batch_size == 20  # all images there are
    state = load_newest([Path("checkpoints")], warn=pytest.fail)[1]
    assert state["config"]["train"]["batch_size"] == batch_size
    config = json.loads(Path("checkpoints/config.json").read_text())
    assert config == json.loads(json.dumps(state["config"]))

    # A continued run keeps it, whatever would fit now.
    monkeypatch.setattr(training_run, "fitting_batch_size", lambda *arguments: 1)
    for epochs, auto in ((2, "auto"), (3, 0)):
        status, said = call(train_model, *arguments, "--batch-size", auto, "--epochs", epochs)
        assert status == 0 and f"batch {batch_size}, " in said and "chosen" not in said
    state = load_newest([Path("checkpoints")], warn=pytest.fail)[1]
    assert state["config"]["train"]["batch_size"] == batch_size


def test_losses_past_the_checkpoint_do_not_count_twice(call, monkeypatch):
    """A killed run has written records that come again when it continues."""
    arguments = ["--full", *PICTOGRAMS, "--samples", 4, "--batch-size", 10, "--train.log_every", 1]
    call(train_model, *arguments, "--epochs", 1)
    lines = Path("checkpoints/metrics.jsonl").read_text().splitlines()
    later = [json.loads(line) | {"step": 99, "loss": 77.0} for line in lines]
    with open("checkpoints/metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in later)
    seen = []
    monkeypatch.setattr(training_run, "loss_findings", lambda train: seen.append(train) or [])
    assert call(train_model, *arguments, "--epochs", 2)[0] == 0
    assert len(seen[0]) == 5 and max(record["loss"] for record in seen[0]) < 77


def test_batches_that_diverge_are_skipped_with_a_warning_in_the_records(call, monkeypatch):
    """Those of steps 3 and 4 are poisoned; then every one is."""
    batch = TrainingBatches.batch
    poisoned = {3, 4}

    def poison(self, index, step):
        x_start, labels = batch(self, index, step)
        return (x_start * math.nan if step in poisoned else x_start), labels

    monkeypatch.setattr(TrainingBatches, "batch", poison)
    arguments = ["--full", *PICTOGRAMS, "--samples", 10, "--batch-size", 10, "--train.log_every", 1]
    status, said = call(train_model, *arguments, "--epochs", 1)
    assert status == 0 and "warning at step 5: 2 batches so far were skipped" in said
    records = read_metrics(Path("checkpoints"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 6, 7, 8, 9, 10]
    poisoned.update(range(12, 99))
    status, said = call(train_model, *arguments, "--epochs", 9)
    assert status == 1
    assert_one_sentence(said, "not finite at step 18", "learning rate", "float32")
    assert load_newest([Path("checkpoints")], warn=pytest.fail)[1]["step"] == 10


def test_memory_that_runs_out_anywhere_else_is_a_sentence(call, monkeypatch):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_model, "Run", exhausted)
    status, said = call(train_model, "--demo", *TINY_FLAGS)
    assert status == 1
    assert_one_sentence(said, "out of memory")


def test_time_limit_saves_and_says_try_again(call):
    full = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 3]
    status, said = call(train_model, *full, "--train.max_hours", 1e-9)
    assert status == 75 and "stopped and saved at step 1" in said
    status, said = call(train_model, *full)
    assert status == 0 and "continuing at step 1" in said


def test_a_quick_test_begins_anew_even_after_an_interruption(call):
    status, said = call(train_model, *QUICK, "--train.max_hours", 1e-9)
    assert status == 75 and "it starts anew next time" in said
    status, said = call(train_model, *QUICK)
    assert status == 0 and "continuing" not in said
    assert said.count("step 1/10, loss") == 1 and "step 2/10, loss" not in said  # one a minute


@pytest.mark.parametrize("mode", ["--full", "--quick-test"])
def test_one_picture_of_each_class_leaves_nothing_to_hold_out(call, mode):
    for label, name in enumerate(CLASS_NAMES):
        path = Path("single", name, "1.png")
        path.parent.mkdir(parents=True)
        Image.new("RGB", (16, 16), (25 * label, 9, 9)).save(path)
    status, said = call(train_model, mode, *TINY_FLAGS, "--data-dir", "single", "--epochs", 2)
    assert status == 0, said
    (run,) = Path().glob("checkpoints*/**/run.json")
    assert {r["kind"] for r in read_metrics(run.parent)} == {"train"}


def test_a_run_for_which_there_is_no_space_takes_no_step(call, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=100)  # bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    status, said = call(train_model, *QUICK)
    assert status == 1
    assert_one_sentence(said, "0 MiB free, but a checkpoint needs")
    assert not Path("checkpoints_overfit/quick-test/metrics.jsonl").exists()


def test_resume_refuses_what_would_be_another_model(call, monkeypatch):
    call(train_model, "--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1)
    status, said = call(
        train_model, "--full", *PICTOGRAMS, "--samples", 2, "--model.base_channels", 32
    )
    assert status == 1
    assert_one_sentence(said, "model.base_channels 16 (now 32)", "--fresh")
    assert_one_sentence(call(train_model, "--full", "--seed", 1)[1], "train.seed 0 (now 1)")
    monkeypatch.setenv("DATA_DIR", "/elsewhere")
    said = call(train_model, "--full")[1]
    assert_one_sentence(said, "pictograms (now cifar10) by DATA_DIR")
    monkeypatch.delenv("DATA_DIR")
    said = call(train_model, "--full", "--batch-size", 5)[1]  # would give it another length
    assert_one_sentence(said, "train.batch_size 128 (now 5)")
    said = call(train_model, "--full", "--train.optimizer", "adamw")[1]  # its state is another
    assert_one_sentence(said, "train.optimizer muon (now adamw)")
    said = call(train_model, "--full", "--diffusion.prediction_type", "epsilon")[1]  # ruins it
    assert_one_sentence(said, "diffusion.prediction_type v_prediction (now epsilon)")


def test_a_checkpoint_of_other_code_is_refused_with_its_name(call, monkeypatch):
    call(train_model, "--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1)
    path = Path("checkpoints/checkpoint_00000001.pt")
    content = path.read_bytes()
    for change, words in (
        (lambda s: s["config"]["train"].update(momentum=0.9), ["settings", "train.momentum"]),
        (lambda s: s["config"].pop("sample"), ["settings", "sample missing"]),
        (lambda s: [s[part].pop("stem.bias") for part in ("model", "ema")],
         ["another network", "differ in stem.bias"]),
    ):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
        for script, where in ((train_model, "the run in checkpoints"), (generate_samples, path)):
            arguments = ["--full", "--epochs", 2] if script is train_model else []
            status, said = call(script, *arguments)
            assert status == 1
            assert_one_sentence(said, str(where), *words)
        path.write_bytes(content)


@pytest.fixture
def handlers():
    """Those of the signals that end a run, put back after the test."""
    earlier = {number: signal.getsignal(number) for number in train_model.STOP_SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def test_one_request_to_stop_may_come_twice(monkeypatch, handlers):
    """make, launchers and schedulers hand on what the process has got already."""
    run, now = SimpleNamespace(stop_signal=0), [100.0]
    monkeypatch.setattr(train_model.time, "monotonic", lambda: now[0])
    with train_model.stopping_on_signals(run):
        for seconds in (0, 0.01, 1.9):
            now[0] = 100 + seconds
            signal.raise_signal(signal.SIGTERM)
            assert run.stop_signal == signal.SIGTERM
    signal.raise_signal(signal.SIGTERM)  # while the report is written and the others are waited for
    now[0] = 102.1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_nobody_stopped_leaves_signals_as_they_were(handlers):
    before = signal.getsignal(signal.SIGTERM)
    with train_model.stopping_on_signals(SimpleNamespace(stop_signal=0)):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_nohup_keeps_a_closed_terminal_from_stopping_the_run():
    run, earlier = SimpleNamespace(stop_signal=0), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train_model.stopping_on_signals(run):
            signal.raise_signal(signal.SIGHUP)
            assert run.stop_signal == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_plain_command_continues_with_the_settings_of_the_run(call):
    full = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 3, "--batch-size", 5]
    call(train_model, *full, "--train.max_hours", 1e-9)
    status, said = call(train_model, "--full", "--train.weight_decay", 0.5)
    assert status == 0 and "batch 5, 12 steps" in said
    assert "continuing at step 1, now with " in said and "train.weight_decay 0.5 (was 0.01)" in said
    state = torch.load("checkpoints/checkpoint_00000012.pt", weights_only=True)
    assert state["config"]["train"]["weight_decay"] == 0.5
    for optimizer in state["optimizers"]:
        assert optimizer["param_groups"][0]["weight_decay"] == 0.5


def test_a_run_of_a_gpu_goes_on_on_the_cpu_only_when_told(call):
    full = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1, "--batch-size", 5]
    call(train_model, *full, "--train.max_hours", 1e-9)
    facts = Path("checkpoints/run.json")
    facts.write_text(facts.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
    status, said = call(train_model, "--full")
    assert status == 1
    assert_one_sentence(said, "was trained on a GPU", "make gpu-status", "--device cpu")
    status, said = call(train_model, "--full", "--device", "cpu")
    assert status == 0 and "continuing at step 1" in said
    assert json.loads(facts.read_text())["device"] == "cpu"


def test_continuing_never_changes_the_data(call, monkeypatch):
    from torchvision.datasets import CIFAR10

    import cifar10

    monkeypatch.setattr(cifar10, "SEARCH_PATH", ())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/unreachable")
    overfit = ["--overfit", *TINY_FLAGS, "--train.max_hours", 1e-9]
    pictures = Path("pictures")
    for name in CLASS_NAMES:
        (pictures / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(pictures / name / f"{index}.png")
    assert call(train_model, *overfit, "--data-dir", pictures)[0] == 75
    assert call(train_model, *overfit)[0] == 75  # finds them again by itself
    moved = pictures.rename("moved")
    assert call(train_model, *overfit, "--data-dir", moved)[0] == 75  # the same pictures
    Image.new("RGB", (8, 8), (9, 0, 0)).save(moved / "cat" / "0.png")
    status, said = call(train_model, *overfit)
    assert status == 1
    assert_one_sentence(said, "was started with other pictures than those found now")
    shutil.rmtree(moved)
    status, said = call(train_model, *overfit)
    assert status == 1
    assert_one_sentence(said, "DATA_DIR moved does not exist")


def test_checkpoint_of_another_mode_is_not_continued(call):
    call(train_model, "--overfit", *PICTOGRAMS, "--train.max_hours", 1e-9)
    Path("checkpoints").mkdir()
    shutil.copy("checkpoints_overfit/checkpoint_00000001.pt", "checkpoints")
    status, said = call(train_model, "--full")
    assert status == 1
    assert_one_sentence(said, "mode overfit, not full")


def test_new_overfit_run_leaves_a_quick_test_where_it_is(call):
    call(train_model, *QUICK)
    call(train_model, "--overfit", *PICTOGRAMS, "--train.max_hours", 1e-9)
    call(train_model, "--overfit", *PICTOGRAMS, "--train.max_hours", 1e-9, "--fresh")
    assert Path("checkpoints_overfit_1/checkpoint_00000001.pt").exists()
    assert Path("checkpoints_overfit/quick-test/checkpoint_00000010.pt").exists()


def test_a_run_in_a_folder_on_another_disk_can_be_moved_aside(monkeypatch):
    folder = Path("checkpoints")
    (folder / "samples").mkdir(parents=True)
    for name in ("checkpoint_00000001.pt", "samples/grid.png"):
        (folder / name).write_text(name)

    def other_disk(*places):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", other_disk)
    train_model.clear_away("full", folder)
    assert list(folder.iterdir()) == []
    assert Path("checkpoints_1/samples/grid.png").read_text() == "samples/grid.png"


def test_processes_whose_gpus_would_differ_in_precision_are_refused(call, monkeypatch):
    monkeypatch.setattr(Processes, "from_leader", lambda self, work: "cuda in fp16")
    with pytest.raises(ConfigError, match="1 .* on cpu in fp32, .* one on cuda in fp16"):
        train_model.require_equal_devices(full(), torch.device("cpu"), Processes(1, 2))
    monkeypatch.setattr(Processes, "from_leader", lambda self, work: (
        "cuda in fp16" if isinstance(found := work(), str) else found))
    status, said = call(train_model, *QUICK, "--device", "cpu")
    assert status == 1
    assert_one_sentence(said, "on cpu in fp32, the first one on cuda in fp16")


def test_second_run_in_a_directory_is_refused(call):
    import fcntl

    call(train_model, *QUICK)
    folder = Path("checkpoints_overfit/quick-test")
    before = sorted(folder.iterdir())
    with open(folder / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, said = call(train_model, *QUICK)
    assert status == 1
    assert_one_sentence(said, "in use by another process")
    assert sorted(folder.iterdir()) == before


def test_a_run_owns_its_directory_from_its_first_look_at_it(call, monkeypatch):
    """Or `make clean` might take what it has just read."""
    call(train_model, *QUICK)
    owned = []

    def look(*args):
        owned.append(is_alive(Path("checkpoints_overfit/quick-test")))
        raise DataError("seen")

    monkeypatch.setattr(train_model, "load_data", look)
    assert_one_sentence(call(train_model, *QUICK)[1], "seen")
    assert owned == [True]


def test_what_is_left_of_a_run_without_checkpoints_is_no_part_of_the_next(call):
    full = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 1]
    call(train_model, *full)
    for path in Path("checkpoints").glob("*.pt"):
        path.unlink()
    Path("checkpoints/evaluation").mkdir()
    Path("checkpoints/evaluation/scores.jsonl").write_text("{}")
    status, said = call(train_model, *full)
    assert status == 0 and "the earlier run was moved to checkpoints_1" in said
    assert not Path("checkpoints/evaluation").exists()
    assert Path("checkpoints_1/evaluation/scores.jsonl").exists()


@pytest.mark.parametrize("script", [
    "train_model.py --full", "generate_samples.py", "evaluate_samples.py", "prepare_data.py",
    "benchmark.py",
])
def test_a_python_without_the_packages_is_named(script):
    script, *arguments = script.split()
    run = subprocess.run([sys.executable, "-S", str(ROOT / script), *arguments],
                         capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert run.returncode == 1
    assert_one_sentence(run.stderr, f"{sys.executable} has no package ", "make install")


def test_a_python_that_is_too_old_is_named_before_it_stumbles():
    code = ("import sys; sys.version_info = (3, 10, 9); sys.modules['config'] = None\n"
            "import command_line")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert_one_sentence(run.stderr, "3.11 or later is needed")


def test_full_run_without_data_stops_and_quick_test_falls_back(call, monkeypatch):
    from torchvision.datasets import CIFAR10

    import cifar10

    monkeypatch.setattr(cifar10, "SEARCH_PATH", ())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/unreachable")
    status, said = call(train_model, "--full", *TINY_FLAGS)
    assert status == 1
    assert_one_sentence(said, "Three ways")
    status, said = call(train_model, "--quick-test", *TINY_FLAGS)
    assert status == 0 and "falling back to the built-in pictograms" in said
    monkeypatch.setattr(cifar10, "CLASS_NAMES", CLASS_NAMES[1:])
    status, said = call(train_model, "--demo", *TINY_FLAGS)
    assert status == 1, "there is nothing else to fall back to"
    assert_one_sentence(said, "pictograms show the classes airplane, ")
    monkeypatch.undo()
    status, said = call(train_model, "--quick-test", *TINY_FLAGS, "--dataset", "cifar10")
    assert status == 1, "what was asked for is not replaced"
    status, said = call(train_model, "--quick-test", *PICTOGRAMS, "--data-dir", "/nowhere")
    assert status == 0 and "the pictures of /nowhere are not used" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--full", "--data-dir", "nowhere"], ["DATA_DIR nowhere does not exist"]),
        (["--overfit", "--samples", "0"], ["--samples", "from 1 to"]),
        (["--overfit", "--samples", "two"], ["--samples", "'two'"]),
        (["--full", "--batch-size", "-3"], ["train.batch_size", "at least 0"]),
        (["--full", "--train.lerning_rate", "1"], ["lerning_rate", "--train.learning_rate"]),
        (["--full", "--epoch", "1"], ["--epoch", "--epochs"]),
        (["--full", "--train.epochs", "many"], ["train.epochs", "whole number"]),
        (["--full", "--device", "cuda:99"], ["cuda:99", "gpu-status"]),
        (["--full", "--device", "tpu"], ["tpu"]),
        (["--full", "--device", "meta"], ["meta"]),
        (["--full", "--seed", "99999999999999999999"], ["train.seed", "at most"]),
        (["--full", "--overfit"], ["not allowed"]),
        ([], ["required"]),
        (["--full", "extra"], ["extra"]),
    ],
)
def test_training_refuses_bad_input(call, arguments, words):
    status, said = call(train_model, *arguments)
    by_argparse = {"lerning_rate", "--epoch", "not allowed", "required", "extra"}
    assert status == (2 if words[0] in by_argparse else 1)
    assert_one_sentence(said, *words)
    assert not list(Path().glob("checkpoints*"))


def test_damaged_newest_checkpoint_is_passed_over(call):
    full = ["--full", *PICTOGRAMS, "--samples", 2, "--batch-size", 20, "--train.save_every", 2]
    call(train_model, *full, "--epochs", 4)
    newest = Path("checkpoints/checkpoint_00000004.pt")
    newest.write_bytes(newest.read_bytes()[:999])
    status, said = call(generate_samples, "--samples", 1, "--grid-only")
    assert status == 0
    assert "checkpoint_00000004.pt is damaged" in said and "checkpoint_00000002.pt" in said
    assert [path.name for path in Path("generated_images").glob("*.png")] == ["grid.png"]


def test_unwritable_place_and_full_disk_lose_nothing(call, monkeypatch):
    Path("checkpoints_overfit").write_text("a file where the folder should be")
    status, said = call(train_model, *QUICK)
    assert status == 1
    assert_one_sentence(said, "checkpoints_overfit")
    Path("checkpoints_overfit").unlink()

    full = ["--full", *PICTOGRAMS, "--samples", 2, "--epochs", 2]
    call(train_model, *full)
    before = Path("checkpoints/checkpoint_00000002.pt").read_bytes()

    def no_space(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    status, said = call(train_model, *full, "--epochs", 3)
    assert status == 1
    assert_one_sentence(said, "checkpoint_00000003.pt", "the disk is full")
    assert [p.name for p in Path("checkpoints").glob("checkpoint_*")] == ["checkpoint_00000002.pt"]
    assert Path("checkpoints/checkpoint_00000002.pt").read_bytes() == before
    assert json.loads(Path("checkpoints/run.json").read_text())["state"] == "failed"


def test_prepare_refuses_bad_input(call):
    status, said = call(prepare_data, "--data-dir", "nowhere")
    assert status == 1
    assert_one_sentence(said, "nowhere does not exist")


@pytest.mark.parametrize("command", [
    "train_model --full", "generate_samples", "evaluate_samples", "prepare_data", "benchmark",
    "doctor", "run_status status", "gpu_status", "report", "clean runs", "launch train_model.py",
])
def test_a_mistyped_flag_is_one_sentence_with_the_nearest(command, monkeypatch, capsys):
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--hepl", *arguments])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "'--hepl'", "'--help'")


@pytest.mark.parametrize("script", ["train_model", "generate_samples", "prepare_data"])
def test_help_is_complete(script):
    result = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    wanted = {
        "train_model": ["--full", "--samples", *(f"--{name}" for name in OPTIONS)],
        "generate_samples": ["CHECKPOINT", "--classes", "--guidance", "--steps", "--raw",
                             "auto: what fits"],
        "prepare_data": ["--data-dir", "--data.skip_unreadable"],
    }[script]
    assert all(word in result.stdout for word in wanted)


@pytest.mark.parametrize("where", ["closed", "gone", "full"])
def test_an_output_that_takes_nothing_is_no_traceback(tmp_path, where):
    command = [sys.executable, str(ROOT / "train_model.py"), "--demo", "--dry-run"]
    run = subprocess.run(
        ["bash", "-c", {"closed": '"$@" >&-', "gone": '"$@" | true; exit ${PIPESTATUS[0]}',
                        "full": '"$@" > /dev/full'}[where], "-", *command],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )
    assert "Traceback" not in run.stderr
    if where == "full":
        assert "No space left" in run.stderr and run.returncode != 0
    else:
        assert run.returncode == {"closed": 0, "gone": 141}[where] and run.stderr == ""


def test_replacing_a_demo_removes_links_not_what_they_point_to(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints_demo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "grid.png").write_text("x")
    folder.mkdir()
    (folder / "checkpoint_00000001.pt").write_text("x")
    (folder / "samples").symlink_to(elsewhere)
    train_model.clear_away("demo", folder)
    assert not list(folder.iterdir()) and (elsewhere / "grid.png").exists()
