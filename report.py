"""A run's own page: report.html, one file without a network, and the same seeds over training as a
GIF (`make report`; a run writes them by itself when it ends).
"""

import base64
import io
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from command_line import Parser, exit_with

import config as settings
from health import lowest, quarter_words, verdict
from run_directory import (
    RUN_DIRECTORIES,
    by_kind,
    ema_grids,
    moment,
    read_json,
    read_metrics,
    read_records,
    replacing,
    sample_path,
)
from run_status import energy_text, read_facts
from training_monitor import evenly, save_animation

MOST_GRIDS = 24  # shown of all that were drawn, evenly through the run
GRID_WIDTH = 1000  # pixels at most, as JPEG: the page stays a few megabytes
QUALITY = 85
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { text-align: left; padding: 2px 1.2em 2px 0;
  vertical-align: top; font-weight: normal } th { color: #666 }
code, pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% } input[type=range] { width: 100% } .changed { font-weight: 600 }
.warning { color: #a40 }
"""
SLIDER = """
const grids = document.querySelectorAll('#grids img'), slider = document.getElementById('step');
function show() { grids.forEach((grid, i) => grid.hidden = i != slider.value);
  document.getElementById('shown').textContent = grids[slider.value].alt; }
slider.addEventListener('input', show); show();
"""


def grid_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the EMA's grids, at most MOST_GRIDS, first and last among them."""
    return [(int(path.name.split("_")[1]), path)
            for path in evenly(ema_grids(folder), MOST_GRIDS) if is_picture(path)]


def is_picture(path: Path) -> bool:
    """Whether there is a picture, and not what a power failure has left of one."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()  # without decoding it
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what PIL raises
        return False
    return True


def reduced(path: Path):
    """A picture of at most GRID_WIDTH pixels."""
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((GRID_WIDTH, 10 * GRID_WIDTH))
    return image


def embedded(path: Path, kind: str) -> str:
    """A picture as a data URL: "png" as it is, "jpeg" reduced to GRID_WIDTH."""
    content = path.read_bytes()
    if kind == "jpeg":
        buffer = io.BytesIO()
        reduced(path).save(buffer, "JPEG", quality=QUALITY)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(path: Path, kind: str) -> str:
    if not is_picture(path):
        return ""
    return f'<img src="{embedded(path, kind)}" alt="{escape(path.stem)}">'


def table(rows: Sequence[Sequence[object]], classes: Sequence[str] = ()) -> str:
    """An HTML table; the first cell of each row is its heading."""
    lines = []
    for index, (head, *cells) in enumerate(rows):
        kind = f' class="{classes[index]}"' if classes and classes[index] else ""
        listed = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr{kind}><th>{escape(str(head))}</th>{listed}</tr>")
    return f"<table>{''.join(lines)}</table>"


def training_hours(train: list[dict]) -> float:
    """Time spent in training steps, by the recorded speed of every stretch."""
    seen = [0, *(record["images_seen"] for record in train)]
    stretches = [(r["images_seen"] - before) / r["images_per_second"]
                 for before, r in zip(seen, train)]
    return sum(stretches) / 3600


def facts_section(run: dict, train: list[dict], validation: list[dict]) -> str:
    def at(key: str) -> str:
        return moment(run[key]) if isinstance(run.get(key), (int, float)) else ""

    rows = [("state", run.get("state", "unknown")), ("last start", at("started")),
            ("ended", at("ended")), ("machine", run.get("machine", ""))]
    if train:
        last = train[-1]
        rows += [
            ("steps", f"{last['step']} of {run.get('total_steps', 'unknown')}"),
            ("images seen", f"{last['images_seen']:,}"),
            ("time in training steps", f"{training_hours(train):.2f} h"),
            ("speed", f"{last['images_per_second']:.1f} images/s"),
            ("energy", energy_text(train)),
            ("peak memory", f"{last.get('peak_memory_gib', 0):.1f} GiB"),
            ("training loss", f"{last['loss']:.4g}"),
            ("by noise level", ", ".join(
                f"{'n/a' if loss is None else f'{loss:.4g}'} ({word})"
                for loss, word in zip(last["loss_quarters"], quarter_words(train)))
             + ", from least to most noise"),
        ]
    if validation:
        if "warnings" in validation[-1]:
            rows.append(("health", f"{verdict(validation[-1]['warnings'])}, at step "
                         f"{validation[-1]['step']}"))
        best = lowest(validation, "loss_ema")
        rows.append(("validation loss", f"{validation[-1]['loss']:.4g}, EMA "
                     f"{validation[-1]['loss_ema']:.4g}; best EMA {best['loss_ema']:.4g} at step "
                     f"{best['step']}"))
    return table([row for row in rows if row[1] != ""])


def config_section(plain: dict) -> str:
    """Settings, those first that differ from the preset of the mode."""
    if not plain:
        return "<p>config.json is missing.</p>"
    try:
        ours, preset = settings.from_dict(plain), settings.PRESETS[plain["mode"]]()
    except (settings.ConfigError, KeyError, TypeError):  # of another version
        return table(list(settings.flatten(plain).items()))
    changed = settings.differences(preset, ours)
    first = [(name, new, f"instead of {old!r}") for name, (old, new) in changed.items()]
    every = settings.flatten(settings.to_dict(ours))
    rest = [(name, value, "") for name, value in every.items() if name not in changed]
    return table(first + rest, ["changed"] * len(first) + [""] * len(rest))


def grids_section(grids: list[tuple[int, Path]]) -> str:
    if not grids:
        return "<p>No grid has been drawn yet.</p>"
    images = "".join(
        f'<img src="{embedded(path, "jpeg")}" alt="step {step}" hidden>' for step, path in grids
    )
    last = len(grids) - 1
    return (
        f'<p><span id="shown"></span></p><input type="range" id="step" min="0" max="{last}" '
        f'value="{last}" aria-label="training step"><div id="grids">{images}</div>'
        f"<script>{SLIDER}</script>"
    )


def scores_section(folder: Path) -> str:
    records = read_records(folder / "evaluation" / "scores.jsonl")
    if not records:
        return "<p>Not evaluated yet: <code>make evaluate</code></p>"
    rows = [("step", "sampler", "guidance", "n", "agreement", "Frechet distance", "FID")]
    for record in records:
        agreement, fid = record.get("agreement"), (record.get("inception") or {}).get("fid")
        distance, as_many, floor = (
            record.get(f"frechet_distance{end}") for end in ("", "_at_n_floor", "_floor")
        )
        n, n_floor = record.get("n", ""), record.get("n_floor")
        fewer = "" if as_many is None or n == n_floor else f"of {n_floor} {as_many:.4g}, "
        sampler = [record.get("sampler", ""), f"{record.get('num_inference_steps', '')} steps"]
        sampler += ["raw weights"] * (record.get("weights") == "raw")
        guidance = f"{record.get('guidance_scale', '')}"
        if (interval := record.get("guidance_interval", [0, 1])) != [0, 1]:
            guidance += f" in {interval[0]:g} to {interval[1]:g}"
        rows.append((
            record.get("step", ""), ", ".join(sampler), guidance, n,
            "" if agreement is None else f"{agreement:.1%}",
            "" if distance is None else f"{distance:.4g}"
            + ("" if floor is None else f" ({fewer}held-out {floor:.4g})"),
            "" if fid is None else f"{fid:.4g}",
        ))
    return table(rows)


def write_report(folder: Path) -> Path:
    """report.html of a run directory, and samples.gif beside it where grids have been drawn."""
    run, plain = read_json(folder / "run.json"), read_json(folder / "config.json")
    run["state"] = read_facts(folder)["state"]  # which knows of a run that was killed
    records = read_metrics(folder)
    train, validation, warnings = by_kind(records, "train", "validation", "warning")
    grids = grid_files(folder)
    title = f"{plain.get('mode', run.get('mode', ''))} run in {folder}"
    cautions = table([(f"step {w['step']}", w["message"]) for w in warnings[-20:]],
                     ["warning"] * len(warnings))
    sections = {
        "Facts": facts_section(run, train, validation),
        "Warnings": cautions if warnings else "<p>None.</p>",
        "Samples through training": grids_section(grids),
        "Originals": picture(sample_path(folder, 0, "originals"), "jpeg"),
        "Verdict": picture(folder / "verdict.png", "jpeg"),
        "Curves": picture(folder / "training_curves.png", "png"),
        "Scores": scores_section(folder),
        "Commands": f"<p>To continue:</p><pre>{escape(str(run.get('command') or ''))}</pre>"
        f"<p>To draw from it:</p><pre>python generate_samples.py {escape(str(folder))}</pre>",
        "Settings": config_section(plain),
    }
    body = "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    path = folder / "report.html"
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")
    if len(grids) > 1:
        steps = ", ".join(str(step) for step, _ in grids)
        save_animation([reduced(file) for _, file in grids], folder / "samples.gif",
                       f"EMA samples of the same seeds at steps {steps}")
    return path


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="run directory (default: the newest)")
    folder = parser.parse_args().folder
    if folder is None:
        runs = [path for path in RUN_DIRECTORIES.values() if (path / "metrics.jsonl").exists()]
        if not runs:
            sys.exit("error: no run here yet; train one first: make demo, make train")
        folder = max(runs, key=lambda path: (path / "metrics.jsonl").stat().st_mtime)
    folder = folder.expanduser()
    if not (folder / "metrics.jsonl").exists():
        sys.exit(f"error: {folder} holds no run: it has no metrics.jsonl; name a run directory")
    print(f"report: {write_report(folder)}")
    return 0


if __name__ == "__main__":
    exit_with(main, ())
