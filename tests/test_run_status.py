"""run_status.py: what it says about runs, and how the monitor behaves."""

import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

import run_status
from run_directory import RUN_DIRECTORIES

SCRIPT = Path(run_status.__file__)
NOW = 1_700_000_000.0
GPU = ["0", "NVIDIA H200", "87", "12595", "143771", "45", "350.12"]


def train(step, **changes):
    return {"kind": "train", "step": step, "epoch": step / 50, "loss": 1 / step,
            "loss_quarters": [0.1, 0.05, None, 0.01], "learning_rate": 1e-3, "grad_norm": 0.5,
            "images_seen": 4 * step, "images_per_second": 7.5,
            "time": NOW - 1000 + step} | changes


def validation(step, loss):
    return {"kind": "validation", "step": step, "epoch": step / 50, "loss": loss,
            "loss_ema": 0.018, "time": NOW - 1000 + step}


def write_run(root, mode="full", records=(), **changes):
    """A run directory like the trainer's."""
    folder = root / RUN_DIRECTORIES[mode]
    folder.mkdir(parents=True, exist_ok=True)
    info = {"mode": mode, "pid": 1, "host": "here", "started": NOW - 7200, "device": "cpu",
            "total_steps": 5000, "steps_per_epoch": 50, "state": "running", "ended": None,
            "command": "python train_model.py"} | changes
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "run.lock").touch()
    return folder


@pytest.fixture
def hold_lock():
    """A function that holds a run's lock as a live run does, and returns the open file."""
    files = []

    def hold(folder):
        files.append(open(folder / "run.lock", "a"))
        fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return files[-1]

    yield hold
    for file in files:
        file.close()


def only_run(root):
    (run,) = run_status.find_runs(root)
    return run


def status_of(root, now=NOW):
    return run_status.format_status(run_status.find_runs(root), now)


def screen_of(root, gpus="No NVIDIA GPU found: test", width=80, height=24):
    return run_status.format_monitor(run_status.find_runs(root), gpus, NOW, width, height)


def run_script(*arguments, **environment):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], text=True, timeout=60,
                          capture_output=True, env=os.environ | environment)


# --- The state of a run ----------------------------------------------------------------------


def test_alive_while_the_lock_is_held_then_died(tmp_path, hold_lock):
    lock = hold_lock(write_run(tmp_path, records=[train(100), train(200)]))
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW - 7200))
    assert f"state        running since {since} on cpu\n" in status_of(tmp_path)
    lock.close()
    assert "died: killed without a word, last sign 13 min ago" in status_of(tmp_path)


def test_looking_disturbs_neither_the_run_nor_another_look(tmp_path, hold_lock):
    folder = write_run(tmp_path)
    with open(folder / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another look does
        assert only_run(tmp_path).facts["state"] == "died"
    hold_lock(folder)  # raises if the look had kept it


def test_an_ended_run(tmp_path):
    write_run(tmp_path, state="interrupted", ended=NOW - 300)
    assert "state        interrupted 5 min ago\n" in status_of(tmp_path)


def test_durations():
    seconds = (-5, 59, 300, 7500, 90_000)
    assert [*map(run_status.duration, seconds)] == ["0 s", "59 s", "5 min", "2 h 05 min", "1 d 1 h"]


def test_a_run_that_begins_or_ends_between_two_looks_has_not_died(tmp_path, monkeypatch):
    write_run(tmp_path)
    looks = iter([False, True])
    monkeypatch.setattr(run_status, "is_alive", lambda folder: next(looks, False))
    assert only_run(tmp_path).facts["state"] == "running"

    def ends_now(folder):
        write_run(tmp_path, state="finished", ended=NOW)
        return True

    monkeypatch.setattr(run_status, "is_alive", ends_now)
    assert only_run(tmp_path).facts["state"] == "finished"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"state": "running"}'])
def test_a_missing_or_damaged_run_json(tmp_path, content):
    folder = write_run(tmp_path, records=[train(10)])
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_text(content)
    assert "state        unknown: run.json is missing or damaged\n" in status_of(tmp_path)
    assert "progress     step 10, epoch 0.2\n" in status_of(tmp_path)
    assert any("loss curve" in line for line in screen_of(tmp_path))


def test_missing_metrics(tmp_path, hold_lock):
    folder = write_run(tmp_path)
    hold_lock(folder)
    (folder / "metrics.jsonl").unlink()
    assert "no training record yet" in status_of(tmp_path)
    assert "speed        not known yet, time left not known yet\n" in status_of(tmp_path)
    assert "checkpoints  none yet" in screen_of(tmp_path)


def test_lines_that_are_no_records(tmp_path):
    folder = write_run(tmp_path, records=[train(10)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": 20}\n{"kind": "train"}\n\xff\xfe\n'
                   b'{"kind": "train", "step": 30}\n{"kind": "warning", "step": 30}\n'
                   b'{"kind": "validation", "step": "30"}\n')
    assert "step 10 of 5000" in status_of(tmp_path)


# --- The status ------------------------------------------------------------------------------


def test_no_run_says_what_to_type(tmp_path):
    (tmp_path / "checkpoints_overfit/quick-test").mkdir(parents=True)
    done = run_script("status", "--root", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "`make demo`" in done.stdout and "`make train`" in done.stdout


def test_a_place_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    done = run_script("status", "--root", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("error: .*/checkpoints/.*: Not a directory; check .*\n", done.stderr)


def test_runs_come_in_order_and_quick_test_does_not_make_an_overfit_run(tmp_path):
    for mode in ("demo", "quick-test", "full"):
        write_run(tmp_path, mode, state="finished", ended=NOW)
    assert [run.mode for run in run_status.find_runs(tmp_path)] == ["full", "demo", "quick-test"]


def test_numbers_of_the_status(tmp_path):
    records = [train(100, loss=float("nan")), train(200, loss=0.25), validation(200, 0.02),
               train(300, loss=0.3), train(400, loss=float("nan")),
               validation(400, 0.03)]
    folder = write_run(tmp_path, state="finished", ended=NOW - 90_000, records=records)
    files = [("checkpoint_00000200.pt", 3 * 2**20, 7200), ("checkpoint_00000100.pt", 2**20, 10_800),
             ("samples/step_00000000_originals.png", 1, 0),  # drawn anew by a continued run
             *((f"samples/step_{step:08d}_{name}.png", 1, 50) for step in (5, 400, 20)
               for name in ("ema", "raw"))]
    for name, size, age in files:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (NOW - age, NOW - age))
    assert status_of(tmp_path) == textwrap.dedent("""\
        full run in checkpoints
          state        finished 1 d 1 h ago
          progress     step 400 of 5000 (8.0%), epoch 8.0 of 100
          train loss   last nan        best 0.25       at step 200
          validation   last 0.03       best 0.02       at step 200
            with EMA   last 0.018      best 0.018      at step 200
          speed        7.5 images/s
          last sample  checkpoints/samples/step_00000400_ema.png
          checkpoints  checkpoint_00000100.pt       1.0 MiB   3 h 00 min ago
                       checkpoint_00000200.pt       3.0 MiB   2 h 00 min ago""")


def test_status_fits_80_columns(tmp_path, hold_lock):
    records = [train(123456, loss=1.2345e-05), validation(123456, 1.2345e-05)]
    device = "cuda:0 (NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition)"
    hold_lock(write_run(tmp_path, "quick-test", records, total_steps=10**6, device=device))
    assert max(map(len, status_of(tmp_path).split("\n"))) == 80


def test_no_letter_of_a_warning_is_lost(tmp_path):
    message = " ".join(f"{number}" * 13 for number in range(9))
    warning = {"kind": "warning", "epoch": 1, "time": NOW, "step": 10, "message": message}
    for shift in range(14):  # so that some line is full
        warning["message"] = "x" * shift + " " + message
        write_run(tmp_path, records=[train(10), warning])
        words = status_of(tmp_path).split()
        assert set(message.split()) <= set(words), shift


def test_a_root_that_does_not_exist_is_no_place_without_runs(tmp_path):
    done = run_script("status", "--root", tmp_path / "nowhere")
    assert done.returncode == 1 and "is no folder" in done.stderr


def test_time_left_by_hand(tmp_path, hold_lock):
    # Only the last 20 records count: steps 60 to 250 in 190 + 190 * 2 = 570 s, so 3 s a step.
    records = [train(step, time=NOW - 5000 + 10 * step) for step in (10, 20, 30, 40, 50)]
    records += [train(60, time=NOW + 2 * 60 - 190)]
    records += [train(step, time=NOW + 2 * step) for step in range(70, 260, 10)]
    lock = hold_lock(write_run(tmp_path, records=records, total_steps=1000))
    assert "7.5 images/s, time left 37 min\n" in status_of(tmp_path)  # 750 * 3 s
    lock.close()
    assert "time left" not in status_of(tmp_path)


def test_time_left_leaves_out_the_pause_before_a_resumption(tmp_path, hold_lock):
    records = [train(10, time=NOW - 9000), train(20, time=NOW - 100), train(30, time=NOW - 80)]
    hold_lock(write_run(tmp_path, records=records, total_steps=50, started=NOW - 200))
    assert "time left 40 s\n" in status_of(tmp_path)


def test_needs_no_torch_and_no_terminal(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    write_run(tmp_path, records=[train(10)])
    for command in ("status", "monitor"):
        done = run_script(command, "--root", tmp_path, PYTHONPATH=str(tmp_path),
                          PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert "step 10 of 5000" in done.stdout


def test_a_reader_that_leaves_early_causes_no_traceback(tmp_path):
    shell = f"'{sys.executable}' '{SCRIPT}' status --root '{tmp_path}' | true"
    done = subprocess.run(["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}"], capture_output=True)
    assert done.stderr == b"" and done.returncode in (0, 128 + signal.SIGPIPE)


# --- The monitor -----------------------------------------------------------------------------


def test_sparkline():
    blocks = run_status.BLOCKS
    assert run_status.sparkline([1.0, 10.0, 100.0], 10) == blocks[0] + blocks[4] + blocks[7]
    assert run_status.sparkline([1.0, 1.0, 100.0, 100.0], 2) == blocks[0] + blocks[7]
    assert run_status.sparkline([5.0, 5.0], 10) == blocks[0] * 2
    assert run_status.sparkline([float("nan"), 0.0, 1.0, float("inf")], 9) == blocks[0]
    assert run_status.sparkline([float("nan")], 9) == "none yet"


def test_monitor_screen(tmp_path, hold_lock):
    write_run(tmp_path, "demo", state="finished", ended=NOW)
    records = [train(step, time=NOW - 5 - (2500 - step) / 100) for step in range(100, 2501, 100)]
    folder = write_run(tmp_path, records=records)
    hold_lock(folder)  # the live one, though the other is newer
    for name in ("checkpoint_1.pt", "checkpoint_2.pt"):
        (folder / name).touch()
    lines = screen_of(tmp_path, [GPU] * 8)
    assert lines[0].startswith("full run in checkpoints ") and lines[0].endswith("q leaves")
    screen = "\n".join(lines)
    bar = re.search(r"done         \[(█+)( +)\] 50.0%\n", screen)
    assert len(bar[1]) == len(bar[2])
    assert "by noise     0.1         0.05        n/a         0.01        (least first)" in screen
    assert "\n             too early   too early   too early   too early\n" in screen
    assert "last metrics 5 s ago" in screen
    curve = re.search(r"loss curve   (\S+)", screen)[1]
    assert curve[0] == "█" and curve[-1] == "▁" and len(curve) == 25
    assert "checkpoint_2.pt" in screen and "checkpoint_1.pt" not in screen
    assert screen.count("\nGPU 0 NVIDIA H200 ") == 8
    assert len(lines) <= 24 and max(map(len, lines)) < 80


def test_monitor_shows_the_newest_run_if_none_lives(tmp_path):
    write_run(tmp_path, state="finished", started=NOW - 900, ended=NOW - 500)
    write_run(tmp_path, "demo", state="interrupted", started=NOW - 800, ended=NOW - 60)
    assert screen_of(tmp_path)[0].startswith("demo run in checkpoints_demo")


@pytest.mark.parametrize("width, height", [(40, 10), (5, 1)])
def test_monitor_fits_a_small_terminal(tmp_path, width, height):
    write_run(tmp_path, records=[train(10), train(2500), validation(2500, 0.1)])
    lines = screen_of(tmp_path, [GPU] * 8, width, height)
    assert len(lines) == height and max(map(len, lines)) == width - 1
    assert lines[-1].startswith("... ")


class Terminal:
    """The monitor on a pseudo-terminal."""

    def __init__(self, root):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "monitor", "--root", root], stdin=self.slave,
            stdout=self.slave, stderr=self.slave, start_new_session=True,
            env=os.environ | {"TERM": "xterm"})
        self.seen = ""

    def wait_for(self, text, seconds=40):
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        assert text in self.seen, self.seen

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("how, status", [(b"q", 0), (b"\x03", 0), (signal.SIGINT, 128 + 2),
                                         (signal.SIGTERM, 128 + 15)])
def test_monitor_restores_the_terminal(terminal, how, status):
    terminal.wait_for("Waiting for a training run")
    terminal.wait_for("GPU")  # the end of the screen
    assert "\x1b[?1049h" in terminal.seen and "\x1b[?1049l" not in terminal.seen
    assert termios.tcgetattr(terminal.slave) != terminal.before
    if isinstance(how, bytes):
        os.write(terminal.master, how)
    else:
        terminal.process.send_signal(how)
    assert terminal.process.wait(30) == status
    terminal.wait_for("\x1b[?1049l")
    assert "\x1b[?25h" in terminal.seen and "Traceback" not in terminal.seen
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_monitor_waits_for_a_run(terminal, tmp_path):
    terminal.wait_for("Waiting for a training run")
    write_run(tmp_path, records=[train(10)])
    terminal.wait_for("step 10 of 5000")
    assert terminal.seen.count("\x1b[2J") == 1  # it redraws in place


def test_monitor_ends_when_the_terminal_is_gone(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.wait_for("Waiting for a training run")
    os.close(terminal.slave)
    os.close(terminal.master)
    try:
        assert terminal.process.wait(30) >= 0  # of its own accord, not by a signal
    finally:
        terminal.process.kill()


@pytest.mark.parametrize("command", ["status", "monitor"])
def test_json_says_the_same_to_programs(tmp_path, hold_lock, command):
    records = [train(100, loss=0.5), train(200, loss=0.25), validation(200, 0.3)]
    records[1]["loss_quarters"][0] = math.nan
    hold_lock(write_run(tmp_path, records=records))
    done = run_script(command, "--json", "--root", tmp_path, PATH=str(tmp_path))
    content = json.loads(done.stdout, parse_constant=pytest.fail)  # such as NaN
    (run,) = content["runs"]
    assert (run["mode"], run["state"], run["total_steps"]) == ("full", "running", 5000)
    assert run["last_train"]["loss_quarters"] == [None, 0.05, None, 0.01]
    assert run["last_train"]["loss"] == 0.25 and run["last_validation"]["loss"] == 0.3
    assert run["noise_levels"] == ["too early"] * 4
    assert run["seconds_left"] == 4800  # a step took a second
    assert run["checkpoints"] == [] and run["last_sample"] is None
    assert ("gpus" in content) == (command == "monitor")


def test_json_without_a_run(tmp_path):
    assert json.loads(run_script("status", "--json", "--root", tmp_path).stdout) == {"runs": []}


def test_a_warning_is_shown_while_it_is_news(tmp_path):
    warning = {"kind": "warning", "step": 90, "epoch": 1.8, "message": "loss 9", "time": NOW}
    write_run(tmp_path, records=[train(80), warning, train(100)])
    assert "\n  warning      step 90: loss 9\n" in status_of(tmp_path)
    write_run(tmp_path, records=[train(80), warning, train(200)])
    assert "warning" not in status_of(tmp_path)


def test_health_is_that_of_the_last_validation(tmp_path):
    healthy = validation(300, 0.02) | {"warnings": 0}
    write_run(tmp_path, records=[train(300), healthy])
    assert "  health       nothing looks wrong (validation at step 300)\n" in status_of(tmp_path)
    jump = {"kind": "warning", "step": 310, "message": "loss 9 is 4.0 times what was usual before"}
    write_run(tmp_path, records=[train(300), healthy, jump])
    assert "health" not in status_of(tmp_path) and "warning" in status_of(tmp_path)
    write_run(tmp_path, records=[train(300), validation(300, 0.02) | {"warnings": 2}])
    assert "health" not in status_of(tmp_path)


def test_energy_is_shown_where_it_was_measured(tmp_path):
    measured = [train(100 * n, energy_joules=1.8e6, images_seen=12_800 * n) for n in (1, 2)]
    write_run(tmp_path, records=measured)
    assert "  energy       1 kWh so far, 141 J per image\n" in status_of(tmp_path)
    assert any(line.startswith("energy") for line in screen_of(tmp_path))
    write_run(tmp_path, records=[*measured, train(300, energy_joules=None)])
    assert "1 kWh so far, of 2 records in 3\n" in status_of(tmp_path)


def test_monitor_lists_who_is_on_the_gpu(tmp_path):
    write_run(tmp_path, records=[train(100)])
    runs, processes = run_status.find_runs(tmp_path), [["4711", "python", "12595"]]
    lines = run_status.format_monitor(runs, [GPU], NOW, 80, 30, processes)
    assert lines[-1].startswith("process     4711 python")
