"""Several processes train as one does: the same batches, weights and validation losses."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

from command_line import COMMAND, LAUNCH_FOLDER, LAUNCHER, MISTAKE, status_of

import pytest
import torch
from conftest import PICTOGRAMS, TINY, TINY_SETTINGS, assert_identical, is_running, wake
from PIL import Image

import launch as launcher
import train_model
import training_run
from cifar10 import DataError
from conditional_diffusion import (
    CosineNoiseScheduler,
    TrainingEngine,
    UNet,
    processes,
    training_engine,
)
from conditional_diffusion.checkpoint import CheckpointError, WriteError
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.processes import Processes
from config import CLASS_NAMES, ConfigError, DataConfig, apply_overrides, full
from data import TrainingBatches, draw_pictograms
from run_directory import read_metrics
from training_run import Run

ROOT = Path(__file__).parents[1]
STEPS = 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 10, 128])
def test_shares_cover_everything_once(world_size, count):
    shares = [Processes(rank, world_size).share(count) for rank in range(world_size)]
    parts = [list(range(count)[share]) for share in shares]
    assert sum(parts, []) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) == max(map(len, parts))


def test_alone_everything_is_returned_as_it_was_given():
    alone = Processes()
    assert alone.leads and not alone.several and alone.share(7) == slice(0, 7)
    assert alone.agree(True, False) == [True, False]
    assert alone.gather(3) == [3] and alone.from_leader(lambda: 4) == 4


def test_a_world_without_an_address_is_a_mistake(monkeypatch):
    """Job templates leave WORLD_SIZE behind."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(processes.NoMeeting, match="WORLD_SIZE is 2 .* but MASTER_ADDR is not set"):
        processes.join()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(processes.NoMeeting, match="WORLD_SIZE is 'two' .*; unset it"):
        processes.join()


@pytest.fixture
def free_port(monkeypatch) -> int:
    """Where processes should meet by the environment, and nobody listens yet."""
    with socket.socket() as free:
        free.bind((launcher.LOOPBACK, 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", launcher.LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_without_a_launcher_the_others_are_not_waited_for_forever(monkeypatch, free_port):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(processes.NoMeeting, match=f"nobody answers at .*:{free_port}"):
        processes.join()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(processes.NoMeeting, match="not all 2 processes came"):
        processes.join()
    with socket.create_server((launcher.LOOPBACK, free_port)):
        with pytest.raises(processes.NoMeeting, match="this process cannot listen at"):
            processes.join()


def test_without_a_launcher_processes_find_each_other_by_the_environment(tmp_path, free_port):
    command = [sys.executable, ROOT / "train_model.py", *TRAIN[1:], "--epochs", "1"]
    started = [
        subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT,
                         env=os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)})
        for rank in range(2)
    ]
    leader, other = (process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], leader + other
    assert "waiting for 2 processes" in leader and "cpu in 2 processes" in leader


def test_processes_that_do_not_come_are_not_waited_for_forever(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    processes.meet(store, 0, 1)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=0.1))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # The second came before the restart, if at all.
    with pytest.raises(processes.NoMeeting, match="not all 2 processes came within 0.1 seconds"):
        processes.meet(store, 0, 2)


def test_a_launcher_that_is_gone_is_not_waited_for_forever(monkeypatch, free_port):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=0.1))
    with pytest.raises(processes.NoMeeting, match=f"nobody answers at .*:{free_port}"):
        processes.common_store(0, 2)


@pytest.mark.parametrize("error, said", [
    (RuntimeError("[/src/gloo/tcp/pair.cc:1] Connection closed by peer. More"),
     "Connection closed by peer"),
    (RuntimeError("shapes do not match"), ""),
    (torch.distributed.DistNetworkError("connection reset"), "connection reset"),
    (torch.distributed.DistBackendError("NCCL error in: a.cpp:1, remote process exited, NCCL 2\n"
                                        "ncclRemoteError: A call failed"),
     "NCCL error in: a.cpp:1, remote process exited, NCCL 2"),
    (torch.distributed.DistBackendError("NCCL error in: a.cpp:1, invalid usage\n"
                                        "ncclInvalidUsage: Duplicate GPU detected"), ""),
])
def test_the_loss_of_another_is_told_from_own_troubles(error, said):
    assert processes.loss_of_another(error) == said


def build_engine(group: Processes) -> tuple[TrainingEngine, TrainingBatches]:
    """A network whose silent parts have been woken; its batches of ten do not divide by four."""
    splits = draw_pictograms(DataConfig(image_size=16, samples_per_class=3), seed=0)
    scheduler = CosineNoiseScheduler(50)
    torch.manual_seed(0)
    model = wake(UNet(scheduler.alphas_cumprod, **TINY))
    engine = TrainingEngine(model, scheduler, total_steps=STEPS, learning_rate=1e-3,
                            max_skipped_steps=0, processes=group)
    batches = TrainingBatches(splits["train"], DataConfig(image_size=16), 10, 0, "cpu", group.share)
    return engine, batches


def train(group: Processes, micro_batches: int = 1, saved: dict | None = None, until: int = STEPS):
    """(engine state, metrics, validation loss) after some steps."""
    engine, batches = build_engine(group)
    engine.micro_batches = micro_batches
    if saved:
        engine.load_state_dict(saved)
    for x_start, labels in batches.starting_at(engine.step):
        if engine.step == until:
            break
        engine.train_step(x_start, labels)
    state = engine.state_dict()
    x_start, labels = torch.rand(3, 3, 16, 16, generator=torch.manual_seed(9)), torch.arange(3)
    loss = engine.validation_loss(engine.ema_model, x_start, labels, 2)
    return state, engine.take_metrics(), loss


def compile_in_the_first_of_two(group: Processes) -> tuple[bool, dict]:
    """(whether training goes on without a compiler, weights after a step)."""
    compile_ = torch.compile

    def compiler(network, **options):
        if group.rank == 1:
            raise RuntimeError("no compiler here")
        return compile_(network, backend="eager")

    torch.compile = compiler
    engine, batches = build_engine(group)
    batch = next(batches.starting_at(0))
    training_run.compile_training(engine, batch)
    without = engine.network is engine.model
    engine.train_step(*batch)
    return without, engine.state_dict()["model"]


def draw_grid(group: Processes) -> torch.Tensor:
    """Three rows of a run's grid, which two processes share in the middle of the second."""
    small = {"train.device": "cpu", "train.batch_size": "10", "sample.batch_size": "5"}
    config = apply_overrides(full(), TINY_SETTINGS | small)
    splits = draw_pictograms(DataConfig(image_size=16, samples_per_class=3), seed=0)
    run = Run(config, Path(), splits, torch.device("cpu"), None, group)
    return run.sample(wake(run.model), 3, grid=True)


def wish_differently(joined: Processes) -> list[list[bool]]:
    """Answers to one wish of the second process, then one of the first, and what was left open."""
    return [joined.agree(joined.rank == 1, False), joined.agree(False, joined.leads),
            joined.answers()]


def work(task, rank: int, world_size: int, folder: Path, options: dict) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    if "saved" in options:
        options["saved"] = torch.load(options["saved"])
    torch.save(task(Processes(rank, world_size, rank), **options), folder / f"{rank}.pt")
    processes.leave()


@pytest.fixture(scope="module")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["conditional_diffusion"])
    return found


@pytest.fixture
def together(context, tmp_path):
    """together(world_size, task, **options): what the task returns in every process."""

    def run(world_size: int, task=train, **options) -> list:
        (tmp_path / "store").unlink(missing_ok=True)
        if "saved" in options:  # not through the pipe, where every tensor is an open file
            torch.save(options["saved"], tmp_path / "saved.pt")
            options["saved"] = tmp_path / "saved.pt"
        started = [context.Process(target=work, args=(task, rank, world_size, tmp_path, options))
                   for rank in range(world_size)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            assert process.exitcode == 0
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]

    return run


def assert_same_training(found, expected) -> None:
    (state, metrics, loss), (expected_state, expected_metrics, expected_loss) = found, expected
    start = build_engine(Processes())[0].model.state_dict()
    for part in ("model", "ema"):
        # Against the way that training has gone. Adam makes whole steps of gradients that are but
        # rounding, so that single weights may differ by more than the rest.
        way, apart = (torch.cat([(a[name] - b[name]).flatten() for name in start]).norm()
                      for a, b in ((expected_state[part], start),
                                   (state[part], expected_state[part])))
        assert way > 0.1 and apart < 1e-3 * way, f"{part}: {apart / way:.2g}"
    for name in ("step", "images_seen", "skipped_steps"):
        assert metrics[name] == expected_metrics[name]
    for name in ("loss", "loss_quarters", "grad_norm"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4), name
    assert loss == pytest.approx(expected_loss, rel=1e-4)


def test_a_wish_of_any_process_is_heard_by_all_at_the_next_step(together):
    answers = [[False, False], [True, False], [False, True]]
    assert together(2, wish_differently) == [answers, answers]


def test_a_grid_is_that_of_one_process(together):
    alone = draw_grid(Processes())
    assert len(alone.unique(dim=0)) == 30
    for found in together(2, draw_grid):
        assert_identical(found, alone)


@pytest.mark.parametrize("world_size, micro_batches", [(2, 1), (2, 2), (4, 1)])
def test_weights_and_metrics_are_those_of_one_process(together, world_size, micro_batches):
    found = together(world_size, micro_batches=micro_batches)
    assert_same_training(found[0], train(Processes()))
    for other in found[1:]:  # all hold the same weights, bit for bit
        assert_identical(other[0]["model"], found[0][0]["model"])
        assert_identical(other[0]["ema"], found[0][0]["ema"])


def test_a_run_goes_on_with_another_number_of_processes(together):
    half = train(Processes(), until=2)[0]
    assert_same_training(together(2, saved=half)[0], train(Processes()))
    half = together(2, until=2)[0][0]
    assert_same_training(train(Processes(), saved=half), train(Processes()))


def test_a_compiler_that_one_process_lacks_is_used_by_none(together):
    (first, weights), (second, others) = together(2, compile_in_the_first_of_two)
    assert first and second
    assert_identical(weights, others)


class Tied(torch.nn.Sequential):
    no_sync = contextlib.nullcontext

    def forward(self, *arguments):
        return self[0](*arguments)


class Pretended(Processes):
    """The first of two processes; the other one needs four parts and has other data."""

    def sum(self, tensor):
        return tensor

    def extreme(self, value, *, largest):
        return max(value, 4)

    def from_leader(self, work):
        return "another fingerprint"


def test_parts_are_agreed_on_before_training_and_lacking_later_ends_the_run(monkeypatch):
    monkeypatch.setattr(training_engine, "average_gradients", Tied)
    engine, batches = build_engine(Pretended(0, 2))
    batch = next(batches.starting_at(0))
    engine.train_step(*batch)
    assert engine.micro_batches == 4 and engine.step == 1

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_compute_gradients", run_out)
    with pytest.raises(OutOfMemory, match="process 0 of 2; end what else"):
        engine.train_step(*batch)


@pytest.mark.parametrize("error, may_pass", [
    (CheckpointError("damaged"), False), (WriteError("the disk is full"), True),
    (OutOfMemory("out of memory"), True), (processes.NoMeeting("nobody came"), False),
])
def test_only_what_may_pass_is_tried_again(tmp_path, monkeypatch, capsys, error, may_pass):
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))

    def fail():
        raise error

    assert status_of(fail, train_model.USER_ERRORS) == 1
    assert (tmp_path / MISTAKE).exists() != may_pass
    assert (str(error) in capsys.readouterr().err) == may_pass


@pytest.mark.usefixtures("own_directory")
def test_fresh_holds_until_the_earlier_run_is_aside(tmp_path, monkeypatch, call):
    """A process that dies before that begins anew again, one that dies later goes on."""
    fresh = [*TRAIN[1:], "--epochs", "1", "--fresh"]
    assert call(train_model, *fresh)[0] == 0
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train_model, "Run", None)  # the first attempt dies here
        with pytest.raises(TypeError):
            call(train_model, *fresh)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, said = call(train_model, *fresh)
    assert status == 0 and "moved to checkpoints_1" in said, said
    assert "is complete" in call(train_model, *fresh)[1]
    monkeypatch.delenv(LAUNCH_FOLDER)  # torchrun without launch.py
    assert "is complete" in call(train_model, *fresh)[1]


def test_other_data_than_the_leaders_is_refused():
    train_model.require_equal_data("mine", None, Path("run"), Processes())
    with pytest.raises(DataError, match="process 1 has other pictures"):
        train_model.require_equal_data("mine", None, Path("run"), Pretended(1, 2))


@pytest.fixture
def launch():
    """launch(folder, *arguments of launch.py, gpus=2, **environment): started, and ended at last.

    One thread per process: more of them than cores would mostly wait for each other.
    """
    started = []

    def start(folder: Path, *arguments, gpus: int = 2, **environment) -> subprocess.Popen:
        command = [sys.executable, ROOT / "launch.py", "--gpus", str(gpus), *arguments]
        started.append(subprocess.Popen(
            command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


TRAIN = [ROOT / "train_model.py", "--full", *PICTOGRAMS, "--samples", "10", "--batch-size", "10",
         "--train.save_every", "5", "--train.log_every", "5"]


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes of a launcher, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    of_training = [pid for pid in map(int, children)
                   if b"train_model.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(
        of_training,
        key=lambda pid: b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes(),
    )


def wait_for_checkpoint(folder: Path, launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint_*.pt")):
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.kill()
            pytest.fail(launcher.communicate()[0])
        time.sleep(0.02)


@pytest.mark.usefixtures("own_directory")
def test_pictures_and_scores_are_those_of_one_process(launch, tmp_path):
    """Three rows for two processes; the same batches, so that the pictures are equal to the bit."""
    assert launch(tmp_path, *TRAIN, "--epochs", "1", gpus=1).wait() == 0
    drawn = {}
    for gpus in (1, 2):
        done = launch(tmp_path, ROOT / "generate_samples.py", "--samples", "3", "--batch-size", "5",
                      "--output", f"by_{gpus}", "--device", "cpu", gpus=gpus)
        said = done.communicate(timeout=120)[0]
        assert done.returncode == 0, said
        assert said.count("grid: ") == 1
        drawn[gpus] = {path.name: path.read_bytes() for path in tmp_path.glob(f"by_{gpus}/*")}
    assert len(drawn[1]) == 33 and drawn[1].keys() == drawn[2].keys()  # with grid, facts and lock
    assert [name for name in drawn[1] if drawn[1][name] != drawn[2][name]] == []

    for label, name in enumerate(CLASS_NAMES):  # few, on which a classifier is trained at once
        for number in range(2):
            path = tmp_path / "pictures" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (25 * label, 100 * number, 80)).save(path)
    for gpus in (1, 2):
        done = launch(tmp_path, ROOT / "evaluate_samples.py", "--samples", "3", "--no-inception",
                      "--batch-size", "5", "--device", "cpu", "--output", f"scores_{gpus}",
                      "--dataset", "cifar10", "--data-dir", "pictures", gpus=gpus)
        said = done.communicate(timeout=120)[0]
        assert done.returncode == 0, said
    one, two = (json.loads((tmp_path / f"scores_{gpus}" / "scores.jsonl").read_text())
                for gpus in (1, 2))
    assert one["n"] == two["n"] == 30
    assert one["colour"] == two["colour"] and one["agreement"] == two["agreement"]


@pytest.mark.usefixtures("own_directory")
def test_launched_run_ends_well_and_only_one_process_speaks(launch, tmp_path):
    launcher = launch(tmp_path, *TRAIN, "--epochs", "1")
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, said
    assert said.count("full run: ") == 1 and "cpu in 2 processes" in said
    steps = [r["step"] for r in read_metrics(tmp_path / "checkpoints") if r["kind"] == "train"]
    assert steps == [1, 5, 10]


@pytest.mark.usefixtures("own_directory")
def test_a_killed_process_ends_the_run_with_its_name(launch, tmp_path):
    launcher = launch(tmp_path, *TRAIN, "--epochs", "10000")
    wait_for_checkpoint(tmp_path, launcher)
    victim = workers(launcher)[1]
    os.kill(victim, signal.SIGKILL)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1 and "Traceback" not in said, said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"process 1 (pid {victim}) was killed by SIGKILL" in sentence


@pytest.mark.usefixtures("own_directory")
def test_what_a_failing_process_said_is_shown(launch, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise ValueError('no luck')\n"
        "time.sleep(600)\n"
    )
    said = (launcher := launch(tmp_path, "failing.py")).communicate(timeout=120)[0]
    assert launcher.returncode == 1
    reason, sentence = said.splitlines()[-2:]
    assert reason == "ValueError: no luck"
    assert re.match(r"error: process 1 \(pid \d+\) failed with status 1, for the reason above; the "
                    "others were ended. To go on from what is saved: ", sentence)


def test_what_the_launcher_tells_its_processes(monkeypatch):
    monkeypatch.setattr(launcher, "launch", lambda *arguments, **options: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(9)))
    command = ["launch.py", "--gpus", "2", str(TRAIN[0]), "--full"]
    monkeypatch.setattr(sys, "argv", [*command, "--fresh"])
    with patch.dict(os.environ):
        os.environ.pop("OMP_NUM_THREADS", None)
        assert launcher.main() == 7
        assert os.environ["OMP_NUM_THREADS"] == "4"
        assert os.environ[launcher.STOPPING_TIMEOUT] == "300"  # as docs/reliability.md says
        # What continues the run must not begin it anew.
        assert os.environ[COMMAND] == shlex.join([sys.executable, *command])
    logging.disable(logging.NOTSET)  # which it has switched off for a process of its own


@pytest.mark.usefixtures("own_directory")
def test_sigterm_saves_and_ends_all(launch, tmp_path):
    launcher = launch(tmp_path, *TRAIN, "--epochs", "10000")
    wait_for_checkpoint(tmp_path, launcher)
    pids = workers(launcher)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert "stopped and saved at step" in said and "Traceback" not in said
    assert "death signal" not in said  # torch's own words for it
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.usefixtures("own_directory")
def test_sigterm_to_launcher_and_processes_is_one_request(launch, tmp_path):
    """As schedulers send it."""
    launcher = launch(tmp_path, *TRAIN, "--epochs", "10000")
    wait_for_checkpoint(tmp_path, launcher)
    for pid in (launcher.pid, *workers(launcher)):
        os.kill(pid, signal.SIGTERM)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert "stopped and saved at step" in said and "error" not in said


# Two of these wait for each other, and then for the launcher to be through with starting them:
# torch forgets those it has started when a signal comes in between.
WAITING = """
import os, pathlib, time
pathlib.Path(os.environ["RANK"]).touch()
while not (pathlib.Path("0").exists() and pathlib.Path("1").exists()):
    time.sleep(0.01)
time.sleep(1)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("own_directory")
def test_nohup_keeps_a_closed_terminal_from_stopping_the_launcher(launch, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        launcher = launch(tmp_path, "waiting.py")
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert launcher.stdout.readline() == "ready\n"
    status = Path(f"/proc/{launcher.pid}/status").read_text()
    assert int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16) & 1 << signal.SIGHUP - 1
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.usefixtures("own_directory")
def test_processes_that_do_not_stop_are_killed_aloud(launch, tmp_path):
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    (tmp_path / "stubborn.py").write_text(ignoring + WAITING)
    launcher = launch(tmp_path, "stubborn.py", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 128 + signal.SIGTERM
    assert said.startswith("error: the processes ended before they were through"), said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("flags, gpus", [([], 2), (["--restarts", "1"], 1)])
def test_a_killed_launcher_leaves_no_process_and_no_step_behind(launch, tmp_path, flags, gpus):
    launcher = launch(tmp_path, *flags, *TRAIN, "--epochs", "10000", gpus=gpus)
    wait_for_checkpoint(tmp_path, launcher)
    pids = workers(launcher)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 120
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((tmp_path / "checkpoints" / "run.json").read_text())["state"] == "interrupted"


@pytest.mark.usefixtures("own_directory")
def test_two_launchers_stand_for_two_machines(launch, tmp_path):
    """On loopback, each in a directory of its own: results appear on machine 0 alone; when a
    process of machine 1 is killed, both end and go on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [tmp_path / name for name in ("first", "second")]
    launchers = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        nodes = ["--nodes", "2", "--node-rank", str(rank), "--rendezvous", meeting]
        launchers.append(
            launch(folder, *nodes, "--restarts", "1", *TRAIN, "--epochs", "10", gpus=1)
        )
    wait_for_checkpoint(folders[0], launchers[0])
    os.kill(workers(launchers[1])[0], signal.SIGKILL)
    said = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert "cpu in 2 processes" in said[0] and "continuing at step" in said[0]
    assert "full run" not in said[1] and not (folders[1] / "checkpoints").exists()
    assert (folders[0] / "checkpoints" / "checkpoint_00000100.pt").exists()


@pytest.mark.usefixtures("own_directory")
def test_a_restart_goes_on_from_the_last_checkpoint(launch, tmp_path):
    launcher = launch(tmp_path, "--restarts", "1", *TRAIN, "--epochs", "10", "--fresh")
    wait_for_checkpoint(tmp_path, launcher)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0 and "continuing at step" in said, said
    assert (tmp_path / "checkpoints" / "checkpoint_00000100.pt").exists()


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("arguments, word", [
    (["--batch-size", "1"], "too small for 2 processes"),
    (["--train.learning_rate", "fast"], "train.learning_rate"),
    (["--epoch", "3"], "'--epochs'"),
])
def test_a_mistake_is_one_clear_sentence(launch, tmp_path, arguments, word):
    launcher = launch(tmp_path, "--restarts", "2", *TRAIN, *arguments)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1 and word in said, said
    assert said.splitlines()[-1].startswith("error: ") and said.count("\n") <= 2  # one of data


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("flags, word", [
    (["--gpus", "many"], "--gpus"),
    (["--restarts", "-1"], "--restarts"),
    (["--gpu", "2"], "'--gpus'"),
    (["--nodes", "2"], "--rendezvous HOST:PORT"),
    (["--rendezvous", "first:29500"], "how many with --nodes"),
    (["--gpus", "2", "--node-rank", "1"], "how many with --nodes"),
    (["--nodes", "2", "--rendezvous", "first:99999"], "'first:99999'"),
    (["--gpus", "all"], "no GPU can be used here"),
    (["--nodes", "2", "--node-rank", "2", "--rendezvous", "127.0.0.1:29500"], "--node-rank"),
])
def test_a_mistake_of_the_launch_is_one_clear_sentence(launch, tmp_path, flags, word):
    launcher = launch(tmp_path, *flags, *TRAIN, gpus=1, CUDA_VISIBLE_DEVICES="")
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == (2 if flags[0] == "--gpu" else 1)
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said, said


def test_a_machine_that_cannot_be_looked_up_is_named(monkeypatch):
    def unknown(*place):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--nodes", "2", "--rendezvous", "first:29500",
                                      "train_model.py"])
    with pytest.raises(ConfigError, match="first:29500 cannot be looked up here: Name or service"):
        launcher.rendezvous_of(launcher.parse_arguments(), 2)


def test_a_script_for_several_machines_also_serves_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--nodes", "1", "--node-rank", "0",
                                      "--rendezvous", "first:29500", "train_model.py"])
    assert launcher.rendezvous_of(launcher.parse_arguments(), 1)["rdzv_backend"] == "c10d"


@pytest.mark.usefixtures("free_port")  # where it would wait for the others
def test_a_process_whose_launcher_is_gone_does_not_start(tmp_path):
    gone = {LAUNCHER: "0", LAUNCH_FOLDER: str(tmp_path / "gone"), "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, ROOT / "train_model.py", *TRAIN[1:]], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, env=os.environ | gone)
    assert done.returncode == 1
    assert done.stderr == "error: launch.py ended while this process was starting\n"


@pytest.mark.usefixtures("own_directory")
def test_a_folder_is_scored_by_one_process(launch, tmp_path):
    launcher = launch(tmp_path, ROOT / "evaluate_samples.py", "--pictures", ".")
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    assert said == "error: scoring a folder takes one process; leave --gpus (make: GPUS=) out\n"


@pytest.mark.usefixtures("own_directory")
def test_machines_that_cannot_meet_say_where_and_why(launch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        meeting = f"127.0.0.1:{taken.getsockname()[1]}"
        launcher = launch(tmp_path, "--nodes", "2", "--rendezvous", meeting, *TRAIN, gpus=1)
        said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    first, second = said.splitlines()
    assert first.startswith("machine 0 of 2")
    assert second.startswith(f"error: no meeting at {meeting}")
