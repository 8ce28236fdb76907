"""Every hyperparameter, once, with its unit and reason; the modes; overrides; plain dicts.

Order of precedence: the defaults below (the full run) < the mode's preset, or what a run that is
continued was started with < the command line.
"""

import difflib
import math
import operator
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace

CIFAR10_CLASSES = (  # in the order of its labels
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
CLASS_NAMES = CIFAR10_CLASSES  # or the names of your own pictures' folders, ("oak", "elm", ...)


LARGEST_SEED = 2**63 - 1
LARGEST = {int: 2**31 - 1, float: 1e30}  # of settings without a bound of their own: within torch's
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SWITCH = ("auto", "true", "false")
SAMPLERS = ("ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++")
AUTO_BATCH = 0  # what "auto" means as a batch size
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         tuple[int, ...]: "whole numbers separated by commas",
         tuple[float, ...]: "numbers separated by commas"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and the cure."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def nearest_word(name: str, valid: typing.Collection[str]) -> str | None:
    """The valid word nearest to a mistyped one, or None.

    Also by the last part alone: "epochs" and "lerning_rate" find their settings.
    """
    last_parts = {word.rpartition(".")[2]: word for word in valid}
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(name.lstrip("-"), last_parts, n=1, cutoff=0.5)
    return last_parts.get(close[0], close[0]) if close else None


def nearest(name: str, valid: typing.Collection[str]) -> str:
    """A phrase that names the valid word nearest to a mistyped one."""
    word = nearest_word(name, valid)
    return f"the nearest valid one is {word!r}" if word else f"valid: {', '.join(valid)}"


def has_type(value, kind) -> bool:
    """Whether a value has a field's declared type; a whole number is fine for a float."""
    if isinstance(kind, types.GenericAlias):
        return isinstance(value, tuple) and all(has_type(v, kind.__args__[0]) for v in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def option(default, help: str, *, least=None, above=None, most=None, one_of=()):
    """A field whose meaning and unit also appear in `--help`, and the values it may take.

    Every entry of a tuple has to keep the bounds.
    """
    bounds = {"least": least, "above": above, "most": most, "one_of": one_of}
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True)
class Section:
    """Settings that belong together; values of the wrong type or out of bounds are refused."""

    def __post_init__(self):
        prefix = type(self).__name__.removesuffix("Config").lower()
        for f in fields(self):
            name, value, bounds = f"{prefix}.{f.name}", getattr(self, f.name), f.metadata
            require(has_type(value, f.type), f"{name} must be {KINDS[f.type]}, not {value!r}")
            if valid := bounds["one_of"]:
                require(value in valid, f"{name} {value!r} is unknown; {nearest(value, valid)}")
            for one in value if isinstance(value, tuple) else (value,):
                most = LARGEST.get(type(one)) if bounds["most"] is None else bounds["most"]
                for bound, word, keeps in ((most, "at most", operator.le),
                                           (bounds["least"], "at least", operator.ge),
                                           (bounds["above"], "above", operator.gt)):
                    good = bound is None or keeps(one, bound)
                    require(good, f"{name} must be {word} {bound}, not {one}")


@dataclass(frozen=True)
class ModelConfig(Section):
    base_channels: int = option(64, "channels of the first level", least=1)
    channel_mult: tuple[int, ...] = option(
        (1, 2, 4), "channels of each level, in base_channels; each level halves the feature map",
        least=1,
    )
    num_res_blocks: tuple[int, ...] = option(
        (2, 3, 3), "residual blocks of each level, on the way down and again on the way up",
        least=1,
    )
    attention_sizes: tuple[int, ...] = option(
        (16, 8), "feature map sizes, in positions a side, that get self-attention"
    )
    patch_size: int = option(
        4, "pixels a side of a patch: 4 puts the first level of a 128-pixel image at 32x32", least=1
    )
    largest_unit: float = option(
        8.0, "the network adds to a linear guess in units of what that leaves open at each "
        "frequency, at most this; larger ones learn faster, but memorise more slowly", above=0
    )
    time_embed_dim: int = option(128, "width of the time embedding", least=2)
    class_embed_dim: int = option(128, "width of the class embedding", least=1)
    dropout: float = option(0.0, "dropout probability in residual blocks", least=0)

    def __post_init__(self):
        super().__post_init__()
        require(self.time_embed_dim % 2 == 0, "model.time_embed_dim must be even")
        require(
            len(self.channel_mult) == len(self.num_res_blocks) > 0,
            f"model.channel_mult {self.channel_mult} and model.num_res_blocks "
            f"{self.num_res_blocks} need one entry per level each",
        )
        require(self.dropout < 1, f"model.dropout must be below 1, not {self.dropout}")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    num_train_timesteps: int = option(1000, "diffusion timesteps T", least=2)
    prediction_type: str = option(
        "v_prediction", "epsilon, sample or v_prediction",
        one_of=("epsilon", "sample", "v_prediction"),
    )
    reference_size: int = option(
        32, "image size in pixels for which the plain cosine schedule is right; the data are "
        "enlarged 32-pixel pictures, so larger images get proportionally more noise", least=1
    )
    min_snr_gamma: float = option(
        5.0, "min-SNR loss weighting; 0 weighs all timesteps alike", least=0
    )


@dataclass(frozen=True)
class DataConfig(Section):
    dataset: str = option(
        "cifar10", "cifar10, or pictograms drawn by the program", one_of=("cifar10", "pictograms")
    )
    data_dir: str = option("", "folder, zip or archive with the pictures; empty: search")
    image_size: int = option(
        128, "height and width in pixels of what the model sees", least=1, most=4096
    )
    samples_per_class: int = option(0, "training images per class; 0: all there are", least=0)
    repeats: int = option(1, "times each training image is shown per epoch", least=1, most=10_000)
    horizontal_flip: bool = option(True, "mirror each training image with probability 1/2")
    skip_unreadable: bool = option(False, "leave out images that cannot be read, with a count")


@dataclass(frozen=True)
class TrainConfig(Section):
    epochs: int = option(100, "passes over the training images", least=1)
    batch_size: int = option(
        128, "images per optimizer step; auto or 0: what fits on the GPU", least=AUTO_BATCH
    )
    optimizer: str = option(
        "muon", "muon (for weight matrices, AdamW for the rest) or adamw (for all)",
        one_of=("muon", "adamw"),
    )
    learning_rate: float = option(1e-3, "peak learning rate", above=0)
    warmup_steps: int = option(500, "steps of linear warm-up to the peak", least=0)
    final_lr_fraction: float = option(
        0.02, "learning rate at the last step, in peaks (cosine)", least=0, most=1
    )
    weight_decay: float = option(0.01, "decoupled weight decay", least=0)
    grad_clip: float = option(
        1.0, "largest gradient norm; longer gradients are scaled to it", above=0
    )
    class_dropout_prob: float = option(
        0.1, "probability of training on the null label, which guidance needs; 0: no guidance",
        least=0, most=1,
    )
    ema_halflife_images: int = option(
        500_000, "longest half-life of the weight average, in images", least=1
    )
    ema_rampup_ratio: float = option(
        0.1, "the half-life is at most this share of the images seen, so short runs average too",
        above=0,
    )
    seed: int = option(0, "seed of weights, data order and noise", least=0, most=LARGEST_SEED)
    device: str = option("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    precision: str = option(
        "auto", "auto (on CUDA bf16, or fp16 with loss scaling, if the GPU is fast at it), fp32 "
        "(TF32 stays off), bf16, fp16", one_of=PRECISIONS
    )
    channels_last: str = option(
        "auto", "memory layout of the network: auto (on CUDA), true, false", one_of=SWITCH
    )
    compile: str = option(
        "auto", "torch.compile of the training step: auto (on CUDA), true, false; the first step "
        "then takes minutes", one_of=SWITCH
    )
    cuda_graphs: bool = option(
        True, "with one GPU launch a training step as one CUDA graph, if a trial of it does what "
        "is done without; a fast GPU then need not wait for the host"
    )
    deterministic: bool = option(
        False, "the same weights bit for bit from the same seed on CUDA too, as always on a CPU; "
        "slower"
    )
    log_every: int = option(20, "steps between lines in metrics.jsonl", least=1)
    # A fast GPU takes 2000 steps in half a minute; slower runs are saved every save_minutes.
    validate_every: int = option(
        2000, "steps between validation losses; always at the end", least=1
    )
    validation_images: int = option(512, "held-out images in the validation loss", least=1)
    sample_every: int = option(2000, "steps between sample grids; always at the end", least=1)
    save_every: int = option(
        2000, "steps between checkpoints; always at the end; one of a validated step can be "
        "best.pt", least=1
    )
    save_minutes: float = option(10.0, "longest time between two checkpoints, in minutes", least=0)
    keep_checkpoints: int = option(3, "newest checkpoints kept; older ones but best.pt go", least=1)
    max_skipped_steps: int = option(
        5, "consecutive batches without a finite gradient that are skipped before the run stops",
        least=0,
    )
    max_hours: float = option(0.0, "stop and save after this many hours; 0: no limit", least=0)


@dataclass(frozen=True)
class SampleConfig(Section):
    sampler: str = option(
        "ddpm", f"sampler of generated pictures: {', '.join(SAMPLERS)}", one_of=SAMPLERS
    )
    num_inference_steps: int = option(50, "denoising steps of generated pictures", least=1)
    eta: float = option(
        0.0, "noise of the ddim sampler: 0 none, 1 as much as ddpm", least=0, most=1
    )
    grid_sampler: str = option(
        "sde-dpm-solver++", "sampler of the grids drawn during training and of what is evaluated",
        one_of=SAMPLERS,
    )
    grid_steps: int = option(25, "denoising steps of these", least=1)
    guidance_scale: float = option(2.0, "uncond + scale (cond - uncond); 1: no guidance", least=0)
    guidance_interval: tuple[float, ...] = option(
        (0.0, 1.0), "part of the chain that is guided, as fractions of T; 0 is the clean end",
        least=0, most=1,
    )
    precision: str = option(
        "auto", "auto (bf16 where the GPU has it), fp32, bf16 or fp16", one_of=PRECISIONS
    )
    cuda_graphs: bool = option(
        True, "on a GPU launch the network as one CUDA graph, if a trial predicts the same"
    )
    clip_x_start: bool = option(True, "clip the predicted clean image to [-1, 1] at each step")
    batch_size: int = option(
        100, "pictures denoised together in the grids drawn during training; elsewhere what fits",
        least=1,
    )

    def __post_init__(self):
        super().__post_init__()
        interval = self.guidance_interval
        require(
            len(interval) == 2 and interval[0] <= interval[1],
            f"sample.guidance_interval must be two fractions, low,high, not {interval}",
        )


@dataclass(frozen=True)
class Config:
    mode: str = "full"
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        names = [name.lower() for name in CLASS_NAMES]
        require(
            isinstance(CLASS_NAMES, tuple) and len(set(names)) == len(names) > 0
            and not any(name in ("", ".", "..") or "/" in name for name in names),
            f"CLASS_NAMES in config.py must be different names of folders, not {CLASS_NAMES!r}",
        )
        multiple = self.model.patch_size * 2 ** (len(self.model.channel_mult) - 1)
        require(
            self.data.image_size % multiple == 0,
            f"data.image_size {self.data.image_size} must be a multiple of {multiple}: patches of "
            f"{self.model.patch_size} pixels, halved {len(self.model.channel_mult) - 1} times",
        )
        first = self.data.image_size // self.model.patch_size
        sizes = [first >> level for level in range(len(self.model.channel_mult))]
        wanted = self.model.attention_sizes
        require(
            not wanted or any(size in sizes for size in wanted),
            f"model.attention_sizes {wanted} names no level of the network: they are "
            f"{', '.join(map(str, sizes))} positions a side",
        )
        require(
            self.mode != "overfit" or self.data.samples_per_class >= 1,
            "data.samples_per_class must be at least 1 in an overfit run",
        )
        for name in ("num_inference_steps", "grid_steps"):
            steps, T = getattr(self.sample, name), self.diffusion.num_train_timesteps
            require(steps <= T, f"sample.{name} {steps} exceeds the {T} diffusion timesteps")
        require(
            self.sample.guidance_scale == 1 or self.train.class_dropout_prob > 0,
            f"sample.guidance_scale {self.sample.guidance_scale} needs a trained null label "
            "(train.class_dropout_prob above 0); without one set sample.guidance_scale to 1",
        )


SECTIONS = {f.name: f.type for f in fields(Config) if f.name != "mode"}
OPTIONS = {
    f"{section}.{f.name}": f for section, kind in SECTIONS.items() for f in fields(kind)
}  # "train.epochs" -> its dataclass field


def differences(old: Config, new: Config) -> dict[str, tuple]:
    """{"train.epochs": (100, 3), ...}: the settings in which they differ, old and new."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def full() -> Config:
    """CIFAR-10 at 128x128 on one CUDA GPU."""
    return Config()


def overfit() -> Config:
    """Memorise one image per class with the full model: proves model, data and sampler."""
    return Config(
        mode="overfit",
        model=ModelConfig(largest_unit=2.0),  # memorises in fewer steps
        # A picture has to be recalled from its class alone, at noise levels where min-SNR weights
        # are near zero.
        diffusion=DiffusionConfig(min_snr_gamma=0.0),
        data=DataConfig(samples_per_class=1, repeats=10, horizontal_flip=False),
        train=TrainConfig(
            epochs=15, batch_size=10, learning_rate=2e-3, warmup_steps=20, weight_decay=0.0,
            class_dropout_prob=0.0, log_every=10, validate_every=75, validation_images=20,
            sample_every=75, save_every=150, compile="false",  # it would take longer than the run
        ),
        sample=SampleConfig(num_inference_steps=25, guidance_scale=1.0),
    )


def quick_test() -> Config:
    """Two epochs of the overfit run: a smoke run of everything."""
    config = overfit()
    return replace(
        config,
        mode="quick-test",
        data=replace(config.data, repeats=5),
        train=replace(config.train, epochs=2, warmup_steps=2, log_every=1, validate_every=5,
                      validation_images=10),
        sample=replace(config.sample, num_inference_steps=10, grid_steps=10),
    )


def demo() -> Config:
    """A small model on the built-in pictograms: the whole product on a laptop CPU."""
    return Config(
        mode="demo",
        model=ModelConfig(
            num_res_blocks=(1, 1, 1), attention_sizes=(4,), patch_size=2, largest_unit=2.0
        ),
        data=DataConfig(dataset="pictograms", image_size=32, horizontal_flip=False),
        train=TrainConfig(
            epochs=2, batch_size=32, learning_rate=2e-3, warmup_steps=25, weight_decay=0.0,
            class_dropout_prob=0.0, validate_every=100, validation_images=200, sample_every=200,
            save_every=200, compile="false",
        ),
        sample=SampleConfig(num_inference_steps=25, guidance_scale=1.0),
    )


PRESETS = {"full": full, "overfit": overfit, "quick-test": quick_test, "demo": demo}


def to_dict(config: Config) -> dict:
    """Plain dicts, tuples and numbers, as JSON and checkpoints can hold them."""
    return asdict(config)


def flatten(plain: dict) -> dict[str, object]:
    """{"train.epochs": 100, ...}: every setting of a config's plain dict under its full name."""
    return {
        f"{section}.{key}": value
        for section, settings in plain.items() if isinstance(settings, dict)
        for key, value in settings.items()
    }


def from_dict(plain: dict) -> Config:
    """Inverse of to_dict; ConfigError for a missing section, unknown key or value of wrong type."""
    missing = {"mode", *SECTIONS} - plain.keys()
    require(not missing, f"{', '.join(sorted(missing))} missing")
    return replace(apply_overrides(Config(), flatten(plain)), mode=plain["mode"])


def apply_overrides(config: Config, overrides: dict[str, object]) -> Config:
    """The config with {"train.epochs": 3, ...} applied; values may be strings from a command line.

    Raises ConfigError for an unknown name (with the nearest valid one) or an unusable value.
    """
    changed: dict[str, dict] = {}
    for name, value in overrides.items():
        if name not in OPTIONS:
            raise ConfigError(f"unknown setting {name!r}; {nearest(name, OPTIONS)}")
        section, key = name.split(".")
        changed.setdefault(section, {})[key] = parse_value(name, OPTIONS[name].type, value)
    sections = {name: replace(getattr(config, name), **keys) for name, keys in changed.items()}
    return replace(config, **sections)


def parse_value(name: str, kind, value: object):
    """value as the field's type; strings are read as a person types them."""
    if not isinstance(value, str) or kind is str:
        return tuple(value) if kind is not str and isinstance(value, list) else value
    text = value.strip()
    if name == "train.batch_size" and text == "auto":
        return AUTO_BATCH
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        parts = text.strip("()").split(",")
        return tuple(kind.__args__[0](part) for part in parts if part.strip())
    except (ValueError, KeyError):
        auto = " or auto" if name == "train.batch_size" else ""
        raise ConfigError(f"{name} must be {KINDS[kind]}{auto}, not {value!r}") from None
