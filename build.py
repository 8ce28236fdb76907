"""From a config to its parts: device, precision, network, schedule, sampler."""

import os
import platform
import re
from pathlib import Path

import torch

import config as settings
from conditional_diffusion import SAMPLERS, CosineNoiseScheduler, UNet
from conditional_diffusion.checkpoint import CheckpointError
from conditional_diffusion.memory import keep_freed_memory
from conditional_diffusion.processes import LAUNCHED_BY, Processes
from config import CLASS_NAMES, Config, ConfigError
from training_monitor import say

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_CAPABILITY = (7, 0)  # of GPUs whose tensor cores make fp16 faster
NVIDIA_DRIVER = Path("/dev/nvidiactl")  # there where the driver is loaded


def choose_device(config: Config, processes: Processes | None = None):
    """The torch device of train.device; ConfigError where it is not to be had.

    Several processes take one GPU each.
    With train.deterministic torch is told so as well: it has to be before the device is used.
    """
    if config.train.deterministic:
        # cuBLAS needs a workspace of its own per stream (its documentation, "Results
        # reproducibility"); cuDNN follows torch's setting.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # fp32 means float32, whatever the environment says.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        if name == "cpu" and NVIDIA_DRIVER.exists() and not hidden:
            say("this machine has a GPU that torch cannot use, so the CPU works; `make gpu-status` "
                "tells why")
    if processes and processes.several and name != "cpu":
        name = own_gpu(name, processes)
    if name == "cpu":
        keep_freed_memory()
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # waits for a kernel, which a mere allocation would not
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}); `make gpu-status` tells more, "
            "`--device cpu` works anywhere"
        ) from error
    device = probe.device  # cuda:0 where cuda was meant: they are not equal to torch
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for what asks about the current one
    return device


def own_gpu(name: str, processes: Processes) -> str:
    """The GPU of one of several processes, by its number on its machine."""
    gpus = torch.cuda.device_count()
    if name != "cuda":
        raise ConfigError(f"several processes cannot share {name}; leave --device out, and choose "
                          "GPUs with CUDA_VISIBLE_DEVICES")
    if gpus == 1 and LAUNCHED_BY not in os.environ and "CUDA_VISIBLE_DEVICES" in os.environ:
        return "cuda:0"  # a platform that starts the processes itself has shown each its own
    if processes.local_rank >= gpus:
        raise ConfigError(f"this machine has {gpus} GPUs for more processes than that; start fewer "
                          "(make: GPUS=), or use --device cpu")
    return f"cuda:{processes.local_rank}"


def machine_name(device: torch.device) -> str:
    """The hardware and the versions that a figure depends on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def switched_on(choice: str, device: torch.device) -> bool:
    """What "true", "false" or "auto", which stands for "on CUDA", means on this device."""
    return choice == "true" or choice == "auto" and device.type == "cuda"


def has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def named_dtype(section: str, precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of a precision other than auto; ConfigError where a GPU would only imitate it."""
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise ConfigError(f"{section}.precision bf16 is not for this GPU, which lacks it; use "
                          "auto, fp32 or fp16")
    return DTYPES[precision]


def training_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """What train.precision means on this device: a dtype for autocast, or None for float32."""
    if config.train.precision != "auto":
        return named_dtype("train", config.train.precision, device)
    if has_bf16(device):
        return torch.bfloat16
    fast_fp16 = device.type == "cuda" and (
        torch.cuda.get_device_capability(device) >= FP16_CAPABILITY
    )
    return torch.float16 if fast_fp16 else None


def sampling_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The same of sample.precision; never fp16 by itself, whose range ends in black pictures."""
    if config.sample.precision != "auto":
        return named_dtype("sample", config.sample.precision, device)
    return torch.bfloat16 if has_bf16(device) else None


def precision_name(dtype: torch.dtype | None) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


def config_of(state: dict, where: object) -> Config:
    """The config in a checkpoint's state; CheckpointError where this code has other settings."""
    try:
        return settings.from_dict(state["config"])
    except ConfigError as error:
        raise CheckpointError(f"the settings of {where} are not those of this code ({error}); go "
                              "back to the code that trained it, or train anew") from None


def build_model(config: Config, device, num_classes: int = len(CLASS_NAMES)):
    """(UNet, CosineNoiseScheduler) of a config, on the device; weights drawn from its seed."""
    device = torch.device(device)
    scheduler = CosineNoiseScheduler(
        config.diffusion.num_train_timesteps,
        image_size=config.data.image_size,
        reference_size=config.diffusion.reference_size,
        prediction_type=config.diffusion.prediction_type,
    )
    torch.manual_seed(config.train.seed)
    model = UNet(
        scheduler.alphas_cumprod, prediction_type=scheduler.prediction_type,
        image_size=config.data.image_size, num_classes=num_classes, **vars(config.model),
    )
    if switched_on(config.train.channels_last, device):
        model = model.to(memory_format=torch.channels_last)
    return model.to(device), scheduler.to(device)


def build_sampler(config: Config, scheduler, *, grid: bool = False):
    """The sampler of a config; with `grid` the quicker one of the grids drawn during training."""
    sample = config.sample
    name = sample.grid_sampler if grid else sample.sampler
    options = {"eta": sample.eta} if name == "ddim" else {}
    return SAMPLERS[name](
        scheduler, num_inference_steps=sample.grid_steps if grid else sample.num_inference_steps,
        guidance_scale=sample.guidance_scale, guidance_interval=sample.guidance_interval,
        clip_x_start=sample.clip_x_start, cuda_graphs=sample.cuda_graphs, **options,
        autocast_dtype=sampling_dtype(config, scheduler.alphas_cumprod.device),
    )
