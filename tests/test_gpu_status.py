"""gpu_status.py: readings of nvidia-smi, the diagnoses, the screen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_status
from gpu_status import Facts, diagnose, format_gpus, query_gpus

ONE_GPU = "0, NVIDIA H200, 87, 12595, 143771, 45, 350.12\n"
MIG_GPU = "0, NVIDIA A100-SXM4-40GB, [N/A], 1024, 40960, 33, [Not Supported]\n"
DRIVER_ERROR = ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
                "Make sure that the latest NVIDIA driver is installed and running.\n")
OLD_HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |\n"
NEW_HEADER = "| NVIDIA-SMI 610.43.02  KMD Version: 610.43.02   CUDA UMD Version: 13.3     |\n"


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi which says what is given first on the PATH."""

    def fake(csv, header=OLD_HEADER, status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "csv").write_text(csv)
        (folder / "header").write_text(header)
        script = folder / "nvidia-smi"
        choice = f"--query-gpu={gpu_status.QUERY}) cat {folder}/csv;; *) cat {folder}/header;;"
        script.write_text(f'#!/bin/sh\ncase "$1" in {choice} esac\nexit {status}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return script

    return fake


def test_one_gpu(fake_smi):
    fake_smi(ONE_GPU)
    assert format_gpus(query_gpus()) == (
        "GPU 0 NVIDIA H200                87 % used  12.3 of 140.4 GiB   45 C  350 W"
    )


def test_eight_gpus_are_aligned(fake_smi):
    fake_smi("".join(f"{i}, NVIDIA H100 80GB HBM3 of a long name, {i}0, 1024, 81559, 3{i}, "
                     f"{i}20.50\n" for i in range(8)))
    lines = format_gpus(query_gpus()).split("\n")
    assert [line[:6] for line in lines] == [f"GPU {i} " for i in range(8)]
    assert len(set(map(len, lines))) == 1 and len(lines[0]) < 80


def test_fields_without_a_number(fake_smi):
    fake_smi(MIG_GPU)
    assert " n/a % used   1.0 of  40.0 GiB   33 C  n/a W" in format_gpus(query_gpus())


@pytest.mark.parametrize("csv, status, reason", [
    (DRIVER_ERROR, 9, "nvidia-smi failed: NVIDIA-SMI has failed because it couldn't"),
    ("No devices were found\n", 0, "No devices were found"),
    ("", 0, "none is listed"),
])
def test_no_gpu_says_why(fake_smi, csv, status, reason):
    fake_smi(csv, status=status)
    assert query_gpus().startswith(f"No NVIDIA GPU found: {reason}")
    assert max(map(len, format_gpus(query_gpus()).split("\n"))) < 80


def test_nvidia_smi_is_missing_broken_or_hangs(fake_smi, monkeypatch, tmp_path):
    script = fake_smi(ONE_GPU)
    script.write_text("no program")
    assert "nvidia-smi does not answer (" in query_gpus()
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: real(*a, **k | {"timeout": 0.2}))
    assert "timed out" in query_gpus()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpus() == f"No NVIDIA GPU found: {gpu_status.NOT_INSTALLED}"


BROKEN = {"gpus": [["0", "NVIDIA H200"]], "torch_version": "2.14.1", "torch_cuda": "13.0",
          "driver_cuda": "13.3", "problem": "error 999"}
DIAGNOSES = {
    "torch missing": ({"torch_version": "", "problem": "No module"}, False, "make install`."),
    "works": ({"problem": ""}, True, "Training will use the GPU"),
    "no driver": ({"gpus": gpu_status.NOT_INSTALLED}, True, "Training works on the CPU"),
    "no device": ({"gpus": "No devices were found"}, True, "The driver is there, but sees no GPU"),
    "broken driver": ({"gpus": "nvidia-smi failed: mismatch"}, False, "restart the machine"),
    "CPU build": ({"torch_cuda": None}, False, "whl/cu130"),
    "CPU build, old driver": ({"torch_cuda": None, "driver_cuda": "12.7"}, False, "whl/cu126"),
    "old driver": ({"driver_cuda": "12.4"}, False, "upgrade the driver, or else replace torch:\n"),
    "older driver": ({"driver_cuda": "11.8"}, False, "CUDA 13.0. Cure: upgrade the driver"),
    "minor versions need not agree": ({"torch_cuda": "13.2", "driver_cuda": "13.0"}, False, "fit"),
    "hidden": ({"visible": "", "problem": "No CUDA GPUs are available"}, False, "`unset CUDA_VIS"),
    "not hidden": ({"visible": "0"}, False, "error 999"),
    "fits but fails": ({}, False, "CUDA does not work (error 999)"),
    "no kernel, old GPU": ({"problem": "CUDA error: no kernel image is"}, False, "whl/cu126"),
    "no kernel, new GPU": (
        {"problem": "CUDA error: no kernel image is", "torch_cuda": "12.6"}, False, "whl/cu130"),
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_diagnosis(name):
    changes, works, words = DIAGNOSES[name]
    verdict, sentence = diagnose(Facts(**BROKEN | changes))
    assert verdict is works
    assert words in sentence
    assert "11.8" not in sentence or "whl" not in sentence, "there is no torch for such a driver"


FAKE_TORCH = """
import types, warnings
__version__ = "2.14.1"
version = types.SimpleNamespace(cuda="13.0")
class cuda:
    def device_count():
        warnings.warn("noise")
        return 1
    def get_device_properties(index):
        return types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=2**37)
def ones(count, device):
    if {problem!r}:
        raise RuntimeError({problem!r})
    return types.SimpleNamespace(item=lambda: 1.0)
"""


def run_with_torch(tmp_path, source, *flags):
    (tmp_path / "torch.py").write_text(source)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    script = Path(gpu_status.__file__)
    return subprocess.run([sys.executable, script, *flags], text=True, capture_output=True,
                          timeout=60, env=environment)


def test_screen_of_a_working_machine(fake_smi, tmp_path):
    fake_smi(ONE_GPU, NEW_HEADER)
    done = run_with_torch(tmp_path, FAKE_TORCH.format(problem=""))
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch                 2.14.1, built for CUDA 13.0\n" in done.stdout
    assert "NVIDIA driver         610.43.02, serves CUDA up to 13.3\n" in done.stdout
    assert "CUDA_VISIBLE_DEVICES  '0'\n" in done.stdout
    assert "cuda:0                NVIDIA H200, capability 9.0, 128.0 GiB, bf16 yes" in done.stdout
    assert "\nGPU 0 NVIDIA H200 " in done.stdout
    assert "\nDiagnosis: Training will use the GPU, cuda:0.\n" in done.stdout


def test_screen_of_an_old_driver(fake_smi, tmp_path):
    fake_smi(ONE_GPU)
    done = run_with_torch(tmp_path, FAKE_TORCH.format(problem="The driver is too old\nand more"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "NVIDIA driver         550.54.15, serves CUDA up to 12.4\n" in done.stdout
    assert f"\n  {sys.executable} -m pip install torch torchvision --index-url" in done.stdout


@pytest.mark.parametrize("source", ["raise ImportError('libcudart is missing')", "half = 'there'"])
def test_torch_that_cannot_be_loaded(fake_smi, tmp_path, source):
    fake_smi(ONE_GPU)
    done = run_with_torch(tmp_path, source)
    assert (done.returncode, done.stderr) == (1, "")
    assert "Diagnosis: torch cannot be loaded (" in done.stdout


def test_json_says_the_same_to_programs(fake_smi, tmp_path):
    fake_smi(MIG_GPU, NEW_HEADER)
    done = run_with_torch(tmp_path, FAKE_TORCH.format(problem=""), "--json")
    content = json.loads(done.stdout)
    assert done.returncode == 0 and content["well"] is True
    gpu = dict(zip(content["query"], content["gpus"][0]))
    assert gpu["name"] == "NVIDIA A100-SXM4-40GB" and gpu["power.draw"] == "[Not Supported]"
    assert content["driver"] == "610.43.02" and content["torch_version"] == "2.14.1"
    assert content["diagnosis"] == "Training will use the GPU, cuda:0."


def test_processes_on_the_gpu(fake_smi, tmp_path):
    script = fake_smi(ONE_GPU)
    listed = ("4711, /home/someone/with/a/long/path/to/an/environment/.venv/bin/python, 12595\n"
              "4712, [Not Found], [N/A]\nNo running processes found\n")
    (tmp_path / "bin" / "processes").write_text(listed)
    case = f'case "$1" in --query-compute-apps=*) cat {tmp_path}/bin/processes; exit;; esac\n'
    script.write_text(script.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{case}"))
    processes = gpu_status.query_processes()
    assert [pid for pid, _, _ in processes] == ["4711", "4712"]
    first, second = gpu_status.format_processes(processes).split("\n")
    assert first.startswith("process     4711 ") and first.endswith(".venv/bin/python   12.3 GiB")
    assert "[Not Found]" in second and second.endswith("   n/a GiB")
    assert max(len(first), len(second)) < 80
    done = run_with_torch(tmp_path, FAKE_TORCH.format(problem=""))
    assert "\nprocess     4711 " in done.stdout


def test_no_process_where_nvidia_smi_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_status.query_processes() == []


NVML_SOURCE = """
#include <string.h>
static unsigned long long counter = 5000;  /* millijoules */
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  *device = (void *)0x123456789abcUL;
  return strcmp(uuid, "GPU-ffc79498-8ff3") ? 6 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
  if (device != (void *)0x123456789abcUL || counter == 0) return 3;
  *energy = counter += 2500;
  if (counter > 12000) counter = 0;
  return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="stands in for the driver's library in C")
def test_energy_between_readings(tmp_path, monkeypatch):
    """Against a library with NVML's interface that counts 2.5 J per reading, three times."""
    (tmp_path / "nvml.c").write_text(NVML_SOURCE)
    library = tmp_path / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(gpu_status, "NVML", str(library))
    assert gpu_status.EnergyMeter("another").joules() is None
    meter = gpu_status.EnergyMeter("ffc79498-8ff3")
    assert [meter.joules() for _ in range(4)] == [2.5, 2.5, None, None]


def test_no_energy_without_a_gpu_or_its_driver(monkeypatch):
    assert gpu_status.EnergyMeter(None).joules() is None
    monkeypatch.setattr(gpu_status, "NVML", "libabsent.so")
    assert gpu_status.EnergyMeter("ffc79498-8ff3").joules() is None
    monkeypatch.setattr(gpu_status, "NVML", "libc.so.6")  # a library without its functions
    assert gpu_status.EnergyMeter("ffc79498-8ff3").joules() is None
