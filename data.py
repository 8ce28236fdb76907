"""Images and labels for training: CIFAR-10 or pictograms, their subsets and their batches."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10 import SPLITS, DataError, Progress, prepare, refuse_other_classes
from config import DataConfig
from pictograms import pictogram_dataset

PICTOGRAMS_PER_CLASS = 500


@dataclass(frozen=True)
class Split:
    """images uint8 (N, 3, S, S) and labels int64 (N,), in a fixed order."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a hash of the content, wherever it came from."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for array in (self.images, self.labels):
            digest.update(array.contiguous().numpy())
        return digest.hexdigest()[:16]

    def first_per_class(self, count: int) -> "Split":
        """The first `count` images of every class, in the order of the split; 0 means all."""
        if count == 0:
            return self
        chosen = [(self.labels == label).nonzero()[:count, 0] for label in self.labels.unique()]
        index = torch.cat(chosen).sort().values
        return Split(self.images[index], self.labels[index])


def fingerprint(splits: dict[str, Split]) -> str:
    """Changes with any of the pictures and labels, wherever they came from."""
    return " ".join(split.fingerprint for split in splits.values())


def load_splits(
    data: DataConfig, *, seed: int, progress: Progress, say: Callable[[str], None]
) -> dict[str, Split]:
    """The training and held-out images that `data` asks for, {"train": ..., "test": ...}.

    Finds, downloads and prepares what is not prepared yet; `say` gets one line per decision.
    Raises DataError where that is impossible.
    """
    if data.dataset == "pictograms":
        splits = draw_pictograms(data, seed)
        say(f"data: built-in pictograms at {data.image_size}x{data.image_size}, seed {seed}")
    else:
        splits = load_prepared(prepare(data, progress=progress, say=say))
    train = splits["train"].first_per_class(data.samples_per_class)
    return {"train": train, "test": splits["test"]}


def draw_pictograms(data: DataConfig, seed: int) -> dict[str, Split]:
    """The built-in set; the held-out pictures come from another seed."""
    refuse_other_classes("the built-in pictograms show")
    per_class = data.samples_per_class or PICTOGRAMS_PER_CLASS
    splits = {}
    for split, count, offset in (("train", per_class, 0), ("test", max(per_class // 10, 2), 1)):
        images, labels = pictogram_dataset(count, data.image_size, 2 * seed + offset)
        splits[split] = Split(torch.from_numpy(images), torch.from_numpy(labels))
    return splits


def load_prepared(folder: Path) -> dict[str, Split]:
    def load(name: str) -> Tensor:
        try:
            return torch.from_numpy(np.load(folder / f"{name}.npy"))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{folder}/{name}.npy is damaged ({error}); remove {folder}, and the next run "
                "prepares it anew"
            ) from error

    return {split: Split(load(f"{split}_images"), load(f"{split}_labels")) for split in SPLITS}


def spread(count: int, labels: Tensor) -> Tensor:
    """Indices of count pictures, evenly over the classes and, within each, over its pictures."""
    by_class = labels.argsort(stable=True)
    return by_class[torch.arange(count) * len(labels) // max(1, count)]


@lru_cache
def bicubic_matrix(size: int, image_size: int, device: torch.device) -> Tensor:
    """(image_size, size): F.interpolate's bicubic enlargement of a column, as a matrix."""
    columns = torch.eye(size).view(1, 1, size, size)
    enlarged = F.interpolate(columns, size=(image_size, size), mode="bicubic", align_corners=False)
    return enlarged[0, 0].to(device)


def to_x_start(images: Tensor, image_size: int) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 (B, 3, image_size, image_size) in [-1, 1], on its device.

    Enlarged by bicubic interpolation where S differs, as two matrix products, which are many times
    faster than F.interpolate.
    """
    x_start = images.float().mul_(1 / 127.5).sub_(1)  # dividing takes longer
    if images.shape[-1] == image_size:
        return x_start
    enlarging = bicubic_matrix(images.shape[-1], image_size, images.device)
    with torch.autocast(images.device.type, enabled=False):
        x_start = enlarging @ (x_start @ enlarging.T)
    return x_start.clamp_(-1, 1)  # bicubic enlargement overshoots at edges


def to_images(x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> uint8 of the same shape, rounded to the nearest level."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_arrays(x: Tensor) -> np.ndarray:
    """x (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), as pictures are drawn and written."""
    return to_images(x).permute(0, 2, 3, 1).cpu().numpy()


def enlarge(images: Tensor, image_size: int) -> Tensor:
    """uint8 (B, 3, S, S) -> uint8 (B, 3, image_size, image_size), as the model sees them."""
    if images.shape[-1] == image_size:
        return images
    # In parts, because in float32 they take many times the memory.
    return torch.cat([to_images(to_x_start(part, image_size)) for part in images.split(256)])


def sent(index: Tensor, device: torch.device) -> Tensor:
    """A small index there; a plain copy would wait for all that the GPU still has to do."""
    return index.to(device, non_blocking=True)


def live_on(images: Tensor, device: torch.device) -> bool:
    """Whether images are kept on the device: a GPU of whose free memory they take less than half.
    """
    return device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2


class TrainingBatches:
    """Endless (x_start, class_labels) batches, a function of (seed, step) alone.

    Epoch e visits every image `repeats` times, in an order drawn from (seed, e); its last,
    incomplete batch is left out unless it is the only one. The uint8 images may live on the device
    (live_on). Of several processes each gets the images of its share of a batch, but all the
    labels.

    Args:
        share: the part of range(batch size) that this process works on.
    """

    def __init__(self, split: Split, data: DataConfig, batch_size: int, seed: int, device,
                 share: Callable[[int], slice] = slice):
        self.share = share
        self.device, self.seed, self.data = torch.device(device), seed, data
        self.images, self.labels = split.images, split.labels
        if self.device.type == "cuda":
            self.labels = self.labels.to(self.device)
        if live_on(self.images, self.device):
            self.images = self.images.to(self.device)
        images_per_epoch = len(split) * data.repeats
        self.batch_size = min(batch_size, images_per_epoch)
        self.steps_per_epoch = images_per_epoch // self.batch_size

    def epoch_order(self, epoch: int) -> Tensor:
        generator = np.random.default_rng((self.seed, epoch))
        rounds = [generator.permutation(len(self.labels)) for _ in range(self.data.repeats)]
        return torch.from_numpy(np.concatenate(rounds))

    def starting_at(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps step, step + 1, ...: x_start (b, 3, H, W), class_labels (B,)."""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = self.epoch_order(epoch)
            for position in range(first, self.steps_per_epoch):
                index = order[position * self.batch_size : (position + 1) * self.batch_size]
                yield self.batch(index, step)
                step += 1

    def batch(self, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        # Those to be mirrored stand last, as one piece: on a CPU this takes a fraction of the time
        # of images[...] and of torch.where.
        mirrored = self.mirrored(len(index), step)
        order = mirrored.argsort(kind="stable")
        index, share = index[torch.from_numpy(order)], self.share(len(index))
        images = self.images.index_select(0, sent(index[share], self.images.device))
        if images.device.type != self.device.type:  # cuda is cuda:0, but not equal to it
            images = images.pin_memory().to(self.device, non_blocking=True)
        turned = images[len(images) - np.count_nonzero(mirrored[order][share]):]
        turned.copy_(turned.flip(-1))  # before they are enlarged, while small
        x_start = to_x_start(images, self.data.image_size)
        return x_start, self.labels.index_select(0, sent(index, self.labels.device))

    def mirrored(self, batch_size: int, step: int) -> np.ndarray:
        """Which images of a step's batch are mirrored left to right, bool (B,)."""
        # A third seed component keeps flips and epoch orders apart.
        draws = np.random.default_rng((self.seed, step, 1)).random(batch_size)
        return (draws < 0.5) & self.data.horizontal_flip
