"""What a run writes down: records, lock, pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import training_monitor
from run_directory import RunInUse, claim, read_metrics
from run_status import find_runs, format_status, read_facts
from training_monitor import TrainingMonitor

ROOT = Path(__file__).parents[1]
FACTS = {"mode": "demo", "device": "cpu", "machine": "test", "total_steps": 100,
         "steps_per_epoch": 10, "command": "python train_model.py --demo"}
RECORD = {"loss": 0.5, "loss_quarters": [0.1, None, 0.3, 0.4], "grad_norm": 1.0,
          "learning_rate": 1e-3, "images_per_second": 9.0, "images_seen": 4}


def test_records_are_appended_and_cut_on_resume(tmp_path):
    with TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(0, {"mode": "demo"})
        for step in (1, 2, 3):
            monitor.record_training(step=step, **RECORD)
        monitor.record_validation(step=3, loss=0.4, loss_ema=0.3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # what a killed run leaves
    (tmp_path / "quick-test").mkdir()
    stale, of_another = tmp_path / "curves.png.tmp", tmp_path / "quick-test" / "curves.png.tmp"
    stale.touch(), of_another.touch()
    with TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(2, {"mode": "demo"})
        monitor.record_training(step=3, **RECORD)
        monitor.end("finished")
    assert of_another.exists() and not stale.exists()
    records = read_metrics(tmp_path)
    expected = [("train", 1), ("train", 2), ("resume", 2), ("train", 3)]
    assert [(r["kind"], r["step"]) for r in records] == expected
    assert records[0]["epoch"] == 0.1
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"


def test_progress_lines_know_no_time_left_before_the_second_record(tmp_path, monkeypatch, capsys):
    """The first one would count what came before the steps, as compiling; 40 min for each of the 90
    steps are 2 d 12 h."""
    clock = iter(range(0, 10**9, 24000))
    with TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(0, {"mode": "demo"})
        monitor.bar.disable, monitor.facts["started"] = True, 0
        for step in (0, 10):
            now = next(clock)
            monkeypatch.setattr(training_monitor.time, "time", lambda now=now: now)
            monitor.last_line = -100
            monitor.record_training(step=step, **RECORD)
    assert capsys.readouterr().out.splitlines() == [
        "step 0/100, loss 0.5000, images/s 9.0",
        "step 10/100, loss 0.5000, images/s 9.0, 2 d 12 h left",
    ]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "error, state", [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")]
)
def test_how_a_run_ended_is_noted(tmp_path, error, state, trained):
    with pytest.raises(error), TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(0, {})
        assert json.loads((tmp_path / "run.json").read_text())["state"] == "running"
        if trained:  # a verdict, which can be interrupted as well, follows
            monitor.end("finished")
        raise error
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["state"] == state and facts["ended"] >= facts["started"]


def test_directory_in_use_is_refused_until_its_process_dies(tmp_path):
    code = (
        "import sys, time; from training_monitor import TrainingMonitor\n"
        f"with TrainingMonitor({str(tmp_path)!r}, **{FACTS!r}) as monitor:\n"
        "    monitor.begin(0, {}); print('ready', flush=True); time.sleep(60)"
    )
    root = Path(training_monitor.__file__).parent
    other = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(RunInUse, match=f"process {other.pid} on"):
        with TrainingMonitor(tmp_path, **FACTS):
            pass
    other.kill()
    other.wait()
    with claim(tmp_path), pytest.raises(RunInUse, match="by another process"):
        claim(tmp_path)  # run.json named the one that was killed
    assert read_facts(tmp_path)["state"] == "died"
    with TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(0, {})
        monitor.end("finished")


def test_a_reader_that_is_gone_does_not_end_the_run():
    """As `make train | tee log`, where tee dies of the same Ctrl-C that the run saves after."""
    code = ("import os; from training_monitor import say; os.read(0, 1); say('one'); say('two'); "
            "os.write(2, b'saved')")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as run:
        run.stdout.close()
        assert run.communicate(b"x")[1] == b"saved" and run.returncode == 0


def test_a_full_disk_under_the_log_does_not_end_the_run():
    code = ("import os; from training_monitor import say; say('one'); say('two'); "
            "os.write(2, b'saved')")
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                             cwd=ROOT, text=True)
    assert run.returncode == 0 and run.stderr.count("cannot be written") == 1
    assert "No space left" in run.stderr and run.stderr.endswith("saved")


def test_nor_does_one_under_all_that_it_says(tmp_path):
    """As `> log 2>&1`, or a terminal that was closed."""
    code = ("from pathlib import Path; from training_monitor import say; say('one'); say('two'); "
            f"Path({str(tmp_path / 'saved')!r}).touch()")
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full,
                              cwd=ROOT).returncode == 0
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["caf\udce9", "ü"])
def test_facts_of_a_picture_may_hold_names_of_any_encoding(tmp_path, name):
    path = tmp_path / "picture.png"
    training_monitor.save_image(Image.new("RGB", (1, 1)), path, {"checkpoint": name})
    with Image.open(path) as image:
        assert image.text["checkpoint"] == name.replace("\udce9", "\\udce9")


def test_grid_places_every_picture_under_its_name():
    images = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(6)])
    grid = np.asarray(training_monitor.labelled_grid(images, ["one", "two", "three"]))
    tops = [y for y in range(grid.shape[0]) if (grid[y, 10] == 0).all()]
    for i in range(6):
        row, column = divmod(i, 3)
        y, x = tops[0] + 30 + row * 68, 36 + column * 68  # 64-pixel pictures, 4 pixels apart
        assert grid[y, x].tolist() == [10 * i] * 3
    assert (grid[: tops[0]] < 128).any(), "no names were drawn"


def test_smoothed_is_the_bias_corrected_average():
    values, weight = [1.0, 4.0, 2.0], 0.9
    for count, got in enumerate(training_monitor.smoothed(values, weight), start=1):
        weights = [weight ** (count - 1 - i) for i in range(count)]
        expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        assert got == pytest.approx(expected, rel=1e-12)


def test_every_curve_has_its_name(monkeypatch, tmp_path):
    drawn = {}

    def savefig(self, path, **options):
        drawn.update({axes.get_title(): {line.get_label(): line.get_ydata()[-1]
                                         for line in axes.lines} for axes in self.axes})
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    train = {"kind": "train", "step": 2, "loss": 9.0, "loss_quarters": [1.0, 2.0, 3.0, 4.0],
             "learning_rate": 5.0, "grad_norm": 6.0, "images_per_second": 7.0}
    validation = {"kind": "validation", "step": 2, "loss": 0.4, "loss_ema": 0.3}
    training_monitor.draw_curves([train, validation], tmp_path / "curves.png")
    assert drawn["validation loss"] == {"weights": 0.4, "EMA weights": 0.3}
    assert drawn["loss by noise level"] == pytest.approx(
        {"least noise": 1.0, "second quarter": 2.0, "third quarter": 3.0, "most noise": 4.0})
    for panel, value in (("loss", 9), ("learning rate", 5), ("gradient norm", 6),
                         ("images per second", 7)):
        assert all(last == pytest.approx(value) for last in drawn[panel].values()), panel


def test_curves_are_drawn_from_any_amount_of_records(tmp_path):
    train = [{"kind": "train", "step": s, **RECORD} for s in range(1, 30)]
    validation = [{"kind": "validation", "step": 10, "loss": 0.4, "loss_ema": 0.3}]
    for records in ([], train[:1], train + validation):
        path = tmp_path / f"{len(records)}.png"
        training_monitor.draw_curves(records, path)
        with Image.open(path) as image:
            assert image.size == (1350, 720)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_warning_is_said_recorded_and_shown_by_status(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    with TrainingMonitor(folder, **FACTS) as monitor:
        monitor.begin(0, {})
        monitor.warn(3, "loss 9 is 4.0 times what was usual before")
        monitor.end("finished")
    assert "warning at step 3: loss 9 is 4.0 times" in capsys.readouterr().out
    (record,) = read_metrics(folder)
    assert (record["kind"], record["step"]) == ("warning", 3)
    assert "  warning      step 3: loss 9 is 4.0 times" in format_status(find_runs(tmp_path), 0.0)


def test_a_validation_comes_with_a_verdict(tmp_path, capsys):
    losses = {"loss": 0.5, "loss_ema": 0.25}
    with TrainingMonitor(tmp_path, **FACTS) as monitor:
        monitor.begin(0, {})
        monitor.record_validation(step=1, **losses)
        monitor.warn(2, "first")
        monitor.warn(2, "second")
    with TrainingMonitor(tmp_path, **FACTS) as monitor:  # what a continued run warned of counts
        monitor.begin(2, {})
        monitor.record_validation(step=2, **losses)
        monitor.record_validation(step=3, **losses)
        monitor.end("finished")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines == [
        "step 1: validation loss 0.5000, EMA 0.2500; nothing looks wrong",
        "step 2: validation loss 0.5000, EMA 0.2500; 2 warnings since the last validation",
        "step 3: validation loss 0.5000, EMA 0.2500; nothing looks wrong",
    ]
    records = [record for record in read_metrics(tmp_path) if record["kind"] == "validation"]
    assert [record["warnings"] for record in records] == [0, 2, 0]


def test_curves_mark_where_a_run_was_continued(tmp_path):
    train = [{"kind": "train", "step": s, **RECORD} for s in range(1, 30)]
    training_monitor.draw_curves(train, tmp_path / "whole.png")
    training_monitor.draw_curves([*train, {"kind": "resume", "step": 9}], tmp_path / "broken.png")
    whole, broken = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), dtype=int)
                     for name in ("whole", "broken"))
    # A dotted line makes columns that differ over most of a panel's height; the label only a few.
    rows = (abs(whole - broken) > 20).sum(0)
    assert (rows > 0.2 * whole.shape[0]).sum() >= 3  # one in each column of panels
