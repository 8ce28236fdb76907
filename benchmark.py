"""Measure training and sampling of the default model on this machine (`make bench`).

Networks and image sizes are timed in turns, so that the ratios hold on a machine whose speed
drifts; what would disturb each other (loaders, whole batches on a GPU) one after the other. --peer
adds other networks for the same task, where their packages are installed; --sizes adds the cost by
image size; on CUDA the batch size and each optimisation follow by themselves, a compilation each,
of which --minutes leaves out what has not begun by then. Everything measured also lands in a JSON
file.
"""

import gc
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from command_line import Parser, add_config_flags, config_overrides, exit_with, parse_whole

import torch
from PIL import Image
from torch import nn
from torch._inductor import config as inductor
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import config as settings
from build import (
    build_model,
    choose_device,
    precision_name,
    sampling_dtype,
    switched_on,
    training_dtype,
)
from conditional_diffusion import SAMPLERS, CosineNoiseScheduler, TrainingEngine, training_engine
from conditional_diffusion.processes import average_gradients
from conditional_diffusion.sampler import RecordedPredictions, autocast
from conditional_diffusion.training_engine import diffusion_loss
from config import AUTO_BATCH, CLASS_NAMES, Config, ConfigError
from data import Split, TrainingBatches, to_images, to_x_start
from gpu_status import first_line
from peers import PEERS
from run_directory import write_json
from training_run import compile_training, missing_compiler, peak_memory_gib, record_training

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
BURN_IN = 2  # rounds that are not counted
# In a round; more on a GPU, which works on one call while the next is being launched.
CALLS = {"cpu": 1, "cuda": 10}
PICTURES = 2048  # in the set that data loading is timed with
DATA_BATCH, DATA_BATCHES = 64, 10  # pictures in a batch, batches in a stretch
WORKERS = max(2, len(os.sched_getaffinity(0)))  # of the DataLoader, as many as there are cores
MEMORY_BATCH = 16
KEPT_IMAGES = 4  # over which is shared out what is kept but once, as weights in another precision
BATCH_SIZES = (64, 256, 1024)  # on CUDA, beside the default; compiling each takes its time
IMAGE_SIZES = (32, 64, 128, 256)
WITH_ADAMW = "ours, with AdamW"
GRID_PICTURES = 100
GRIDS = (("ddpm", 1000), ("ddpm", 50), ("sde-dpm-solver++", 25))  # samplers and their steps


@contextmanager
def products_in_tf32() -> Iterator[None]:
    """What mixed precision leaves in float32, of which Muon's products are most."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# What differs from the product: settings, and those of torch that the product leaves alone.
SWITCHES = {
    "without compile": ({"train.compile": "false"}, nullcontext),
    "without channels_last": ({"train.channels_last": "false"}, nullcontext),
    "without CUDA graphs": ({"train.cuda_graphs": "false"}, nullcontext),
    "without compile and CUDA graphs": (
        {"train.compile": "false", "train.cuda_graphs": "false"}, nullcontext
    ),
    "channels_last throughout": ({}, partial(inductor.patch, force_layout_optimization=True)),
    "cuDNN trying kernels": (
        {}, partial(cudnn.flags, enabled=True, benchmark=True, allow_tf32=False)
    ),
    "compiled with the loss": (
        {"train.compile": "false"}, partial(patch.object, training_engine, "diffusion_loss",
                                            torch.compile(diffusion_loss, dynamic=False)),
    ),
    "float32 products in TF32": ({}, products_in_tf32),
    "without mixed precision": ({"train.precision": "fp32"}, nullcontext),
}
COMPILED = ("compiled with the loss", "compiled")  # not by compile_training
USER_ERRORS = (ConfigError,)


# ---- timing --------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, the device's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def time_in_turns(works: dict[str, Callable], rounds: int, device) -> dict[str, list[float]]:
    """Durations of a call of each, one per round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    calls = CALLS[device.type]
    for round_number in range(BURN_IN + rounds):
        for name, work in works.items():
            duration = seconds(partial(repeat, work, calls), device) / calls
            if round_number >= BURN_IN:
                times[name].append(duration)
    return times


class Report:
    """Times calls, prints a line per measurement and keeps it in a JSON file, whatever happens.

    A part that fails is named there and in `failed`; the others go on.

    Args:
        rounds: how often everything is timed.
        minutes: after which nothing new begins.
    """

    def __init__(self, path: Path, facts: dict, device: torch.device, rounds: int,
                 minutes: float = math.inf):
        self.path, self.content = path, {"facts": facts, "measurements": []}
        self.device, self.rounds = device, rounds
        self.ends, self.failed = time.monotonic() + 60 * minutes, []
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)

    def attempt(self, part: str, measure: Callable, *arguments, always: bool = False) -> None:
        """Measure a part, unless the minutes are over."""
        if time.monotonic() >= self.ends and not always:
            print(f"left out, since the minutes are over: {part}", flush=True)
            return
        try:
            measure(self, *arguments)
        except Exception as error:  # a compiler's, a driver's: of any kind
            reason = f"{type(error).__name__}: {first_line(error)}"
            self.failed.append(part)
            self.keep({"what": "not measured", "name": part, "reason": reason})
            print(f"not measured: {part} ({reason})", flush=True)

    def time(self, works: dict[str, Callable]) -> dict[str, list[float]]:
        return time_in_turns(works, self.rounds, self.device)

    def add(self, what: str, name: str, times: list[float], images: int, *, flops: float = 0.0,
            peak: float = 0.0, **more) -> None:
        """Durations of calls that process so many images and take so many FLOPs each."""
        middle = statistics.median(times)
        record = {
            "what": what, "name": name, "n": len(times), "images": images,
            "seconds_per_image": middle / images, "images_per_second": images / middle,
            "fastest": min(times) / images, "slowest": max(times) / images, **more,
        }
        line = (f"{what:<16} {name:<28} {images / middle:10.4g} images/s  {middle / images:9.3g} "
                f"s/image, {min(times) / images:.3g} to {max(times) / images:.3g}, n {len(times)}")
        if flops and peak:
            record["share_of_peak"] = flops / middle / peak
            line += f"; {record['share_of_peak']:.0%} of the matmul peak"
        self.keep(record)
        print("; ".join([line, *(f"{key} {value}" for key, value in more.items())]), flush=True)

    def note(self, what: str, name: str, **values) -> None:
        self.keep({"what": what, "name": name, **values})
        listed = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{what:<16} {name:<28} {listed}", flush=True)

    def keep(self, record: dict) -> None:
        self.content["measurements"].append(record)
        write_json(self.path, self.content)


# ---- what is timed -------------------------------------------------------------------------------


def random_batch(images: int, size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    x_start = torch.rand(images, 3, size, size, device=device) * 2 - 1
    return x_start, torch.arange(images, device=device) % len(CLASS_NAMES)


def forward_flops(model: nn.Module, size: int, device) -> float:
    """Of one image, multiplications and additions apart, as torch counts them."""
    x_t, labels = random_batch(1, size, device)
    # The counter does not know the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x_t, labels, labels)
    return counter.get_total_flops()


def kept_bytes(model: nn.Module, size: int, device, dtype: torch.dtype | None) -> float:
    """What the forward pass keeps of one image for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would keep its own graph for ever

    x_t, labels = random_batch(KEPT_IMAGES, size, device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with autocast(x_t.device, dtype):
            _held = model(x_t, labels, labels)  # or other storages would take the same places
    return sum(kept.values()) / KEPT_IMAGES


def matmul_peak(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of a large matrix product in this precision: what the machine can do at best."""
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype or torch.float32)
    times = time_in_turns({"matmul": lambda: a @ b}, 10, device)["matmul"]
    return 2 * size**3 / min(times)


def engine_for(
    model: nn.Module, config: Config, device: torch.device, images: int, *, recorded: bool = True
) -> TrainingEngine:
    """The product's training step around any network of our signature, for so many images.

    What is recorded shows no peak of memory.
    """
    scheduler = CosineNoiseScheduler().to(device)
    engine = TrainingEngine(
        model, scheduler, total_steps=10**6, learning_rate=1e-4,
        optimizer=config.train.optimizer, autocast_dtype=training_dtype(config, device),
    )
    if switched_on(config.train.compile, device):
        compile_training(engine, random_batch(images, config.data.image_size, device))
    if recorded:
        record_training(config, engine, random_batch(images, config.data.image_size, device))
    return engine


def training_config(name: str, config: Config) -> Config:
    """Ours is trained as it is, and everything else with AdamW."""
    if name == "ours":
        return config
    return settings.apply_overrides(config, {"train.optimizer": "adamw"})


def sample_step(model: nn.Module, batch, dtype: torch.dtype | None) -> None:
    x_t, labels = batch
    with torch.no_grad(), autocast(x_t.device, dtype):
        model(x_t, labels, labels)


def usual_loader(images: torch.Tensor, folder: Path) -> DataLoader:
    """The same pictures as PNG files, decoded one by one by torchvision in WORKERS processes."""
    for index, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        path = folder / str(index % len(CLASS_NAMES)) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    transform = transforms.Compose([
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ])
    return DataLoader(ImageFolder(folder, transform), DATA_BATCH, shuffle=True, num_workers=WORKERS,
                      drop_last=True, persistent_workers=True)


# ---- the parts of the benchmark ------------------------------------------------------------------


def compare_data(report: Report, config: Config) -> float:
    """Batches as training takes them against a DataLoader; returns our seconds per image."""
    images, size, times = DATA_BATCH, config.data.image_size, {}
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(256, (PICTURES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    enlarged = to_images(to_x_start(originals, size))
    labels = torch.arange(PICTURES) % len(CLASS_NAMES)

    def batches_of(pictures: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        split = Split(pictures, labels)
        return TrainingBatches(split, config.data, images, 0, report.device).starting_at(0)

    small, large = batches_of(originals), batches_of(enlarged)
    usual = f"DataLoader, {WORKERS} workers, {size}x{size} PNGs"
    # One after the other, or the workers would fetch ahead while ours is timed; and in long
    # stretches, which what they have fetched ahead at the beginning cannot shorten.
    with tempfile.TemporaryDirectory() as folder:
        epochs = itertools.repeat(usual_loader(enlarged, Path(folder)))
        batches = itertools.chain.from_iterable(epochs)
        works = {
            "ours, from 32x32": lambda: next(small),
            f"ours, from {size}x{size}": lambda: next(large),
            usual: lambda: next(batches)[0].to(report.device),
        }
        for name, work in works.items():
            stretch = partial(repeat, work, DATA_BATCHES)
            times[name] = report.time({name: stretch})[name]
            report.add("data", name, times[name], DATA_BATCHES * images)
    loader, ours = statistics.median(times.pop(usual)), statistics.median(times["ours, from 32x32"])
    for name, values in times.items():
        report.note("data", f"{name}, against DataLoader", ratio=loader / statistics.median(values))
    return ours / (DATA_BATCHES * images)


def compare_networks(
    report: Report, config: Config, networks: dict[str, nn.Module]
) -> dict[str, float]:
    """Training step and sampling step of each; returns seconds per image of the training steps."""
    images, size, device = config.train.batch_size, config.data.image_size, report.device
    dtypes = training_dtype(config, device), sampling_dtype(config, device)
    peaks = {dtype: matmul_peak(device, dtype) for dtype in set(dtypes)}
    for dtype, peak in peaks.items():
        report.note("matmul peak", precision_name(dtype), TFLOP_per_second=peak / 1e12)
    flops = {name: forward_flops(model, size, device) for name, model in networks.items()}
    for name, model in networks.items():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        kept = kept_bytes(model, size, device, dtypes[0])
        report.note("network", name, parameters_M=parameters / 1e6,
                    forward_GFLOP_per_image=flops[name] / 1e9,
                    kept_for_backward_MiB_per_image=kept / 2**20)
    batch = random_batch(images, size, device)
    sampling = report.time(
        {name: partial(sample_step, model, batch, dtypes[1]) for name, model in networks.items()}
    )
    trained = {**networks, WITH_ADAMW: new_network("ours", config, device)}
    flops[WITH_ADAMW] = flops["ours"]
    engines = {
        name: engine_for(model, training_config(name, config), device, images)
        for name, model in trained.items()
    }
    training = report.time(
        {name: partial(engine.train_step, *batch) for name, engine in engines.items()}
    )
    for name, engine in engines.items():
        ways = {"parts": engine.micro_batches, "recorded": engine.recorded} if (
            device.type == "cuda") else {}
        # Backward computes two products for every one of forward.
        report.add("training step", name, training[name], images, peak=peaks[dtypes[0]],
                   flops=3 * flops[name] * images, **ways)
    for name in networks:
        report.add("sampling step", name, sampling[name], images, peak=peaks[dtypes[1]],
                   flops=flops[name] * images)
    return {name: statistics.median(values) / images for name, values in training.items()}


def peak_of_a_step(config: Config, name: str) -> tuple[float, float]:
    """GiB before a training step and at most, in a process whose peak no other work has raised."""
    device = choose_device(config)
    batch = random_batch(MEMORY_BATCH, config.data.image_size, device)
    model, config = new_network(name, config, device), training_config(name, config)
    engine = engine_for(model, config, device, MEMORY_BATCH, recorded=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # compiling has raised it
    before = peak_memory_gib(device)
    for _ in range(2):
        engine.train_step(*batch)
    return before, peak_memory_gib(device)


def be_the_first_to_go() -> None:
    """Where memory runs out, the system is to end this process, not the benchmark."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # the largest there is


def compare_memory(report: Report, config: Config, names: list[str]) -> None:
    for name in names:  # which a GPU that is for one process alone refuses
        report.attempt(f"memory of {name}", measure_memory, config, name, always=True)


def measure_memory(report: Report, config: Config, name: str) -> None:
    # One task, or it would wait for another for ever, should this process be killed.
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=be_the_first_to_go,
        max_tasks_per_child=1,
    ) as pool:
        before, peak = pool.submit(peak_of_a_step, config, name).result()
    report.note(f"memory, batch {MEMORY_BATCH}", name, peak_GiB=peak, before_GiB=before)


def compare_sizes(report: Report, config: Config) -> None:
    """Training step by image size; the same pixels per batch, so that only the size differs."""
    torch.compiler.reset()  # it keeps but a few variants of a function, and earlier ones count
    pixels = config.train.batch_size * config.data.image_size**2
    engines, batches, flops = {}, {}, {}
    for size in IMAGE_SIZES:
        sized = replace(config, data=replace(config.data, image_size=size))
        model, _ = build_model(sized, report.device)
        flops[size] = forward_flops(model, size, report.device)
        batches[size] = random_batch(max(1, pixels // size**2), size, report.device)
        engines[size] = engine_for(model, sized, report.device, len(batches[size][0]))
    times = report.time(
        {size: partial(engines[size].train_step, *batches[size]) for size in IMAGE_SIZES}
    )
    for size in IMAGE_SIZES:
        images = len(batches[size][0])
        each = statistics.median(times[size]) / images
        report.add("training step", f"{size}x{size}", times[size], images,
                   GFLOP_per_image=round(flops[size] / 1e9, 2),
                   microseconds_per_pixel=round(1e6 * each / size**2, 3))


def compare_processes(report: Report, config: Config) -> None:
    """What a process pays for being one of several, the others' and the network's time apart.

    On CUDA both launch kernels one by one, as several do.
    """
    torch.compiler.reset()
    images, device = config.train.batch_size, report.device
    batch = random_batch(images, config.data.image_size, device)
    engines = {name: engine_for(build_model(config, device)[0], config, device, images,
                                recorded=False)
               for name in ("alone", "in a group of one")}
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    grouped = engines["in a group of one"]
    grouped.network = average_gradients(grouped.network)
    times = report.time(
        {name: partial(engine.train_step, *batch) for name, engine in engines.items()}
    )
    torch.distributed.destroy_process_group()
    for name, values in times.items():
        report.add("training step", name, values, images)
    ratios = [group / alone for alone, group in zip(*times.values())]
    report.note("processes", "in a group of one, against alone", ratio=statistics.median(ratios))


def without_compiled(variants: dict, device: torch.device) -> dict:
    """The variants that can be measured: all, or without a compiler those that need none."""
    problem = missing_compiler(device)
    left_out = [name for name in variants if name in COMPILED and problem]
    if left_out:
        print(f"left out, since torch.compile does not work here ({problem}): "
              + ", ".join(left_out), flush=True)
    return {name: variant for name, variant in variants.items() if name not in left_out}


def time_training(report: Report, name: str, config: Config, images: int) -> None:
    """A training step on CUDA by itself, with its memory, built and compiled for it."""
    device = report.device
    peak = matmul_peak(device, training_dtype(config, device))
    torch.compiler.reset()
    gc.collect()  # the variant before
    torch.cuda.empty_cache()
    engine = engine_for(build_model(config, device)[0], config, device, images, recorded=False)
    flops = 3 * images * forward_flops(engine.model, config.data.image_size, device)
    batch = random_batch(images, config.data.image_size, device)
    work = partial(engine.train_step, *batch)
    work()
    torch.cuda.reset_peak_memory_stats(device)  # compiling, and running out of memory, raised it
    work()
    memory = round(peak_memory_gib(device), 2)
    record_training(config, engine, batch)
    report.add("training step", name, report.time({name: work})[name], images,
               flops=flops, peak=peak, peak_GiB=memory, parts=engine.micro_batches,
               network_compiled=engine.network is not engine.model, recorded=engine.recorded)


def compare_on_cuda(report: Report, config: Config) -> None:
    """What only a GPU shows: batch sizes, and each optimisation taken away."""
    device = report.device
    for images in BATCH_SIZES:
        name = f"batch {images}"
        report.attempt(name, time_training, name, config, images)
    for name, (changes, context) in without_compiled(SWITCHES, device).items():
        changed = settings.apply_overrides(config, changes)
        with context():
            report.attempt(name, time_training, name, changed, config.train.batch_size)


def time_grids(report: Report, config: Config) -> None:
    """Whole guided grids, once each."""
    size, device = config.data.image_size, report.device
    model, scheduler = build_model(config, device)
    labels = torch.arange(GRID_PICTURES, device=device) % len(CLASS_NAMES)

    def seconds_by(sampler: str, steps: int, recorded: bool) -> float:
        chain = SAMPLERS[sampler](
            scheduler, num_inference_steps=steps, guidance_scale=2.0,
            autocast_dtype=sampling_dtype(config, device), cuda_graphs=recorded,
        )
        draw = partial(chain.sample, model, labels, (3, size, size), range(GRID_PICTURES))
        return seconds(draw, device)

    seconds_by("ddpm", 2, False)  # loads kernels
    for (sampler, steps), recorded in itertools.product(GRIDS, (True, False)):
        way = "" if recorded else ", without CUDA graphs"
        report.add("grid", f"{sampler}, {steps} steps, guided{way}",
                   [seconds_by(sampler, steps, recorded)], GRID_PICTURES)


def compare_sampling(report: Report, config: Config) -> None:
    """A step of a guided grid in other ways than the product's, which draws uncompiled."""
    images, size, device = 2 * GRID_PICTURES, config.data.image_size, report.device
    batch, dtype = random_batch(images, size, device), sampling_dtype(config, device)
    model, _ = build_model(config, device)
    changed = settings.apply_overrides(config, {"train.channels_last": "false"})
    contiguous, _ = build_model(changed, device)
    ways = {"as it is": (model, dtype), "in float32": (model, None),
            "without channels_last": (contiguous, dtype),
            "in float32 without channels_last": (contiguous, None),
            "compiled": (torch.compile(model, dynamic=False), dtype)}
    torch.compiler.reset()
    works = {name: partial(sample_step, network, batch, precision)
             for name, (network, precision) in without_compiled(ways, device).items()}
    recorded = RecordedPredictions(model, dtype)
    x_t, labels = batch

    @torch.no_grad()
    def in_a_graph() -> None:
        recorded(x_t, labels, labels, 1.0)

    times = report.time(works | {"in a CUDA graph": in_a_graph})
    if not recorded.by_scale[1.0]:
        del times["in a CUDA graph"]  # which the log has given the reason for
    for name, values in times.items():
        report.add("sampling step", name, values, images)


def new_network(name: str, config: Config, device: torch.device) -> nn.Module:
    if name == "ours":
        return build_model(config, device)[0]
    network = PEERS[name](config.data.image_size).to(device)
    if switched_on(config.train.channels_last, device):
        network = network.to(memory_format=torch.channels_last)
    return network


def parse_arguments():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", action="store_true", help="time other networks as well")
    parser.add_argument("--sizes", action="store_true", help="also the cost by image size")
    parser.add_argument("--rounds", metavar="N", default="9", help="timed calls of each (9)")
    parser.add_argument("--minutes", metavar="N",
                        help="after them no part that follows the networks begins (no limit)")
    parser.add_argument("--json", metavar="FILE", default="benchmark.json",
                        help="where the figures go (benchmark.json)")
    add_config_flags(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    rounds = parse_whole("--rounds", args.rounds)
    minutes = parse_whole("--minutes", args.minutes) if args.minutes else math.inf
    path = Path(args.json).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--json {path} is no file in a folder that exists; check the path")
    overrides = config_overrides(args)
    device = choose_device(settings.apply_overrides(settings.full(), overrides))
    if device.type == "cpu":
        overrides.setdefault("train.batch_size", "4")
    config = settings.apply_overrides(settings.full(), overrides)
    if config.train.batch_size == AUTO_BATCH:
        raise ConfigError("the batch size of a benchmark must be a number, not auto")
    on_cuda = device.type == "cuda"
    report = Report(path, {
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "training": precision_name(training_dtype(config, device)),
        "sampling": precision_name(sampling_dtype(config, device)),
        "batch": config.train.batch_size, "image_size": config.data.image_size,
    }, device, rounds, minutes)
    networks = {"ours": new_network("ours", config, device)}
    for name in PEERS if args.peer else ():
        try:
            networks[name] = new_network(name, config, device)
        except ImportError as error:
            print(f"{name} is left out: {error.name} is not installed")
    compare_memory(report, config, list(networks))  # before training keeps what it freed
    per_image = compare_networks(report, config, networks)
    networks.clear()
    data = compare_data(report, config)
    report.note("data", "share of a training step", share=data / per_image["ours"])
    later = {"grids": time_grids, "batch sizes and optimisations": compare_on_cuda,
             "ways of sampling": compare_sampling} if on_cuda else {}
    later |= {"image sizes": compare_sizes} if args.sizes else {}
    for part, compare in (later | {"a process of several": compare_processes}).items():
        report.attempt(part, compare, config)
    print(f"written to {path}")
    if report.failed:
        raise ConfigError(f"not measured, for the reasons above: {', '.join(report.failed)}")
    return 0


if __name__ == "__main__":
    exit_with(main, USER_ERRORS)
