"""What several test files share: the import path, the markers, a small network, its settings."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and threads that wait by spinning would take them from each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest
import torch
from torch.utils._triton import has_triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as settings  # noqa: E402
from build import build_model  # noqa: E402
from conditional_diffusion import CosineNoiseScheduler, UNet, save_checkpoint  # noqa: E402

TINY = {
    "image_size": 16, "base_channels": 16, "channel_mult": (1, 2), "num_res_blocks": (1, 1),
    "attention_sizes": (4,), "patch_size": 2, "time_embed_dim": 16, "class_embed_dim": 16,
}
# Nearly the same as settings of a run and as flags of the scripts, with a chain of 50 timesteps.
TINY_SETTINGS = {
    "data.image_size": "16", "model.base_channels": "16", "model.channel_mult": "1,2",
    "model.num_res_blocks": "1,1", "model.attention_sizes": "4", "model.patch_size": "2",
    "diffusion.num_train_timesteps": "50", "sample.num_inference_steps": "5",
    "sample.grid_steps": "3", "train.validation_images": "10",
}
TINY_FLAGS = ["--device", "cpu"]
TINY_FLAGS += [word for name, value in TINY_SETTINGS.items() for word in (f"--{name}", value)]
PICTOGRAMS = [*TINY_FLAGS, "--dataset", "pictograms"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; run with -m gpu")
    if not config.option.markexpr:
        config.option.markexpr = "not gpu"


def assert_identical(actual, expected, where="state"):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected)):
            assert_identical(*pair, f"{where}[{i}]")
    else:
        assert type(actual) is type(expected) and actual == expected, where


def wake(model: UNet, seed: int = 0) -> UNet:
    """The model with small noise in the parameters that start at zero.

    At initialisation these silence most of the network, so that tests of what it does with its
    inputs would pass or fail for nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def make_checkpoint(folder: str, class_names=settings.CLASS_NAMES, **more) -> Path:
    """That of an untrained network which listens, for what needs no training."""
    config = settings.apply_overrides(settings.demo(), {**TINY_SETTINGS, **more})
    model, _ = build_model(config, "cpu", len(class_names))
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    return save_checkpoint(Path(folder), {
        "config": settings.to_dict(config), "class_names": list(class_names), "step": 12,
        "images_seen": 120, "model": raw, "ema": wake(model).state_dict(), "optimizers": [],
    }, keep=1)


@pytest.fixture
def tiny_model():
    """tiny_model(seed=0, **overrides): a UNet for 16x16 images, its weights fixed by the seed."""

    def build(seed: int = 0, **overrides) -> UNet:
        torch.manual_seed(seed)
        return UNet(CosineNoiseScheduler(50).alphas_cumprod, **{**TINY, **overrides})

    return build


@pytest.fixture
def awake_model(tiny_model):
    """As tiny_model, woken."""
    return lambda seed=0, **overrides: wake(tiny_model(seed, **overrides), seed)


@pytest.fixture
def schedule():
    """schedule(T=50, **options): a noise schedule short enough for a whole chain."""

    def build(T: int = 50, **options) -> CosineNoiseScheduler:
        return CosineNoiseScheduler(T, **options)

    return build


@pytest.fixture(autouse=True)
def device_of_the_test(request, monkeypatch):
    """Only a test marked gpu uses one: the others compare to the bit, or patch what a CPU calls."""
    if request.node.get_closest_marker("gpu"):
        has_triton.cache_clear()  # what it found where a test was to see no GPU
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """What launchers and job templates leave in the environment is not for the tests."""
    for name in list(os.environ):
        if name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or (
            name.startswith(("TORCHELASTIC_", "TRAINING_"))
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")  # servers of the tests are on this machine


@pytest.fixture
def own_directory(tmp_path, monkeypatch):
    """The test runs in an empty directory, without DATA_DIR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments) -> (exit status, what it said), as the shell would see them."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        import command_line

        with pytest.raises(SystemExit) as stop:
            command_line.exit_with(script.main, script.USER_ERRORS)
        output = "".join(capsys.readouterr())
        # A text as the exit code is what Python prints to stderr before it exits with 1.
        if isinstance(stop.value.code, str):
            return 1, output + stop.value.code
        return stop.value.code or 0, output

    return run


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def assert_one_sentence(said: str, *words: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    for word in words:
        assert word in errors[0], said
