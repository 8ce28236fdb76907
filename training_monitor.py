"""What a run writes down and how it is drawn.

Heavy imports wait inside the functions that draw.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from health import verdict
from run_directory import (
    acquire_lock,
    append_record,
    by_kind,
    duration,
    read_metrics,
    replacing,
    sample_path,
    sweep,
    time_left,
    write_json,
)

CURVES_SECONDS = 60  # between two drawings of them, each of which takes a second
LINE_SECONDS = 60  # between progress lines where the output is not a terminal
LEAST_SIDE = 64  # pixels of a picture in a grid
FRAME_MILLISECONDS, LAST_MILLISECONDS = 100, 2000  # of an animation
LINEAR_PANELS = ("learning rate", "images per second")
SMOOTHING = 0.9  # weight of the past in the smoothed loss curve


def say(message: str) -> None:
    """One line to the user, above a progress bar if there is one."""
    from tqdm import tqdm

    try:
        tqdm.write(message)
        sys.stdout.flush()
    except OSError as error:  # a run still has to go on, or to save
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| tee` dies of the Ctrl-C that ends the run
            with suppress(OSError):  # both may go to one full disk or lost terminal
                print(f"the output cannot be written: {error.strerror}; going on without it",
                      file=sys.stderr)


def progress(items: Iterable, total: int, what: str) -> Iterable:
    """items behind a progress bar on a terminal; elsewhere just the items."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=what, disable=None, leave=False)


def evenly(items: Sequence, most: int) -> Sequence:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class TrainingMonitor:
    """Owns a run directory while the run lives: lock, records, progress bar, pictures.

    Use as a context manager. Raises RunInUse if another live process owns the directory.

    Args:
        lock: of the directory, where it has been acquired already.
    """

    def __init__(self, folder: Path, *, mode: str, device: str, machine: str, total_steps: int,
                 steps_per_epoch: int, command: str, lock: TextIO | None = None):
        self.folder, self.lock = Path(folder), lock
        self.facts = {
            "mode": mode, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time(),
            "device": device, "machine": machine, "total_steps": total_steps,
            "steps_per_epoch": steps_per_epoch, "state": "running", "ended": None,
            "command": command,
        }
        self.bar = None
        self.curves_drawn = time.monotonic()

    def __enter__(self) -> "TrainingMonitor":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or acquire_lock(self.folder)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.bar is not None:
            self.bar.close()
        self.facts["ended"] = time.time()
        if kind is not None or self.facts["state"] == "running":
            self.facts["state"] = "interrupted" if kind is KeyboardInterrupt else "failed"
        try:
            write_json(self.folder / "run.json", self.facts)
        except OSError:
            # A full disk must not hide the error that ends the run; the free lock tells the rest.
            if kind is None:
                raise
        self.lock.close()

    def begin(self, step: int, config: dict) -> None:
        """Write the config and cut what a killed run left past `step`: it will come again."""
        from tqdm import tqdm

        sweep(self.folder)
        (self.folder / "samples").mkdir(exist_ok=True)
        write_json(self.folder / "run.json", self.facts)
        write_json(self.folder / "config.json", config)
        self.records = [r for r in read_metrics(self.folder) if r["step"] <= step]
        with replacing(self.folder / "metrics.jsonl") as unfinished:
            unfinished.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        if step > 0:
            self.append("resume", step=step)
        self.bar = tqdm(
            total=self.facts["total_steps"], initial=step, unit="step", disable=None,
            dynamic_ncols=True, smoothing=0.1,
        )
        self.last_line = 0.0

    def end(self, state: str) -> None:
        """Note how the run ended: "finished" or "interrupted"."""
        self.bar.close()
        self.facts["state"] = state

    def advance(self) -> None:
        self.bar.update(1)

    def append(self, kind: str, **values) -> None:
        """One more record in metrics.jsonl, with its epoch and time."""
        epoch = round(values["step"] / self.facts["steps_per_epoch"], 3)
        record = {"kind": kind, "epoch": epoch, **values, "time": time.time()}
        append_record(self.folder / "metrics.jsonl", record)
        self.records.append(record)

    def warn(self, step: int, message: str) -> None:
        """Say what looks wrong, and record it."""
        self.append("warning", step=step, message=message)
        say(f"warning at step {step}: {message}")

    def record_validation(self, **values) -> None:
        """Append the record of a validation and show its losses.

        It also counts the warnings since the one before, the verdict on the run.
        """
        since = takewhile(lambda r: r["kind"] != "validation", reversed(self.records))
        warnings = sum(record["kind"] == "warning" for record in since)
        self.append("validation", **values, warnings=warnings)
        say(f"step {values['step']}: validation loss {values['loss']:.4f}, EMA "
            f"{values['loss_ema']:.4f}; {verdict(warnings)}")

    def record_training(self, **values) -> None:
        """Append a record of training and show its loss."""
        self.append("train", **values)
        shown = {"loss": f"{values['loss']:.4f}"}
        shown["images/s"] = f"{values['images_per_second']:.1f}"
        self.bar.set_postfix(shown)
        if self.bar.disable and time.time() - self.last_line >= LINE_SECONDS:
            self.last_line = time.time()
            say(self.progress_line(values["step"], shown))

    def progress_line(self, step: int, shown: dict) -> str:
        total = self.facts["total_steps"]
        left = time_left(*by_kind(self.records, "train"), self.facts["started"], total)
        return f"step {step}/{total}, " + ", ".join(
            f"{name} {value}" for name, value in shown.items()
        ) + ("" if left is None else f", {duration(left)} left")

    def draw_samples(self, step: int, name: str, images, class_names: Sequence[str]) -> None:
        """A labelled grid of uint8 images (rows * classes, H, W, 3), classes taking turns."""
        grid = labelled_grid(images, class_names, f"step {step}, {name}")
        save_image(grid, sample_path(self.folder, step, name))

    @property
    def curves_are_old(self) -> bool:
        return time.monotonic() > self.curves_drawn + CURVES_SECONDS

    def draw_curves(self) -> None:
        self.curves_drawn = time.monotonic()
        draw_curves(self.records, self.folder / "training_curves.png")


def labelled_grid(
    images, column_names: Sequence[str], title: str = "", row_names: Sequence[str] = ()
):
    """A PIL picture of uint8 images (N, H, W, 3), filled row by row under the column names.

    Images smaller than LEAST_SIDE pixels are enlarged to it so that the names fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = max(images.shape[1], LEAST_SIDE)
    columns, rows = len(column_names), -(-len(images) // len(column_names))
    gap, text = 4, max(11, side // 8)
    font = ImageFont.load_default(text)
    top = (text + 2 * gap) * (2 if title else 1)
    left = gap + max((int(font.getlength(name)) + 2 * gap for name in row_names), default=0)
    size = (left + columns * (side + gap), top + rows * (side + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    if title:
        pen.text((left, gap), title, "black", font)
    for column, name in enumerate(column_names):
        middle = left + column * (side + gap) + side // 2
        pen.text((middle, top - gap), name, "black", font, anchor="md")
    for row, name in enumerate(row_names):
        pen.text((left - 2 * gap, top + row * (side + gap) + side // 2), name, "black", font,
                 anchor="rm")
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        picture = Image.fromarray(pixels)
        if picture.width != side:
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
        grid.paste(picture, (left + column * (side + gap), top + row * (side + gap)))
    return grid


def save_image(image, path: Path, facts: dict | None = None) -> None:
    """Write a PNG in one step, facts in its text chunks; what is no text becomes JSON."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (facts or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        info.add_text(key, text.encode(errors="backslashreplace").decode())
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=info)


def save_animation(frames: Sequence, path: Path, comment: str) -> None:
    """Write PIL pictures as a GIF that loops, its last frame held, in one step."""
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    with replacing(path) as unfinished:
        frames[0].save(
            unfinished, format="GIF", save_all=True, append_images=frames[1:], duration=durations,
            loop=0, comment=comment.encode(),
        )


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with the start-up bias removed (Kingma & Ba 2015, sec. 3)."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def draw_curves(records: list[dict], path: Path) -> None:
    """training_curves.png: losses, losses by noise level, learning rate, gradient, throughput."""
    from matplotlib.figure import Figure

    train, validation, resumed = by_kind(records, "train", "validation", "resume")
    steps = [record["step"] for record in train]
    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = dict(zip(
        ("loss", "validation loss", "loss by noise level", "learning rate", "gradient norm",
         "images per second"), figure.subplots(2, 3).flat,
    ))

    losses = [record["loss"] for record in train]
    panels["loss"].plot(steps, losses, color="tab:blue", alpha=0.3, label="mean since last record")
    panels["loss"].plot(steps, smoothed(losses), color="tab:blue", label="smoothed")
    marker = {"marker": ".", "markersize": 4}
    at = [record["step"] for record in validation]
    for key, label in (("loss", "weights"), ("loss_ema", "EMA weights")):
        panels["validation loss"].plot(at, [r[key] for r in validation], label=label, **marker)
    names = ("least noise", "second quarter", "third quarter", "most noise")
    for quarter, name in enumerate(names):
        known = [(r["step"], r["loss_quarters"][quarter]) for r in train]
        known = [(step, loss) for step, loss in known if loss is not None]
        values = smoothed([loss for _, loss in known], 0.8)
        panels["loss by noise level"].plot([step for step, _ in known], values, label=name)
    panels["learning rate"].plot(steps, [record["learning_rate"] for record in train])
    for panel, key in (("gradient norm", "grad_norm"), ("images per second", "images_per_second")):
        values = [record[key] for record in train]
        panels[panel].plot(steps, values, color="tab:blue", alpha=0.3)
        panels[panel].plot(steps, smoothed(values), color="tab:blue")
    # A line alone, in a panel without data, would leave a logarithmic axis without limits.
    filled = [axes for axes in panels.values() if any(len(line.get_xdata()) for line in axes.lines)]
    for record in resumed:
        for axes in filled:
            axes.axvline(record["step"], color="grey", linestyle=":", linewidth=1)

    for name, axes in panels.items():
        axes.set(title=name, xlabel="step (dotted: continued)" if resumed else "step")
        axes.grid(alpha=0.3)
        # Within less than half a decade the ticks of a logarithmic axis are hard to read.
        if name not in LINEAR_PANELS and axes.dataLim.y1 > 3 * axes.dataLim.y0 > 0:
            axes.set_yscale("log")
        if name in ("loss", "validation loss", "loss by noise level"):
            axes.legend()
    panels["images per second"].set_ylim(bottom=0)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90)
