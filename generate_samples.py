"""Draw labelled pictures from a checkpoint.

    python generate_samples.py                      # the newest usable checkpoint
    python generate_samples.py CHECKPOINT --samples 4 --classes cat,dog

The model, its schedule and the sampler's settings come from the checkpoint.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

import config as settings
from command_line import (
    Parser,
    build_model,
    build_sampler,
    choose_device,
    exit_with,
    open_checkpoint,
    parse_classes,
    parse_count,
)
from conditional_diffusion.checkpoint import CheckpointError
from conditional_diffusion.memory import OutOfMemory
from config import Config, ConfigError
from training_monitor import (
    labelled_grid,
    save_image,
    say,
    to_uint8,
    write_json,
)

USER_ERRORS = (ConfigError, CheckpointError, OutOfMemory)


def parse_arguments():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT",
                        help="checkpoint file or run directory (default: the newest usable one)")
    parser.add_argument("--samples", metavar="N", default="4", help="pictures per class (4)")
    parser.add_argument("--classes", metavar="C,C,...", help="names or indices (all)")
    parser.add_argument("--steps", metavar="N", help="denoising steps (the checkpoint's)")
    parser.add_argument("--guidance", metavar="SCALE",
                        help="uncond + SCALE (cond - uncond); 1: none (the checkpoint's)")
    parser.add_argument("--seed", metavar="N", default="0",
                        help="seed of each class's first picture; the next ones follow (0)")
    parser.add_argument("--batch-size", metavar="N", help="pictures denoised together")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of their EMA")
    parser.add_argument("--grid-only", action="store_true", help="the grid without single files")
    parser.add_argument("--output", metavar="DIR", default="generated_images",
                        help="where the pictures go (generated_images)")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda, ...")
    return parser.parse_args()


def apply_flags(config: Config, args) -> Config:
    """The checkpoint's config with the sampler's settings from the command line."""
    overrides = {"train.device": args.device}
    for value, name in ((args.steps, "sample.num_inference_steps"),
                        (args.guidance, "sample.guidance_scale"),
                        (args.batch_size, "sample.batch_size")):  # fmt: skip
        if value is not None:
            overrides[name] = value
    return settings.apply_overrides(config, overrides)


def main() -> int:
    args = parse_arguments()
    count = parse_count("--samples", args.samples)
    first_seed = settings.parse_value("--seed", int, args.seed)
    if not 0 <= first_seed <= settings.LARGEST_SEED - count:
        raise ConfigError(f"--seed must lie in 0..{settings.LARGEST_SEED}, not {first_seed}")
    path, state = open_checkpoint(args.checkpoint)
    config = apply_flags(settings.from_dict(state["config"]), args)
    class_names = tuple(state["class_names"])
    classes = list(range(len(class_names)))
    if args.classes is not None:
        classes = parse_classes(args.classes, class_names)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    device = choose_device(config)
    model, scheduler = build_model(config, device)
    model.load_state_dict(state["model" if args.raw else "ema"])
    sample = config.sample
    sampler = build_sampler(config, scheduler)
    seeds = [first_seed + row for row in range(count) for _ in classes]
    labels = torch.tensor(classes, device=device).repeat(count)
    say(f"drawing {len(seeds)} pictures from {path} (step {state['step']}) on {device}: DDPM, "
        f"{sample.num_inference_steps} steps, guidance {sample.guidance_scale:g}")  # fmt: skip
    batches = -(-len(seeds) // sample.batch_size)
    with tqdm(total=batches * sample.num_inference_steps, unit="step", disable=None) as bar:
        size = config.data.image_size
        images = sampler.sample(
            model, labels, (3, size, size), seeds, batch_size=sample.batch_size,
            callback=lambda done, x_t, x_start: bar.update(1),
        )  # fmt: skip

    facts = {
        "checkpoint": str(path), "step": state["step"], "weights": "raw" if args.raw else "EMA",
        "sampler": "DDPM", "num_inference_steps": sample.num_inference_steps,
        "guidance_scale": sample.guidance_scale, "clip_x_start": sample.clip_x_start,
    }  # fmt: skip
    names = [class_names[index] for index in classes]
    write_pictures(output, to_uint8(images), names, seeds, facts, single=not args.grid_only)
    say(f"grid: {output / 'grid.png'}; facts: {output / 'samples.json'}")
    return 0


def write_pictures(
    output: Path, images, names: list[str], seeds: list[int], facts: dict, *, single: bool
) -> None:
    """grid.png, samples.json and, where asked for, one CLASS_SEED.png per picture."""
    from PIL import Image

    pictures = [(names[i % len(names)], seed) for i, seed in enumerate(seeds)]
    if single:
        for pixels, (name, seed) in zip(images, pictures):
            text = {"class": name, "seed": str(seed), "facts": json.dumps(facts)}
            save_image(Image.fromarray(pixels), output / f"{name}_{seed:04d}.png", text)
    save_image(labelled_grid(images, names), output / "grid.png", {"facts": json.dumps(facts)})
    listed = [{"class": name, "seed": seed} for name, seed in pictures]
    write_json(output / "samples.json", {**facts, "pictures": listed})


if __name__ == "__main__":
    exit_with(main, USER_ERRORS)
