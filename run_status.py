"""What the training runs are doing, read from their directories: `make status`, `make monitor`."""

import contextlib
import fcntl
import json
import math
import signal
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from command_line import Parser, exit_with

from gpu_status import format_gpus, format_processes, query_gpus, query_processes
from health import lowest, quarter_words, verdict
from run_directory import (
    LOCK,
    RUN_DIRECTORIES,
    by_kind,
    duration,
    ema_grids,
    moment,
    read_json,
    read_metrics,
    time_left,
)

NO_RUN = "No training run yet: type `make demo` for a small one or `make train`."
UNKNOWN = {"state": "unknown: run.json is missing or damaged", "device": "unknown device",
           "started": 0, "ended": None, "total_steps": 0, "steps_per_epoch": 1}
REFRESH_SECONDS = 2
WARNED = 0.8  # of the steps so far: warnings from then on are shown
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RunState:
    """What one run directory holds; checkpoints are (time, name, size), oldest first."""

    mode: str
    folder: Path  # relative to the root
    facts: dict  # run.json
    train: list[dict]  # records of metrics.jsonl
    validation: list[dict]
    warnings: list[dict]
    checkpoints: list[tuple[float, str, int]]
    last_sample: str | None  # the newest grid of the EMA

    @property
    def last_sign(self) -> float:
        """When the run last left a trace."""
        recorded = self.train[-1]["time"] if self.train else 0
        return max(self.facts["started"], self.facts["ended"] or 0, recorded)


def is_alive(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_facts(folder: Path) -> dict:
    """run.json, its state put right if the run was killed."""
    alive = is_alive(folder)
    facts = read_json(folder / "run.json")
    if not facts.keys() >= UNKNOWN.keys():
        return UNKNOWN
    facts = {key: facts[key] for key in UNKNOWN}
    if facts["state"] == "running" and not alive and not is_alive(folder):  # nor just begun
        return facts | {"state": "died"}
    return facts


def checkpoint_files(folder: Path) -> list[tuple[float, str, int]]:
    found = []
    for path in folder.glob("*.pt"):
        with contextlib.suppress(FileNotFoundError):  # a run removes its old checkpoints
            found.append((path.stat().st_mtime, path.name, path.stat().st_size))
    return sorted(found)


def find_runs(root: Path) -> list[RunState]:
    """The runs under root, in the order of RUN_DIRECTORIES."""
    runs = []
    for mode, name in RUN_DIRECTORIES.items():
        folder = root / name
        facts, records = read_facts(folder), read_metrics(folder)
        checkpoints, grids = checkpoint_files(folder), ema_grids(folder)
        if facts is not UNKNOWN or records or checkpoints:
            kinds = by_kind(records, "train", "validation", "warning")
            last_sample = f"{name}/samples/{grids[-1].name}" if grids else None
            runs.append(RunState(mode, name, facts, *kinds, checkpoints, last_sample))
    return runs


def state_text(run: RunState, now: float) -> str:
    state, ended = run.facts["state"], run.facts["ended"]
    if state == "running":
        return f"running since {moment(run.facts['started'])} on {run.facts['device']}"
    if state == "died":
        return f"died: killed without a word, last sign {duration(now - run.last_sign)} ago"
    return state if ended is None else f"{state} {duration(now - ended)} ago"


def progress_text(run: RunState) -> str:
    if not run.train:
        return "no training record yet"
    step, epoch, total = run.train[-1]["step"], run.train[-1]["epoch"], run.facts["total_steps"]
    if not total:
        return f"step {step}, epoch {epoch:.1f}"
    epochs = total / run.facts["steps_per_epoch"]
    return f"step {step} of {total} ({step / total:.1%}), epoch {epoch:.1f} of {epochs:.0f}"


def loss_text(records: list[dict], key: str) -> str:
    """The last and the lowest loss, aligned."""
    if not records:
        return "none yet"
    best = lowest(records, key)
    return f"last {records[-1][key]:<10.4g} best {best[key]:<10.4g} at step {best['step']}"


def seconds_left(run: RunState) -> float | None:
    """Of a run that lives; None where that is not known."""
    if run.facts["state"] != "running":
        return None
    return time_left(run.train, run.facts["started"], run.facts["total_steps"])


def speed_text(run: RunState) -> str:
    """Images per second, and while the run lives the time left."""
    text = f"{run.train[-1]['images_per_second']:.1f} images/s" if run.train else "not known yet"
    if run.facts["state"] != "running":
        return text
    left = seconds_left(run)
    return f"{text}, time left {'not known yet' if left is None else duration(left)}"


def energy_text(train: list[dict]) -> str:
    """What the GPU has consumed so far; empty where nobody measured."""
    measured = [r["energy_joules"] for r in train if r.get("energy_joules") is not None]
    if not measured:
        return ""
    text = f"{sum(measured) / 3.6e6:.3g} kWh so far"
    if len(measured) < len(train):
        return f"{text}, of {len(measured)} records in {len(train)}"
    return f"{text}, {sum(measured) / train[-1]['images_seen']:.3g} J per image"


def status_rows(run: RunState, now: float, checkpoints: int) -> list[tuple[str, str]]:
    """Label and text of all there is to say in words, with so many of the newest checkpoints."""
    files = [f"{name:<24}{size / 2**20:8.1f} MiB   {duration(now - modified)} ago"
             for modified, name, size in run.checkpoints[-checkpoints:]]
    step = run.train[-1]["step"] if run.train else 0
    lately = [w for w in run.warnings if w["step"] >= WARNED * step][-1:]  # the rest is history
    sentence = "".join(f"step {w['step']}: {w['message']}" for w in lately)
    cautions = textwrap.wrap(sentence, 65)  # beside the labels, in 80 columns
    if not cautions and run.validation and run.validation[-1].get("warnings") == 0:
        cautions = [f"{verdict(0)} (validation at step {run.validation[-1]['step']})"]
    return [
        ("state", state_text(run, now)),
        *zip(["warning" if lately else "health", *[""] * len(cautions)], cautions),
        ("progress", progress_text(run)),
        ("train loss", loss_text(run.train, "loss")),
        ("validation", loss_text(run.validation, "loss")),
        ("  with EMA", loss_text(run.validation, "loss_ema")),
        ("speed", speed_text(run)),
        *([("energy", energy_text(run.train))] if energy_text(run.train) else []),
        ("last sample", run.last_sample or "none yet"),
        *zip(["checkpoints", *[""] * len(files)], files or ["none yet"]),
    ]


def as_json(runs: list[RunState]) -> list[dict]:
    """The same for programs; times are seconds since 1970, losses as recorded or None."""
    content = [
        {
            "mode": run.mode, "folder": str(run.folder), **run.facts,
            "seconds_left": seconds_left(run),
            "last_train": run.train[-1] if run.train else None,
            "last_validation": run.validation[-1] if run.validation else None,
            "noise_levels": quarter_words(run.train),
            "warnings": run.warnings,
            "checkpoints": [{"name": name, "bytes": size, "modified": modified}
                            for modified, name, size in run.checkpoints],
            "last_sample": run.last_sample,
        }
        for run in runs
    ]
    return json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN is no JSON


def format_status(runs: list[RunState], now: float) -> str:
    """Every run, in 80 columns."""
    blocks = []
    for run in runs:
        lines = [f"  {label:<13}{text}"[:80] for label, text in status_rows(run, now, 99)]
        blocks.append("\n".join([f"{run.mode} run in {run.folder}", *lines]))
    return "\n\n".join(blocks) or NO_RUN


def sparkline(losses: list[float], width: int) -> str:
    """The course of the loss on a logarithmic scale; each character is the mean of its share."""
    logs = [math.log(loss) for loss in losses if 0 < loss < math.inf]
    if not logs:
        return "none yet"
    count = min(width, len(logs))
    edges = [index * len(logs) // count for index in range(count + 1)]
    means = [sum(logs[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, span = min(means), max(means) - min(means) or 1
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def curve_rows(run: RunState, now: float, room: int) -> list[tuple[str, str]]:
    """What the monitor shows beside the words."""
    last, total = run.train[-1], run.facts["total_steps"]
    share = last["step"] / total if total else 0
    bar = (BLOCKS[-1] * int(share * room)).ljust(room)
    quarters = ["n/a" if loss is None else f"{loss:.4g}" for loss in last["loss_quarters"]]
    return [
        ("done", f"[{bar}] {share:.1%}"),
        ("last metrics", f"{duration(now - last['time'])} ago"),
        ("loss curve", sparkline([record["loss"] for record in run.train], room)),
        ("by noise", "".join(f"{text:<12}" for text in quarters) + "(least first)"),
        ("", "".join(f"{word:<12}" for word in quarter_words(run.train)).rstrip()),
    ]


def format_monitor(
    runs: list[RunState], gpus: list | str, now: float, width: int, height: int,
    processes: list[list[str]] = (),
) -> list[str]:
    """The lines of one screen: the run that is alive, else the newest, GPUs and their processes."""
    width -= 1  # the last column would wrap
    run = max(runs, key=lambda r: (r.facts["state"] == "running", r.last_sign), default=None)
    title = f"{run.mode} run in {run.folder}" if run else "Waiting for a training run"
    lines = [title.ljust(width - 18) + time.strftime("%H:%M:%S  q leaves", time.localtime(now)), ""]
    rows = status_rows(run, now, checkpoints=1) if run else []
    if run and run.train:
        rows += curve_rows(run, now, room=max(8, width - 25))
    lines += [f"{label:<13}{text}" for label, text in rows] or [NO_RUN]
    lines += ["", *format_gpus(gpus).split("\n"), *format_processes(processes).splitlines()]
    if len(lines) > height:
        lines[height - 1 :] = [f"... {len(lines) - height + 1} more lines in a taller window"]
    return [line[:width] for line in lines]


def monitor(root: Path) -> None:
    """Draw the screen again and again until q is typed."""
    import curses  # here, because some builds of Python lack it

    shown = {"gpus": "GPU: asking nvidia-smi ...", "processes": []}

    def poll_gpus() -> None:  # beside the screen: nvidia-smi can take seconds
        while True:
            shown.update(gpus=query_gpus(), processes=query_processes())
            time.sleep(REFRESH_SECONDS)

    def draw(window) -> None:
        curses.raw()  # Ctrl-C comes as a key, so that `make monitor` too ends with status 0
        window.timeout(1000 * REFRESH_SECONDS)
        with contextlib.suppress(curses.error):  # a plain terminal has neither
            curses.use_default_colors()
            curses.curs_set(0)
        while sys.stdin.isatty():  # not once the terminal is gone
            height, width = window.getmaxyx()
            window.erase()
            screen = format_monitor(
                find_runs(root), shown["gpus"], time.time(), width, height, shown["processes"]
            )
            for row, line in enumerate(screen):
                window.addstr(row, 0, line.encode(window.encoding, "replace"))
            if window.getch() in (ord("q"), ord("Q"), 3):  # 3: Ctrl-C
                return

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    threading.Thread(target=poll_gpus, daemon=True).start()
    try:
        curses.wrapper(draw)  # restores the terminal, whatever happens
    except curses.error as error:
        sys.exit(f"error: {error}; TERM must name this terminal")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("status", "monitor"))
    parser.add_argument("--json", action="store_true", help="the same as JSON, once")
    parser.add_argument("--root", type=Path, default=Path(), help="where the run directories are")
    args = parser.parse_args()
    root = args.root.expanduser()
    if not root.is_dir():
        sys.exit(f"error: --root {args.root} is no folder; check the path")
    sys.stdout.reconfigure(errors="replace")  # for an output that lacks the blocks
    if args.json:
        content = {"runs": as_json(find_runs(root))}
        if args.command == "monitor":
            content |= {"gpus": query_gpus(), "processes": query_processes()}
        print(json.dumps(content, indent=1))
    elif args.command == "status":
        print(format_status(find_runs(root), time.time()))
    elif not (sys.stdin.isatty() and sys.stdout.isatty()):
        runs, processes = find_runs(root), query_processes()
        print(*format_monitor(runs, query_gpus(), time.time(), 80, 99, processes), sep="\n")
    else:
        monitor(root)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    exit_with(main, ())
