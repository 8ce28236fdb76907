"""What a run writes down and how it is drawn.

A run directory holds config.json, run.json (who runs what since when), metrics.jsonl, to which
records are only appended, training_curves.png, samples/ and the checkpoints. Heavy imports wait
inside the functions that draw, so that reading a run's state starts instantly.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from health import verdict

RUN_DIRECTORIES = {
    "full": Path("checkpoints"),
    "overfit": Path("checkpoints_overfit"),
    "demo": Path("checkpoints_demo"),
    "quick-test": Path("checkpoints_overfit/quick-test"),
}  # in the order in which `make generate` looks for a checkpoint
LOCK = "run.lock"  # in a folder of results; held by the process that writes there
PACE = 20  # records from which the time left is worked out
CURVES_SECONDS = 60  # between two drawings of them, each of which takes a second
LINE_SECONDS = 60  # between progress lines where the output is not a terminal
# What readers of a record count on, beside its kind and step.
RECORD_PARTS = {
    "train": {"epoch", "time", "loss", "loss_quarters", "images_seen", "images_per_second",
              "learning_rate", "grad_norm"},
    "validation": {"loss", "loss_ema"},
    "warning": {"message"},
}
LEAST_SIDE = 64  # pixels of a picture in a grid
FRAME_MILLISECONDS, LAST_MILLISECONDS = 100, 2000  # of an animation
LINEAR_PANELS = ("learning rate", "images per second")
SMOOTHING = 0.9  # weight of the past in the smoothed loss curve


class RunInUse(Exception):
    """Another live process writes to this folder."""


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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError without a file's name, as of a full disk, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else the name would take the place of the reason
            error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which to write what then takes path's place: no reader sees half a file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a run directory, whose lock is held."""
    for unfinished in (*folder.glob("*.tmp"), *(folder / "samples").glob("*.tmp")):
        unfinished.unlink()


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Its content; nothing where the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(errors="replace"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_records(path: Path) -> list[dict]:
    """The records of a JSON Lines file; what is none, as a line that was cut short, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def append_record(path: Path, record: dict) -> None:
    """One more line in a JSON Lines file, also behind a line that was cut short."""
    with naming(path), open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write((start + json.dumps(record) + "\n").encode())


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; what lacks a part is left out, as in read_records."""
    records = read_records(Path(folder) / "metrics.jsonl")
    return [
        record for record in records
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
        and record.keys() >= RECORD_PARTS.get(record["kind"], set())
    ]


def by_kind(records: Sequence[dict], *kinds: str) -> list[list[dict]]:
    """The records of each of these kinds."""
    return [[record for record in records if record["kind"] == kind] for kind in kinds]


def evenly(items: Sequence, most: int) -> Sequence:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def acquire_lock(folder: Path) -> TextIO:
    """The open lock file of a folder of results; the system frees it when the process ends.

    Raises RunInUse if another live process holds it.
    """
    path = folder / LOCK
    for _ in range(20):  # a reader that looks whether the run lives holds it for an instant
        lock = open(path, "a")
        try:
            with naming(path):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):  # none took its place
                return lock
        except BlockingIOError:
            time.sleep(0.01)
        lock.close()
    raise RunInUse(f"{folder} is in use by {owner(folder)}; wait for it or stop it")


def owner(folder: Path) -> str:
    """Who runs there, from run.json, which a run that is starting has not written yet."""
    facts = read_json(folder / "run.json")
    if not facts.keys() >= {"started", "pid", "host", "state"} or facts["state"] != "running":
        return "another process"
    return f"process {facts['pid']} on {facts['host']} since {moment(facts['started'])}"


def claim(folder: Path) -> TextIO | None:
    """The lock of a folder of results, as acquire_lock; None where there is no folder yet.

    A run there that was killed is noted as such. Raises RunInUse if a live process holds the lock,
    or if that cannot be told.
    """
    if folder.is_symlink() and not folder.exists():
        raise RunInUse(f"{folder} is a link to {os.readlink(folder)}, which is not there; mount "
                       "that disk, or remove the link")
    if not folder.is_dir():
        return None
    lock, facts = acquire_lock(folder), read_json(folder / "run.json")
    if facts.get("state") == "running":  # as it says of itself, but the lock is free
        with suppress(OSError):  # on a full disk `make clean` must get on
            write_json(folder / "run.json", facts | {"state": "died"})
    return lock


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min" if minutes > 0 else f"{max(0, int(seconds))} s"
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def time_left(train: Sequence[dict], started: float, total_steps: int) -> float | None:
    """Seconds, at the pace of the last training records; None where that is not known."""
    # Records from before this start are a resumed run's: the pause is no time per step.
    records = [record for record in train if record["time"] >= started]
    if len(records) < 2:
        return None
    first, last = records[-PACE:][0], records[-1]
    step_seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
    return (total_steps - last["step"]) * step_seconds


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

    def record(self, kind: str, **values) -> None:
        """Append one record of kind "train" or "validation" and show its losses.

        A validation's also counts the warnings since the one before, the verdict on the run.
        """
        step = values["step"]
        if kind == "validation":
            since = takewhile(lambda r: r["kind"] != "validation", reversed(self.records))
            warnings = sum(record["kind"] == "warning" for record in since)
            self.append(kind, **values, warnings=warnings)
            say(f"step {step}: validation loss {values['loss']:.4f}, EMA {values['loss_ema']:.4f}; "
                + verdict(warnings))
            return
        self.append(kind, **values)
        shown = {"loss": f"{values['loss']:.4f}"}
        shown["images/s"] = f"{values['images_per_second']:.1f}"
        self.bar.set_postfix(shown)
        if self.bar.disable and time.time() - self.last_line >= LINE_SECONDS:
            self.last_line = time.time()
            say(self.progress_line(step, shown))

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


def sample_path(folder: Path, step: int, name: str) -> Path:
    return folder / "samples" / f"step_{step:08d}_{name}.png"


def ema_grids(folder: Path) -> list[Path]:
    """The grids drawn so far from the EMA, in the order of their steps."""
    return sorted((folder / "samples").glob(f"step_{8 * '[0-9]'}_ema.png"))


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
