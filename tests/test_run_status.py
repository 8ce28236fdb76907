"""run_status.py: what it says about runs, GPUs and mismatches, and how the monitor behaves."""

import fcntl
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_status
from run_status import GpuFacts, GpuReading, diagnose

SCRIPT = Path(run_status.__file__)
NOW = 1_700_000_000.0
ONE_GPU = "0, NVIDIA H200, 87, 12595, 143771, 45, 350.12\n"
EIGHT_GPUS = "".join(f"{i}, NVIDIA H100 80GB HBM3, {i}0, 1024, 81559, 3{i}, 120.50\n"
                     for i in range(8))
MIG_GPU = "0, NVIDIA A100-SXM4-40GB, [N/A], 1024, 40960, 33, [Not Supported]\n"
DRIVER_ERROR = ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
                "Make sure that the latest NVIDIA driver is installed and running.\n")
OLD_HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |\n"
NEW_HEADER = "| NVIDIA-SMI 610.43.02  KMD Version: 610.43.02   CUDA UMD Version: 13.3     |\n"
READING = GpuReading("0", "NVIDIA H200", 87.0, 12595.0, 143771.0, 45.0, 350.0)


# --- Run directories -------------------------------------------------------------------------

def train(step, **changes):
    return {"kind": "train", "step": step, "epoch": step / 50, "images_seen": step * 10,
            "loss": 1 / step, "loss_quarters": [0.1, 0.05, None, 0.01], "grad_norm": 0.4,
            "learning_rate": 1e-4, "images_per_second": 7.5, "data_wait": 0.01,
            "peak_memory_gib": 1.2, "time": NOW - 1000 + step} | changes


def validation(step, loss):
    return {"kind": "validation", "step": step, "loss": loss, "loss_ema": 0.018,
            "time": NOW - 1000 + step}


def write_run(root, name="checkpoints", records=(), lock=True, **changes):
    """A run directory like the trainer's."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    info = {"mode": run_status.RUN_DIRECTORIES[name], "pid": 2**22 + 1, "host": "elsewhere",
            "started": NOW - 7200, "device": "cpu", "total_steps": 5000, "steps_per_epoch": 50,
            "state": "running", "ended": None, "command": "python train_model.py"} | changes
    (folder / "run.json").write_text(json.dumps(info))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if lock:
        (folder / "run.lock").touch()
    return folder


@pytest.fixture
def hold_lock():
    """A function that lets another process hold a run's lock, as a live run does."""
    holders = []

    def hold(folder):
        code = ("import fcntl, sys, time\nlock = open(sys.argv[1], 'w')\n"
                "fcntl.flock(lock, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(120)")
        holder = subprocess.Popen([sys.executable, "-c", code, str(folder / "run.lock")],
                                  stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout.readline() == "held\n"
        return holder

    yield hold
    for holder in holders:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def only_run(root):
    (run,) = run_status.find_runs(root)
    return run


def status_of(root, now=NOW):
    return run_status.format_status(run_status.find_runs(root), now)


def run_script(*arguments, **environment):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], text=True,
                          capture_output=True, env=os.environ | environment, timeout=60)


def test_alive_while_the_lock_is_held_then_died(tmp_path, hold_lock):
    folder = write_run(tmp_path, records=[train(100), train(200)])
    holder = hold_lock(folder)
    assert only_run(tmp_path).state == "running"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW - 7200))
    assert f"state        running since {since} on cpu\n" in status_of(tmp_path)
    holder.kill()
    holder.wait()
    assert only_run(tmp_path).state == "died"
    assert "died: killed without a word, last sign 13 min ago" in status_of(tmp_path)


def test_probing_leaves_the_lock_free_and_two_probes_do_not_meet(tmp_path):
    folder = write_run(tmp_path)
    only_run(tmp_path)
    with open(folder / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(folder / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another probe does
        assert only_run(tmp_path).state == "died"


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_ended_runs(tmp_path, state):
    write_run(tmp_path, state=state, ended=NOW - 300)
    assert f"state        {state} 5 min ago\n" in status_of(tmp_path)


def test_a_run_that_ends_between_two_looks_has_not_died(tmp_path, monkeypatch):
    write_run(tmp_path)

    def ends_now(lock, info):
        write_run(tmp_path, state="finished", ended=NOW)
        return False

    monkeypatch.setattr(run_status, "is_alive", ends_now)
    assert only_run(tmp_path).state == "finished"


def test_without_flock_the_pid_decides(tmp_path, monkeypatch):
    def no_flock(file, operation):
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    here = os.uname().nodename
    write_run(tmp_path, host=here, pid=os.getpid())
    assert only_run(tmp_path).state == "running"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (gone.pid, 10**14):
        write_run(tmp_path, host=here, pid=pid)
        assert only_run(tmp_path).state == "died"
    write_run(tmp_path, host="elsewhere", pid=os.getpid())
    assert only_run(tmp_path).state == "running"
    assert "cannot tell from this machine" in status_of(tmp_path)


def test_no_run_says_what_to_type(tmp_path):
    (tmp_path / "checkpoints_overfit").mkdir()
    done = run_script("status", "--root", tmp_path)
    assert done.returncode == 0
    assert "No training run yet" in done.stdout
    assert "`make demo`" in done.stdout and "`make train`" in done.stdout


def test_runs_come_in_order_and_quick_test_does_not_make_an_overfit_run(tmp_path):
    for name in ("checkpoints_demo", "checkpoints_overfit/quick-test", "checkpoints"):
        write_run(tmp_path, name, state="finished", ended=NOW)
    assert [run.mode for run in run_status.find_runs(tmp_path)] == ["full", "quick-test", "demo"]


def test_numbers_of_the_status(tmp_path):
    folder = write_run(tmp_path, state="finished", ended=NOW - 90_000, records=[
        train(100, loss=0.5), train(200, loss=0.25), validation(200, 0.02),
        train(300, loss=0.3), validation(300, 0.03)])
    for name, size, age in (("checkpoint_00000200.pt", 3 * 2**20, 7200),
                            ("checkpoint_00000100.pt", 2**20, 10_800),
                            *((f"samples/{i}.png", 1, 50 + abs(i - 5)) for i in range(9))):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (NOW - age, NOW - age))
    assert status_of(tmp_path) == textwrap.dedent("""\
        full run in checkpoints
          state        finished 1 d 1 h ago
          progress     step 300 of 5000 (6.0 %), epoch 6.0 of 100
          train loss   last 0.3        best 0.25       at step 200
          validation   last 0.03       best 0.02       at step 200
            with EMA   last 0.018      best 0.018      at step 200
          speed        7.5 images/s
          last sample  checkpoints/samples/5.png
          checkpoints  step 100            1.0 MiB   3 h 00 min ago
                       step 200            3.0 MiB   2 h 00 min ago""")


def test_status_fits_80_columns(tmp_path, hold_lock):
    folder = write_run(tmp_path, "checkpoints_overfit/quick-test", total_steps=10**6, mode="x" * 99,
                       device="cuda:0 (NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition)",
                       records=[train(123456, loss=1.2345e-05), validation(123456, 1.2345e-05)])
    hold_lock(folder)
    lines = status_of(tmp_path).split("\n")
    assert len(lines) == 9
    assert max(map(len, lines)) <= 80


def test_time_left_by_hand(tmp_path, hold_lock):
    # Only the last 20 records count: steps 60 to 250 in 190 + 190 * 2 = 570 s, so 3 s a step.
    records = [train(step, time=NOW - 5000 + 10 * step) for step in (10, 20, 30, 40, 50)]
    records += [train(60, time=NOW + 2 * 60 - 190)]
    records += [train(step, time=NOW + 2 * step) for step in range(70, 260, 10)]
    folder = write_run(tmp_path, records=records, total_steps=1000)
    hold_lock(folder)
    assert only_run(tmp_path).seconds_left == pytest.approx((1000 - 250) * 3)
    assert "7.5 images/s, time left 37 min\n" in status_of(tmp_path)


def test_time_left_leaves_out_the_pause_before_a_resumption(tmp_path, hold_lock):
    records = [train(10, time=NOW - 9000), train(20, time=NOW - 100), train(30, time=NOW - 80)]
    folder = write_run(tmp_path, records=records, total_steps=130, started=NOW - 200)
    hold_lock(folder)
    assert only_run(tmp_path).seconds_left == pytest.approx(100 * 2)


@pytest.mark.parametrize("records", [[], [train(10)], [train(10), train(10)]])
def test_time_left_not_known_yet(tmp_path, hold_lock, records):
    folder = write_run(tmp_path, records=records)
    hold_lock(folder)
    assert only_run(tmp_path).seconds_left is None
    assert "time left not known yet" in status_of(tmp_path)


def test_no_time_left_for_a_dead_run(tmp_path):
    write_run(tmp_path, records=[train(10), train(20)])
    assert only_run(tmp_path).seconds_left is None
    assert "time left" not in status_of(tmp_path)


def test_truncated_last_line(tmp_path, hold_lock):
    folder = write_run(tmp_path, records=[train(10)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 20, "lo')
    assert [record["step"] for record in only_run(tmp_path).train] == [10]
    assert "the last line of metrics.jsonl is incomplete" in status_of(tmp_path)
    hold_lock(folder)  # a live run is just writing it
    assert only_run(tmp_path).notes == ()


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b"null", b'{"kind": "train"}', b"[" * 10**5,
                                  b'{"kind": "train", "step": "x"}', b'{"step": Infinity}'])
def test_damaged_lines_are_counted(tmp_path, line):
    folder = write_run(tmp_path, records=[train(10)])
    good = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(good + line + b"\n" + good.replace(b"10", b"20"))
    assert len(only_run(tmp_path).train) == 2
    assert "note         1 damaged line(s) in metrics.jsonl skipped\n" in status_of(tmp_path)


def test_odd_values_do_not_stop_it(tmp_path):
    write_run(tmp_path, started="soon", total_steps=0, steps_per_epoch=None, device=7, mode=None,
              pid=-1e99, state=[], records=[
                  train(1, loss=None, loss_quarters=3, time="x", epoch=None),
                  train(2, epoch=None, loss=float("nan"), images_per_second=10**400,
                        loss_quarters=[{}])])
    text = status_of(tmp_path)
    assert "full run in checkpoints\n  state        unknown\n  progress     step 2\n" in text
    assert "train loss   last nan\n" in text
    screen = run_status.format_monitor(run_status.find_runs(tmp_path), [], NOW)
    assert "by noise     n/a" in screen


def test_an_impossibly_late_start(tmp_path, hold_lock):
    hold_lock(write_run(tmp_path, started=1e300))
    assert "state        running on cpu" in status_of(tmp_path)


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    write_run(tmp_path, mode="a\x1b[2Jb")
    assert "a?[2Jb run in" in status_of(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_unparsable_run_json(tmp_path, content, hold_lock):
    folder = write_run(tmp_path, records=[train(10)])
    (folder / "run.json").write_text(content)
    assert "state        unknown\n  note         run.json is damaged" in status_of(tmp_path)
    assert "step 10" in status_of(tmp_path)
    hold_lock(folder)
    assert "state        running on unknown device\n" in status_of(tmp_path)


def test_missing_files(tmp_path):
    folder = write_run(tmp_path, records=[train(10)])
    (folder / "run.json").unlink()
    assert "run.json is not readable (No such file or directory)" in status_of(tmp_path)
    (folder / "metrics.jsonl").unlink()
    text = status_of(tmp_path)
    assert "metrics.jsonl is not readable (No such file or directory)" in text
    assert "no training record yet" in text


def test_status_imports_no_torch_and_needs_no_terminal(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    write_run(tmp_path, records=[train(10)])
    for command in ("status", "monitor"):
        done = run_script(command, "--root", tmp_path, PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert "step 10 of 5000" in done.stdout
    assert "torch was imported" in run_script("gpu-status", PYTHONPATH=str(tmp_path)).stderr


def test_an_output_that_lacks_characters_or_is_closed(tmp_path):
    write_run(tmp_path, mode="größer")
    done = run_script("status", "--root", tmp_path, PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("gr??er run in checkpoints\n")
    shell = f"'{sys.executable}' '{SCRIPT}' monitor --root '{tmp_path}'"
    assert subprocess.run(f"{shell} >&-", shell=True, capture_output=True).stderr == b""
    done = subprocess.run(f"{shell} | true", shell=True, capture_output=True)
    assert done.stderr == b""


def test_a_root_that_is_not_there(tmp_path):
    done = run_script("status", "--root", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "there is no directory" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_command():
    text = run_script("--help").stdout
    assert all(word in text for word in ("status ", "monitor ", "gpu-status ", "--once", "--root"))


# --- The monitor -----------------------------------------------------------------------------

def test_sparkline():
    assert run_status.sparkline([1.0, 10.0, 100.0], 10, "abc") == "abc"
    assert run_status.sparkline([1.0, 1.0, 100.0, 100.0], 2, "abc") == "ac"
    assert run_status.sparkline([5.0, 5.0], 10, "abc") == "aa"
    assert run_status.sparkline([], 10, "abc") == ""
    assert run_status.sparkline([None, float("nan"), 0.0, 1.0, float("inf")], 9, "abc") == "a"


def screen_of(root, gpus="No NVIDIA GPU found: test", **options):
    return run_status.format_monitor(run_status.find_runs(root), gpus, NOW, **options)


def test_monitor_screen(tmp_path, hold_lock):
    write_run(tmp_path, "checkpoints_demo", state="finished", ended=NOW)
    records = [train(step, time=NOW - 5 - (2500 - step) / 100) for step in range(100, 2501, 100)]
    hold_lock(write_run(tmp_path, records=records))  # the live one, though the other is newer
    screen = screen_of(tmp_path, [READING])
    lines = screen.split("\n")
    assert lines[0].startswith("full run in checkpoints") and lines[0].endswith("q leaves")
    bar = re.search(r"\[(█+)(▁+)\]  50.0%", screen)
    assert abs(len(bar[1]) - len(bar[2])) <= 1
    assert "by noise     0.1  0.05  n/a  0.01  (least to most noise)" in screen
    assert "last metrics 5 s ago" in screen
    curve = re.search(r"loss curve   (\S+)", screen)[1]
    assert curve[0] == "█" and curve[-1] == "▁" and len(curve) == 25
    assert lines[-1].startswith("GPU 0 NVIDIA H200 ")
    assert len(lines) <= 24 and max(map(len, lines)) < 80


def test_monitor_shows_the_newest_run_if_none_lives(tmp_path):
    write_run(tmp_path, state="finished", started=NOW - 900, ended=NOW - 500)
    write_run(tmp_path, "checkpoints_demo", state="interrupted", started=NOW - 800, ended=NOW - 60)
    assert screen_of(tmp_path).startswith("demo run in checkpoints_demo")


def test_monitor_in_ascii(tmp_path):
    write_run(tmp_path, records=[train(10), train(2500)])
    assert screen_of(tmp_path, blocks=run_status.ASCII_BLOCKS).isascii()
    assert run_script("monitor", "--root", tmp_path, PYTHONIOENCODING="ascii").stdout.isascii()
    done = run_script("monitor", "--once", "--root", tmp_path, PYTHONIOENCODING="utf-8")
    assert "█" in done.stdout


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (200, 60), (1, 1)])
def test_monitor_fits_the_terminal(tmp_path, size):
    folder = write_run(tmp_path, records=[train(10), train(2500), validation(2500, 0.1)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("{")
    eight = [READING] * 8
    lines = screen_of(tmp_path, eight, size=size).split("\n")
    assert len(lines) <= max(3, size[1]) and max(map(len, lines)) < max(20, size[0])
    cut = any("more lines in a taller window" in line for line in lines)
    assert cut == (size == (40, 10)) or size == (1, 1)
    assert (sum(line.startswith("GPU ") for line in lines) == 8) == (size[1] >= 24)


class Terminal:
    """The monitor on a pseudo-terminal that does not tell its size."""

    def __init__(self, root):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "monitor", "--root", str(root)], stdin=self.slave,
            stdout=self.slave, stderr=self.slave, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"})
        self.seen = ""

    def wait_for(self, text, seconds=20):
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode()
        assert text in self.seen, self.seen

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


LEAVE = "\x1b[?25h\x1b[?1049l"


@pytest.mark.parametrize("how, status", [(b"q", 0), (b"\x03", 0), (signal.SIGINT, 0),
                                         (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)])
def test_monitor_restores_the_terminal(terminal, how, status):
    terminal.wait_for("Waiting for a training run")
    assert "\x1b[?1049h\x1b[?25l" in terminal.seen and LEAVE not in terminal.seen
    assert termios.tcgetattr(terminal.slave) != terminal.before
    if isinstance(how, bytes):
        os.write(terminal.master, how)
    else:
        terminal.process.send_signal(how)
    assert terminal.process.wait(10) == status
    terminal.wait_for(LEAVE)
    assert terminal.seen.endswith(LEAVE) and "Traceback" not in terminal.seen
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_monitor_waits_for_a_run_and_redraws_in_place(terminal, tmp_path):
    terminal.wait_for("Waiting for a training run")
    write_run(tmp_path, records=[train(10)])
    terminal.wait_for("full run in checkpoints")
    terminal.wait_for("step 10 of 5000")
    assert terminal.seen.count("\x1b[H") >= 2 and "\x1b[2J" not in terminal.seen
    assert "by noise     0.1  0.05  n/a  0.01  (least to most noise)" in terminal.seen


# --- GPUs ------------------------------------------------------------------------------------

@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi which says what is given first on the PATH."""
    def fake(csv, header=OLD_HEADER, status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "csv").write_text(csv)
        (folder / "header").write_text(header)
        script = folder / "nvidia-smi"
        script.write_text(f'#!/bin/sh\ncase "$1" in --query-gpu={run_status.GPU_QUERY}) '
                          f"cat {folder}/csv;; *) cat {folder}/header;; esac\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return script

    return fake


def test_one_gpu(fake_smi):
    fake_smi(ONE_GPU)
    assert run_status.query_gpus() == [
        GpuReading("0", "NVIDIA H200", 87.0, 12595.0, 143771.0, 45.0, 350.12)]
    assert run_status.format_gpus(run_status.query_gpus()) == (
        "GPU 0 NVIDIA H200                87 % used  12.3 of 140.4 GiB   45 C  350 W")


def test_eight_gpus(fake_smi):
    fake_smi(EIGHT_GPUS)
    gpus = run_status.query_gpus()
    assert [(gpu.index, gpu.utilization) for gpu in gpus] == [(str(i), 10.0 * i) for i in range(8)]
    lines = run_status.format_gpus(gpus).split("\n")
    assert len(lines) == 8 and len(set(map(len, lines))) == 1 and len(lines[0]) < 80


def test_fields_without_a_number(fake_smi):
    fake_smi(MIG_GPU)
    (gpu,) = run_status.query_gpus()
    assert (gpu.utilization, gpu.memory_used, gpu.power) == (None, 1024.0, None)
    assert " n/a % used   1.0 of  40.0 GiB   33 C  n/a W" in run_status.format_gpus([gpu])


def test_no_gpu_sentences(fake_smi, monkeypatch, tmp_path):
    fake_smi(DRIVER_ERROR, status=9)
    assert run_status.query_gpus().startswith(
        "No NVIDIA GPU found: nvidia-smi failed: NVIDIA-SMI has failed because it couldn't")
    fake_smi("No devices were found\n")
    assert run_status.query_gpus() == "No NVIDIA GPU found: No devices were found"
    fake_smi("")
    assert run_status.query_gpus() == "No NVIDIA GPU found: nvidia-smi lists none"
    fake_smi(ONE_GPU).write_text("no program")
    assert run_status.query_gpus().startswith("No NVIDIA GPU found: nvidia-smi does not answer (")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_status.query_gpus() == f"No NVIDIA GPU found: {run_status.SMI_MISSING}"


def test_a_hanging_nvidia_smi(fake_smi, monkeypatch):
    fake_smi(ONE_GPU).write_text("#!/bin/sh\nexec sleep 60\n")
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: real(*a, **k | {"timeout": 0.2}))
    assert "timed out" in run_status.query_gpus()


WORKING = dict(torch_version="2.9.0", torch_cuda="12.8", gpus=[READING], driver="550.54.15",
               driver_cuda="12.4")
H200 = ("NVIDIA H200", (9, 0), 150e9)
OLD_CARD = ("Tesla K80", (3, 7), 12e9)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90")
DIAGNOSES = {
    "torch missing": ({"problem": "No module named 'torch'"}, False, "`make install`"),
    "works": (WORKING | {"available": True, "devices": (H200,), "architectures": ARCHITECTURES},
              True, "use the GPU, NVIDIA H200"),
    "no driver": (WORKING | {"gpus": GpuFacts().gpus, "driver": "", "driver_cuda": ""},
                  True, "Training works on the CPU"),
    "no device": (WORKING | {"gpus": "No NVIDIA GPU found: No devices were found"},
                  True, "Training works on the CPU"),
    "broken driver": (WORKING | {"gpus": "No NVIDIA GPU found: nvidia-smi failed: mismatch"},
                      False, "restart the machine"),
    "CPU build": (WORKING | {"torch_cuda": None, "driver_cuda": "12.7"},
                  False, "install torch --index-url https://download.pytorch.org/whl/cu126"),
    "CPU build, CUDA of the driver unknown": (
        WORKING | {"torch_cuda": None, "driver_cuda": ""}, False, "whl/cu130"),
    "old driver": (WORKING, False, "serves CUDA up to 12.4, but torch is built for CUDA 12.8"),
    "old driver, cure": (WORKING, False, "upgrade the NVIDIA driver, or else replace torch:\n"),
    "old driver, by number": (WORKING | {"driver_cuda": "9.2"}, False, "serves CUDA up to 9.2"),
    "hidden, empty": (WORKING | {"visible": ""}, False, "`unset CUDA_VISIBLE_DEVICES`"),
    "hidden, -1": (WORKING | {"visible": "-1"}, False, "`unset CUDA_VISIBLE_DEVICES`"),
    "hidden, no such GPU": (WORKING | {"visible": "1,0"}, False, "`unset CUDA_VISIBLE_DEVICES`"),
    "not hidden": (WORKING | {"visible": "0"}, False, "upgrade the NVIDIA driver"),
    "not hidden by name": (WORKING | {"visible": "GPU-1234"}, False, "upgrade the NVIDIA driver"),
    "fits but fails": (WORKING | {"driver_cuda": "13.0", "problem": "error 999"},
                       False, "CUDA does not start (error 999)"),
    "no device answers": (WORKING | {"available": True, "problem": "busy"}, False, "(busy)"),
    "no kernel": (WORKING | {"available": True, "devices": (OLD_CARD, H200),
                             "architectures": ARCHITECTURES},
                  False, "cuda:0, Tesla K80, has capability 3.7"),
    "no kernel on the second": (WORKING | {"available": True, "devices": (H200, OLD_CARD),
                                           "architectures": ARCHITECTURES}, True, "cuda:1, Tesla"),
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_diagnosis(name):
    facts, works, words = DIAGNOSES[name]
    verdict, sentence = diagnose(GpuFacts(**facts))
    assert verdict is works
    assert words in sentence


@pytest.mark.parametrize("capability, architectures, runs", [
    ((8, 6), ("sm_80",), True), ((8, 0), ("sm_86",), False), ((9, 0), ("sm_80",), False),
    ((9, 0), ("sm_80", "compute_80"), True), ((7, 5), ("compute_80",), False),
    ((9, 0), ("sm_90a",), True), ((12, 1), ("sm_120a",), False), ((12, 1), ("sm_120",), True),
    ((10, 0), ("sm_120", "sm_90"), False), ((9, 0), (), True)])
def test_has_kernel(capability, architectures, runs):
    assert run_status.has_kernel(capability, architectures) is runs


FAKE_TORCH = """
import types, warnings
__version__ = "2.9.0"
version = types.SimpleNamespace(cuda={cuda!r})
class cuda:
    def is_available():
        if {warning!r}:
            warnings.warn({warning!r})
        return {available}
    def device_count(): return 1
    def get_arch_list(): return ["sm_90"]
    def get_device_properties(index):
        if {broken}:
            raise RuntimeError("all CUDA-capable devices are busy")
        return types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=2**37)
"""


def gpu_status(tmp_path, cuda="12.8", available=True, broken=False, warning="", torch=None):
    (tmp_path / "torch.py").write_text(torch or FAKE_TORCH.format(
        cuda=cuda, available=available, broken=broken, warning=warning))
    done = run_script("gpu-status", PYTHONPATH=str(tmp_path), CUDA_VISIBLE_DEVICES="0")
    assert done.stderr == ""
    return done


def test_gpu_status_of_a_working_machine(fake_smi, tmp_path):
    fake_smi(ONE_GPU, NEW_HEADER)
    done = gpu_status(tmp_path)
    assert done.returncode == 0
    assert "torch                 2.9.0, built for CUDA 12.8\n" in done.stdout
    assert "NVIDIA driver         610.43.02, serves CUDA up to 13.3\n" in done.stdout
    assert "CUDA_VISIBLE_DEVICES  '0'\n" in done.stdout
    assert "cuda:0                NVIDIA H200, capability 9.0, 128.0 GiB, bf16 yes" in done.stdout
    assert "Diagnosis: Training will use the GPU, NVIDIA H200." in done.stdout


def test_gpu_status_of_an_old_driver(fake_smi, tmp_path):
    fake_smi(ONE_GPU, OLD_HEADER)
    done = gpu_status(tmp_path, available=False, warning="The NVIDIA driver is too old")
    assert done.returncode == 1
    assert "NVIDIA driver         550.54.15, serves CUDA up to 12.4\n" in done.stdout
    assert "\n  python -m pip install torch --index-url" in done.stdout


def test_gpu_status_of_broken_machines(fake_smi, tmp_path):
    fake_smi(ONE_GPU, NEW_HEADER)
    done = gpu_status(tmp_path, available=False, warning="CUDA unknown error")
    assert done.returncode == 1 and "(CUDA unknown error)" in done.stdout
    done = gpu_status(tmp_path, broken=True)
    assert done.returncode == 1 and "CUDA-capable devices are" in done.stdout
    done = gpu_status(tmp_path, torch="raise ImportError('libcudart.so is missing')")
    assert done.returncode == 1 and "(libcudart.so is missing). Cure: `make" in done.stdout
    done = gpu_status(tmp_path, torch="half = 'installed'")
    assert done.returncode == 1 and "torch cannot be loaded" in done.stdout


def test_gpu_status_without_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    done = gpu_status(tmp_path, cuda=None, available=False)
    assert done.returncode == 0
    assert "built without CUDA" in done.stdout and "Training works on the" in done.stdout
