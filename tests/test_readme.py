"""Every command that README shows, run as a user types it, in one repository, one after another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_FLAGS
from PIL import Image

from config import CLASS_NAMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAM = r"(?:make|python3?|torchrun|ruff) "
TINY = " ".join(TINY_FLAGS)
SHORT = f"{TINY} --epochs 1 --batch-size 10"
# What makes a command short here; a command is not tested before it has an entry.
ARGUMENTS = {
    "make demo": f"{SHORT} --samples 20", "make train": SHORT, "make overfit": SHORT,
    "make test": SHORT, "make quick-test": SHORT,
    "make evaluate": "--no-inception --samples 2",
    "make doctor": TINY, "make bench": f"{SHORT[: SHORT.index(' --diffusion')]} --rounds 1",
    "make check": "--collect-only", "python train_model.py": SHORT,
}
PLAIN = {
    "make data", "make report", "make generate", "make status", "make monitor", "make gpu-status",
    "make help", "make install", "make clean", "make clean-all", "make clean-cuda",
    "python generate_samples.py", "ruff check",
}


def commands() -> list[str]:
    """In the order of the text, those that remove something last."""
    blocks = [line.partition(" #")[0] for line in re.findall(rf"^    ({PROGRAM}.*)$", README, re.M)]
    spans = re.findall(rf"`({PROGRAM}[^`]*)`", README)
    every = dict.fromkeys(re.sub(r"\s+", " ", text).strip() for text in blocks + spans)
    return sorted(every, key=lambda command: "clean" in command)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the product beside twenty pictures."""
    folder = tmp_path_factory.mktemp("repository")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "Makefile",
                 ROOT / "ruff.toml"]:
        shutil.copy(path, folder)
    for name in ("conditional_diffusion", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for label, name in enumerate(CLASS_NAMES):
        for number in range(2):
            path = folder / "pictures" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (25 * label, 100 * number, 80)).save(path)
    return folder


@pytest.mark.parametrize("command", commands())
def test_command(command, repository, monkeypatch):
    words = " ".join(command.split()[:2])
    assert words in PLAIN or words in ARGUMENTS, "give this command an entry above"
    if command.startswith("ruff"):
        pytest.importorskip("ruff")
        command = f"python -m {command}"
    more = ARGUMENTS.get(words, "")
    if command.startswith("make "):
        own = re.search(r" ARGS='?([^']*)'?$", command)
        more = f"{own[1] if own else ''} {more}".strip()
        command = re.sub(r" ARGS=.*", "", command) + f" PYTHON={sys.executable} ARGS='{more}'"
    else:
        command = f"{command} {more}".replace("python ", f"{sys.executable} ", 1)
        command = command.replace("CHECKPOINT", "checkpoints")
    monkeypatch.setenv("DATA_DIR", str(repository / "pictures"))
    monkeypatch.setenv("HOME", str(repository))  # whose caches make clean-cuda clears
    monkeypatch.setenv("TMPDIR", str(repository))
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        command, shell=True, cwd=repository, env=os.environ | {"CONFIRM": "yes"},
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )
    said = done.stdout + done.stderr
    if "overfit" in command or "make test" in command:  # one epoch memorises nothing
        assert done.returncode != 0 and "FAIL: every class must be right" in said, said
    else:
        assert done.returncode == 0, said
    assert "Traceback" not in said, said
