"""report.html: complete, self-contained, safe against what is in the files, and alive."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import PICTOGRAMS
from PIL import Image

import report
import train_model
from report import MOST_GRIDS, grid_files, training_hours, write_report

pytestmark = pytest.mark.usefixtures("own_directory")
VOID = {"meta", "img", "input"}  # elements without an end


class Page(HTMLParser):
    """Text by section, pictures, and whether every element ends where it should."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.sections, self.pictures, self.current = [], {"": ""}, [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")  # needs no network
        if tag == "img":
            self.pictures.append(attributes["alt"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.current = None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.current is None:
            self.current = data
            self.sections[data] = ""
        elif self.open and self.open[-1] not in ("style", "script"):
            self.sections[self.current] += " " + data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


@pytest.fixture
def run(call) -> Path:
    """A small run that drew two grids."""
    flags = ["--full", *PICTOGRAMS, "--samples", 4, "--batch-size", 10, "--epochs", 2,
             "--train.sample_every", 5, "--train.weight_decay", 0.125]
    status, said = call(train_model, *flags)
    assert status == 0 and "report: checkpoints/report.html" in said
    return Path("checkpoints")


def test_a_run_writes_its_own_page(run):
    page = Page((run / "report.html").read_text())
    assert list(page.sections) == [
        "", "Facts", "Warnings", "Samples through training", "Originals", "Curves", "Scores",
        "Commands", "Settings",
    ]
    facts = page.sections["Facts"]
    assert "finished" in facts and "8 of 8" in facts and "images seen 80" in facts
    assert re.search(r"threads, torch [\d.]+.*, Python 3", facts)
    assert page.pictures == ["step 5", "step 8", "step_00000000_originals", "training_curves"]
    assert "--train.weight_decay 0.125" in page.sections["Commands"]
    listed = page.sections["Settings"].split()
    assert listed.index("train.weight_decay") < listed.index("train.learning_rate")
    assert "train.weight_decay 0.125 instead of 0.01" in page.sections["Settings"]
    with Image.open(run / "samples.gif") as animation:
        assert animation.n_frames == 2


def test_scores_warnings_and_a_death_are_told(run):
    (run / "evaluation").mkdir()
    score = {"step": 8, "sampler": "ddim", "num_inference_steps": 9, "guidance_scale": 2.0, "n": 7,
             "agreement": 0.25, "frechet_distance": 12.5, "frechet_distance_floor": 0.5,
             "inception": {"fid": 33.25}}
    (run / "evaluation" / "scores.jsonl").write_text(json.dumps(score) + '\n{"step": 8, "sam')
    warning = {"kind": "warning", "step": 3, "message": "loss <b>jumps</b>"}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(warning) + "\n")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": "running"}))
    page = page_of(run)
    assert "8 ddim, 9 steps 2.0 7 25.0% 12.5 (held-out 0.5) 33.25" in page.sections["Scores"]
    score |= {"weights": "raw", "guidance_interval": [0.2, 0.8], "n_floor": 4,
              "frechet_distance_at_n_floor": 13.5}
    (run / "evaluation" / "scores.jsonl").write_text(json.dumps(score))
    assert ("8 ddim, 9 steps, raw weights 2.0 in 0.2 to 0.8 7 25.0% 12.5 (of 4 13.5, held-out 0.5)"
            in page_of(run).sections["Scores"])
    del score["frechet_distance_floor"], score["frechet_distance_at_n_floor"]  # one is held out
    (run / "evaluation" / "scores.jsonl").write_text(json.dumps(score))
    assert "in 0.2 to 0.8 7 25.0% 12.5 33.25" in page_of(run).sections["Scores"]
    assert "step 3 loss <b>jumps</b>" in page.sections["Warnings"]  # as text, not as an element
    assert "state died" in page.sections["Facts"]


def test_an_empty_or_damaged_run_still_has_a_page(tmp_path, monkeypatch):
    folder = tmp_path / "<b>bold"
    folder.mkdir()
    (folder / "run.json").write_text("{")
    page = page_of(folder)
    assert "<b>bold" in page.sections[""]
    assert "No grid" in page.sections["Samples through training"]
    assert "config.json is missing" in page.sections["Settings"]
    (folder / "config.json").write_text(json.dumps({"mode": "full", "model": {"of": "old"}}))
    assert "model.of old" in page_of(folder).sections["Settings"]
    (folder / "samples").mkdir()  # with what a power failure may leave
    for name in ("step_00000008_ema.png", "step_00000009_ema.png", "step_00000000_originals.png"):
        (folder / "samples" / name).touch()
    buffer = io.BytesIO()
    Image.effect_noise((99, 99), 50).save(buffer, "PNG")
    (folder / "samples" / "step_00000010_ema.png").write_bytes(buffer.getvalue()[:2000])
    assert "No grid" in page_of(folder).sections["Samples through training"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    Image.new("L", (99, 99)).save(folder / "samples" / "step_00000011_ema.png")
    assert "No grid" in page_of(folder).sections["Samples through training"]


def test_many_grids_are_thinned_out_evenly(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(0, 1000, 10):
        Image.new("RGB", (1, 1)).save(tmp_path / "samples" / f"step_{step:08d}_ema.png")
    steps = [step for step, _ in grid_files(tmp_path)]
    assert len(steps) == MOST_GRIDS and steps[0] == 0 and steps[-1] == 990
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert max(gaps) - min(gaps) <= 10


def test_time_in_training_is_images_over_speed():
    train = [{"images_seen": 3600, "images_per_second": 1.0},
             {"images_seen": 10_800, "images_per_second": 4.0}]
    assert training_hours(train) == pytest.approx(1.5)


def test_the_script_takes_the_newest_run_or_says_what_is_missing(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 0 and "report: checkpoints/report.html" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py", "nowhere"])
    with pytest.raises(SystemExit, match="nowhere holds no run"):
        report.main()


BROWSER = """
import sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication
application = QApplication(sys.argv)
view = QWebEngineView()
script = '''(() => {
const slider = document.getElementById("step");
const shown = () => [...document.querySelectorAll("#grids img")].filter(i => !i.hidden)
  .map(i => [i.alt, i.naturalWidth > 0]);
const last = shown();
slider.value = 0;
slider.dispatchEvent(new Event("input"));
return JSON.stringify([last, shown(), document.getElementById("shown").textContent]);
})()'''
def ask(loaded):
    view.page().runJavaScript(script, lambda answer: (print("answer", answer), application.quit()))
view.loadFinished.connect(ask)
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
QTimer.singleShot(60000, application.quit)
application.exec()
"""


def test_the_slider_works_in_a_real_browser(run, monkeypatch):
    """Chromium, as Qt ships it: pip install PyQt6-WebEngine."""
    pytest.importorskip("PyQt6.QtWebEngineWidgets", exc_type=ImportError)
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    monkeypatch.setenv("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")
    path = str((run / "report.html").resolve())
    done = subprocess.run([sys.executable, "-c", BROWSER, path], capture_output=True, text=True)
    (answer,) = [line[7:] for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert json.loads(answer) == [[["step 8", True]], [["step 5", True]], "step 5"]


def test_facts_say_which_loss_is_which():
    train = [{"step": 9, "images_seen": 90, "images_per_second": 1.0, "loss": 0.5,
              "loss_quarters": [0.1, 0.2, 0.3, 0.4], "learning_rate": 1.0}]
    validation = [{"step": 4, "loss": 0.45, "loss_ema": 0.25},
                  {"step": 8, "loss": 0.4, "loss_ema": 0.3}]
    page = report.facts_section({}, train, validation)
    assert "0.4, EMA 0.3; best EMA 0.25 at step 4" in page
    assert re.search(r"0\.1 .*0\.2 .*0\.3 .*0\.4 .*from least", page)


def test_the_last_warnings_are_shown_and_grids_in_their_order(tmp_path):
    (tmp_path / "samples").mkdir()
    colours = {5: (255, 0, 0), 8: (0, 0, 255)}
    for step, colour in colours.items():
        path = tmp_path / "samples" / f"step_{step:08d}_ema.png"
        Image.new("RGB", (64, 64), colour).save(path)
    warnings = [{"kind": "warning", "step": s, "message": f"number {s} "} for s in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, warnings)))
    html = write_report(tmp_path).read_text()
    assert "number 30 " in html and "number 11 " in html and "number 10 " not in html
    assert 'max="1" value="1"' in html  # the slider starts at the last one
    with Image.open(tmp_path / "samples.gif") as animation:
        for frame, colour in enumerate(colours.values()):
            animation.seek(frame)
            assert animation.convert("RGB").getpixel((32, 32)) == colour


def test_odd_contents_of_a_run_do_not_hinder_its_report(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("step_00000001_ema", "step_best_ema"):
        Image.new("RGB", (64, 64)).save(tmp_path / "samples" / f"{name}.png")
    (tmp_path / "run.json").write_text('{"started": "yesterday", "command": null}')
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.jsonl").write_text('{"step": 7, "inception": null}\n')
    page = page_of(tmp_path)
    assert "7" in page.sections["Scores"] and "step 1" in page.pictures


def test_a_report_of_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    assert "caf?" in write_report(folder).read_text()
