"""A run that is killed at any moment, again and again, ends where an uninterrupted one ends."""

import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import command_line

import pytest
import torch
from conftest import PICTOGRAMS, assert_identical

import train_model
from run_directory import read_metrics

STEPS = 60
ARGUMENTS = [
    "--full", *PICTOGRAMS, "--samples", "4", "--batch-size", "10", "--epochs", "15",
    "--model.dropout", "0.1", "--train.save_every", "2", "--train.log_every", "5",
    "--train.validate_every", "6", "--train.sample_every", "12",
]


def train(folder: Path, slow_writes: bool) -> None:
    """The training script in a process of its own, saving in slow motion if asked to."""
    os.chdir(folder)
    torch.set_num_threads(1)
    write = torch.save

    def save_slowly(state, file):
        file.write(b"half a checkpoint")
        file.flush()
        time.sleep(0.1)
        file.seek(0)
        file.truncate()
        write(state, file)

    if slow_writes:
        torch.save = save_slowly
    sys.argv = ["train_model.py", *ARGUMENTS]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    command_line.exit_with(train_model.main, train_model.USER_ERRORS)


@pytest.fixture(scope="module")
def processes():
    """Processes that start from a server with torch already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_model"])
    return context


def trains(process, folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        facts = json.loads((folder / "checkpoints" / "run.json").read_text())
        return facts["pid"] == process.pid
    return False


def newest_step(folder: Path) -> int:
    found = sorted(path.stem[-8:] for path in folder.glob("checkpoints/checkpoint_*.pt"))
    return int(found[-1]) if found else 0


def wait_until(reached, process) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(folder: Path) -> list[tuple]:
    records = read_metrics(folder / "checkpoints")
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in records
            if r["kind"] in ("train", "validation")]


def test_killed_twenty_times_the_run_ends_bit_for_bit_the_same(tmp_path, processes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    reference = processes.Process(target=train, args=(whole, False))
    reference.start()
    reference.join(120)
    assert reference.exitcode == 0

    moments = random.Random(0)
    reached = [0]
    for _ in range(20):
        process = processes.Process(target=train, args=(broken, True))
        process.start()
        wait_until(lambda: trains(process, broken), process)
        wanted = reached[-1] + 2 * moments.randrange(3)  # a checkpoint every two steps
        wait_until(lambda: newest_step(broken) >= wanted, process)
        process.join(moments.uniform(0.0, 0.2))  # into a step or a save, which takes half of that
        process.kill()
        process.join()
        reached.append(newest_step(broken))
    assert reached == sorted(reached), "a kill lost a checkpoint"
    assert len(set(reached)) > 5, f"the kills did not fall into the run: {reached}"
    process = processes.Process(target=train, args=(broken, False))
    process.start()
    process.join(120)
    assert process.exitcode == 0

    name = f"checkpoints/checkpoint_{STEPS:08d}.pt"
    expected, found = (torch.load(f / name, weights_only=True) for f in (whole, broken))
    for part in ("model", "ema", "optimizers"):
        assert_identical(found[part], expected[part])
    assert losses(broken) == losses(whole)
    for kind in ("raw", "ema"):
        grid = f"checkpoints/samples/step_{STEPS:08d}_{kind}.png"
        assert (whole / grid).read_bytes() == (broken / grid).read_bytes()
    assert not list(broken.rglob("*.tmp"))


def test_best_checkpoint_is_kept_beside_the_newest(tmp_path, processes):
    process = processes.Process(target=train, args=(tmp_path, False))
    process.start()
    process.join(120)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == ["best.pt", *(f"checkpoint_{step:08d}.pt" for step in (56, 58, 60))]
    validation = [r for r in read_metrics(tmp_path / "checkpoints") if r["kind"] == "validation"]
    saved = [r for r in validation if r["step"] % 2 == 0]
    best = min(saved, key=lambda record: record["loss_ema"])
    state = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert state["step"] == best["step"] and state["best_loss"] == best["loss_ema"]
