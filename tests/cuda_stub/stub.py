"""Run a script of this repository on a GPU that computes nothing.

    python tests/cuda_stub/stub.py train_model.py --full

From the C files beside this one it builds libraries that torch takes for CUDA's runtime, driver,
cuBLAS and cuDNN. All that the host does is real: choices, allocations and their peak, launches,
compiled kernels, waiting. All numbers read from the GPU are zero, all truths true. Needs Linux,
gcc, Python's headers and torch's build for CUDA 13, and is in the way where there is a GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent
WHEELS = Path(torch.__file__).parent.parent / "nvidia"
HEADERS = WHEELS / "cu13" / "include"
COPIED = {
    "runtime": [WHEELS / "cu13/lib/libcudart.so.13"],
    "libraries": [WHEELS / "cu13/lib/libcublas.so.13", WHEELS / "cu13/lib/libcublasLt.so.13",
                  WHEELS / "cudnn/lib/libcudnn.so.9"],
}  # what each C file stands for


def why_not() -> str:
    """What stops the stub here, in a few words; empty where it works."""
    lacking = [path.name for paths in COPIED.values() for path in paths if not path.exists()]
    if lacking:
        return f"torch has no {', '.join(lacking)}"
    if missing := [tool for tool in ("gcc", "nm") if not shutil.which(tool)]:
        return f"there is no {missing[0]}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python's headers"
    return "there is a GPU" if Path("/dev/nvidiactl").exists() else ""


def defined(path: Path, *options: str) -> set[str]:
    """The functions that a library or an object file offers."""
    listed = subprocess.run(["nm", "--defined-only", *options, path], check=True,
                            capture_output=True, text=True).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    return {name.partition("@")[0] for kind, name in symbols if kind in "TWi"}


def driver_functions() -> set[str]:
    header = (HEADERS / "cuda.h").read_text()
    return {name for pattern in (r"CUDAAPI\s+(cu\w+)\(", r"#define\s+cu\w+\s+(cu\w+_v\d+)\b",
                                 r"\b(cu[A-Z]\w+_ptsz)\b")
            for name in re.findall(pattern, header)}


def build(folder: Path) -> dict[str, str]:
    """Build the libraries into a folder; returns the environment that makes a process use them."""
    major, minor, patch = torch._C._cudnn.getCompileVersion()
    version = 10_000 * major + 100 * minor + patch
    compiler = ["gcc", "-fPIC", "-w", "-O1", f"-I{SOURCE}", f"-I{HEADERS}",
                f"-DCUDNN_VERSION={version}"]

    def objects(name: str, wanted: set[str]) -> list[Path]:
        """Object file of a C file, and functions that only succeed for all else that is wanted."""
        own, others = folder / f"{name}.o", folder / f"{name}_others.c"
        subprocess.run([*compiler, "-c", SOURCE / f"{name}.c", "-o", own], check=True)
        rest = sorted(wanted - defined(own))
        others.write_text("".join(f"long {function}(void) {{ return 0; }}\n" for function in rest))
        return [own, others]

    parts = [part for name, libraries in COPIED.items() for part in objects(name, {
        function for library in libraries for function in defined(library, "-D")
        if re.match("(__)?cu", function)
    })]

    def link(parts: list[Path], name: str) -> None:
        subprocess.run([*compiler, "-shared", *parts, "-o", folder / name, "-ldl", "-lpthread"],
                       check=True)

    link(parts, "libstub.so")
    link(objects("driver", driver_functions()), "libcuda.so.1")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # as Triton's linker looks for it
    return {
        "LD_PRELOAD": str(folder / "libstub.so"), "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder), "STUB_GIB": "80", "STUB_CAPABILITY": "90",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # its plans are beyond the stub
        # Or what is built against the stub's driver would be kept for a real one.
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gib", default="80", help="memory of the GPU")
    parser.add_argument("--capability", default="90", help="90 for 9.0")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"error: the stub does not work here: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | build(Path(folder))
        environment |= {"STUB_GIB": args.gib, "STUB_CAPABILITY": args.capability}
        command = [sys.executable, args.script, *args.arguments]
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
