"""What the scripts share: flags for every setting, errors in one sentence, the device."""

import argparse
import os
import sys
from collections.abc import Callable

import config as settings
from config import CLASS_NAMES, Config, ConfigError

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
    "--batch-size": "sample.batch_size",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one sentence naming the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message}; `python {self.prog} --help` lists what there is\n")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            self.exit(2, f"error: unknown argument {word!r}; {nearest_flag(word, flags)}\n")
        return parsed


def nearest_flag(word: str, flags: list[str]) -> str:
    if not word.startswith("-"):
        return "`--help` lists what there is"
    # "--epoch", "--train.epoch" and "--lerning_rate" should all find their setting.
    close = settings.nearest(word, flags)
    if close.startswith("valid:"):
        bare = {flag.rpartition(".")[2]: flag for flag in flags if "." in flag}
        close = settings.nearest(word.lstrip("-"), bare)
        for name, flag in bare.items():
            close = close.replace(repr(name), repr(flag))
    return "`--help` lists what there is" if close.startswith("valid:") else close


def add_config_flags(
    parser: argparse.ArgumentParser,
    sections: tuple[str, ...],
    short_flags: dict[str, str] = TRAINING_FLAGS,
    defaults: str = "",
) -> None:
    """One flag per setting of these sections, `--train.epochs 3`, plus the short forms.

    defaults says where a setting comes from that is not given; else it is that of the full run.
    """
    for section in sections:
        group = parser.add_argument_group(f"{section} settings")
        for name, field in settings.OPTIONS.items():
            if not name.startswith(f"{section}."):
                continue
            short = [flag for flag, full in short_flags.items() if full == name]
            kind, default = field.type.__name__, field.default
            if isinstance(default, tuple):
                kind = ",".join([field.type.__args__[0].__name__] * 2) + ",..."
                default = ",".join(map(str, default))
            group.add_argument(
                *short, f"--{name}", dest=name, metavar=kind.upper(), default=argparse.SUPPRESS,
                help=f"{field.metadata['help']} ({defaults or f'full run: {default}'})",
            )  # fmt: skip


def config_overrides(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags; DATA_DIR in the environment counts as --data-dir."""
    given = {name: value for name, value in vars(args).items() if name in settings.OPTIONS}
    if os.environ.get("DATA_DIR"):
        given.setdefault("data.data_dir", os.environ["DATA_DIR"])
    return given


def parse_classes(text: str, class_names: tuple[str, ...] = CLASS_NAMES) -> list[int]:
    """Class indices from "cat,dog,3"; ConfigError names the nearest class to an unknown one."""
    chosen = []
    for word in filter(None, (part.strip().lower() for part in text.split(","))):
        if word in class_names:
            index = class_names.index(word)
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


def parse_count(name: str, text: str) -> int:
    """A whole number of at least 1, or a ConfigError that names the flag."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {text!r}")
    return int(text)


def parse_seed(text: str, count: int) -> int:
    """The first of count seeds that follow each other; ConfigError where one would be too large."""
    seed, largest = settings.parse_value("--seed", int, text), settings.LARGEST_SEED - count + 1
    if not 0 <= seed <= largest:
        raise ConfigError(f"--seed must lie in 0..{largest}, not {seed}")
    return seed


def choose_device(config: Config):
    """The torch device of train.device; ConfigError where it is not to be had.

    With train.deterministic torch is told so as well: it has to be before the device is used.
    """
    import torch

    if config.train.deterministic:
        # cuBLAS needs a workspace of its own per stream (its documentation, "Results
        # reproducibility"); cuDNN follows torch's setting.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # runs a kernel, which a mere allocation would not
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}); `make gpu-status` tells more, "
            "`--device cpu` works anywhere"
        ) from error
    return device


def exit_with(main: Callable[[], int | None], user_errors: tuple[type[Exception], ...]) -> None:
    """Call main and exit; a user's mistake becomes one sentence on stderr and status 1."""
    try:
        sys.exit(main())
    except user_errors as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        sys.exit(f"error: {where}{reason}; check the path, its permissions and the disk")
    except (RuntimeError, MemoryError) as error:
        from conditional_diffusion.memory import reraise_unless_out_of_memory

        reraise_unless_out_of_memory(error)
        sys.exit("error: out of memory; end what else uses the device, or choose smaller settings")
    except KeyboardInterrupt:
        sys.exit(130)


def build_model(config: Config, device):
    """(UNet, CosineNoiseScheduler) of a config, on the device; weights drawn from its seed."""
    import torch

    from conditional_diffusion import CosineNoiseScheduler, UNet

    scheduler = CosineNoiseScheduler(
        config.diffusion.num_train_timesteps,
        image_size=config.data.image_size,
        reference_size=config.diffusion.reference_size,
        prediction_type=config.diffusion.prediction_type,
    )
    torch.manual_seed(config.train.seed)
    model = UNet(
        scheduler.alphas_cumprod, prediction_type=scheduler.prediction_type,
        image_size=config.data.image_size, num_classes=len(CLASS_NAMES), **vars(config.model),
    )  # fmt: skip
    return model.to(device), scheduler.to(device)


def build_sampler(config: Config, scheduler, *, grid: bool = False):
    """The sampler of a config; with `grid` the quicker one of the grids drawn during training."""
    from conditional_diffusion import SAMPLERS

    sample = config.sample
    name = sample.grid_sampler if grid else sample.sampler
    options = {"eta": sample.eta} if name == "ddim" else {}
    return SAMPLERS[name](
        scheduler, num_inference_steps=sample.grid_steps if grid else sample.num_inference_steps,
        guidance_scale=sample.guidance_scale, guidance_interval=sample.guidance_interval,
        clip_x_start=sample.clip_x_start, **options,
    )  # fmt: skip
