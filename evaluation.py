"""Scores of pictures against a data set, and the drawings that go with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from classifier import INPUT_SIZE, cached_classifier, look_at, to_input
from config import CLASS_NAMES
from data import Split, enlarge, spread
from run_directory import replacing
from scores import (
    NEIGHBOURS,
    Neighbours,
    colour_statistics,
    confusion_matrix,
    frechet_distance,
    near_copies,
    nearest,
)
from training_monitor import labelled_grid, save_image

COLOUR_IMAGES = 5000  # of the training set, for its colours
PAIRS = 10  # closest pairs drawn


@dataclass(frozen=True)
class Pictures:
    """images uint8 (N, 3, S, S); labels int64 (N,) of the class wanted, or None if unknown."""

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Scores:
    """What Evaluator finds: `report` as plain numbers, the rest for drawing."""

    report: dict
    confusion: Tensor | None
    by_features: Neighbours
    by_pixels: Neighbours


def pixel_neighbours(images: Tensor, references: Tensor, device) -> Neighbours:
    """The nearest references, uint8 (M, 3, S, S), of each image and of its mirror image at 32x32.

    Both by root mean square distance of pixel values in [-1, 1].
    """
    rows, references = (
        torch.cat([to_input(chunk, device) for chunk in part.split(500)])
        for part in (images, references)
    )
    both = [nearest(side.flatten(1), references.flatten(1), NEIGHBOURS)
            for side in (rows, rows.flip(-1))]
    distances = torch.cat([side.distances for side in both], dim=1)
    best = distances.topk(both[0].distances.shape[1], largest=False)
    index = torch.cat([side.index for side in both], dim=1).gather(1, best.indices)
    return Neighbours(index, best.values / (3 * INPUT_SIZE**2) ** 0.5)


class Evaluator:
    """The reference of all scores: a data set and the classifier trained on it.

    Args:
        splits: {"train": ..., "test": ...}; the held-out part gives the floors, which are what real
            pictures score.
        image_size: pixels a side at which the model sees them.
    """

    def __init__(self, splits: dict[str, Split], image_size: int, device):
        self.train, self.held_out = splits["train"], splits["test"]
        self.image_size, self.device = image_size, device
        self.judge = cached_classifier(splits, image_size, device)
        self.facts = {
            "data": self.train.fingerprint, "train": len(self.train),
            "held_out": len(self.held_out), "image_size": image_size,
            "classifier_accuracy": self.judge.accuracy,
            "classifier_input": f"{INPUT_SIZE}x{INPUT_SIZE}, bicubic, antialiased, from "
            f"{image_size}x{image_size}",
        }
        self._floors: dict[int, dict] = {}  # by the number of pictures
        some = spread(min(COLOUR_IMAGES, len(self.train)), self.train.labels)
        self._colour_data = colour_statistics(enlarge(self.train.images[some], image_size))

    def _against_training(
        self, images: Tensor, features: Tensor
    ) -> tuple[dict, Neighbours, Neighbours]:
        """Distance and near copies of N pictures, with their neighbours by features and pixels."""
        by_features = nearest(features.to(self.device), self.judge.train, NEIGHBOURS)
        by_pixels = pixel_neighbours(images, self.train.images, self.device)
        report = {"near_copies_features": near_copies(by_features).float().mean().item(),
                  "near_copies_pixels": near_copies(by_pixels).float().mean().item()}
        if len(images) > 1:
            report["frechet_distance"] = frechet_distance(features, self.judge.train)
        return report, by_features, by_pixels

    def floor(self, n: int) -> dict:
        """What n held-out pictures score; kept for the other pictures of a sweep."""
        if n not in self._floors:
            index = spread(n, self.held_out.labels)
            images = enlarge(self.held_out.images[index], self.image_size)
            self._floors[n], *_ = self._against_training(images, self.judge.held_out[index])
        return self._floors[n]

    def scores(self, pictures: Pictures) -> Scores:
        """Class agreement, Frechet distance, near copies and colours of N pictures."""
        images, labels = pictures.images, pictures.labels
        n = min(len(images), len(self.held_out))
        features, found = look_at(self.judge.model, images)
        report: dict = {"n": len(images), "n_floor": n}
        confusion = None
        if labels is not None:
            confusion = confusion_matrix(labels, found, len(CLASS_NAMES))
            share = confusion.diag() / confusion.sum(1).clamp(min=1)
            drawn = confusion.sum(1) > 0
            report["agreement"] = (found == labels).float().mean().item()
            report["agreement_by_class"] = {
                name: share[i].item() for i, name in enumerate(CLASS_NAMES) if drawn[i]
            }
        ours, by_features, by_pixels = self._against_training(images, features)
        report |= ours | {f"{name}_floor": value for name, value in self.floor(n).items()}
        if n > 1:
            # Distances fall with the number of pictures.
            as_many = features[spread(n, torch.zeros(len(images)) if labels is None else labels)]
            report["frechet_distance_at_n_floor"] = frechet_distance(as_many, self.judge.train)
        report |= {"colour": colour_statistics(images), "colour_data": self._colour_data}
        return Scores(report, confusion, by_features, by_pixels)

    def draw_pairs(self, pictures: Pictures, scores: Scores, path: Path) -> None:
        """The samples nearest to a training image above it: first by features, then by pixels."""
        images, size = [], pictures.images.shape[-1]
        for neighbours in (scores.by_features, scores.by_pixels):
            order = neighbours.distances[:, 0].argsort()[:PAIRS]
            originals = self.train.images[neighbours.index[order, 0]]
            images += [pictures.images[order], enlarge(originals, size)]
        names = [f"pair {i + 1}" for i in range(len(order))]
        title = "sample above nearest training image: by features, then by pixels"
        pairs = torch.cat(images).permute(0, 2, 3, 1).numpy()
        save_image(labelled_grid(pairs, names, title), path)


def draw_confusion(confusion: Tensor, path: Path) -> None:
    """The confusion matrix (classes, classes) in per cent of the row."""
    from matplotlib.figure import Figure

    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    ticks = range(len(CLASS_NAMES))
    axes.set_xticks(ticks, CLASS_NAMES, rotation=45, ha="right")
    axes.set_yticks(ticks, CLASS_NAMES)
    axes.set(xlabel="what the classifier sees", ylabel="class wanted", title="samples, per cent")
    for row in ticks:
        for column in ticks:
            value = share[row, column].item()
            if value >= 0.5:
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90)


def draw_sweep(records: Sequence[dict], path: Path) -> None:
    """Agreement and distances against the guidance scale, with what real pictures score.

    Distances are those of as many samples as there are held-out pictures.
    """
    from matplotlib.figure import Figure

    scores, first = [{**record["inception"], **record} for record in records], records[0]
    panels = {  # title and floor
        "agreement": ("class agreement", first["reference"]["classifier_accuracy"]),
        "frechet_distance": ("Frechet distance", first.get("frechet_distance_floor")),
        "fid": ("FID", first["inception"].get("floor", {}).get("fid")),
    }
    panels = {key: (title, floor) for key, (title, floor) in panels.items()
              if floor is not None and all(key in score for score in scores)}
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    scales = [record["guidance_scale"] for record in records]
    for axes, (key, (title, floor)) in zip(all_axes, panels.items()):
        values = [score.get(f"{key}_at_n_floor", score[key]) for score in scores]
        axes.plot(scales, values, marker=".", label="samples")
        axes.axhline(floor, color="gray", linestyle="--", label="held-out pictures")
        axes.set(title=title, xlabel="guidance scale")
        if key != "agreement":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90)
