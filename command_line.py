"""What the scripts share: flags for every setting, errors in one sentence."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

if sys.version_info < (3, 11):  # before anything that an older one cannot read
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or later is needed "
             "(make: BASE_PYTHON=python3.12)")

import config as settings
from config import ConfigError

# Flags for the common choices, beside the full names that every setting has.
TRAINING_FLAGS = {
    "--data-dir": "data.data_dir",
    "--dataset": "data.dataset",
    "--epochs": "train.epochs",
    "--batch-size": "train.batch_size",
    "--seed": "train.seed",
    "--device": "train.device",
}
SAMPLING_FLAGS = {
    "--sampler": "sample.sampler",
    "--steps": "sample.num_inference_steps",
    "--guidance": "sample.guidance_scale",
}

MOST = 1_000_000  # pictures, rounds and the like
PACKAGES = ("torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL")  # as imported

# Environment variables that launch.py sets for the processes it starts.
LAUNCH_FOLDER = "TRAINING_LAUNCH_FOLDER"  # where they leave these files for it
STATUS, MISTAKE = "status", "mistake"  # one they agree on; the sentence for a user's mistake
CLEARED = "cleared"  # the earlier run is out of the way
COMMAND = "TRAINING_COMMAND"  # what continues their run
LAUNCHER = "TRAINING_LAUNCHER"  # its process number
LOST_STATUS = 76  # of a process that ends because another one did; a protocol error in sysexits.h


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one sentence naming the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.exit(mistake(f"{message}; `python {self.prog} --help` lists what there is", 2))

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            sys.exit(mistake(f"unknown argument {word!r}; {nearest_flag(word, flags)}", 2))
        return parsed


def nearest_flag(word: str, flags: list[str]) -> str:
    flag = settings.nearest_word(word, flags) if word.startswith("-") else None
    return f"the nearest valid one is {flag!r}" if flag else "`--help` lists what there is"


def add_config_flags(
    parser: argparse.ArgumentParser,
    names: Iterable[str] = settings.OPTIONS,
    short_flags: dict[str, str] = TRAINING_FLAGS,
    defaults: str = "",
) -> None:
    """One flag per setting of these names, `--train.epochs 3`, plus the short forms, by section.

    defaults says where a setting comes from that is not given; else it is that of the full run.
    """
    for section, members in groupby(names, lambda name: name.partition(".")[0]):
        group = parser.add_argument_group(f"{section} settings")
        for name in members:
            field = settings.OPTIONS[name]
            short = [flag for flag, full in short_flags.items() if full == name]
            kind, default = field.type.__name__, field.default
            if isinstance(default, tuple):
                kind = ",".join([field.type.__args__[0].__name__] * 2) + ",..."
                default = ",".join(map(str, default))
            group.add_argument(
                *short, f"--{name}", dest=name, metavar=kind.upper(), default=argparse.SUPPRESS,
                help=f"{field.metadata['help']} ({defaults or f'full run: {default}'})",
            )


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint to draw from, and how."""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT",
                        help="checkpoint file or run directory (default: the newest usable one)")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of their EMA")
    parser.add_argument("--seed", metavar="N",
                        help="the first seed; further pictures take the next ones (0)")
    parser.add_argument("--device", dest="train.device", metavar="DEVICE", default="auto",
                        help="auto, cpu, cuda, ...")
    parser.add_argument("--batch-size", "--sample.batch_size", dest="sample.batch_size",
                        metavar="N", default=argparse.SUPPRESS,
                        help="pictures denoised together (auto: what fits)")
    # The grids drawn during training have settings of their own.
    others = ("sample.grid_sampler", "sample.grid_steps", "sample.batch_size")
    wanted = [name for name in settings.OPTIONS
              if name.startswith("sample.") and name not in others]
    add_config_flags(parser, wanted, SAMPLING_FLAGS, "the checkpoint's")


def config_overrides(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags; DATA_DIR in the environment counts as --data-dir."""
    given = {name: value for name, value in vars(args).items() if name in settings.OPTIONS}
    if os.environ.get("DATA_DIR"):
        given.setdefault("data.data_dir", os.environ["DATA_DIR"])
    return given


def parse_classes(text: str, class_names: tuple[str, ...]) -> list[int]:
    """Class indices from "cat,dog,3"; ConfigError names the nearest class to an unknown one."""
    chosen, known = [], [name.lower() for name in class_names]
    for word in filter(None, (part.strip().lower() for part in text.split(","))):
        if word in known:
            index = known.index(word)
        elif word.isdecimal() and int(word) < len(class_names):
            index = int(word)
        else:
            hint = settings.nearest(word, class_names)
            raise ConfigError(
                f"unknown class {word!r}; {hint}, or an index 0..{len(class_names) - 1}"
            )
        if index not in chosen:
            chosen.append(index)
    if not chosen:
        raise ConfigError("no class given; name some of " + ", ".join(class_names))
    return chosen


def parse_whole(name: str, text: str, least: int = 1, most: int = MOST) -> int:
    """A whole number from least to most, or a ConfigError that names the flag."""
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {text!r}")
    return int(text)


def parse_seed(text: str | None, count: int) -> int:
    """The first of count seeds that follow each other; 0 where none is given."""
    text = "0" if text is None else text.strip()
    return parse_whole("--seed", text, 0, settings.LARGEST_SEED - count + 1)


def join_processes():
    """The processes of this call; only the one that leads goes on to speak."""
    from conditional_diffusion import processes

    if processes.LAUNCHED_BY not in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        print(f"waiting for {os.environ['WORLD_SIZE']} processes, which WORLD_SIZE in the "
              "environment speaks of", flush=True)
    launcher = os.environ.get(LAUNCHER)
    joined = processes.join(launcher and int(launcher))
    if not joined.leads:
        sys.stdout = open(os.devnull, "w")
    return joined


def exit_with(main: Callable[[], int | None], user_errors: tuple[type[Exception], ...]) -> None:
    """Call main and exit; a user's mistake becomes one sentence on stderr and status 1."""
    if sys.stdout is None:  # closed by who started us
        sys.stdout = open(os.devnull, "w")
    elif isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    # What was a mistake before a restart still is one.
    launched = os.environ.get(LAUNCH_FOLDER)
    hopeless = launched and Path(launched, MISTAKE).exists()
    status = 1 if hopeless else status_of(main, user_errors)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # At once: a thread of torch.distributed that lets go of a tensor while the interpreter is
        # being taken down would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def status_of(main: Callable[[], int | None], user_errors: tuple[type[Exception], ...]) -> int:
    """What main returns, or 1 after a user's mistake.

    A status that main returns is one that all processes agree on: where launch.py started them, it
    is left for it, because to torchrun every other status than 0 is a failure.
    """
    try:
        status = main() or 0
        if "torch.distributed" in sys.modules:
            from conditional_diffusion.processes import leave

            leave()
    except user_errors as error:
        # Disks and memory may have room again at the next attempt; nothing else changes by itself.
        return complain(error) if isinstance(error, (OSError, MemoryError)) else mistake(error)
    except BrokenPipeError:  # who reads, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        return complain(f"{where}{reason}; check the path, its permissions and the disk")
    except (RuntimeError, MemoryError) as error:
        from conditional_diffusion.memory import is_out_of_memory
        from conditional_diffusion.processes import NoMeeting, loss_of_another

        if isinstance(error, NoMeeting):
            return mistake(error)
        if reason := loss_of_another(error):
            print(f"lost the other processes: {reason}", file=sys.stderr)
            return LOST_STATUS
        if not is_out_of_memory(error):
            raise
        return complain("out of memory; end what else uses the device, or choose smaller settings")
    except KeyboardInterrupt:
        return 130
    if status and os.environ.get(LAUNCH_FOLDER):
        Path(os.environ[LAUNCH_FOLDER], STATUS).write_text(str(status))
        return 0
    return status


def mistake(sentence: object, status: int = 1) -> int:
    """Say what the user got wrong, or let launch.py say it once for all processes and restarts."""
    launched = os.environ.get(LAUNCH_FOLDER)
    if not launched or not Path(launched).is_dir():  # launch.py removes it when it ends
        return complain(sentence, status)
    Path(launched, MISTAKE).write_text(str(sentence))
    return status


def explain_missing_package(kind: type, error: BaseException, trace) -> None:
    """What Python does with an error that nothing caught: one of our packages lacking is a mistake.
    """
    if issubclass(kind, ModuleNotFoundError) and error.name in PACKAGES:
        complain(f"{sys.executable} has no package {error.name}; `rm -rf .venv; make install` "
                 "sets up .venv/bin/python, `pip install -r requirements.txt` another Python")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain_missing_package  # the scripts import this module before any package


def complain(sentence: object, status: int = 1) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status
