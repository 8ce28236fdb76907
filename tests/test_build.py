"""build.py: what the settings mean on a device."""

import pytest
import torch
from test_noise_scheduler import published_alphas_cumprod
from torch.testing import assert_close

import build
from build import build_model, build_sampler, sampling_dtype, training_dtype
from conditional_diffusion import DDIMSampler, DPMSolverSampler
from conditional_diffusion.processes import LAUNCHED_BY, Processes
from config import ConfigError, apply_overrides, full

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
SMALL = {"data.image_size": "16", "model.patch_size": "2", "model.base_channels": "16"}


@pytest.fixture
def gpu(monkeypatch):
    """gpu(bf16, capability): what torch says of the GPU."""

    def pretend(bf16: bool, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.mark.parametrize(
    "name, bf16, capability, training, sampling",
    [
        ("H200", True, (9, 0), torch.bfloat16, torch.bfloat16),
        ("T4", False, (7, 5), torch.float16, None),
        ("V100", False, (7, 0), torch.float16, None),
        ("P100", False, (6, 0), None, None),
    ],
)
def test_precision_follows_the_gpu(gpu, name, bf16, capability, training, sampling):
    gpu(bf16, capability)
    assert training_dtype(full(), CUDA) is training
    assert sampling_dtype(full(), CUDA) is sampling


def test_bf16_by_name_is_refused_where_a_gpu_would_only_imitate_it(gpu):
    gpu(False, (7, 5))
    config = apply_overrides(full(), {"train.precision": "bf16", "sample.precision": "bf16"})
    for dtype, name in ((training_dtype, "train"), (sampling_dtype, "sample")):
        with pytest.raises(ConfigError, match=f"{name}.precision bf16 is not for this GPU"):
            dtype(config, CUDA)
    gpu(True, (8, 0))
    assert training_dtype(config, CUDA) is sampling_dtype(config, CUDA) is torch.bfloat16


@pytest.mark.parametrize("driver, visible, said", [
    (True, None, True), (True, "0", True), (True, "", False), (False, None, False),
])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(
    monkeypatch, tmp_path, capsys, driver, visible, said
):
    monkeypatch.setattr(build, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert build.choose_device(full()) == CPU
    assert ("make gpu-status" in capsys.readouterr().out) is said
    build.choose_device(apply_overrides(full(), {"train.device": "cpu"}))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("gpus, visible, launched, expected", [
    (4, None, True, "cuda:2"), (4, None, False, "cuda:2"), (1, "2", False, "cuda:0"),
    (1, "2", True, None), (1, None, False, None), (2, "0,1", False, None),
])
def test_each_of_several_processes_takes_its_own_gpu(
    monkeypatch, gpus, visible, launched, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), (LAUNCHED_BY, launched and "a run")):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    third = Processes(rank=2, world_size=4, local_rank=2)
    if expected:
        assert build.own_gpu("cuda", third) == expected
    else:
        with pytest.raises(ConfigError, match=f"has {gpus} GPUs for more processes"):
            build.own_gpu("cuda", third)
    with pytest.raises(ConfigError, match="cannot share cuda:1"):
        build.own_gpu("cuda:1", third)


def test_on_a_cpu_and_where_it_is_said_precision_is_fixed():
    assert training_dtype(full(), CPU) is sampling_dtype(full(), CPU) is None
    wanted = {"train.precision": "fp16", "sample.precision": "bf16"}
    config = apply_overrides(full(), wanted)
    assert training_dtype(config, CPU) is torch.float16
    assert sampling_dtype(config, CPU) is torch.bfloat16


@pytest.mark.parametrize("choice, expected", [("auto", False), ("true", True), ("false", False)])
def test_channels_last_is_a_layout_and_changes_no_number(choice, expected):
    layout = {"train.channels_last": choice}
    config = apply_overrides(full(), SMALL | layout)
    model, _ = build_model(config, "cpu")
    plain, _ = build_model(apply_overrides(config, {"train.channels_last": "false"}), "cpu")
    weight = model.stem.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected
    torch.nn.init.normal_(model.out.weight, std=0.1)
    plain.load_state_dict(model.state_dict())
    x_t, labels = torch.randn(3, 3, 16, 16), torch.arange(3)
    torch.testing.assert_close(
        model(x_t, labels, labels), plain(x_t, labels, labels), rtol=1e-4, atol=1e-4
    )


def test_network_is_sampled_in_bf16_and_the_state_stays_float32():
    config = apply_overrides(full(), SMALL | {"sample.num_inference_steps": "3"})
    _, scheduler = build_model(config, "cpu")
    seen = []

    class Network(torch.nn.Module):
        null_label = 10

        def forward(self, x_t, timesteps, class_labels):
            seen.append((x_t.dtype, torch.mm(x_t[0, 0], x_t[0, 0]).dtype))
            return x_t.to(torch.bfloat16)

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        chosen = apply_overrides(config, {"sample.precision": precision})
        sampler = build_sampler(chosen, scheduler)
        pictures = sampler.sample(Network(), torch.tensor([1]), (3, 16, 16), [0])
        assert pictures.dtype == torch.float32
        assert seen == 3 * [(torch.float32, dtype)]


def test_float32_means_float32():
    libraries = torch.backends.cudnn, torch.backends.cuda.matmul
    for library in libraries:
        library.allow_tf32 = True
    build.choose_device(apply_overrides(full(), {"train.device": "cpu"}))
    assert not any(library.allow_tf32 for library in libraries)


def test_settings_reach_the_samplers():
    config = apply_overrides(full(), SMALL | {
        "sample.sampler": "ddim", "sample.grid_sampler": "ddim", "sample.eta": 0.3,
        "sample.num_inference_steps": 5, "sample.grid_steps": 3, "sample.guidance_scale": 3.5,
        "sample.guidance_interval": (0.2, 0.7), "sample.clip_x_start": False,
    })
    _, scheduler = build_model(config, CPU)
    for grid, steps in ((False, 5), (True, 3)):
        sampler = build_sampler(config, scheduler, grid=grid)
        assert type(sampler) is DDIMSampler and sampler.num_inference_steps == steps
        assert (sampler.eta, sampler.guidance_scale, sampler.clip_x_start) == (0.3, 3.5, False)
        assert sampler.guidance_interval == (0.2, 0.7)
    config = apply_overrides(config, {"sample.grid_sampler": "dpm-solver++"})
    assert type(build_sampler(config, scheduler, grid=True)) is DPMSolverSampler


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_network_and_schedule_are_those_of_the_config(prediction_type):
    config = apply_overrides(full(), SMALL | {
        "diffusion.prediction_type": prediction_type, "diffusion.reference_size": 64,
        "diffusion.num_train_timesteps": 50,
    })
    model, scheduler = build_model(config, CPU)
    assert scheduler.prediction_type == model.wiener.prediction_type == prediction_type
    plain = torch.tensor(published_alphas_cumprod(50), dtype=torch.float64)
    ratio = scheduler.snr.double() / (plain / (1 - plain))
    assert_close(ratio, torch.full_like(ratio, (64 / 16) ** 2), rtol=1e-5, atol=0)
    assert torch.equal(model.wiener.alphas_cumprod, scheduler.alphas_cumprod)
