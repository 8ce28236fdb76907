"""A compact CIFAR-10 classifier, trained on the run's own data, that judges samples offline.

Its accuracy on held-out pictures is measured and kept with it: a score it gives is worth no more.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_diffusion.checkpoint import DAMAGED
from conditional_diffusion.memory import in_parts
from conditional_diffusion.muon import Muon, matrix_weights
from config import CLASS_NAMES
from data import Split, enlarge
from run_directory import replacing
from training_monitor import progress, say

INPUT_SIZE = 32  # pixels a side of what the classifier sees
CHUNK = 500  # pictures looked at together outside training
LOGIT_SCALE = 1 / 9  # keeps the first steps small, at a learning rate that suits the convolutions
FOLDER = Path("data/classifiers")
VERSION = 3  # of this file's mathematics; a change makes every cached classifier stale


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained; part of the name under which it is cached."""

    widths: tuple[int, ...] = (32, 128, 128)
    epochs: int = 5
    batch_size: int = 500
    learning_rate: float = 1.5  # this and the next two are of SGD, for normalisations and head
    momentum: float = 0.85
    weight_decay: float = 1e-3
    matrix_learning_rate: float = 0.1  # this and the next two are of Muon, for convolutions
    matrix_momentum: float = 0.6
    matrix_weight_decay: float = 0.1
    label_smoothing: float = 0.1
    shift: int = 2  # pixels by which training pictures are moved about
    seed: int = 0


@dataclass(frozen=True)
class Judge:
    """A trained classifier with what it makes of the data that it was trained for.

    The data are looked at as samples are: enlarged as the model sees them, and reduced again.
    accuracy: share of the held-out images it gets right; train, held_out: features float32 (N, D)
    of the two splits.
    """

    model: "Classifier"
    accuracy: float
    train: Tensor
    held_out: Tensor


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions with batch norm, the first one followed by a halving of the map."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
    )


class Classifier(nn.Module):
    """Convolutional network for pictures of 32x32; images (B, 3, 32, 32) in [-1, 1].

    Its first layer is fixed and whitens 2x2 patches, which shortens training by epochs.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int = len(CLASS_NAMES)):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        channels = (24, *widths)
        self.blocks = nn.Sequential(*[block(a, b) for a, b in zip(channels, channels[1:])])
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):  # the first output channels repeat the input
                nn.init.dirac_(module.weight.data[: module.in_channels])

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Set the first layer from images (N, 3, H, W): patches with equal power everywhere."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2).float()
        # Both signs, since what follows is not odd.
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
        self.whiten.bias.zero_()
        self.whiten.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """What the decision is made from, (B, widths[-1])."""
        return self.blocks(F.gelu(self.whiten(images))).amax(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return LOGIT_SCALE * self.head(self.features(images))


def to_input(images: Tensor, device) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 (B, 3, 32, 32) in [-1, 1], on the device.

    Other sizes are resized by antialiased bicubic interpolation.
    """
    images = images.to(device).float() / 127.5 - 1
    if images.shape[-1] == INPUT_SIZE:
        return images
    size = (INPUT_SIZE, INPUT_SIZE)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def augmented(images: Tensor, shift: int) -> Tensor:
    """Each of images (B, 3, S, S) mirrored with probability 1/2 and moved by up to shift pixels."""
    B, _, S, _ = images.shape
    mirrored = torch.rand(B, 1, 1, 1, device=images.device) < 0.5
    padded = F.pad(torch.where(mirrored, images.flip(-1), images), [shift] * 4, mode="reflect")
    offsets = torch.randint(2 * shift + 1, (2, B, 1), device=images.device)
    rows, columns = offsets + torch.arange(S, device=images.device)  # (B, S) each
    index = torch.arange(B, device=images.device)[:, None, None]
    # The indexed dimensions come first: (B, S, S, 3).
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_classifier(train: Split, recipe: Recipe, device) -> Classifier:
    """A classifier trained on all images of a split, on the device, in eval mode."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        model = Classifier(recipe.widths)
        images = torch.cat([to_input(chunk, "cpu") for chunk in train.images.split(CHUNK)])
        model.fit_whitening(images[:: max(1, len(images) // 5000)])
        # Measured on a CPU too: in this layout a step takes half the time.
        model.to(device, memory_format=torch.channels_last)
        images, labels = images.to(device), train.labels.to(device)
        batch_size = min(recipe.batch_size, len(images))
        steps = recipe.epochs * (len(images) // batch_size)
        convolutions = matrix_weights(model.blocks)
        rest = [p for p in model.parameters() if p.ndim <= 2 and p.requires_grad]
        # With SGD for the convolutions too it would take twice the epochs.
        optimizers = [
            torch.optim.SGD(rest, recipe.learning_rate, recipe.momentum, nesterov=True,
                            weight_decay=recipe.weight_decay),
            Muon(convolutions, recipe.matrix_learning_rate, recipe.matrix_weight_decay,
                 recipe.matrix_momentum),
        ]
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, optimizer.defaults["lr"], total_steps=max(10, steps), pct_start=0.2,
                anneal_strategy="linear", cycle_momentum=False, div_factor=5, final_div_factor=20,
            ) for optimizer in optimizers
        ]
        order = torch.cat([torch.randperm(len(images))[: len(images) // batch_size * batch_size]
                           for _ in range(recipe.epochs)])
        for index in progress(order.to(device).split(batch_size), steps, "training classifier"):
            logits = model(augmented(images[index], recipe.shift))
            loss = F.cross_entropy(
                logits, labels[index], label_smoothing=recipe.label_smoothing
            )
            model.zero_grad()
            loss.backward()
            for stepper in (*optimizers, *schedules):
                stepper.step()
    return model.eval()


@torch.no_grad()
def look_at(
    model: Classifier, images: Tensor, image_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(features (N, D), classes int64 (N,)) of images uint8 (N, 3, S, S), on the CPU.

    Features and logits are those of a picture and its mirror image, averaged. With an image_size
    the pictures are first enlarged to it.
    """
    device = model.head.weight.device

    def look(part: slice) -> tuple[Tensor, Tensor]:
        seen = images[part].to(device)
        if image_size is not None:
            seen = enlarge(seen, image_size)
        batch = to_input(seen, device).contiguous(memory_format=torch.channels_last)
        both = (model.features(batch) + model.features(batch.flip(-1))) / 2
        return both.cpu(), model.head(both).argmax(1).cpu()

    features, classes = zip(*in_parts(look, len(images), CHUNK, "pictures to classify"))
    return torch.cat(features), torch.cat(classes)


def digest(*parts) -> str:
    """16 hexadecimal digits that change with any of the parts, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(path: Path, make: Callable[[], dict]) -> dict:
    """What make returns, of tensors and numbers: from the file at path, written where it is not.

    A file that cannot be written, as on a full disk, is made again by the next call.
    """
    if path.exists():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except DAMAGED as error:  # making it anew mends it
            say(f"{path} cannot be read ({type(error).__name__}); making it again")
    content = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            torch.save(content, unfinished)
    except (OSError, RuntimeError) as error:  # the second is torch's for a full disk
        reason = getattr(error, "strerror", None) or "is the disk full?"
        say(f"{path} cannot be written ({reason}); the next call makes it again")
    return content


def cached_classifier(
    splits: dict[str, Split], image_size: int, device, *, recipe: Recipe = Recipe(),
    folder: Path = FOLDER,
) -> Judge:
    """The classifier for this data, trained unless it is in the folder already.

    Its file's name depends on the data's content and on the recipe. What it makes of the data at
    this image_size lies beside it.
    """
    train, test = splits["train"], splits["test"]
    name = digest(VERSION, asdict(recipe), train.fingerprint, test.fingerprint)

    def trained() -> dict:
        for features in folder.glob(f"{name}_*.pt"):  # of other weights
            features.unlink()
        say(f"classifier: training on {len(train)} pictures, once, into {folder}")
        weights = train_classifier(train, recipe, device).state_dict()
        return {key: value.cpu().contiguous() for key, value in weights.items()}

    def looked_at() -> dict:
        say(f"classifier: looking at the data at {image_size}x{image_size}, once")
        held_out, found = look_at(model, test.images, image_size)
        return {"accuracy": (found == test.labels).float().mean().item(), "held_out": held_out,
                "train": look_at(model, train.images, image_size)[0]}

    weights = cached(folder / f"{name}.pt", trained)
    with torch.device("meta"):  # its weights come from the file
        model = Classifier(recipe.widths)
    model.load_state_dict(weights, assign=True)
    model.to(device, memory_format=torch.channels_last).eval()
    return Judge(model, **cached(folder / f"{name}_{image_size}.pt", looked_at))
