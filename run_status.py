#!/usr/bin/env python3
"""Show what the training runs and the GPUs are doing: status, monitor, gpu-status.

It only reads what a run leaves in its directory, so it can be started and stopped at any time.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

RUN_DIRECTORIES = {"checkpoints": "full", "checkpoints_overfit": "overfit",
                   "checkpoints_overfit/quick-test": "quick-test", "checkpoints_demo": "demo"}
STATES = ("running", "finished", "interrupted", "failed", "died")
NO_RUN = "No training run yet: type `make demo` for a small one or `make train`."
REFRESH_SECONDS = 2.0
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
GPU_QUERY = "index,name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
SMI_MISSING = "nvidia-smi, and so the NVIDIA driver, is not installed"
CUDA_WHEELS = ((11, 8), (12, 6), (12, 8), (13, 0))  # at download.pytorch.org/whl/cuXYZ


# --- What a run directory says ---------------------------------------------------------------

@dataclass(frozen=True)
class RunState:
    """One run as the screen shows it; paths are relative to the root."""
    mode: str
    directory: str
    state: str  # one of STATES, or unknown
    notes: tuple[str, ...]
    device: str
    started: float | None
    ended: float | None
    total_steps: float | None
    steps_per_epoch: float | None
    train: tuple[dict, ...]  # records of parse_record
    validation: tuple[dict, ...]
    sample: str | None
    checkpoints: tuple[tuple[int, int, float], ...]  # (step, bytes, time), by step

    @property
    def last_sign(self) -> float:
        """When the run last left a trace."""
        times = (self.started, self.ended, *(record["time"] for record in self.train[-1:]))
        return max(moment or 0.0 for moment in times)

    @property
    def seconds_left(self) -> float | None:
        """Steps to go times the recent time per step; None unless alive and known."""
        # Records from before this start are a resumed run's: the pause is no time per step.
        recent = [r for r in self.train[-20:] if (r["time"] or 0) >= (self.started or 1)]
        steps = recent[-1]["step"] - recent[0]["step"] if recent else 0
        if self.state != "running" or self.total_steps is None or steps <= 0:
            return None
        seconds = recent[-1]["time"] - recent[0]["time"]
        return max(0, self.total_steps - recent[-1]["step"]) * seconds / steps


def number(value: object, limit: float = 1e15) -> float | None:
    """`value` as a float below the limit, None if it is no such number."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        result = float(value)
        return result if abs(result) < limit or limit == math.inf else None


def plain_text(value: object, default: str) -> str:
    """`value` if it is a text, without characters that would disturb a terminal."""
    text = value if isinstance(value, str) and value else default
    return "".join(character if character.isprintable() else "?" for character in text)


def parse_object(data: bytes) -> dict | None:
    """The JSON object in `data`, None if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        return value if isinstance(value, dict) else None


@functools.lru_cache(maxsize=None)  # the monitor reads the same lines again and again
def parse_record(line: bytes) -> dict | None:
    """One line of metrics.jsonl with every number checked, None if it is damaged."""
    fields = parse_object(line) or {}
    step, quarters = number(fields.get("step")), fields.get("loss_quarters")
    if step is None:
        return None
    keys = ("loss_ema", "epoch", "images_per_second", "time")
    return {key: number(fields.get(key)) for key in keys} | {
        "kind": fields.get("kind"), "step": int(step),
        "loss": number(fields.get("loss"), math.inf),  # a diverged run writes NaN
        "loss_quarters": list(map(number, quarters)) if isinstance(quarters, list) else []}


def read_metrics(path: Path) -> tuple[list[dict], str]:
    """The records of metrics.jsonl, and a note about what cannot be read."""
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError as error:
        return [], f"metrics.jsonl is not readable ({error.strerror})"
    records = [parse_record(line) for line in lines]
    damaged = records.count(None)
    note = f"{damaged} damaged line(s) in metrics.jsonl skipped" if damaged else ""
    if damaged == 1 and records[-1] is None:
        note = "the last line of metrics.jsonl is incomplete and was skipped"
    return [record for record in records if record], note


def is_alive(lock: Path, info: dict) -> bool | None:
    """Whether the run's process lives: by its lock, else by its pid; None if unknown."""
    with contextlib.suppress(OSError):  # no lock file, or a file system without flock
        with open(lock, "rb") as file:  # closing it releases the lock
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
    pid = number(info.get("pid"))
    if pid is None or info.get("host") != os.uname().nodename:
        return None
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, as another user's
    return True


def read_run_json(directory: Path) -> tuple[dict, str]:
    """The fields of run.json, or none and why."""
    try:
        info = parse_object((directory / "run.json").read_bytes())
    except OSError as error:
        return {}, f"run.json is not readable ({error.strerror})"
    return (info, "") if info is not None else ({}, "run.json is damaged: not a JSON object")


def run_state(directory: Path) -> tuple[dict, str, str]:
    """run.json's fields, the run's state in one word, and a note or nothing."""
    info, note = read_run_json(directory)
    alive = is_alive(directory / "run.lock", info)
    if info.get("state") == "running" and alive is False:
        # It may have ended between the two looks; by now it has written so.
        info, note = read_run_json(directory)
        if info.get("state") == "running":
            return info, "died", note
    if info.get("state") == "running" and alive is None:
        note = "cannot tell from this machine whether it still runs"
    state = "running" if alive and not info else info.get("state")
    return info, state if state in STATES else "unknown", note


def list_files(directory: Path, pattern: str) -> list[tuple[float, str, int]]:
    """(time, name, size) of the files whose whole name matches, oldest first."""
    found = []
    with contextlib.suppress(OSError):  # no such directory
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):  # removed while we look
                if re.fullmatch(pattern, entry.name):
                    found.append((entry.stat().st_mtime, entry.name, entry.stat().st_size))
    return sorted(found)


def find_runs(root: Path | str) -> list[RunState]:
    """The runs under `root`, in the order of RUN_DIRECTORIES."""
    traces = r"run\.json|run\.lock|metrics\.jsonl|checkpoint_\d+\.pt"
    return [load_run(Path(root, name), name) for name in RUN_DIRECTORIES
            if list_files(Path(root, name), traces)]


def load_run(directory: Path, name: str) -> RunState:
    info, state, note = run_state(directory)
    records, metrics_note = read_metrics(directory / "metrics.jsonl")
    if state == "running" and "incomplete" in metrics_note:
        metrics_note = ""  # it is being written
    samples = list_files(directory / "samples", r".*\.png")
    checkpoints = list_files(directory, r"checkpoint_\d+\.pt")
    times_and_totals = ("started", "ended", "total_steps", "steps_per_epoch")
    return RunState(
        mode=plain_text(info.get("mode"), RUN_DIRECTORIES[name]), directory=name, state=state,
        notes=tuple(text for text in (note, metrics_note) if text),
        device=plain_text(info.get("device"), "unknown device"),
        **{key: number(info.get(key)) for key in times_and_totals},
        train=tuple(r for r in records if r["kind"] == "train"),
        validation=tuple(r for r in records if r["kind"] == "validation"),
        sample=f"{name}/samples/{plain_text(samples[-1][1], '')}" if samples else None,
        checkpoints=tuple(sorted((int(re.sub(r"\D", "", file)), size, modified)
                                 for modified, file, size in checkpoints)))


# --- The same in words -----------------------------------------------------------------------

def duration(seconds: float) -> str:
    minutes = max(0, int(seconds)) // 60
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{max(0, int(seconds))} s"
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def figure(value: float | None, form: str = ".4g") -> str:
    return "n/a" if value is None else format(value, form)


def clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[:max(0, width - 3)] + "..."


def state_text(run: RunState, now: float) -> str:
    """The run's state in words."""
    if run.state == "running":
        since = time.strftime("since %Y-%m-%d %H:%M:%S ", time.localtime(run.started))
        return f"running {since if run.started else ''}on {run.device}"
    if run.state == "died":
        seen = f", last sign {duration(now - run.last_sign)} ago" if run.last_sign else ""
        return f"died: killed without a word{seen}"
    return run.state + ("" if run.ended is None else f" {duration(now - run.ended)} ago")


def progress_text(run: RunState) -> str:
    """Step and epoch of their totals."""
    if not run.train:
        return "no training record yet"
    step, epoch = run.train[-1]["step"], run.train[-1]["epoch"]
    text = f"step {step}"
    if run.total_steps:
        text += f" of {run.total_steps:.0f} ({100 * step / run.total_steps:.1f} %)"
    text += "" if epoch is None else f", epoch {epoch:.1f}"
    if epoch is not None and run.total_steps and run.steps_per_epoch:
        text += f" of {run.total_steps / run.steps_per_epoch:.0f}"
    return text


def loss_text(records: tuple[dict, ...], key: str = "loss") -> str:
    """The last and the lowest loss, aligned."""
    if not records:
        return "none yet"
    text = f"last {figure(records[-1][key]):<10} "
    valid = [r for r in records if r[key] is not None and math.isfinite(r[key])]
    best = min(valid, key=lambda record: record[key], default=None)
    return text + f"best {figure(best[key]):<10} at step {best['step']}" if best else text.rstrip()


def summary_rows(run: RunState, now: float) -> list[tuple[str, str]]:
    """(label, text) of everything but the checkpoints."""
    speed = run.train[-1]["images_per_second"] if run.train else None
    left = "not known yet" if run.seconds_left is None else duration(run.seconds_left)
    time_left = f", time left {left}" if run.state == "running" else ""
    return [("state", state_text(run, now)), *(("note", note) for note in run.notes),
            ("progress", progress_text(run)), ("train loss", loss_text(run.train)),
            ("validation", loss_text(run.validation)),
            ("  with EMA", loss_text(run.validation, "loss_ema")),
            ("speed", f"{figure(speed, '.1f')} images/s{time_left}"),
            ("last sample", run.sample or "none yet")]


def checkpoint_rows(run: RunState, now: float) -> list[tuple[str, str]]:
    texts = [f"step {step:<9} {size / 2**20:8.1f} MiB   {duration(now - modified)} ago"
             for step, size, modified in run.checkpoints]
    return list(zip(["checkpoints", *[""] * len(texts)], texts or ["none yet"]))


def format_status(runs: list[RunState], now: float) -> str:
    """Every run, in 80 columns; only a sample's path is never cut, to remain of use."""
    blocks = []
    for run in runs:
        lines = [clip(f"{run.mode} run in {run.directory}", 80)]
        for label, text in summary_rows(run, now) + checkpoint_rows(run, now):
            lines.append(clip(f"  {label:<13}{text}", 999 if label == "last sample" else 80))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or NO_RUN


# --- GPUs, through nvidia-smi ----------------------------------------------------------------

@dataclass(frozen=True)
class GpuReading:
    """One GPU now, memory in MiB; None where nvidia-smi gives no number."""
    index: str
    name: str
    utilization: float | None
    memory_used: float | None
    memory_total: float | None
    temperature: float | None
    power: float | None


def nvidia_smi(*arguments: str) -> tuple[str, str]:
    """What nvidia-smi prints, or nothing and a sentence saying why."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, errors="replace", timeout=20)
    except FileNotFoundError:
        return "", SMI_MISSING
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi does not answer ({error})"
    message = plain_text((done.stdout + done.stderr).strip().partition("\n")[0], "no message")
    return (done.stdout, "") if done.returncode == 0 else ("", f"nvidia-smi failed: {message}")


def query_gpus() -> list[GpuReading] | str:
    """One reading per GPU, or a sentence saying why there is none."""
    output, problem = nvidia_smi(f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits")
    gpus = []
    for line in output.splitlines():
        index, _, rest = plain_text(line, "").partition(", ")
        name, *fields = rest.rsplit(", ", 5)
        if len(fields) == 5:
            gpus.append(GpuReading(index, name, *map(number, fields)))
    said = plain_text(output.strip().partition("\n")[0], "nvidia-smi lists none")
    return gpus or f"No NVIDIA GPU found: {problem or said}"


def format_gpus(gpus: list[GpuReading] | str, width: int = 80) -> str:
    """One line per GPU: utilisation, memory, temperature, power."""
    if isinstance(gpus, str):
        return "\n".join(textwrap.wrap(gpus, width))
    lines = []
    for gpu in gpus:
        used, total = (figure(None if mib is None else mib / 1024, ".1f")
                       for mib in (gpu.memory_used, gpu.memory_total))
        lines.append(f"GPU {gpu.index} {clip(gpu.name, 24):<24} {figure(gpu.utilization):>4} % used"
                     f" {used:>5} of {total:>5} GiB {figure(gpu.temperature):>4} C"
                     f" {figure(gpu.power, '.0f'):>4} W")
    return "\n".join(clip(line, width) for line in lines)


# --- The live monitor ------------------------------------------------------------------------

def sparkline(losses: list[float | None], width: int, blocks: str) -> str:
    """The course of the loss on a logarithmic scale; each character is the mean of its share."""
    logs = [math.log(loss) for loss in losses if loss is not None and 0 < loss < math.inf]
    count = min(width, len(logs))
    edges = [index * len(logs) // max(1, count) for index in range(count + 1)]
    means = [sum(logs[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, span = min(means, default=0), max(means, default=0) - min(means, default=0) or 1
    return "".join(blocks[round((mean - low) / span * (len(blocks) - 1))] for mean in means)


def monitor_rows(run: RunState, now: float, width: int, blocks: str) -> list[tuple[str, str]]:
    """The bar, the status with only the newest checkpoint, and the course of the loss."""
    last = run.train[-1] if run.train else {"step": 0, "time": None, "loss_quarters": []}
    share = min(1.0, last["step"] / run.total_steps) if run.total_steps else 0.0
    room = max(8, width - 26)
    full = int(share * room)
    quarters = "  ".join(figure(loss) for loss in last["loss_quarters"])
    seen = "none yet" if last["time"] is None else f"{duration(now - last['time'])} ago"
    return [("done", f"[{blocks[-1] * full}{blocks[0] * (room - full)}] {share:6.1%}"),
            *summary_rows(run, now), ("checkpoint", checkpoint_rows(run, now)[-1][1]),
            ("last metrics", seen),
            ("loss curve", sparkline([r["loss"] for r in run.train], room, blocks) or "none yet"),
            ("by noise", f"{quarters}  (least to most noise)" if quarters else "none yet")]


def format_monitor(runs: list[RunState], gpus: list[GpuReading] | str, now: float,
                   size: tuple[int, int] = (80, 24), blocks: str = BLOCKS) -> str:
    """One screen that fits `size`: the run that is alive, else the newest, and the GPUs."""
    width, height = max(20, size[0]) - 1, max(3, size[1])  # the last column would wrap
    run = max(runs, key=lambda each: (each.state == "running", each.last_sign), default=None)
    title = f"{run.mode} run in {run.directory}" if run else "Waiting for a training run"
    lines = [f"{title:<{width - 18}}{time.strftime('%H:%M:%S', time.localtime(now))}  q leaves", ""]
    if run is None:
        lines += textwrap.wrap(NO_RUN, width)
    else:
        lines += [f"{label:<13}{text}" for label, text in monitor_rows(run, now, width, blocks)]
    lines += ["", *format_gpus(gpus, width).split("\n")]
    if len(lines) > height:
        lines[height - 1:] = [f"... {len(lines) - height + 1} more lines in a taller window"]
    return "\n".join(clip(line.rstrip(), width) for line in lines)


@contextlib.contextmanager
def full_screen():
    """The alternate screen and unbuffered keys; yields the keyboard, restores all on leaving."""
    keyboard = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
    saved = None if keyboard is None else termios.tcgetattr(keyboard)
    for leave in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(leave, lambda sent, _: sys.exit(0 if sent == signal.SIGINT else 128 + sent))
    try:
        if saved:
            keys = termios.tcgetattr(keyboard)
            # Without ISIG Ctrl-C comes as a key, so that `make monitor` also ends with status 0.
            keys[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
            termios.tcsetattr(keyboard, termios.TCSADRAIN, keys)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield keyboard
    finally:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()
            if saved:
                termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)


def leave_was_typed(keyboard: int | None, seconds: float) -> bool:
    """Wait for a key or for the time; whether the key was q or Ctrl-C."""
    ready = select.select([] if keyboard is None else [keyboard], [], [], seconds)[0]
    keys = os.read(keyboard, 64) if ready else b" "
    return not keys or any(key in b"qQ\x03" for key in keys)  # no keys: the terminal is gone


def monitor(root: Path, once: bool) -> int:
    """Draw the screen, once or until q is typed."""
    blocks = BLOCKS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BLOCKS
    if once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        size = (shutil.get_terminal_size((80, 24)).columns, 999)
        print(format_monitor(find_runs(root), query_gpus(), time.time(), size, blocks))
        return 0
    gpus: list = ["GPU: asking nvidia-smi ..."]

    def poll_gpus() -> None:  # beside the screen: nvidia-smi can take seconds
        while True:
            gpus[0] = query_gpus()
            time.sleep(REFRESH_SECONDS)

    threading.Thread(target=poll_gpus, daemon=True).start()
    with contextlib.suppress(OSError), full_screen() as keyboard:  # OSError: the terminal is gone
        leaving = False
        while not leaving:
            size = os.get_terminal_size(sys.stdout.fileno())
            screen = format_monitor(find_runs(root), gpus[0], time.time(), size, blocks)
            # Overwriting, and clearing only the rest of each line, does not flicker.
            sys.stdout.write("\x1b[H" + screen.replace("\n", "\x1b[K\n") + "\x1b[K\x1b[J")
            sys.stdout.flush()
            leaving = leave_was_typed(keyboard, REFRESH_SECONDS)
    return 0


# --- Why the GPU is or is not used -----------------------------------------------------------

@dataclass(frozen=True)
class GpuFacts:
    """All that the diagnosis rests on."""
    torch_version: str = ""  # empty: torch cannot be imported
    problem: str = ""  # what torch said when it failed to load or to start CUDA
    torch_cuda: str | None = None  # None: a build without CUDA
    available: bool = False
    devices: tuple[tuple[str, tuple[int, int], float], ...] = ()  # name, capability, bytes
    architectures: tuple[str, ...] = ()
    gpus: list[GpuReading] | str = f"No NVIDIA GPU found: {SMI_MISSING}"
    driver: str = ""
    driver_cuda: str = ""
    visible: str | None = None  # CUDA_VISIBLE_DEVICES


def torch_facts() -> dict:
    """What torch says about itself and its devices."""
    try:
        import torch  # here alone, because it takes seconds
        facts = {"torch_version": str(torch.__version__), "torch_cuda": torch.version.cuda}
    except (ImportError, OSError, AttributeError) as error:  # missing, or half installed
        return {"problem": str(error).partition("\n")[0]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts["available"] = torch.cuda.is_available()
        try:
            found = [torch.cuda.get_device_properties(index)
                     for index in range(torch.cuda.device_count() if facts["available"] else 0)]
            facts["devices"] = tuple((d.name, (d.major, d.minor), d.total_memory) for d in found)
            facts["architectures"] = tuple(torch.cuda.get_arch_list())
        except (RuntimeError, AssertionError) as error:
            return facts | {"problem": str(error).partition("\n")[0]}
    return facts | {"problem": str(caught[0].message).partition("\n")[0] if caught else ""}


def gather_facts() -> GpuFacts:
    header = nvidia_smi()[0]
    # Drivers from 610 on print "KMD Version" and "CUDA UMD Version".
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", header)
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", header)
    return GpuFacts(**torch_facts(), gpus=query_gpus(), driver=driver[1] if driver else "",
                    driver_cuda=cuda[1] if cuda else "",
                    visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def reinstall(driver_cuda: str) -> str:
    """How to get a torch that the driver can serve."""
    fitting = [wheel for wheel in CUDA_WHEELS if wheel <= version(driver_cuda or "99.0")]
    wheel = max(fitting, default=CUDA_WHEELS[0])
    return ("replace torch:\n  python -m pip uninstall -y torch\n  python -m pip install torch "
            "--index-url https://download.pytorch.org/whl/cu{}{}".format(*wheel))


def has_kernel(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a torch built for these architectures runs on a GPU of this capability."""
    for kind, major, minor, only in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", str(architectures)):
        built = (int(major), int(minor))
        # Code for one architecture runs on later minor versions, PTX on every later GPU.
        later = built <= capability and (kind == "compute" or built[0] == capability[0])
        if capability == built or later and not only:
            return True
    return not architectures


def diagnose(facts: GpuFacts) -> tuple[bool, str]:
    """Whether all is well, and a sentence with the cure where it is not."""
    if not facts.torch_version:
        return False, f"torch cannot be loaded ({facts.problem}). Cure: `make install`."
    if facts.available:
        return diagnose_devices(facts)
    if isinstance(facts.gpus, str):
        if SMI_MISSING in facts.gpus or "No devices" in facts.gpus:
            return True, (f"{facts.gpus}. Training works on the CPU, only smaller and slower; "
                          "to use an NVIDIA GPU install its driver.")
        return False, (f"{facts.gpus}. Cure: restart the machine (needed after a driver update) "
                       "or reinstall the driver; until then training works on the CPU.")
    if facts.torch_cuda is None:
        return False, ("nvidia-smi sees a GPU, but this torch is a build for the CPU only. "
                       f"Cure: {reinstall(facts.driver_cuda)}")
    first = (facts.visible or "").split(",")[0].strip()
    hidden = not first or number(first) is not None and not 0 <= number(first) < len(facts.gpus)
    if facts.visible is not None and hidden:
        return False, (f"CUDA_VISIBLE_DEVICES is {facts.visible!r} and so hides every GPU. "
                       "Cure: `unset CUDA_VISIBLE_DEVICES`.")
    if facts.driver_cuda and version(facts.driver_cuda) < version(facts.torch_cuda):
        return False, (f"The driver serves CUDA up to {facts.driver_cuda}, but torch is built for "
                       f"CUDA {facts.torch_cuda}. Cure: upgrade the NVIDIA driver, or else "
                       f"{reinstall(facts.driver_cuda)}")
    return False, (f"Driver and torch fit, but CUDA does not start ({facts.problem or 'no reason'})"
                   ". Cure: restart the machine, or start its container with `--gpus all`.")


def diagnose_devices(facts: GpuFacts) -> tuple[bool, str]:
    """The diagnosis when torch has CUDA: can it use the devices?"""
    if not facts.devices:
        return False, (f"CUDA starts, but no device answers ({facts.problem}). Cure: stop what "
                       "else uses the GPU, or restart the machine.")
    lacking = [index for index, (_, capability, _) in enumerate(facts.devices)
               if not has_kernel(capability, facts.architectures)]
    if not lacking:
        return True, f"Training will use the GPU, {facts.devices[0][0]}."
    name, capability, _ = facts.devices[lacking[0]]
    # Training takes cuda:0, so only there a missing kernel stops it.
    return lacking[0] > 0, (
        "cuda:{}, {}, has capability {}.{}, for which this torch has no kernel ({}). Cure: choose "
        "another GPU with CUDA_VISIBLE_DEVICES, or else {}".format(
            lacking[0], name, *capability, ", ".join(facts.architectures),
            reinstall(facts.driver_cuda)))


def format_facts(facts: GpuFacts) -> str:
    """The facts, then the diagnosis; its commands are not wrapped, to remain of use."""
    build = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    serves = f"{facts.driver}, serves CUDA up to {facts.driver_cuda or 'n/a'}"
    rows = [("python", f"{sys.version.split()[0]} ({sys.executable})"),
            ("torch", f"{facts.torch_version}, {build}" if facts.torch_version else "not loaded"),
            ("NVIDIA driver", serves if facts.driver else "none"),
            ("CUDA_VISIBLE_DEVICES", "not set" if facts.visible is None else repr(facts.visible)),
            ("torch.cuda", "available" if facts.available else "not available")]
    rows += [(f"cuda:{index}", "{}, capability {}.{}, {:.1f} GiB, bf16 {}".format(
        name, *capability, memory / 2**30, "yes" if capability >= (8, 0) else "no"))
        for index, (name, capability, memory) in enumerate(facts.devices)]
    sentence, *commands = diagnose(facts)[1].split("\n")
    return "\n".join([*(f"{label:<22}{text}" for label, text in rows), format_gpus(facts.gpus), "",
                      textwrap.fill(f"Diagnosis: {sentence}", 80, break_on_hyphens=False),
                      *commands])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Show what the training runs and the GPUs are doing.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""\
commands:
  status      every run: state, progress, losses, speed, checkpoints
  monitor     the run that is alive (else the newest) and the GPUs, every 2 s
  gpu-status  torch, driver and GPUs, and what to do if they do not fit together

exit status: 0; 1 if gpu-status finds something broken; 2 for a wrong option""")
    parser.add_argument("command", choices=("status", "monitor", "gpu-status"))
    parser.add_argument("--once", action="store_true",
                        help="monitor: print one screen and exit, as when not on a terminal")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR",
                        help="the directory that holds checkpoints* (default: the current one)")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        parser.error(f"--root: there is no directory {options.root}")
    with contextlib.suppress(AttributeError):  # closed or replaced
        sys.stdout.reconfigure(errors="replace")
    if options.command == "monitor":
        return monitor(options.root, options.once)
    if options.command == "status":
        print(format_status(find_runs(options.root), time.time()))
        return 0
    facts = gather_facts()
    print(format_facts(facts))
    return 0 if diagnose(facts)[0] else 1


if __name__ == "__main__":
    for quiet in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C and `| head` end it without a traceback
        signal.signal(quiet, signal.SIG_DFL)
    sys.exit(main())
