"""Score the samples of a checkpoint, or a folder of pictures, against the data.

    python evaluate_samples.py                               # the newest usable checkpoint
    python evaluate_samples.py CHECKPOINT --samples 100 --sweep 1,1.5,2,3
    python evaluate_samples.py --pictures generated_images

Every score comes with what it depends on, in scores.jsonl beside the drawings.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import command_line as cli

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import config as settings
from build import choose_device
from cifar10 import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    DataError,
    files_below,
    folded,
    locate,
    to_rgb,
    turned,
)
from conditional_diffusion.checkpoint import CheckpointError, require_classes
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.processes import Processes
from config import CLASS_NAMES, Config, ConfigError
from data import PICTOGRAMS_PER_CLASS, load_splits, to_images
from drawing import Drawing, usable_folder
from evaluation import Evaluator, Pictures, draw_confusion, draw_sweep
from inception_scores import InceptionUnavailable, inception_scores
from run_directory import RunInUse, acquire_lock, append_record
from training_monitor import labelled_grid, progress, save_image, say

USER_ERRORS = (ConfigError, CheckpointError, DataError, OutOfMemory, RunInUse)
PER_CLASS = {"cuda": 1000, "cpu": 50}  # pictures drawn unless --samples says otherwise
INCEPTION_TITLES = {"fid": "FID", "kid_mean": "KID", "precision": "precision",
                    "recall": "recall", "inception_score_mean": "Inception Score"}
REFERENCE_SETTINGS = ("data.data_dir", "data.dataset", "data.skip_unreadable")
INCEPTION_CACHE = Path("data/inception")
GRID_ROWS = 4  # of the samples shown; they are the first ones, not chosen


def parse_arguments():
    parser = cli.Parser(description=__doc__.split("\n\n")[0] + " Sampler and steps are those of "
                        "the grids drawn during training unless others are given.")
    parser.add_argument("--pictures", metavar="DIR",
                        help="score these pictures, named CLASS_*.png or in folders by class")
    parser.add_argument("--samples", metavar="N", help="pictures per class "
                        f"(on a GPU {PER_CLASS['cuda']}, on a CPU {PER_CLASS['cpu']})")
    parser.add_argument("--sweep", metavar="S,S,...", help="score these guidance scales in turn")
    parser.add_argument("--inception-weights", metavar="FILE",
                        help="Inception weights for FID, KID, ... (torch-fidelity's own otherwise)")
    parser.add_argument("--no-inception", action="store_true", help="leave FID, KID, ... out")
    parser.add_argument("--output", metavar="DIR",
                        help="where scores and drawings go (evaluation/ beside what is scored)")
    cli.add_config_flags(parser, REFERENCE_SETTINGS,
                         defaults="the checkpoint's; with --pictures the full run's")
    cli.add_drawing_flags(parser)
    return parser.parse_args()


def read_folder(folder: Path) -> Pictures:
    """The pictures in a folder and its class folders, squares of one size.

    Classes come from file or folder names. Where some have a class, those without, such as a grid,
    are left out.
    """
    if not folder.is_dir():
        raise DataError(f"--pictures {folder} is no folder; name one that holds pictures")
    found = [(path, class_of(path.relative_to(folder))) for path in sorted(files_below(folder))
             if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
             and (path.parent == folder or locate(path.relative_to(folder)))]
    labelled = [(path, label) for path, label in found if label is not None]
    found = labelled or found
    if not found:
        raise DataError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    images: list[torch.Tensor] = []
    for path, _ in found:
        try:
            with Image.open(path) as picture:
                pixels = np.array(to_rgb(turned(picture)))  # (H, W, 3)
        except UNREADABLE as error:
            raise DataError(f"{path} cannot be read ({error}); remove or replace it") from error
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        side = images[0].shape[-1]
        if images[-1].shape != (3, side, side):
            raise DataError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, not {side}x{side}; "
                            "pictures must be squares of one size")
    labels = torch.tensor([label for _, label in labelled]) if labelled else None
    return Pictures(torch.stack(images), labels)


def class_of(path: Path) -> int | None:
    """The class in a picture's name, cat_0000.png, or else in that of a folder above it."""
    name = folded(path.name)
    own = [label for label, known in enumerate(CLASS_NAMES)
           if name.startswith(f"{folded(known)}_")]
    if own:  # the longest, as a name may begin with another one
        return max(own, key=lambda label: len(CLASS_NAMES[label]))
    place = locate(path)
    return None if place is None else place[1]


def parse_scales(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--sweep must be numbers separated by commas, not {text!r}") from None


def draw(drawing: Drawing, per_class: int, seed: int, processes: Processes) -> Pictures | None:
    """per_class pictures of every class, each from a seed of its own.

    Several processes draw a share each; the one that leads gets all, the others nothing.
    """
    labels = torch.arange(per_class * len(CLASS_NAMES)) % len(CLASS_NAMES)
    parts, share = [], processes.share(len(labels))
    own = torch.arange(share.start, share.stop)
    quiet = None if processes.leads else True
    with tqdm(total=len(own), unit="picture", disable=quiet, leave=False) as bar:
        for pictures in drawing.draw_parts(labels[own], (own + seed).tolist()):
            parts.append(to_images(pictures).cpu())
            bar.update(len(pictures))
    gathered = [part for process in processes.gather(parts) for part in process]
    return Pictures(torch.cat(gathered), labels) if gathered else None


def report_lines(record: dict) -> list[str]:
    """What a person reads of one record."""
    reference = record["reference"]

    def percent(key: str) -> str:
        return f"{100 * record[key]:.1f} %"

    lines = []
    if "agreement" in record:
        worst = sorted(record["agreement_by_class"].items(), key=lambda item: item[1])[:3]
        lines.append(f"class agreement    {percent('agreement')}, lowest " + ", ".join(
            f"{name} {100 * share:.0f} %" for name, share in worst))
    if "frechet_distance_floor" in record:
        ours, real = record["frechet_distance"], record["frechet_distance_floor"]
        as_many = at_n_floor(record, "frechet_distance")
        lines.append(f"Frechet distance   {ours:.4g} in the classifier's features ({as_many}"
                     f"held-out pictures {real:.4g})")
    lines.append(
        f"near copies        {percent('near_copies_features')} by features "
        f"(held-out {percent('near_copies_features_floor')}), {percent('near_copies_pixels')} by "
        f"pixels (held-out {percent('near_copies_pixels_floor')})"
    )
    for key, name in (("colour", "samples"), ("colour_data", "data")):
        mean, std = ([f"{v:.1f}" for v in record[key][part]] for part in ("mean", "std"))
        lines.append(f"colour, {name:<10} mean {' '.join(mean)}, std {' '.join(std)} (0 to 255)")
    for key, title in INCEPTION_TITLES.items():
        if key in record["inception"]:
            ours, real = record["inception"][key], record["inception"]["floor"][key]
            lines.append(f"{title:<18} {ours:.4g} ({at_n_floor(record['inception'], key)}"
                         f"held-out pictures {real:.4g})")
    if "missing" in record["inception"]:
        lines.append("no FID, KID, precision, recall, Inception Score: "
                     f"{record['inception']['missing']}")
    lines.append(
        f"n {record['n']} (held-out {record['n_floor']}); reference: {reference['train']} pictures "
        f"at {reference['image_size']}x{reference['image_size']}; the classifier is right on "
        f"{100 * reference['classifier_accuracy']:.1f} % of held-out pictures"
    )
    return ["  " + line for line in lines]


def at_n_floor(scores: dict, key: str) -> str:
    """The score of as many pictures as are held out, where they are fewer and it depends on that.
    """
    if scores["n"] == scores["n_floor"] or f"{key}_at_n_floor" not in scores:
        return ""
    return f"of {scores['n_floor']} pictures {scores[f'{key}_at_n_floor']:.4g}, "


class Scorer:
    """Scores sets of pictures against one reference and writes down what it finds."""

    def __init__(self, args, config: Config, device: torch.device, image_size: int, output: Path):
        self.args, self.output, self.device = args, output, device
        every = 0  # all there are; of pictograms as many as the run learned, or the usual number
        if config.data.dataset == "pictograms":
            every = max(config.data.samples_per_class, PICTOGRAMS_PER_CLASS)
        reference = replace(config.data, image_size=image_size, samples_per_class=every, repeats=1)
        self.splits = load_splits(reference, seed=config.train.seed, progress=progress, say=say)
        if not len(self.splits["test"]):
            raise DataError("scores need held-out pictures, of which this data has none; use more "
                            "pictures, or put some below test/")
        self.evaluator = Evaluator(self.splits, image_size, self.device)
        self.records: list[dict] = []
        self.no_inception = "left out by --no-inception" if args.no_inception else ""  # why not

    def inception(self, pictures: Pictures) -> dict:
        """The scores from Inception features, or why there are none."""
        if not self.no_inception:
            try:
                return inception_scores(
                    pictures.images, self.splits["train"], self.splits["test"],
                    cache=INCEPTION_CACHE, weights=self.args.inception_weights, device=self.device,
                )
            except InceptionUnavailable as error:
                self.no_inception = str(error)  # the other pictures of a sweep need not try again
        return {"missing": self.no_inception}

    def add(self, pictures: Pictures, facts: dict, suffix: str = "") -> None:
        """Score pictures; facts say how they came about, suffix tells their drawings apart."""
        scores = self.evaluator.scores(pictures)
        record = {**facts, "reference": self.evaluator.facts, **scores.report}
        record["inception"] = self.inception(pictures)
        self.records.append(record)
        for line in report_lines(record):  # first, for a disk may be full
            say(line)
        append_record(self.output / "scores.jsonl", record)
        if scores.confusion is not None:
            draw_confusion(scores.confusion, self.output / f"confusion{suffix}.png")
        self.evaluator.draw_pairs(pictures, scores, self.output / f"nearest{suffix}.png")


def score_folder(args, overrides: dict) -> Path:
    folder = Path(os.path.expanduser(args.pictures))
    of_drawing = {"CHECKPOINT": args.checkpoint, "--samples": args.samples, "--sweep": args.sweep,
                  "--seed": args.seed, "--raw": args.raw,
                  **{f"--{name}": value for name, value in overrides.items()
                     if name.startswith("sample.")}}
    if given := [name for name, value in of_drawing.items() if value]:
        raise ConfigError(f"{', '.join(given)} would draw pictures, for which there is no need "
                          "with --pictures; leave it out")
    if cli.join_processes().several:
        raise ConfigError("scoring a folder takes one process; leave --gpus (make: GPUS=) out")
    pictures = read_folder(folder)
    output = usable_folder(args.output or folder / "evaluation")
    config = settings.apply_overrides(settings.full(), overrides)
    with acquire_lock(output):
        scorer = Scorer(args, config, choose_device(config), pictures.images.shape[-1], output)
        say(f"scoring {len(pictures.images)} pictures in {folder}")
        scorer.add(pictures, {"pictures": str(folder)})
    return output


def score_checkpoint(args, overrides: dict) -> Path:
    scales = parse_scales(args.sweep) if args.sweep else []
    if scales and "sample.guidance_scale" in overrides:
        raise ConfigError("--sweep and --guidance exclude each other")
    processes = cli.join_processes()
    drawing = Drawing(args.checkpoint, overrides, raw=args.raw, quick=True, processes=processes)
    require_classes(drawing.path, drawing.class_names, CLASS_NAMES)
    config = drawing.config
    if config.data.dataset == "pictograms" and "data.data_dir" in overrides:
        say("the pictures of DATA_DIR are not used: this run learned the built-in pictograms; "
            "--dataset cifar10 scores against them nevertheless")
    per_class = cli.parse_whole("--samples", args.samples or str(PER_CLASS[drawing.device.type]))
    seed = cli.parse_seed(args.seed, per_class * len(CLASS_NAMES))
    configs = [settings.apply_overrides(config, {"sample.guidance_scale": s}) for s in scales]
    output = usable_folder(args.output or drawing.path.parent / "evaluation")
    # Another call would mix its drawings with ours.
    with acquire_lock(output) if processes.leads else nullcontext():
        scorer = None
        if processes.leads:
            scorer = Scorer(args, config, drawing.device, drawing.size, output)
        for config in configs or [config]:
            drawing.configure(config)
            say(f"scoring {per_class} pictures per class from {drawing}")
            pictures = draw(drawing, per_class, seed, processes)
            if scorer is None:
                continue
            suffix = f"_guidance_{config.sample.guidance_scale:g}"
            first = pictures.images[: GRID_ROWS * len(CLASS_NAMES)].permute(0, 2, 3, 1).numpy()
            save_image(labelled_grid(first, CLASS_NAMES), output / f"samples{suffix}.png")
            scorer.add(pictures, {**drawing.facts(), "seed": seed}, suffix)
        if scorer is not None and len(scorer.records) > 1:
            draw_sweep(scorer.records, output / "guidance_sweep.png")
    return output


def main() -> int:
    args = parse_arguments()
    if args.inception_weights and not Path(args.inception_weights).expanduser().is_file():
        raise ConfigError(f"--inception-weights {args.inception_weights} is no file; leave it out "
                          "to use torch-fidelity's own")
    score = score_folder if args.pictures else score_checkpoint
    output = score(args, cli.config_overrides(args))
    say(f"scores, confusion matrix and nearest training images: {output}/")
    return 0


if __name__ == "__main__":
    cli.exit_with(main, USER_ERRORS)
