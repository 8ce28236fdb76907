"""doctor.py: what it finds well, and that each fault is named with its cure."""

import math
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS

import doctor
from conditional_diffusion import TrainingEngine, UNet, memory
from conditional_diffusion.cuda_graphs import RecordingError
from config import CLASS_NAMES
from gpu_status import Facts

pytestmark = pytest.mark.usefixtures("own_directory")
# The data section asks for real pictures, of which there are none here.
FLAGS = TINY_FLAGS


@pytest.fixture
def lines(call, monkeypatch):
    """lines(*flags) -> (exit status, {check: its line})."""
    monkeypatch.setattr("cifar10.SEARCH_PATH", (Path("data/cifar10-128x128"),))
    monkeypatch.setattr(memory, "available_cpu_memory", lambda: 2**34)
    usage = shutil.disk_usage(".")._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    def run(*flags) -> tuple[int, dict[str, str]]:
        status, said = call(doctor, *FLAGS, *flags)
        assert "Traceback" not in said
        assert all(len(line) < 80 or " " not in line.strip() for line in said.splitlines())
        blocks = said.replace("\n" + 17 * " ", " ").splitlines()
        findings = [line for line in blocks if line.startswith(("ok", "note", "FAIL"))]
        return status, {line[6:17].strip(): line for line in findings}

    return run


def test_a_healthy_machine_passes_and_leaves_nothing_behind(lines):
    status, found = lines()
    assert status == 0
    assert {name: line.split()[0] for name, line in found.items()} == {
        "packages": "ok", "GPU": "ok", "writing": "ok", "disk": "ok", "memory": "ok",
        "data": "note", "training": "ok",
    }
    assert f"torch {torch.__version__.split('+')[0]}" in found["packages"]
    assert "on cpu in fp32: a step of 2 images took" in found["training"]
    assert "tries to download CIFAR-10" in found["data"]
    assert list(Path().iterdir()) == []


def failing(status_and_lines, what: str) -> str:
    """The line of the one check that failed."""
    status, found = status_and_lines
    assert status == 1
    assert [name for name, line in found.items() if line.startswith("FAIL")] == [what]
    return found[what]


@pytest.mark.parametrize("missing", ["torch", "tqdm"])
def test_a_missing_package_ends_the_examination(lines, monkeypatch, missing):
    version = metadata.version

    def lacking(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", lacking)
    status, found = lines()
    line = failing((status, found), "packages")
    assert f"{missing} is not installed. Cure: `rm -rf .venv; make install`" in line
    assert "training" not in found


@pytest.mark.parametrize("broken", ["torchvision", "PIL.Image", "numpy"])
def test_a_package_that_cannot_be_imported_is_named(broken):
    code = f"import sys; sys.modules[{broken!r}] = None; import doctor; sys.exit(doctor.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parent)})
    assert done.returncode == 1 and not done.stderr
    name = "pillow" if broken == "PIL.Image" else broken
    assert f"{name} cannot be imported" in " ".join(done.stdout.split())
    assert "rm -rf .venv; make install" in " ".join(done.stdout.split())


def test_an_old_torch_is_named(lines, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.10.1")
    assert "torch 2.11 or later" in failing(lines(), "packages")


def test_a_gpu_that_does_not_work_stops_only_what_needs_it(lines, monkeypatch):
    monkeypatch.setattr(doctor, "gather_facts", lambda: Facts([["0"]], torch_version="2.14.1"))
    monkeypatch.setattr(doctor, "diagnose", lambda facts: (False, "It is broken. Cure: mend it."))
    for device, words in (("auto", "note  GPU"), ("cpu", "note  GPU")):
        status, found = lines("--device", device)
        assert status == 0 and found["GPU"].startswith(words)
        assert found["GPU"].endswith("It is broken. Cure: mend it.")
    assert lines("--device", "cuda")[1]["GPU"].startswith("FAIL")


def test_a_folder_that_cannot_be_written_to(lines, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert "cannot be written to (Permission denied)" in failing(lines(), "writing")


def test_a_full_disk(lines, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    said = failing(lines(), "disk")
    assert ("0.0 GiB free for checkpoints/ and data/, where a full run takes about 4.0 GiB more. "
            "Cure: free some space for checkpoints/ and data/") in said
    assert "takes about 0.0 GiB more" in lines("--dataset", "pictograms")[1]["disk"]


def test_each_disk_is_looked_at(monkeypatch, tmp_path):
    """checkpoints/ may be a link to another disk than the one that is full."""
    other = next((place for place in ("/dev/shm", "/run", "/tmp")
                  if os.path.isdir(place) and os.stat(place).st_dev != os.stat(".").st_dev), None)
    if other is None:
        pytest.skip("there is only one disk here")
    Path("checkpoints").symlink_to(Path(other, "absent", "runs"))
    usage = shutil.disk_usage(".")
    free = {other: 3 * 2**30, str(tmp_path): 5 * 2**30}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free[str(place)]))
    finding = doctor.check_disk({"checkpoints": 4 * 2**30, "data": 4 * 2**30})
    assert not finding.well and finding.cure == "free some space for checkpoints/"
    assert finding.text.startswith("3.0 GiB free for checkpoints/, where a full run takes about")
    assert "; 5.0 GiB free for data/, where" in finding.text


def test_scarce_memory_is_noted(lines, monkeypatch):
    monkeypatch.setattr(memory, "available_cpu_memory", lambda: 2**30)
    status, found = lines()
    assert status == 0 and found["memory"].startswith("note") and "1.0 GiB" in found["memory"]


def test_data_that_cannot_be_used(lines, tmp_path):
    assert "DATA_DIR nowhere does not exist" in failing(lines("--data-dir", "nowhere"), "data")
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures" in failing(lines("--data-dir", "empty"), "data")


def test_data_that_can_be_used(lines, tmp_path):
    for name in CLASS_NAMES:
        folder = tmp_path / "pictures" / "train" / name
        folder.mkdir(parents=True)
        (folder / "1.png").touch()
    status, found = lines("--data-dir", "pictures")
    assert status == 0
    assert found["data"].startswith("ok    data       pictures: 10 pictures, to be prepared ")
    assert "takes about 4.0 GiB more" in found["disk"]
    prepared = Path(re.search(r"by the first run in (\S+)$", found["data"])[1])
    prepared.mkdir(parents=True)
    (prepared / "info.json").touch()
    _, found = lines("--data-dir", "pictures")
    assert f"10 pictures, prepared in {prepared}" in found["data"]
    assert "takes about 0.0 GiB more" in found["disk"]
    assert "built-in pictograms" in lines("--dataset", "pictograms")[1]["data"]
    (folder / "1.png").unlink()
    assert "no training pictures of truck" in failing(lines("--data-dir", "pictures"), "data")


def test_a_step_that_fails_or_gives_no_numbers(lines, monkeypatch):
    def broken(self, *inputs):
        raise RuntimeError("CUDA error: no kernel image is available\nand more")

    def poisoned(self, x_t, timesteps, class_labels):
        return x_t * self.position.mean() * math.nan

    for forward, words in ((broken, "CUDA error: no kernel image"), (poisoned, "not finite")):
        monkeypatch.setattr(UNet, "forward", forward)
        line = failing(lines(), "training")
        assert words in line and "Cure: " in line


def test_a_compiler_that_does_not_work_is_noted(lines, monkeypatch):
    def broken(function):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert lines()[1]["training"].startswith("ok")  # which a CPU does not compile
    status, found = lines("--train.compile", "true")
    assert status == 0 and found["training"].startswith("note")
    assert "torch.compile does not work (Failed to find C compiler). Cure: " in found["training"]


def test_steps_that_are_no_cuda_graphs_are_noted(lines, monkeypatch):
    def record(engine, x_start, class_labels):
        raise RecordingError("a trial did not do the same")

    monkeypatch.setattr("training_run.records_training", lambda config, engine: True)
    monkeypatch.setattr(TrainingEngine, "record", record)
    status, found = lines()
    assert status == 0 and found["training"].startswith("note")
    assert "CUDA graphs (a trial did not do the same). Cure: training goes on" in found["training"]


def test_commands_stand_on_lines_of_their_own(capsys):
    cure = "replace torch:\n  python -m pip uninstall -y torch\n  python -m pip install torch"
    doctor.show("GPU", doctor.Finding(False, "this torch is built without CUDA", cure))
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[-2:]] == [
        "python -m pip uninstall -y torch", "python -m pip install torch"
    ]


def test_a_device_that_is_not_there(lines):
    assert "device 'cuda:9' cannot be used" in failing(lines("--device", "cuda:9"), "training")
