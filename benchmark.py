"""Time a training step and a sampling step of the default model on this machine (`make bench`).

With --peer the same work is timed in the same run with diffusers' UNet2DModel, where that package
is installed: the two take turns, so that the ratio holds on a machine whose speed drifts.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import config as settings
from command_line import (
    Parser,
    add_config_flags,
    build_model,
    choose_device,
    config_overrides,
    exit_with,
    parse_count,
)
from config import CLASS_NAMES, Config, ConfigError

PEER_CHANNELS = (64, 64, 128, 128, 256, 256)
MATMUL_SIZE = 2048
BURN_IN = 2  # rounds that are not counted
USER_ERRORS = (ConfigError,)


class Peer(torch.nn.Module):
    """diffusers' UNet2DModel behind our signature."""

    def __init__(self, image_size: int):
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(PEER_CHANNELS)
        down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
        down[-2], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.network = UNet2DModel(
            sample_size=image_size, block_out_channels=PEER_CHANNELS, down_block_types=tuple(down),
            up_block_types=tuple(up), num_class_embeds=len(CLASS_NAMES) + 1,
        )  # fmt: skip

    def forward(self, x_t, timesteps, class_labels):
        return self.network(x_t, timesteps, class_labels=class_labels).sample


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, the device's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def train_step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    model(*batch).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def sample_step(model, batch) -> None:
    model(*batch)


def time_in_turns(works: dict[str, Callable], rounds: int, device) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(BURN_IN + rounds):
        for name, work in works.items():
            duration = seconds(work, device)
            if round_number >= BURN_IN:
                times[name].append(duration)
    return times


def report(what: str, times: dict[str, list[float]], images: int) -> None:
    ours = statistics.median(times["ours"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{what:<14} {name:<10} {middle / images:8.4f} s/image, {min(values) / images:.4f} to "
            f"{max(values) / images:.4f}, n {len(values)}; {middle / ours:.2f} x ours"
        )


def run(config: Config, rounds: int, peer: bool) -> None:
    device, size = choose_device(config), config.data.image_size
    images = config.train.batch_size
    models = {"ours": build_model(config, device)[0]}
    if peer:
        models["diffusers"] = Peer(size).to(device)
    batch = (
        torch.randn(images, 3, size, size, device=device),
        torch.arange(images, device=device) * 997 % config.diffusion.num_train_timesteps,
        torch.arange(images, device=device) % len(CLASS_NAMES),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, batch "
          f"{images}, {size}x{size}")  # fmt: skip
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device=device)
    product = time_in_turns({"matmul": lambda: a @ b}, 10, device)["matmul"]
    print(f"matmul peak {2 * MATMUL_SIZE**3 / min(product) / 1e9:.0f} GFLOP/s")
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            sample_step(model, batch)
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{name}: {parameters:.1f} M parameters, forward "
              f"{counter.get_total_flops() / images / 1e9:.1f} GFLOP/image")  # fmt: skip
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()
    }
    training = {
        name: lambda model=model, optimizer=optimizers[name]: train_step(model, optimizer, batch)
        for name, model in models.items()
    }
    report("training step", time_in_turns(training, rounds, device), images)
    sampling = {
        name: lambda model=model: sample_step(model, batch) for name, model in models.items()
    }
    report("sampling step", time_in_turns(sampling, rounds, device), images)


def main() -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", action="store_true", help="time diffusers' UNet2DModel as well")
    parser.add_argument("--rounds", metavar="N", default="9", help="timed calls of each (9)")
    add_config_flags(parser, ("model", "data", "train"))
    args = parser.parse_args()
    overrides = {"train.batch_size": "4", **config_overrides(args)}
    config = settings.apply_overrides(settings.full(), overrides)
    try:
        run(config, parse_count("--rounds", args.rounds), args.peer)
    except ImportError as error:
        sys.exit(f"error: --peer needs {error.name}; install it: pip install diffusers")
    return 0


if __name__ == "__main__":
    exit_with(main, USER_ERRORS)
