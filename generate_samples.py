"""Draw labelled pictures from a checkpoint.

    python generate_samples.py                      # the newest usable checkpoint
    python generate_samples.py CHECKPOINT --samples 4 --classes cat,dog

Settings of the sampler that are not given are the checkpoint's; the batch size is what fits into
memory.
"""

import json
from contextlib import nullcontext
from itertools import count, product
from pathlib import Path

import command_line as cli

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from conditional_diffusion.checkpoint import CheckpointError
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.processes import Processes
from config import ConfigError
from data import to_arrays
from drawing import Drawing, usable_folder
from run_directory import RunInUse, acquire_lock, write_json
from training_monitor import evenly, labelled_grid, save_animation, save_image, say

USER_ERRORS = (ConfigError, CheckpointError, OutOfMemory, RunInUse)
MOST_SAMPLES = 10_000  # pictures per class and call
GRID_ROWS = 50  # at most; a longer grid shows nothing more
FRAMES, COLUMNS = 30, 8  # of the trajectory's animation and of its film strip


def parse_arguments():
    parser = cli.Parser(description=" ".join(__doc__.split("\n\n")[::2]))
    parser.add_argument("--samples", metavar="N", default="4", help="pictures per class (4)")
    parser.add_argument("--classes", metavar="C,C,...", help="names or indices (all)")
    parser.add_argument("--grid-only", action="store_true", help="the grid without single files")
    parser.add_argument("--trajectory", action="store_true",
                        help="also show how each class's first picture emerges from noise")
    parser.add_argument("--output", metavar="DIR", default="generated_images",
                        help="where the pictures go (generated_images)")
    cli.add_drawing_flags(parser)
    return parser.parse_args()


def set_aside(output: Path, class_names: tuple[str, ...]) -> None:
    """Move an earlier call's results into a folder of their own: samples.json describes all here.

    Other files stay where they are.
    """
    ours = ["samples.json", "grid.png", "trajectory.png", "trajectory.gif",
            *(f"{name}_[0-9]*.png" for name in class_names)]
    if earlier := {path for pattern in ours for path in output.glob(pattern)}:
        folder = next(f for n in count(1) if not (f := output / f"earlier_{n}").exists())
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)
        say(f"earlier pictures moved to {folder}")


class Album:
    """Puts pictures and the facts of how they were made into a folder.

    Single pictures are written as soon as their batch is finished, so that an interruption keeps
    them. Several processes have an album each, for their share of the seeds; the grid and
    samples.json are the leader's and show all.

    Args:
        names, seeds: pictures come seed by seed, each seed in all named classes.
        timesteps: those of the sampler's steps, descending.
        facts: JSON-able; they stand in samples.json and in every file's text.
    """

    def __init__(self, output: Path, names: list[str], seeds: list[int], timesteps: list[int],
                 facts: dict, processes: Processes, *, single: bool, trajectory: bool):
        self.processes = processes
        self.share = self.processes.share(len(seeds))
        self.all_seeds, seeds = seeds, seeds[self.share]
        self.output, self.names, self.seeds, self.timesteps = output, names, seeds, timesteps
        self.facts, self.single = facts, single
        self.pictures = [{"class": name, "seed": seed} for seed, name in product(seeds, names)]
        self.shown = max(0, GRID_ROWS - self.share.start) * len(names)  # of ours in the grid
        self.batches: list[np.ndarray] = []  # of these, uint8 (B, H, W, 3)
        self.drawn = 0
        # Per shown step the states of each class's first picture, under the number of the batch's
        # first picture: a batch that runs out of memory comes again, in parts.
        shown = evenly(range(1, len(timesteps) + 1), FRAMES) if trajectory else []
        self.states: dict[int, dict[int, Tensor]] = {done: {} for done in shown}
        self.bar = tqdm(
            total=len(self.pictures), disable=None if self.processes.leads else True,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} pictures [{elapsed}<{remaining}]",
        )

    def on_step(self, done: int, x_t: Tensor, x_start: Tensor) -> None:
        """The sampler's callback: steps done in this batch, its state and prediction."""
        self.bar.update(self.drawn + len(x_t) * done / len(self.timesteps) - self.bar.n)
        first = len(self.names) - self.drawn
        if done in self.states and first > 0:
            self.states[done][self.drawn] = torch.stack([x_t[:first], x_start[:first]]).cpu()

    def add(self, images: np.ndarray) -> None:
        """The next finished pictures, uint8 (B, H, W, 3)."""
        for pixels, picture in zip(images, self.pictures[self.drawn :]):
            if self.single:
                picture["file"] = f"{picture['class']}_{picture['seed']:04d}.png"
                path = self.output / picture["file"]
                save_image(Image.fromarray(pixels), path, {**picture, **self.facts})
        if self.drawn < self.shown:  # a copy, or the whole batch would stay
            self.batches.append(images[: self.shown - self.drawn].copy())
        self.drawn += len(images)

    def finish(self) -> None:
        """Write grid.png, samples.json and, where asked for, the trajectory."""
        self.bar.close()
        own = np.concatenate(self.batches) if self.batches else None
        parts = self.processes.gather((own, self.pictures))
        if not self.processes.leads:
            return
        self.pictures = [picture for _, pictures in parts for picture in pictures]
        seeds = self.all_seeds[:GRID_ROWS]
        images = np.concatenate([images for images, _ in parts if images is not None])
        grid = labelled_grid(images, self.names, row_names=[f"seed {seed}" for seed in seeds])
        facts = {**self.facts, "classes": self.names, "seeds": self.all_seeds}
        save_image(grid, self.output / "grid.png", {**facts, "seeds": seeds})
        if self.states:
            self.draw_trajectory({**facts, "seeds": self.seeds[:1]})
        write_json(self.output / "samples.json", {**facts, "pictures": self.pictures})

    def draw_trajectory(self, facts: dict) -> None:
        """trajectory.gif: all classes over time; trajectory.png: a row per class, time in columns.

        Both show x_t and the x_start predicted on the way to it.
        """
        # Per step, (2 * classes, H, W, 3): first every class's x_t, then every class's x_start.
        states = {
            done: to_arrays(torch.cat(list(parts.values()), dim=1).flatten(0, 1))
            for done, parts in self.states.items()
        }
        steps, classes = len(self.timesteps), len(self.names)
        frames = [
            labelled_grid(images, self.names, f"step {done} of {steps}",
                          row_names=["x_t", "x_start"])
            for done, images in states.items()
        ]
        save_animation(frames, self.output / "trajectory.gif", json.dumps(facts))

        columns = evenly(list(states), COLUMNS)
        film = np.stack([states[done] for done in columns])  # (columns, 2 * classes, H, W, 3)
        gap = np.full_like(film[:1, :classes], 255)
        film = np.concatenate([film[:, :classes], gap, film[:, classes:]]).swapaxes(0, 1)
        names = [f"t={self.timesteps[done]}" if done < steps else "picture" for done in columns]
        names += ["", *(f"from t={self.timesteps[done - 1]}" for done in columns)]
        title = "left: x_t at timestep t; right: x_start, predicted from x_t"
        strip = labelled_grid(film.reshape(-1, *film.shape[2:]), names, title, row_names=self.names)
        save_image(strip, self.output / "trajectory.png", facts)


def main() -> int:
    args = parse_arguments()
    rows = cli.parse_whole("--samples", args.samples, most=MOST_SAMPLES)
    first = cli.parse_seed(args.seed, rows)
    seeds = list(range(first, first + rows))  # of each class's pictures
    processes = cli.join_processes()
    drawing = Drawing(
        args.checkpoint, cli.config_overrides(args), raw=args.raw, processes=processes
    )
    class_names = drawing.class_names
    classes = list(range(len(class_names)))
    if args.classes is not None:
        classes = cli.parse_classes(args.classes, class_names)
    output = usable_folder(args.output)
    names = [class_names[index] for index in classes]
    # Another call would mix its pictures with ours.
    with acquire_lock(output) if processes.leads else nullcontext():
        processes.from_leader(lambda: set_aside(output, class_names))
        say(f"drawing {len(seeds) * len(names)} pictures from {drawing}")
        album = Album(
            output, names, seeds, drawing.sampler.timesteps, drawing.facts(), processes,
            single=not args.grid_only, trajectory=args.trajectory,
        )
        if album.seeds:  # there may be fewer than processes
            labels = torch.tensor(classes).repeat(len(album.seeds))
            seeds = [seed for seed in album.seeds for _ in names]
            for pictures in drawing.draw_parts(labels, seeds, album.on_step):
                album.add(to_arrays(pictures))
        album.finish()
    animation = f"; animation: {output / 'trajectory.gif'}" if args.trajectory else ""
    say(f"grid: {output / 'grid.png'}; facts: {output / 'samples.json'}{animation}")
    return 0


if __name__ == "__main__":
    cli.exit_with(main, USER_ERRORS)
