"""What the host does with a GPU, on one that computes nothing (cuda_stub/): no number is looked at.

Whole commands go through all that torch does for CUDA outside its kernels. What is compiled is
compiled for it by Triton and NVIDIA's assembler.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_FLAGS
from cuda_stub import stub

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*TINY_FLAGS[2:], "--dataset", "pictograms"]  # without the device
TRAINING = ["--full", *FLAGS, "--batch-size", "32", "--train.warmup_steps", "2"]

pytestmark = pytest.mark.skipif(bool(stub.why_not()), reason=stub.why_not() or "it works")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "DATA_DIR"}
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return kept | path | stub.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def python(environment, tmp_path_factory):
    """python(*arguments, gib=80) -> what it said, in a folder of this file's; it has to succeed."""
    folder = tmp_path_factory.mktemp("runs")

    def run(*arguments, gib: float = 80, capability: int = 90) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {"STUB_GIB": str(gib), "STUB_CAPABILITY": str(capability)},
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    run.folder = folder
    return run


NOTICES = """
import pytest, torch

x = torch.zeros(3, 4, device="cuda")
assert x.sum().item() == 0 and x.isfinite().all() and x.shape == (3, 4)
with pytest.raises(torch.OutOfMemoryError):
    torch.empty(2**31, device="cuda")
with pytest.raises(RuntimeError, match="invalid configuration"):  # see MOST_GROUPS in unet.py
    torch.nn.functional.group_norm(
        torch.zeros(1, 2**16, 2, device="cuda", requires_grad=True), 2**16
    ).sum().backward()
torch.cuda.set_sync_debug_mode("error")
with pytest.raises(RuntimeError, match="synchronizing"):
    x.sum().item()
print("noticed all")
"""


def test_the_stub_notices_what_it_is_here_for(python):
    assert "noticed all" in python("-c", NOTICES, gib=1)


STEPS = """
import torch
from conftest import TINY
from conditional_diffusion import CosineNoiseScheduler, TrainingEngine, UNet
from config import DataConfig
from data import Split, TrainingBatches

images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
for dtype in (None, torch.bfloat16, torch.float16):
    for optimizer in ("muon", "adamw"):
        scheduler = CosineNoiseScheduler(50).cuda()
        model = UNet(scheduler.alphas_cumprod, **TINY).cuda().to(memory_format=torch.channels_last)
        engine = TrainingEngine(model, scheduler, total_steps=9, learning_rate=1e-3,
                                optimizer=optimizer, autocast_dtype=dtype)
        split = Split(images, torch.arange(20) % 10)
        batches = TrainingBatches(split, DataConfig(image_size=16), 4, 0, "cuda").starting_at(0)
        engine.train_step(*next(batches))
        for recorded in (False, True):
            if recorded:
                engine.record(*next(batches))
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                engine.train_step(*next(batches))
            torch.cuda.set_sync_debug_mode("default")
            print("none waited:", dtype, optimizer, engine.recorded, engine.step)
"""


def test_no_training_step_waits(python):
    """torch raises an error where one does."""
    said = python("-W", "ignore", "-c", STEPS)
    assert len(re.findall(r"none waited: .* False 4$", said, re.MULTILINE)) == 6
    assert len(re.findall(r"none waited: .* True 7$", said, re.MULTILINE)) == 6


FAILS = """
import torch
from conftest import TINY
from conditional_diffusion import CosineNoiseScheduler, TrainingEngine, UNet
from conditional_diffusion.cuda_graphs import Recording, RecordingError

def waiting(module, inputs, output):
    output.sum().item()

def waiting_unnoticed(module, inputs, output):
    if torch.cuda.is_current_stream_capturing():
        output.sum().item()

def out_of_memory(module, inputs, output):
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**40, device="cuda")

scheduler = CosineNoiseScheduler(50).cuda()
earlier = Recording(lambda: [torch.rand(4, device="cuda")], [])
batch = torch.zeros(4, 3, 16, 16, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
for look in (waiting, waiting_unnoticed, out_of_memory):
    model = UNet(scheduler.alphas_cumprod, **TINY).cuda()
    engine = TrainingEngine(model, scheduler, total_steps=9, learning_rate=1e-3,
                            autocast_dtype=torch.float16)
    hook = model.stem.register_forward_hook(look)
    try:
        engine.record(*batch)
    except RecordingError as error:
        print(f"{look.__name__}: {error}.")
    engine.train_step(*batch)
    hook.remove()
    engine.record(*batch)
    engine.train_step(*batch)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.manual_seed(7)
    earlier()
    assert earlier.random.initial_seed() == 7
    print("went on:", engine.recorded, engine.step)
"""


def test_a_recording_that_fails_leaves_torch_able_to_go_on(python):
    said = python("-W", "error::UserWarning", "-c", FAILS)
    assert "waiting: called a synchronizing CUDA operation." in said
    spoilt = "waiting_unnoticed: CUDA error: operation not permitted when stream is capturing."
    assert spoilt in said
    assert "out_of_memory: CUDA out of memory." in said
    assert said.count("went on: True 2") == 3


def test_a_run_is_trained_continued_drawn_from_and_scored(python):
    uncompiled = [*TRAINING, "--samples", "20", "--train.compile", "false"]
    script = ROOT / "train_model.py"
    said = python(script, *uncompiled, "--epochs", "1")
    assert "cuda:0, bf16" in said and "step 6: validation loss" in said
    assert "without CUDA graphs" not in said
    assert "continuing at step 6" in python(script, *uncompiled, "--epochs", "2")
    facts = json.loads((python.folder / "checkpoints/run.json").read_text())
    assert (facts["state"], facts["device"]) == ("finished", "cuda:0")
    assert "Stub GPU" in facts["machine"]
    for sampler in ("ddpm", "sde-dpm-solver++"):
        said = python(ROOT / "generate_samples.py", "--samples", "1", "--sampler", sampler,
                      "--steps", "20")
        assert "on cuda:0" in said and "without CUDA graphs" not in said
    assert len(list((python.folder / "generated_images").glob("cat*.png"))) == 1
    said = python(ROOT / "evaluate_samples.py", "--samples", "2", "--no-inception")
    assert "on cuda:0" in said and "class agreement" in said


def test_a_run_is_compiled(python):
    """The smallest network that has every kind of layer: each kernel takes its time."""
    said = python(ROOT / "train_model.py", *TRAINING, "--samples", "8", "--epochs", "1", "--fresh",
                  "--model.channel_mult", "1", "--model.num_res_blocks", "1",
                  "--model.attention_sizes", "8")
    assert "cuda:0, bf16" in said and "compiling the network" in said
    assert "torch.compile does not work" not in said and "without CUDA graphs" not in said


def test_a_gpu_without_bf16_trains_in_fp16(python):
    said = python(ROOT / "train_model.py", *TRAINING, "--samples", "8", "--epochs", "1", "--fresh",
                  "--train.compile", "false", capability=75)
    assert "cuda:0, fp16" in said and "validation loss" in said
    assert "without CUDA graphs" not in said


# The full network, which has more to keep for itself than for a picture.
FULL = ["--full", "--dataset", "pictograms", "--samples", "40", "--epochs", "1", "--fresh",
        "--train.compile", "false", "--sample.grid_steps", "2", "--train.validation_images", "10"]


def test_a_batch_that_does_not_fit_is_split(python):
    said = python(ROOT / "train_model.py", *FULL, "--batch-size", "400", gib=6)
    assert "each batch of 400 now goes through the network in 2 parts" in said


def test_the_batch_that_is_chosen_fits(python):
    said = python(ROOT / "train_model.py", *FULL, "--batch-size", "auto", gib=6)
    chosen = int(re.search(r"batch size (\d+), chosen for this device", said)[1])
    assert 150 < chosen < 250 and "out of memory" not in said
