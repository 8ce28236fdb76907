"""What the GPUs are doing, and why training does or does not use one (`make gpu-status`)."""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from command_line import Parser, exit_with

QUERY = "index,name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
PROCESS_QUERY = "pid,process_name,used_memory"
NVML = "libnvidia-ml.so.1"  # comes with the driver, as nvidia-smi does
OLDEST_WHEEL = 12  # the major version of CUDA that torch's oldest wheels are built for
NOT_INSTALLED = "nvidia-smi, and so the NVIDIA driver, is not installed"


@dataclass(frozen=True)
class Facts:
    """All that the diagnosis rests on; empty or None is not known."""

    gpus: list[list[str]] | str  # of query_gpus
    driver: str = ""
    driver_cuda: str = ""
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    torch_version: str = ""
    torch_cuda: str | None = None  # None: a build without CUDA
    devices: tuple[str, ...] = ()
    processes: Sequence[list[str]] = ()  # of query_processes
    problem: str = ""  # what torch said when it failed to load or to compute on cuda:0


def first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0]


def nvidia_smi(*arguments: str) -> tuple[str, str]:
    """What nvidia-smi prints, or nothing and why."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=9)
    except FileNotFoundError:
        return "", NOT_INSTALLED
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi does not answer ({error})"
    if done.returncode:
        return "", f"nvidia-smi failed: {first_line(done.stdout + done.stderr)}"
    return done.stdout, ""


def query_gpus() -> list[list[str]] | str:
    """The fields of QUERY for every GPU, or a sentence saying why there is none."""
    output, problem = nvidia_smi(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    gpus = [line.split(", ") for line in output.splitlines() if line.count(", ") == 6]
    return gpus or f"No NVIDIA GPU found: {problem or first_line(output) or 'none is listed'}"


def query_processes() -> list[list[str]]:
    """[pid, name, MiB] of every process that computes on a GPU, as far as the driver tells."""
    output, _ = nvidia_smi(f"--query-compute-apps={PROCESS_QUERY}", "--format=csv,noheader,nounits")
    processes = [line.split(", ") for line in output.splitlines()]
    return [fields for fields in processes if len(fields) == 3 and fields[0].isdigit()]


def format_processes(processes: Sequence[list[str]]) -> str:
    """One line per process, below 80 columns."""
    return "\n".join(
        f"process {pid:>8} {name[-45:]:<45} {figure(used, '.1f', 1024):>6} GiB"
        for pid, name, used in processes
    )


def figure(text: str, form: str, unit: int = 1) -> str:
    """A field as a number, n/a where nvidia-smi gives none, such as [N/A]."""
    try:
        return format(float(text) / unit, form)
    except ValueError:
        return "n/a"


def format_gpus(gpus: list[list[str]] | str) -> str:
    """One aligned line per GPU, below 80 columns."""
    if isinstance(gpus, str):
        return textwrap.fill(gpus, 79)
    return "\n".join(
        f"GPU {index} {name:<24.24} {figure(load, '.0f'):>4} % used "
        f"{figure(used, '.1f', 1024):>5} of {figure(total, '.1f', 1024):>5} GiB "
        f"{figure(heat, '.0f'):>4} C {figure(power, '.0f'):>4} W"
        for index, name, load, used, total, heat, power in gpus
    )


class EnergyMeter:
    """What a GPU has consumed between two readings, by the counter in its driver.

    Args:
        uuid: of the GPU, as torch's device properties give it; None where there is no GPU. With MIG
            the counter is that of the whole GPU.
    """

    def __init__(self, uuid: str | None):
        self.nvml, self.gpu, self.last = None, ctypes.c_void_p(), None
        if uuid is None:
            return
        with contextlib.suppress(OSError, AttributeError):  # no driver, or one too old
            nvml = ctypes.CDLL(NVML)
            name, gpu = f"GPU-{uuid}".encode(), ctypes.byref(self.gpu)
            if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(name, gpu) == 0:
                self.nvml = nvml
                self.last = self._joules()

    def _joules(self) -> float | None:
        """Since the driver was loaded; GPUs before Volta do not count."""
        counter = ctypes.c_ulonglong()
        if self.nvml is None or self.nvml.nvmlDeviceGetTotalEnergyConsumption(
            self.gpu, ctypes.byref(counter)
        ):
            return None
        return counter.value / 1000  # it counts millijoules

    def joules(self) -> float | None:
        """Since the last call, or the first time since the start; None if not known."""
        last, self.last = self.last, self._joules()
        return None if last is None or self.last is None else self.last - last


def torch_facts() -> dict:
    """What torch says about itself and its devices."""
    try:
        import torch  # here, because it takes seconds

        facts = {"torch_version": str(torch.__version__), "torch_cuda": torch.version.cuda}
    except (ImportError, OSError, AttributeError) as error:  # missing or half installed
        return {"problem": first_line(error)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the errors below say the same
        try:
            found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            facts["devices"] = tuple(
                f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} "
                f"GiB, bf16 {'yes' if gpu.major >= 8 else 'no'}" for gpu in found
            )
            torch.ones(1, device="cuda:0").item()
        except (RuntimeError, AssertionError) as error:
            facts["problem"] = first_line(error)
    return facts


def gather_facts() -> Facts:
    header, _ = nvidia_smi()
    # Drivers from 610 on print "KMD Version" and "CUDA UMD Version".
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", header)
    cuda = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", header)
    return Facts(query_gpus(), driver[1] if driver else "", cuda[1] if cuda else "",
                 os.environ.get("CUDA_VISIBLE_DEVICES"), processes=query_processes(),
                 **torch_facts())


def replace_torch(cuda: str) -> str:
    """How to get a torch for this CUDA, of which only the major version matters."""
    wheel = "cu126" if cuda and float(cuda) < 13 else "cu130"
    pip = f"{sys.executable} -m pip"
    return (f"replace torch:\n  {pip} uninstall -y torch torchvision\n  {pip} install torch "
            f"torchvision --index-url https://download.pytorch.org/whl/{wheel}")


def diagnose(facts: Facts) -> tuple[bool, str]:
    """Whether all is well, and a sentence with the cure where it is not."""
    if not facts.torch_version:
        return False, (f"torch cannot be loaded ({facts.problem}). Cure: `rm -rf .venv; make "
                       "install`.")
    if not facts.problem:
        return True, "Training will use the GPU, cuda:0."
    if "no kernel image" in facts.problem:
        # Builds for CUDA 13 have left out the old GPUs, those for CUDA 12 lack the newest.
        other = "12" if (facts.torch_cuda or "").startswith("13") else "13"
        return False, ("This torch has no kernels for cuda:0. Cure: choose another GPU with "
                       f"CUDA_VISIBLE_DEVICES, or else {replace_torch(other)}")
    if "No devices were found" in facts.gpus:
        return True, ("Training works on the CPU, only much slower. The driver is there, but sees "
                      "no GPU; if there is one, `dmesg` may tell why, and a restart may help.")
    if NOT_INSTALLED in facts.gpus:
        return True, ("Training works on the CPU, only much slower; to use an NVIDIA GPU "
                      "install its driver.")
    if isinstance(facts.gpus, str):
        return False, ("The NVIDIA driver does not work. Cure: restart the machine (needed after a "
                       "driver update) or reinstall the driver.")
    if facts.torch_cuda is None:
        return False, ("nvidia-smi sees a GPU, but this torch is a build for the CPU only. Cure: "
                       + replace_torch(facts.driver_cuda))
    if facts.visible is not None and "No CUDA GPUs" in facts.problem:
        return False, "CUDA_VISIBLE_DEVICES hides every GPU. Cure: `unset CUDA_VISIBLE_DEVICES`."
    if facts.driver_cuda and int(float(facts.driver_cuda)) < int(float(facts.torch_cuda)):
        cure = "upgrade the driver"
        if float(facts.driver_cuda) >= OLDEST_WHEEL:
            cure += f", or else {replace_torch(facts.driver_cuda)}"
        return False, (f"The driver serves CUDA up to {facts.driver_cuda}, but torch is built for "
                       f"CUDA {facts.torch_cuda}. Cure: {cure}")
    return False, (f"Driver and torch fit, but CUDA does not work ({facts.problem}). Cure: stop "
                   "what else uses the GPU, restart the machine, or start its container with "
                   "`--gpus all`.")


def format_facts(facts: Facts) -> str:
    """The facts, then the diagnosis; its commands are not wrapped, to remain of use."""
    build = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    serves = f"{facts.driver}, serves CUDA up to {facts.driver_cuda or 'n/a'}"
    rows = [
        ("python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("torch", f"{facts.torch_version}, {build}" if facts.torch_version else "not loaded"),
        ("NVIDIA driver", serves if facts.driver else "none"),
        ("CUDA_VISIBLE_DEVICES", "not set" if facts.visible is None else repr(facts.visible)),
        *((f"cuda:{index}", text) for index, text in enumerate(facts.devices)),
    ]
    sentence, *commands = diagnose(facts)[1].split("\n")
    diagnosis = textwrap.fill(f"Diagnosis: {sentence}", 79, break_on_hyphens=False)
    lines = [f"{label:<22}{text}" for label, text in rows]
    processes = format_processes(facts.processes)
    gpus = format_gpus(facts.gpus) + (f"\n{processes}" if processes else "")
    return "\n".join([*lines, gpus, "", diagnosis, *commands])


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    as_json = parser.parse_args().json
    facts = gather_facts()
    well, diagnosis = diagnose(facts)
    if as_json:
        content = asdict(facts) | {"query": QUERY.split(","), "well": well, "diagnosis": diagnosis}
        print(json.dumps(content, indent=1))
    else:
        print(format_facts(facts))
    return 0 if well else 1


if __name__ == "__main__":
    exit_with(main, ())
